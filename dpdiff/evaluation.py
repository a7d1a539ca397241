"""Runs a detector over a test set and says how well it did, category by category."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dpdiff._files import write_json
from dpdiff._progress import track
from dpdiff.data import AnomalyDataset, Sample
from dpdiff.metrics import IMAGE_FIGURES, PIXEL_FIGURES, image_metrics, pixel_metrics

_EXAMPLE_SIZE = 224  # pixels of an example's side that are kept, at most


@dataclass(frozen=True)
class Example:
    """One image of the test set with what the model made of it.

    image: uint8 (H, W, 3). mask: bool (H, W), None where the defect is not marked. map: float32 (H, W) or None.
    """

    path: str
    kind: str
    label: int
    score: float
    image: np.ndarray
    mask: np.ndarray | None
    map: np.ndarray | None


@dataclass(frozen=True)
class CategoryResult:
    """figures: those that are defined, from 0 to 1. scores, labels (N,): of every test image. examples: a few of them.
    map_range: what a heat map shows as coldest (the usual) and as hottest (the peak of a usual defect)."""

    figures: dict[str, float]
    scores: np.ndarray
    labels: np.ndarray
    examples: list[Example] = field(default_factory=list)
    map_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Results:
    """categories: in the order of their names' numbers. seconds: spent in the model, for all images."""

    categories: dict[str, CategoryResult]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Each figure's mean over the categories that have it."""
        figures = {name: [c.figures[name] for c in self.categories.values() if name in c.figures] for name in _FIGURES}
        return {name: float(np.mean(values)) for name, values in figures.items() if values}

    @property
    def images_per_second(self) -> float:
        return sum(len(c.scores) for c in self.categories.values()) / self.seconds

    def to_dict(self) -> dict[str, dict]:
        """``{"mean": {figure: value}, "categories": {name: {figure: value}}}``, all from 0 to 1.

        The figures are ``image_auroc``, ``image_ap``, ``image_f1max``, ``pixel_auroc``, ``pixel_ap``, ``pixel_f1max``
        and ``aupro``. One that a category doesn't define (no masks; no good, or no defective, images) is absent.
        """
        return {"mean": self.mean, "categories": {name: dict(c.figures) for name, c in self.categories.items()}}

    def save_json(self, path: str | os.PathLike) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def table(self) -> Table:
        """The figures in percent, a row per category (n test images) and their mean as the last."""
        mean = self.mean
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("category", overflow="fold")
        table.add_column("n", justify="right", no_wrap=True)
        for name in mean:
            table.add_column(FIGURE_NAMES[name].replace(" ", "\n"), justify="right", no_wrap=True)

        def percent(figures: dict[str, float]) -> Iterator[str]:
            return (f"{100 * figures[name]:.1f}" if name in figures else "-" for name in mean)

        for name, category in self.categories.items():
            table.add_row(Text(name), str(len(category.scores)), *percent(category.figures))
        table.add_section()
        total = sum(len(c.scores) for c in self.categories.values())
        table.add_row("mean", str(total), *percent(mean), style="bold")
        return table


_FIGURES = (*IMAGE_FIGURES, *PIXEL_FIGURES)
FIGURE_NAMES = dict(
    zip(_FIGURES, ("image AUROC", "image AP", "image F1max", "pixel AUROC", "pixel AP", "pixel F1max", "AUPRO"))
)


