"""`dpdiff export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpdiff.cli.inputs import Device, Weights, check_different, check_writable, find_device


def export(
    weights: Weights,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The program, .pt2 by custom.")],
    portable: Annotated[
        bool,
        typer.Option(
            "--portable/--fused",
            help="PyTorch's operators, which load anywhere; or the fused ones, faster, after import dpdiff_kernels.",
        ),
    ] = True,
    device: Device = None,
) -> None:
    """Write a trained detector as a torch.export program, which runs without this package.

    It takes images (B, 3, S, S) in [0, 1], any number of the model's own size, and returns a dictionary: scores, and
    maps where the model localises. The file is compared with the model before it takes its name.

    Example: `dpdiff export --weights runs/mvtec/model.safetensors --out detector.pt2`
    """
    check_writable(out, "--out", folder=False)
    check_different(weights=weights, out=out)
    import dpdiff
    from dpdiff.export import export as write_program

    detector = dpdiff.load(weights, find_device(device))
    write_program(detector, out, portable=portable)
    size = detector.image_size
    print(f"{type(detector).__name__} for images (B, 3, {size}, {size}): {out}")
    loading = f'torch.export.load("{out}").module()'
    print(f"Load it: {loading}" if portable else f"Load it: import dpdiff_kernels; {loading}")
