"""From the feature maps of a backbone to tokens on one grid, and from reconstructed tokens to an error map."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdiff.backbones import Backbone


class Tokenizer(nn.Module):
    """Averages neighbourhoods, standardises every layer, brings all to one grid and concatenates: tokens (B, N, D).

    Each feature vector is first averaged with its neighbours in a window of `neighbourhood` x `neighbourhood`, as in
    PatchCore (Roth et al., "Towards total recall in industrial anomaly detection", 2022), which makes it a description
    of its surroundings that tolerates small shifts.

    The grid is that of the layer whose stride is `stride`. A finer layer is folded into it (each token takes the r x r
    feature vectors it covers, so that nothing is lost), a coarser one is interpolated. Plain transformers, whose
    layers share one grid, have theirs averaged in two groups, the early and the late ones, as Dinomaly does
    (Guo et al., CVPR 2025). A layer of more than `max_channels` channels is projected on its principal components.

    `fit` sets the statistics; they are buffers, saved with the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: int,
        stride: int | None = None,
        max_channels: int = 128,
        neighbourhood: int = 3,
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
        target = stride if stride is not None else _default_stride(strides)
        if target not in strides:
            raise ValueError(f"stride is {stride}: expected one of the layers' strides {sorted(set(strides))}")
        self.grid = sizes[self.fused[strides.index(target)][0]]
        self.folds = [_fold(sizes[group[0]], self.grid) for group in self.fused]
        channels = [backbone.channels[group[0]] for group in self.fused]
        self.widths = [min(c, max_channels) for c in channels]
        for i, (c, width) in enumerate(zip(channels, self.widths)):
            self.register_buffer(f"mean_{i}", torch.zeros(c))
            self.register_buffer(f"basis_{i}", torch.eye(c, width))

    @property
    def dim(self) -> int:
        """Channels D of a token."""
        return sum(width * fold**2 for width, fold in zip(self.widths, self.folds))

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
        layers = []
        for i, (features, fold) in enumerate(zip(self._fuse(maps), self.folds)):
            features = features.movedim(1, -1) - getattr(self, f"mean_{i}")
            features = (features @ getattr(self, f"basis_{i}")).movedim(-1, 1)
            if fold > 1:
                features = F.pixel_unshuffle(features, fold)
            elif features.shape[-2:] != self.grid:
                features = F.interpolate(features, size=self.grid, mode="bilinear", align_corners=False)
            layers.append(features)
        return torch.cat(layers, 1).flatten(2).mT.contiguous()

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, N, D) -> one map per layer (B, width, height, width), unfolded to the layer's own grid."""
        maps = tokens.mT.unflatten(-1, self.grid)
        layers = maps.split([width * fold**2 for width, fold in zip(self.widths, self.folds)], 1)
        return [F.pixel_shuffle(layer, fold) if fold > 1 else layer for layer, fold in zip(layers, self.folds)]

    def cosine_distances(self, tokens: Tensor, reconstruction: Tensor) -> list[Tensor]:
        """1 - cosine similarity of each layer's feature vectors: maps (B, height, width) on the layers' own grids."""
        pairs = zip(self.split(tokens), self.split(reconstruction))
        return [1 - F.cosine_similarity(x, y, dim=1) for x, y in pairs]

    def _fuse(self, maps: Sequence[Tensor]) -> list[Tensor]:
        fused = [maps[g[0]] if len(g) == 1 else torch.stack([maps[i] for i in g]).mean(0) for g in self.fused]
        size = self.neighbourhood
        return [F.avg_pool2d(m, size, stride=1, padding=size // 2, count_include_pad=False) for m in fused]


def _halves(n: int) -> list[list[int]]:
    return [list(range(n // 2)), list(range(n // 2, n))]


def _default_stride(strides: Sequence[int]) -> int:
    return min(strides, key=lambda s: abs(math.log2(s / 16)))


def _fold(size: tuple[int, int], grid: tuple[int, int]) -> int:
    """How many feature vectors of a finer layer, along each side, make one token; 1 where it isn't a multiple."""
    fold = size[0] // grid[0]
    return fold if fold > 1 and size == (grid[0] * fold, grid[1] * fold) else 1