def evaluate(
    model: nn.Module,
    dataset: AnomalyDataset,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    n_examples: int = 5,
    progress: bool = True,
) -> Results:
    """Score every image of ``dataset`` and compare with what is known about it.

    model: has ``predict(images)``, images (B, 3, S, S) float32 in [0, 1], which returns ``scores`` (B,) and ``maps``
    (B, S, S) or None; larger is more anomalous. It is put into evaluation mode.
    n_examples: images per category to keep for a report: the good one of highest score, and defective ones spread
    evenly from the lowest score to the highest. progress: show a bar where the output is a terminal.

    Pixel figures are computed at S x S, where a category has masks, over its good images and those with a mask. The
    maps of one category are held at a time, N x S x S float32.

    Raises ValueError for an empty data set and for scores or maps with NaN, naming the category.
    """
    if not len(dataset):
        raise ValueError("dataset holds no test image")
    model.eval()
    number = {name: i for i, name in enumerate(dataset.categories)}
    order = sorted(range(len(dataset)), key=lambda i: number[dataset.samples[i].category])
    loader = DataLoader(Subset(dataset, order), batch_size=batch_size, num_workers=num_workers)
    seconds: list[float] = []
    categories = {}
    with closing(track(predictions(model, loader, seconds), "Evaluating", len(order), progress)) as outputs:
        for name, group in itertools.groupby(zip(order, outputs), key=lambda p: dataset.samples[p[0]].category):
            indices, predicted = zip(*group)
            try:
                categories[name] = _category_result(dataset, indices, predicted, n_examples)
            except ValueError as error:
                raise ValueError(f"category {name!r}: {error}") from error
    return Results(categories, sum(seconds))


def predictions(
    model: nn.Module, loader: DataLoader, seconds: list[float] | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Score, map and mask of one image after the other, the last two None where there is none.

    seconds: gets the time that each batch takes in the model.
    """
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    for batch in loader:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.predict(batch["image"].to(device))
        scores = out.scores.float().cpu()  # waits for the device
        maps = itertools.repeat(None) if out.maps is None else out.maps.float().cpu()
        if seconds is not None:
            seconds.append(time.perf_counter() - start)
        masks = (mask if known else None for mask, known in zip(batch["mask"], batch["has_mask"]))
        yield from zip(scores, maps, masks)


def _category_result(dataset: AnomalyDataset, indices: Sequence[int], predicted: Sequence, n: int) -> CategoryResult:
    samples = [dataset.samples[i] for i in indices]
    scores = torch.stack([score for score, _, _ in predicted]).numpy()
    labels = np.array([sample.label for sample in samples])
    figures = image_metrics(scores, labels)
    map_range = None
    if predicted[0][1] is not None:
        maps = torch.stack([map for _, map, _ in predicted]).numpy()
        map_range = _map_range(maps, labels)
        if any(sample.mask for sample in samples):
            known = [i for i, (_, _, mask) in enumerate(predicted) if mask is not None]
            masks = torch.stack([predicted[i][2] for i in known]).numpy()
            figures |= pixel_metrics(maps if len(known) == len(maps) else maps[known], masks)
    examples = [_example(dataset, indices[i], *predicted[i]) for i in _spread(scores, labels, n)]
    return CategoryResult(figures, scores, labels, examples, map_range)


def _map_range(maps: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    peaks = maps.max(axis=(1, 2))
    if np.isnan(peaks).any():
        raise ValueError(f"maps hold NaN (of {np.isnan(peaks).sum()} images)")
    return float(np.median(maps[:, ::4, ::4])), float(np.median(peaks[labels == 1] if labels.any() else peaks))


def _spread(scores: np.ndarray, labels: np.ndarray, n: int) -> list[int]:
    """Up to n places: defective images from the lowest score to the highest, then the good one of highest score."""
    order = np.argsort(scores, kind="stable")
    good, bad = order[labels[order] == 0], order[labels[order] == 1]
    good = good[-1:] if len(bad) else good[::-1]
    wanted = min(len(bad), n - len(good[:1]))
    chosen = bad[np.linspace(0, len(bad) - 1, wanted).round().astype(int)] if wanted > 0 else bad[:0]
    return [*chosen, *good][:n]


def _example(dataset: AnomalyDataset, index: int, score: Tensor, map: Tensor | None, mask: Tensor | None) -> Example:
    sample: Sample = dataset.samples[index]
    side = min(dataset.image_size, _EXAMPLE_SIZE)
    pixels = dataset[index]["image"].mul(255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
    if mask is not None:
        mask = np.array(Image.fromarray(mask.numpy()).resize((side, side), Image.Resampling.NEAREST))
    if map is not None:
        map = np.array(Image.fromarray(map.numpy()).resize((side, side), Image.Resampling.BOX))
    return Example(str(sample.image), sample.kind, sample.label, float(score), np.array(image), mask, map)
