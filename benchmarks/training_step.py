"""A step of training on features that are known already, to be timed."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpdiff.detector import Detector


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
