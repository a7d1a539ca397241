"""`dpdiff evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dpdiff.cli.inputs import (
    BatchSize,
    Corrupt,
    Data,
    Device,
    Weights,
    Workers,
    check_writable,
    find_device,
    read_catalogue,
    usable,
)


def evaluate(
    data: Data,
    weights: Weights,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there, as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report there: one HTML file with heat maps.")
    ] = None,
    device: Device = None,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    on_corrupt: Corrupt = "raise",
) -> None:
    """Measure how well a detector finds the defects of a data set.

    Prints AUROC, average precision and best F1 of images and of pixels, and AUPRO, per category and on average.

    Example: `dpdiff evaluate --data mvtec --weights runs/mvtec/model.safetensors --json out.json --report report.html`
    """
    for path, option in ((json, "--json"), (report, "--report")):
        if path is not None:
            check_writable(path, option, folder=False)
    from rich.console import Console

    import dpdiff
    from dpdiff import evaluation
    from dpdiff.data import AnomalyDataset

    detector = dpdiff.load(weights, find_device(device))
    catalogue = read_catalogue(data, need="test")
    samples = usable(catalogue.test, on_corrupt)
    tested = {sample.category for sample in samples}
    categories = [name for name in catalogue.categories if name in tested]
    untested = [name for name in catalogue.categories if name not in tested]
    if untested:
        print(f"Without test images, left out: {', '.join(untested)}")

    dataset = AnomalyDataset(samples, detector.image_size, categories)
    results = evaluation.evaluate(detector, dataset, batch_size=batch_size, num_workers=workers)
    Console(width=None if sys.stdout.isatty() else 120).print(results.table())  # a file has room for whole names
    if json is not None:
        results.save_json(json)
        print(f"Figures: {json}")
    if report is not None:
        from dpdiff.report import write_report

        details = {"weights": weights, "data": data, **detector.config}
        write_report(results, report, title=f"{type(detector).__name__} on {Path(data).name}", details=details)
        print(f"Report: {report}")
