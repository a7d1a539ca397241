"""Which errors are normal, for each kind of structure."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PRIOR = 16.0  # tokens of the average kind that count for every prototype beside its own
_FLOOR = 0.5  # share of the mean deviation that is added to every one, lest rare structure be held to next to none


class NormalErrors(nn.Module):
    """Mean and deviation of each of several error maps over the tokens of normal images nearest to each prototype.

    Grain is never reconstructed well and a smooth face always is: the same error is normal on one and a defect on the
    other. Standardised by these, errors of all kinds of structure, and of all maps, have one unit.
    """

    def __init__(self, n_maps: int, n_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_maps, n_prototypes))
        self.register_buffer("deviation", torch.ones(n_maps, n_prototypes))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """From batches of errors (M, B, N) of normal images and the nearest prototypes (B, N) of their tokens."""
        n_maps, n_prototypes = self.mean.shape
        # Of each map and prototype: how many tokens, the sums of their errors and of the squares.
        sums = torch.zeros(3, n_maps, n_prototypes, dtype=torch.float64, device=self.mean.device)
        for errors, nearest in batches:
            errors, nearest = errors.double().flatten(1), nearest.flatten()
            moments = torch.stack([torch.ones_like(errors), errors, errors.square()])
            sums.index_add_(2, nearest, moments)
        average = sums.sum(-1, keepdim=True)
        sums += _PRIOR * average / average[0]
        mean = sums[1] / sums[0]
        deviation = (sums[2] / sums[0] - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        floor = (_FLOOR * deviation.mean(-1, keepdim=True)).clamp_min(1e-6)
        self.deviation.copy_(deviation + floor)

    def forward(self, errors: Tensor, nearest: Tensor) -> Tensor:
        """errors (M, B, N), nearest (B, N) -> how many deviations the errors lie above the mean (M, B, N)."""
        return (errors - self.mean[:, nearest]) / self.deviation[:, nearest]
