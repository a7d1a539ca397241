"""Shows evaluation results: heat maps, and a report that is one HTML file with everything in it."""

from __future__ import annotations

import base64
import datetime
import io
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from scipy import ndimage

from dpdiff._files import atomic_write
from dpdiff._report_page import PAGE, SCRIPT, STYLE
from dpdiff._version import version_of
from dpdiff.evaluation import FIGURE_NAMES, CategoryResult, Example, Results

_COLOURS = colormaps["inferno"]
_MARK = np.array([0, 229, 168], np.float32)  # of the ground truth; in no colour of the heat maps
_PIXELS = 33_000_000  # of all pictures together: about 10 MB of them
_SIDES = (96, 224)  # of a picture, at least and at most
_BINS = 32


def heatmap(
    image: Image.Image | np.ndarray | torch.Tensor,
    map: np.ndarray | torch.Tensor,
    low: float | None = None,
    high: float | None = None,
) -> Image.Image:
    """Lay an anomaly map over its image: what is usual shows as grey, the more anomalous the brighter it glows.

    image: a picture, uint8 (H, W) or (H, W, 3), or a tensor (3, H, W) in [0, 1]. map (h, w): resized to the image.
    low, high: what is shown as coldest and as hottest; the map's least and greatest value when None.

    Returns an RGB picture of the size of the image.
    """
    image = _picture(image)
    values = torch.as_tensor(map).detach().cpu().float().numpy()
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    heat = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR))
    grey = np.asarray(image.convert("L"), np.float32)[..., None] * 0.8
    opacity = 0.85 * np.minimum(1.25 * heat, 1)[..., None]
    glow = 255 * _COLOURS(heat)[..., :3].astype(np.float32)
    return Image.fromarray(((1 - opacity) * grey + opacity * glow).round().astype(np.uint8))


def _picture(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return image.convert("RGB")


def write_report(
    results: Results,
    path: str | os.PathLike,
    title: str = "Anomaly detection",
    details: Mapping[str, object] | None = None,
) -> None:
    """Write ``results`` as one HTML file that shows them without anything else, not even a network.

    It holds the mean figures, a table to sort and filter, and per category the distribution of the scores and the
    examples that the evaluation kept: image, ground truth and heat map. details: what to state about the run, such as
    the model's configuration; command, date and versions are stated anyway. Pictures shrink as categories grow, so that
    160 of them with five examples each stay below 15 MB. The file is written whole or not at all.
    """
    n = len(results.categories)
    n_images = sum(len(c.scores) for c in results.categories.values())
    shown = max(1, int(_PIXELS / (n * 3 * _SIDES[0] ** 2)))  # examples per category that there is room for
    pictures = 3 * sum(min(shown, len(c.examples)) for c in results.categories.values())
    side = int(np.clip(np.sqrt(_PIXELS / max(pictures, 1)), *_SIDES))
    numbered = list(enumerate(results.categories.items()))
    page = PAGE.substitute(
        title=escape(title),
        subtitle=f"{_count(n, 'category', 'categories')} &middot; {_count(n_images, 'test image', 'test images')}"
        f" &middot; {results.images_per_second:.1f} images/s",
        style=STYLE.replace("$width", f"{max(3 * side // 2, 300)}px"),
        cards="".join(_card(name, value, results) for name, value in results.mean.items()),
        table=_table(results),
        legend=_legend(results),
        categories="".join(_category(i, name, c, shown, side) for i, (name, c) in numbered),
        details="".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in _details(details).items()),
        script=SCRIPT,
    )
    with atomic_write(path) as tmp:
        tmp.write_text(page, encoding="utf-8", errors="replace")  # file names may hold what UTF-8 can't


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def _details(given: Mapping[str, object] | None) -> dict[str, object]:
    versions = [f"{package} {version_of(package, '(not installed)')}" for package in ("dpdiff", "torch", "timm")]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **(given or {}),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
        "platform": platform.platform(),
    }


def _card(name: str, mean: float, results: Results) -> str:
    """A mean with the spread of its categories: a dot for each on a line from 0 to 1."""
    values = {c: r.figures[name] for c, r in results.categories.items() if name in r.figures}
    dots = "".join(f'<circle cx="{2 + 196 * v:.1f}" cy="7" r="2.5"/>' for v in values.values())
    least = min(values, key=values.get)
    return (
        f'<div class="card"><div class="name">{FIGURE_NAMES[name]}</div>'
        f'<div class="value">{100 * mean:.1f}<small> %</small></div>'
        '<svg viewBox="0 0 200 14" preserveAspectRatio="none" aria-hidden="true">'
        '<path d="M2 7H198" stroke="var(--line)" stroke-width="2"/>'
        f'<g fill="var(--accent)" fill-opacity=".45">{dots}</g></svg>'
        f'<div class="least" title="{escape(least)}">lowest {100 * values[least]:.1f} &middot; {escape(least)}</div>'
        "</div>"
    )


