"""Detectors as `torch.export` programs (.pt2), which run without the model's Python code."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import dpdiff_kernels as dk
from dpdiff._files import atomic_write

_TOLERANCE = 1e-3  # of the largest score or map value, between program and model


class _Outputs(nn.Module):
    """`predict` with a dictionary of tensors as its result, which a program keeps without the model's classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: x for name, x in self.model.predict(images)._asdict().items() if x is not None}


def export(model: nn.Module, path: str | os.PathLike, *, portable: bool = True) -> torch.export.ExportedProgram:
    """Writes a detector's `predict` as a program, and compares what the written file computes with the model.

    The program takes images (B, 3, S, S) float32 in [0, 1] for any B and the model's own S, on the model's device, and
    returns {"scores": (B,), "maps": (B, S, S)}, without maps where the model has none:

        program = torch.export.load(path).module()
        scores = program(images)["scores"]

    Args:
        model: a detector, put into evaluation mode.
        path: the file, .pt2 by custom; written whole or not at all.
        portable: PyTorch's own operators only, which every torch loads, C++ too. Else the fused operators, which are
            faster: `import dpdiff_kernels` before the program is loaded.

    Raises:
        RuntimeError: the program differs from the model by more than rounding; nothing is written then.
    """
    model.eval()
    size, device = model.image_size, next(model.parameters()).device
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    # Traced outside inference mode, whose tensors can't be saved; the batch is traced at 2, since 0 and 1 are special.
    with torch.inference_mode(False), torch.no_grad(), dk.use_backend("reference") if portable else nullcontext():
        batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(_Outputs(model), (images,), dynamic_shapes=batch)
    with atomic_write(path) as tmp:
        with warnings.catch_warnings(action="ignore"):  # of weights that share memory; they are saved
            torch.export.save(program, tmp)
        _check(torch.export.load(tmp).module(), model, torch.cat([images, images.flip(-1)])[:3])
    return program


@torch.no_grad()
def _check(program: nn.Module, model: nn.Module, images: Tensor) -> None:
    for batch in (images, images[:1]):
        expected = _Outputs(model)(batch)
        for name, out in program(batch).items():
            difference = (out - expected[name]).abs().max() / expected[name].abs().max()
            if not difference <= _TOLERANCE:
                raise RuntimeError(f"the program's {name} are off by {difference.item():.1e} of their largest value")
