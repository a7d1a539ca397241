"""The two banks of DPDiff-AD: local prototypes of fine structure, global prototypes that shape the feature space."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdiff_kernels as dk


class LocalPrototypes(nn.Module):
    """A bank (K, D) of typical tokens. Initialised by k-means, learnt by gradient, unused prototypes revived."""

    def __init__(self, n_prototypes: int, dim: int, k: int = 1, temperature: float = 0.1) -> None:
        super().__init__()
        self.k = k
        self.temperature = temperature
        self.bank = nn.Parameter(torch.randn(n_prototypes, dim))
        self.register_buffer("counts", torch.zeros(n_prototypes), persistent=False)  # uses since the last revival

    @torch.no_grad()
    def initialise(self, tokens: Tensor, n_iters: int, generator: torch.Generator | None = None) -> None:
        """k-means on training tokens (N, D)."""
        self.bank.copy_(dk.kmeans(tokens, len(self.bank), n_iters=n_iters, generator=generator))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) -> the structural condition (B, N, D): each token's nearest prototypes, blended; and the
        squared distance to the nearest one per channel (B, N)."""
        # Distances grow with the channels; per-channel ones keep the temperature's meaning for every backbone.
        temperature = self.temperature * tokens.shape[-1]
        # A nearer prototype has the smaller distance: aggregate_nearest negates "l2" scores in its softmax.
        nearest = dk.aggregate_nearest(tokens, self.bank, k=self.k, metric="l2", temperature=temperature)
        if self.training:
            self.counts += torch.bincount(nearest.indices[..., 0].flatten(), minlength=len(self.bank))
        return nearest.values, nearest.scores[..., 0] / tokens.shape[-1]

    @torch.no_grad()
    def revive(self, tokens: Tensor, distances: Tensor) -> int:
        """Moves the prototypes that no token was nearest to since the last call onto the tokens (B, N, D) farthest from
        the bank; returns how many."""
        dead = (self.counts == 0).nonzero().flatten()
        dead = dead[: distances.numel()]
        if len(dead):
            farthest = distances.flatten().topk(len(dead)).indices
            self.bank[dead] = tokens.flatten(0, 1)[farthest].to(self.bank.dtype)
        self.counts.zero_()
        return len(dead)


class GlobalPrototypes(nn.Module):
    """A bank (K, D) in the denoiser's embedding space, to which image descriptors and tokens are transported.

    The optimal-transport cost draws what is embedded and the prototypes together; uniform marginals keep every one
    in use; and the transport plan of one view serves as the target of another (swapped assignment, as in Caron et al.,
    "Unsupervised learning of visual features by contrasting cluster assignments", 2020).
    """

    def __init__(
        self, n_prototypes: int, dim: int, eps: float = 0.05, n_iters: int = 20, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.eps = eps
        self.n_iters = n_iters
        self.temperature = temperature
        self.bank = nn.Parameter(F.normalize(torch.randn(n_prototypes, dim), dim=-1) * dim**0.5)

    def similarity(self, embedding: Tensor) -> Tensor:
        """Cosine similarities (..., N, K) of embeddings (..., N, D)."""
        return F.normalize(embedding.float(), dim=-1) @ F.normalize(self.bank.float(), dim=-1).T

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Two views (N, D) of the same tokens or images -> (transport cost, swapped-assignment cross-entropy)."""
        similarities = torch.stack([self.similarity(view1), self.similarity(view2)])  # (2, N, K)
        transport = dk.sinkhorn(1 - similarities, eps=self.eps, n_iters=self.n_iters, return_plan=True)
        target = transport.plan.detach()
        target = target / target.sum(-1, keepdim=True)
        log_prediction = (similarities / self.temperature).log_softmax(-1)
        swapped = -(target.flip(0) * log_prediction).sum(-1).mean()
        return transport.value.mean(), swapped
