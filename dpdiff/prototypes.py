"""The two banks of DPDiff-AD: global prototypes, one per kind of image, each with its own group of local prototypes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dpdiff_kernels as dk

_BALANCING_ROUNDS = 10


class LocalPrototypes(nn.Module):
    """Groups of typical tokens: a bank (n_groups * per_group, D), the k-means centres of each group's tokens, and
    `places` (n_groups * per_group, n_places), the means of these tokens' `tokens.places`.

    An image searches the few groups that it is routed to, so that the cost doesn't grow with the number of groups.
    """

    def __init__(self, n_groups: int, per_group: int, dim: int, n_places: int, k: int, temperature: float) -> None:
        super().__init__()
        self.k = k
        self.temperature = temperature
        self.register_buffer("bank", torch.randn(n_groups * per_group, dim))
        self.register_buffer("places", torch.zeros(n_groups * per_group, n_places))
        self.register_buffer("groups", torch.arange(n_groups).repeat_interleave(per_group), persistent=False)
        self.per_group = per_group

    def active(self, active_groups: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prototypes (B, G per_group, D) of active_groups (B, G) and their places; the whole bank when None."""
        if active_groups is None:
            return self.bank, self.places
        parts = (x.unflatten(0, (-1, self.per_group))[active_groups].flatten(1, 2) for x in (self.bank, self.places))
        return tuple(parts)

    @torch.no_grad()
    def initialise(self, group: int, tokens: Tensor, places: Tensor, generator: torch.Generator | None = None) -> None:
        """Sets one group by k-means on tokens (N, D) at places (N, n_places)."""
        enough = tokens.repeat(-(-self.per_group // len(tokens)), 1)  # where there are fewer than prototypes
        bank = dk.kmeans(enough, self.per_group, n_iters=10, generator=generator)
        nearest = dk.nearest_prototype(tokens, bank, metric="l2").indices.squeeze(-1)
        rows = slice(group * self.per_group, (group + 1) * self.per_group)
        self.bank[rows] = bank
        counts = nearest.bincount(minlength=self.per_group).clamp(1)  # repeated tokens leave prototypes without any
        self.places[rows] = torch.zeros_like(self.places[rows]).index_add(0, nearest, places) / counts[:, None]

    def forward(self, tokens: Tensor, active_groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D), active_groups (B, G) or None for all -> the structural condition (B, N, D): each token's k
        nearest prototypes, blended; the squared distance to the nearest one per channel (B, N); its number (B, N)."""
        # Distances grow with the channels; per-channel ones keep the temperature's meaning for every backbone.
        temperature = self.temperature * tokens.shape[-1]
        groups = None if active_groups is None else self.groups
        # A nearer prototype has the smaller distance: aggregate_nearest negates "l2" scores in its softmax.
        nearest = dk.aggregate_nearest(
            tokens, self.bank, self.k, "l2", temperature, groups=groups, active_groups=active_groups
        )
        return nearest.values, nearest.scores[..., 0] / tokens.shape[-1], nearest.indices[..., 0]


class GlobalPrototypes(nn.Module):
    """A bank (K, D) of typical images: the centres of clusters of their descriptors, of unit length.

    Optimal transport evens the clusters' shares of the images, and so what the groups of local prototypes learn from.

    They route an image to groups of local prototypes, and in training hold the reconstructions to the geometry of
    normal images: their optimal transport to the bank is to be cheap, and to go where that of the clean image goes
    (swapped assignment, as in Caron et al., "Unsupervised learning of visual features by contrasting cluster
    assignments", 2020).
    """

    def __init__(
        self, n_prototypes: int, dim: int, eps: float = 0.02, n_iters: int = 20, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.eps = eps
        self.n_iters = n_iters
        self.temperature = temperature
        self.register_buffer("bank", F.normalize(torch.randn(n_prototypes, dim), dim=-1))

    @torch.no_grad()
    def initialise(
        self, descriptors: Tensor, balanced: bool = True, generator: torch.Generator | None = None
    ) -> Tensor:
        """Spherical k-means on descriptors (N, D) of images, then, where `balanced`, rounds of it in which transport
        assigns them in place of nearness. Returns the cluster (N,) of each image."""
        n_prototypes = len(self.bank)
        descriptors = F.normalize(descriptors.float(), dim=-1)
        enough = descriptors.repeat(-(-n_prototypes // len(descriptors)), 1)  # where there are fewer than prototypes
        self.bank.copy_(dk.kmeans(enough, n_prototypes, metric="cosine", generator=generator))
        if not balanced:
            return self.route(descriptors, 1).squeeze(1)
        for _ in range(_BALANCING_ROUNDS):
            self.bank.copy_(F.normalize(self._shares(descriptors).mT @ descriptors, dim=-1))
        return self._shares(descriptors).argmax(1)

    def _shares(self, descriptors: Tensor) -> Tensor:
        """Of each image (N, K) in each cluster, all images and all clusters having the same mass."""
        return dk.sinkhorn(1 - descriptors @ self.bank.mT, eps=self.eps, n_iters=100).plan

    @torch.no_grad()
    def route(self, descriptors: Tensor, n: int) -> Tensor:
        """Descriptors (B, D) of images -> their n nearest prototypes (B, n), the groups of local ones to search."""
        return dk.nearest_prototype(descriptors.float(), self.bank, k=n, metric="cosine").indices

    def forward(self, clean: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
        """Descriptors (B, D) of the same images -> (transport cost, swapped-assignment cross-entropy) of the latter.

        In distributed training the images are those of all processes: marginals and losses are of the whole step.
        """
        pair = _of_all_processes(F.normalize(torch.stack([clean, reconstructed]).float(), dim=-1))
        similarities = pair @ self.bank.T  # (2, B, K)
        # A batch shows few kinds of images: prototypes take what mass they get (tau_b), images give all of theirs.
        transport = dk.sinkhorn(1 - similarities, eps=self.eps, n_iters=self.n_iters, tau_b=self.eps)
        target = transport.plan[0].detach()
        target = target / target.sum(-1, keepdim=True)
        swapped = -(target * (similarities[1] / self.temperature).log_softmax(-1)).sum(-1).mean()
        return transport.value[1], swapped


def _of_all_processes(x: Tensor) -> Tensor:
    """x (2, B, D) -> those of all n processes, (2, n B, D). This one's has its gradient n times: DDP takes the mean."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    if x.requires_grad:
        x = x.clone()
        x.register_hook(lambda gradient: len(parts) * gradient)
    parts[dist.get_rank()] = x
    return torch.cat(parts, 1)
