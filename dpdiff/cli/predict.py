"""`dpdiff predict`."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpdiff._files import atomic_write
from dpdiff.cli.inputs import BatchSize, Corrupt, Device, Weights, Workers, check_writable, find_device, usable

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "scores.csv"
_PICTURE_SIDE = 1024  # pixels of a heat map's longer side, at most
# What a heat map shows as coldest and as hottest, in deviations of normal images. Of these, a pixel in ten is above the
# first and hardly one above the second; of defects half or more.
_MAP_RANGE = (0.5, 2.0)


def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Images, or folders of them, nested or flat.")
    ],
    weights: Weights,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where scores.csv and the heat maps go.")],
    device: Device = None,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    on_corrupt: Corrupt = "raise",
) -> None:
    """Score images: the larger, the more anomalous.

    Writes DIR/scores.csv (columns image, score) and, for a model that localises, a heat map per image, DIR/<name>.png,
    in the folders in which the images lie.

    Example: `dpdiff predict photos part.jpg --weights runs/mvtec/model.safetensors --out scored`
    """
    check_writable(out, "--out", folder=True)
    paths, names = find_images(images, out)

    import torch
    from torch.utils.data import DataLoader

    import dpdiff
    from dpdiff._progress import track
    from dpdiff.data import AnomalyDataset, Sample

    samples = usable([Sample(path, category="") for path in paths], on_corrupt)
    detector = dpdiff.load(weights, find_device(device))
    loader = DataLoader(AnomalyDataset(samples, detector.image_size), batch_size, num_workers=workers)

    rows = []
    with torch.inference_mode():
        for batch in track(loader, "Predicting"):
            scores, maps = detector.predict(batch["image"].to(next(detector.parameters()).device))
            for i, (path, score) in enumerate(zip(batch["path"], scores.tolist())):
                if not math.isfinite(score):
                    raise RuntimeError(f"the model gives image {path} the score {score}")
                rows.append((path, f"{score:.9g}"))  # as many digits as tell two float32 apart
                if maps is not None:
                    _write_heat_map(out / names[Path(path)], path, maps[i])
    with (
        atomic_write(out / SCORES) as tmp,
        open(tmp, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([("image", "score"), *rows])
    print(f"{len(rows):,} {'image' if len(rows) == 1 else 'images'} scored: {out / SCORES}")


def find_images(given: Sequence[Path], out: Path) -> tuple[list[Path], dict[Path, Path]]:
    """Every image once, in the order given, and the name of each one's heat map within `out`.

    Names are the images' own with the suffix .png, in the same folders, counted from the one that holds all that was
    given; where two images differ in nothing but their suffix, all names keep theirs (a.jpg.png).
    """
    from dpdiff.data import walk_images

    paths: dict[str, Path] = {}
    tops = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"image or folder {path} does not exist")
        tops.append(os.path.abspath(path if path.is_dir() else path.parent))
        if _real(Path(tops[-1])) == _real(out):
            raise ValueError(f"--out {out} is the folder of the images: expected another one")
        found = list(walk_images(path)) if path.is_dir() else [path]
        if path.is_dir() and _real(out).is_relative_to(_real(path)):
            found = [image for image in found if not _real(image).is_relative_to(_real(out))]
        if not found:
            raise ValueError(f"folder {path} holds no image")
        for image in found:
            paths.setdefault(os.path.abspath(image), image)

    top = os.path.commonpath(tops)
    names = {path: Path(os.path.relpath(place, top)) for place, path in paths.items()}
    short = {path: name.with_suffix(".png") for path, name in names.items()}
    if len(set(short.values())) < len(short):
        short = {path: name.with_name(f"{name.name}.png") for path, name in names.items()}
    sources = {_real(path): path for path in paths.values()}
    for name in short.values():
        if _real(out / name) in sources:
            raise ValueError(f"--out {out}: a heat map would replace the image {out / name}; expected another folder")
    return list(paths.values()), short


def _real(path: Path) -> Path:
    """`Path.resolve`, but of a link to itself too."""
    return Path(os.path.realpath(path))


def _write_heat_map(file: Path, path: str, map: Tensor) -> None:
    import torch.nn.functional as F

    from dpdiff.data import load_image
    from dpdiff.report import heatmap

    picture = load_image(path)
    scale = _PICTURE_SIDE / max(picture.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[-2:]]
        picture = F.interpolate(picture[None], size=size, mode="area")[0]
    with atomic_write(file) as tmp:
        heatmap(picture, map, *_MAP_RANGE).save(tmp, format="PNG")
