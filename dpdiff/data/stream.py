"""In which order training sees its images: a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dpdiff.data.features import FeatureCache
from dpdiff.draws import generator


class Stream(Dataset):
    """Endless passes over n items, each pass in another order: position p is an item of pass p // n.

    A batch of positions is a list of the items' tensors, stacked, and the positions as int64 (B,).
    """

    def __init__(self, features: FeatureCache, seed: int) -> None:
        self.features = features
        self.seed = seed
        self._order = (-1, [])

    def __getitems__(self, positions: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        return self.features.batch([self._item(p) for p in positions]), torch.tensor(positions)

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, len(self.features))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.features), generator=generator(self.seed, epoch))
            self._order = (epoch, order.tolist())
        return self._order[1][place]


class Batches(Sampler):
    """Positions of a stream, batch by batch; the processes of a group share out consecutive ones.

    So two processes with batches of 8, or one with two accumulated batches of 8, see in a step what one with a batch of
    16 sees.

    Attribute `start`: of the `n_batches` of this process, how many it has had already.
    """

    def __init__(self, batch_size: int, n_batches: int) -> None:
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.start = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        together = dist.is_available() and dist.is_initialized()
        rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        for batch in range(self.start, self.n_batches):
            first = (batch * n_ranks + rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
