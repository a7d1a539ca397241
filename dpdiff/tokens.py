"""From the feature maps of a backbone to tokens on one grid, and from reconstructed tokens to an error map."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdiff.backbones import Backbone


class Tokenizer(nn.Module):
    """Standardises every layer, brings all to one grid, scales their vectors to one length: tokens (B, N, D).

    The grid is that of the finest layer, or of the one whose stride is `stride`; the others are interpolated. Plain
    transformers, whose layers share one grid, have theirs averaged in two groups, the early and the late ones, as
    Dinomaly does (Guo et al., CVPR 2025). A layer of more than `max_channels` channels is projected on its principal
    components.

    All the vectors of all layers have the same length, such that a token's mean square is one. So half the mean squared
    difference of two tokens is the mean of 1 - cosine over the layers: Euclidean operators compare directions, in which
    defects show, and not lengths, which vary with contrast.

    With `neighbourhood` > 1 each feature vector is first averaged with its neighbours in a window of that side, as in
    PatchCore (Roth et al., "Towards total recall in industrial anomaly detection", 2022).

    `fit` sets the statistics; they are buffers, saved with the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: int,
        stride: int | None = None,
        max_channels: int = 128,
        neighbourhood: int = 1,
    ) -> None:
        super().__init__()
        if neighbourhood < 1 or neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {neighbourhood}: expected a positive odd number")
        self.neighbourhood = neighbourhood
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, image_size, image_size, device=next(backbone.parameters()).device))
        sizes = [tuple(m.shape[-2:]) for m in maps]
        # Layers whose average is one group of features. A CNN's layers stay apart.
        self.fused = _halves(len(maps)) if len(set(sizes)) == 1 and len(maps) > 2 else [[i] for i in range(len(maps))]
        strides = [backbone.strides[group[0]] for group in self.fused]
        self.stride = stride if stride is not None else min(strides)
        if self.stride not in strides:
            raise ValueError(f"stride is {stride}: expected one of the layers' strides {sorted(set(strides))}")
        self.grid = sizes[self.fused[strides.index(self.stride)][0]]
        channels = [backbone.channels[group[0]] for group in self.fused]
        self.widths = [min(c, max_channels) for c in channels]
        for i, (c, width) in enumerate(zip(channels, self.widths)):
            self.register_buffer(f"mean_{i}", torch.zeros(c))
            self.register_buffer(f"basis_{i}", torch.eye(c, width))

    @property
    def dim(self) -> int:
        """Channels D of a token."""
        return sum(self.widths)

    @property
    def n_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Sets mean and basis of every layer from the feature maps of (some) training images, one pass, in float64."""
        sums = [0.0] * len(self.fused)
        products = [0.0] * len(self.fused)
        count = [0] * len(self.fused)
        for maps in batches:
            for i, features in enumerate(self._fuse(maps)):
                x = features.double().movedim(1, -1).flatten(0, -2)
                sums[i] = sums[i] + x.sum(0)
                products[i] = products[i] + x.T @ x
                count[i] += len(x)
        if not all(count):
            raise ValueError("batches is empty: expected the feature maps of at least one image")
        for i, width in enumerate(self.widths):
            mean = sums[i] / count[i]
            covariance = products[i] / count[i] - mean.outer(mean)
            deviation = covariance.diagonal().clamp_min(0).sqrt()
            scale = 1 / deviation.clamp_min(1e-3 * deviation.max().clamp_min(1e-12))  # a dead channel stays small
            basis = scale.diag()
            if width < len(mean):
                correlation = covariance * scale.outer(scale)
                components = torch.linalg.eigh(correlation).eigenvectors[:, -width:].flip(1)
                basis = basis @ components
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"basis_{i}").copy_(basis)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Feature maps (B, C_l, H_l, W_l) of the backbone's layers -> tokens (B, N, D)."""
        length = (self.dim / len(self.fused)) ** 0.5
        layers = []
        for i, features in enumerate(self._fuse(maps)):
            features = features.movedim(1, -1) - getattr(self, f"mean_{i}")
            features = (features @ getattr(self, f"basis_{i}")).movedim(-1, 1)
            if features.shape[-2:] != self.grid:
                features = F.interpolate(features, size=self.grid, mode="bilinear", align_corners=False)
            layers.append(length * F.normalize(features, dim=1))
        return torch.cat(layers, 1).flatten(2).mT.contiguous()

    def cosine_distances(self, tokens: Tensor, reconstruction: Tensor) -> Tensor:
        """The mean of 1 - cosine similarity over the layers' parts of each token: (B, N)."""
        pairs = zip(tokens.split(self.widths, -1), reconstruction.split(self.widths, -1))
        return torch.stack([1 - F.cosine_similarity(x, y, dim=-1) for x, y in pairs]).mean(0)

    def _fuse(self, maps: Sequence[Tensor]) -> list[Tensor]:
        fused = [maps[g[0]] if len(g) == 1 else torch.stack([maps[i] for i in g]).mean(0) for g in self.fused]
        size = self.neighbourhood
        if size == 1:
            return fused
        return [F.avg_pool2d(m, size, stride=1, padding=size // 2, count_include_pad=False) for m in fused]


def places(grid: tuple[int, int], n: int = 4) -> Tensor:
    """Where each cell of a grid, row by row, lies: products (N, n^2) of the n lowest cosines along both sides.

    Their means over some tokens tell smoothly how often these lie where.
    """
    along = [((torch.arange(side) + 0.5) * math.pi / side).outer(torch.arange(n)).cos() for side in grid]
    return torch.einsum("hi,wj->hwij", *along).flatten(2).flatten(0, 1)


def _halves(n: int) -> list[list[int]]:
    return [list(range(n // 2)), list(range(n // 2, n))]
