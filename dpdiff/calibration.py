"""Which errors are normal, for each kind of structure."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PRIOR = 16.0  # tokens of the average kind that count for every prototype beside its own


class NormalErrors(nn.Module):
    """What is normal for each of several error maps: the mean over the tokens of normal images nearest to each
    prototype, and the deviation of all tokens from these means.

    Grain is never reconstructed well and a smooth face always is: the same error is normal on one and a defect on the
    other. What exceeds the mean means the same everywhere, however, and is counted in one unit per map: held to its own
    deviation, structure that few tokens show, or that hardly varies in training, would stand out in normal images.
    """

    def __init__(self, n_maps: int, n_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_maps, n_prototypes))
        self.register_buffer("deviation", torch.ones(n_maps, 1))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """From batches of errors (M, B, N) of normal images and the nearest prototypes (B, N) of their tokens."""
        # Of each prototype, and for each map: how many tokens, the sums of their errors and of the squares.
        sums = torch.zeros(3, *self.mean.shape, dtype=torch.float64, device=self.mean.device)
        for errors, nearest in batches:
            errors, nearest = errors.double().flatten(1), nearest.flatten()
            sums.index_add_(2, nearest, torch.stack([torch.ones_like(errors), errors, errors.square()]))
        n, total, squares = sums
        average = total.sum(-1, keepdim=True) / n.sum(-1, keepdim=True)
        mean = (total + _PRIOR * average) / (n + _PRIOR)
        variance = (squares - 2 * mean * total + n * mean.square()).sum(-1, keepdim=True) / n.sum(-1, keepdim=True)
        self.mean.copy_(mean)
        self.deviation.copy_(variance.clamp_min(0).sqrt().clamp_min(1e-6))

    def forward(self, errors: Tensor, nearest: Tensor) -> Tensor:
        """errors (M, B, N), nearest (B, N) -> how many deviations the errors lie above the mean (M, B, N)."""
        return (errors - self.mean[:, nearest]) / self.deviation[:, :, None]
