"""`dpdiff evaluate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpdiff.cli.inputs import (
    BatchSize,
    Corrupt,
    Data,
    Device,
    OnCorrupt,
    Weights,
    Workers,
    check_different,
    check_writable,
    data_folder,
    find_device,
    read_catalogue,
    usable,
)

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn


def evaluate(
    data: Data,
    weights: Weights,
    out_data: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Images out of distribution, of which those of --data are in; repeatable."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there, as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report there: one HTML file with heat maps.")
    ] = None,
    device: Device = None,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    on_corrupt: Corrupt = "raise",
) -> None:
    """Measure how well a detector finds the defects of a data set, or tells other images from it.

    Prints AUROC, average precision and best F1 of images and of pixels, and AUPRO, per category and on average.

    With --out-data, prints AUROC, AUPR with the images in and those out of distribution as positives, and the share of
    images out of distribution that pass where 95 % of those in it do (FPR95), per out-set and on average. Of a data set
    with a test split these are its good test images, of any other all images.

    Example: `dpdiff evaluate --data mvtec --weights runs/mvtec/model.safetensors --json out.json --report report.html`

    Example: `dpdiff evaluate --data cifar10:data --out-data svhn:data --out-data LSUN --weights m.safetensors`
    """
    if out_data and report is not None:
        raise ValueError("--report shows defects: it can't be given with --out-data")
    for path, option in ((json, "--json"), (report, "--report")):
        if path is not None:
            check_writable(path, option, folder=False)
    check_different(weights=weights, json=json, report=report)
    import dpdiff
    from dpdiff import evaluation
    from dpdiff.data import AnomalyDataset

    detector = dpdiff.load(weights, find_device(device))
    if out_data:
        _evaluate_ood(detector, data, out_data, json, batch_size, workers, on_corrupt)
        return
    catalogue = read_catalogue(data, need="test")
    samples = usable(catalogue.test, on_corrupt)
    tested = {sample.category for sample in samples}
    categories = [name for name in catalogue.categories if name in tested]
    untested = [name for name in catalogue.categories if name not in tested]
    if untested:
        print(f"Without test images, left out: {', '.join(untested)}")

    dataset = AnomalyDataset(samples, detector.image_size, categories)
    results = evaluation.evaluate(detector, dataset, batch_size=batch_size, num_workers=workers)
    if json is not None:
        results.save_json(json)
    if report is not None:
        from dpdiff.report import write_report

        details = {"weights": weights, "data": data, **detector.config}
        write_report(results, report, title=f"{type(detector).__name__} on {Path(data).name}", details=details)
    _show(results.table(), Figures=json, Report=report)


def _evaluate_ood(
    detector: nn.Module,
    data: str,
    out_data: Sequence[str],
    json: Path | None,
    batch_size: int,
    workers: int,
    on_corrupt: OnCorrupt,
) -> None:
    from dpdiff import ood

    folders = [os.path.realpath(data_folder(name)) for name in (data, *out_data)]  # one set has many spellings
    for i, name in enumerate(out_data, start=1):
        if folders[i] in folders[:i]:
            raise ValueError(f"--out-data {name} is given twice")
    inside, *outside = (usable(ood.normal_images(read_catalogue(d)), on_corrupt) for d in (data, *out_data))
    named = dict(zip(out_data, outside))
    results = ood.evaluate_ood(detector, inside, named, batch_size=batch_size, num_workers=workers)
    if json is not None:
        results.save_json(json)
    print(f"{type(detector).__name__}: {len(results.inside):,} images in distribution, {data}")
    _show(results.table(), Figures=json)


def _show(table: Table, **files: Path | None) -> None:
    """After the files are written: what can't be shown is in them then."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)  # a file has room for whole names
    for what, file in files.items():
        if file is not None:
            print(f"{what}: {file}")
