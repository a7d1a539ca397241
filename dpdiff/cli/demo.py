"""`dpdiff demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpdiff.cli.evaluate import evaluate
from dpdiff.cli.inputs import check_writable, data_folder
from dpdiff.cli.train import train


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model, the figures and the report go.")] = Path(
        "demo"
    ),
    categories: Annotated[int, typer.Option(min=1, help="Product categories to render.")] = 12,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; the model's own by default.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep a model that is there, or go on from its checkpoint.")] = True,
) -> None:
    """Render products, train DPDiff-AD on them with ImageNet features, and show what it finds.

    A few minutes without a network or a GPU. Writes model.safetensors, results.json and report.html.

    Example: `dpdiff demo --categories 40 --steps 2000 --out runs/demo40`
    """
    check_writable(out, "--out", folder=True)
    data = f"products:{categories}"
    print(f"1/3 Rendering {categories} product categories, unless they are there", flush=True)
    print(f"    {data_folder(data)}")
    print("2/3 Training", flush=True)
    train(data, out, steps=steps, resume=resume)
    print("3/3 Evaluating", flush=True)
    evaluate(data, out / "model.safetensors", json=out / "results.json", report=out / "report.html")