def _table(results: Results) -> str:
    mean = results.mean

    def cells(figures: Mapping[str, float]) -> Iterable[str]:
        for name in mean:
            if name in figures:
                v = 100 * figures[name]
                yield f'<td data-value="{v:.4f}" style="--v:{v:.1f}%">{v:.1f}</td>'
            else:
                yield "<td>&ndash;</td>"

    heads = "".join(f'<th scope="col"><button>{h}</button></th>' for h in ("images", *(FIGURE_NAMES[m] for m in mean)))
    rows = "".join(
        f'<tr data-place="{i}"><td><a href="#c{i}">{escape(name)}</a></td>'
        f'<td data-value="{len(c.scores)}">{len(c.scores)}</td>{"".join(cells(c.figures))}</tr>'
        for i, (name, c) in enumerate(results.categories.items())
    )
    total = sum(len(c.scores) for c in results.categories.values())
    means = "".join(f"<td>{100 * value:.1f}</td>" for value in mean.values())
    return (
        f'<table><thead><tr><th scope="col" aria-sort="ascending"><button>category</button></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody><tfoot><tr><td>mean</td><td>{total:,}</td>{means}</tr></tfoot></table>"
    )


def _legend(results: Results) -> str:
    parts = [_swatch("var(--good)") + "good", _swatch("var(--bad)") + "defective"]
    if any(c.map_range for c in results.categories.values()):
        stops = ", ".join(to_hex(_COLOURS(v)) for v in np.linspace(0.15, 1, 6))
        parts += [
            _swatch(to_hex(_MARK / 255)) + "marked as defective",
            f'<i class="swatch ramp" style="background:linear-gradient(90deg, {stops})"></i>usual to anomalous',
        ]
    parts.append("Each histogram is scaled to its peak.")
    parts.append("Examples run from the lowest-scoring defect to the highest; the good image shown scores highest.")
    return f'<div class="legend muted">{"".join(f"<span>{part}</span>" for part in parts)}</div>'


def _swatch(colour: str) -> str:
    return f'<i class="swatch" style="background:{colour}"></i>'


def _category(place: int, name: str, category: CategoryResult, shown: int, side: int) -> str:
    facts = [f"{FIGURE_NAMES[f]} <b>{100 * v:.1f}</b>" for f, v in category.figures.items()]
    n_bad = int(category.labels.sum())
    facts.append(f"<b>{len(category.labels) - n_bad}</b> good, <b>{n_bad}</b> defective")
    examples = "".join(_example(example, category, side) for example in category.examples[-shown:])
    return (
        f'<section class="panel category" id="c{place}"><div class="bar"><h2>{escape(name)}</h2>'
        f'<div class="facts muted">{"".join(f"<span>{fact}</span>" for fact in facts)}</div></div>'
        f'<div class="body">{_histogram(category)}{examples}</div></section>\n'
    )


def _histogram(category: CategoryResult) -> str:
    """The distributions of the scores of good and of defective images, each scaled to its own peak."""
    low, high = float(category.scores.min()), float(category.scores.max())
    width, height = 300, 110
    parts = []
    for label, colour in ((0, "var(--good)"), (1, "var(--bad)")):
        counts, _ = np.histogram(category.scores[category.labels == label], _BINS, (low, max(high, low + 1e-12)))
        if counts.any():
            steps = "".join(f"V{height - (height - 8) * c / counts.max():.1f}h{width / _BINS:.3f}" for c in counts)
            parts.append(
                f'<path d="M0 {height}{steps}V{height}Z" fill="{colour}" fill-opacity=".35" stroke="{colour}"/>'
            )
    return (
        f'<figure class="histogram"><svg viewBox="0 -1 {width} {height + 20}" role="img" '
        f'aria-label="Scores of good and defective images"><g stroke-width="1.2">{"".join(parts)}</g>'
        f'<path d="M0 {height}H{width}" stroke="var(--line)"/>'
        f'<g fill="var(--muted)" font-size="11"><text y="{height + 15}">{low:.4g}</text>'
        f'<text x="{width / 2}" y="{height + 15}" text-anchor="middle">image score</text>'
        f'<text x="{width}" y="{height + 15}" text-anchor="end">{high:.4g}</text></g></svg></figure>'
    )


def _example(example: Example, category: CategoryResult, side: int) -> str:
    side = min(side, *example.image.shape[:2])
    image = Image.fromarray(example.image).resize((side, side), Image.Resampling.LANCZOS)
    pictures = [_img(image, "image")]
    if example.map is not None:
        if example.mask is None:
            pictures.append('<div class="none">defect not marked</div>')
        else:
            pictures.append(_img(_marked(image, example.mask), "ground truth"))
        pictures.append(_img(heatmap(image, example.map, *category.map_range), "heat map"))
    return (
        f'<figure><div class="pictures{" one" if len(pictures) == 1 else ""}">{"".join(pictures)}</div>'
        f'<figcaption title="{escape(example.path)}"><span class="tag{"" if example.label else " good"}">'
        f'{escape(example.kind)}</span>score <span class="score">{example.score:.4g}</span> &middot; '
        f"{escape(Path(example.path).name)}</figcaption></figure>"
    )


def _marked(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image with the outline of its defects, and a tint inside."""
    inside = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    edge = inside & ~ndimage.binary_erosion(inside)
    pixels = np.array(image, np.float32)
    pixels[inside] = 0.65 * pixels[inside] + 0.35 * _MARK
    pixels[edge] = _MARK
    return Image.fromarray(pixels.round().astype(np.uint8))


def _img(picture: Image.Image, what: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=78, method=2)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img loading="lazy" decoding="async" alt="{what}" src="data:image/webp;base64,{data}">'
