"""A step of training on features that are known already, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dpdiff.detector import Detector  # of a package that may lack what it needs


def training_step(model: Detector, features: Tensor, bfloat16: bool) -> Callable[[], None]:
    """Losses of the features, gradients and AdamW, whose rate is zero: all its work is done and the weights stay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bfloat16):
            loss = model.losses(features)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
