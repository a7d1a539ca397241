"""Random numbers that depend on a seed and a sample, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers for a batch, in which every sample has a generator of its own.

    So a sample draws the same in whatever batch, process or order it comes, and training can be resumed exactly. A
    generator costs a few microseconds.

    Args:
        seeds: one per sample, from 0 to 2^64 - 1.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = device
        self.generators = [generator(seed, device=device) for seed in seeds]

    @classmethod
    def unseeded(cls, n: int, device: torch.device | str = "cpu") -> Draws:
        """For n samples, from the global random numbers of torch."""
        return cls(torch.randint(2**62, (n,)).tolist(), device)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return self._stack(torch.randn(shape, generator=g, device=self.device) for g in self.generators)

    def integers(self, low: int, high: int) -> Tensor:
        """(B,) int64 from low to high - 1."""
        return self._stack(torch.randint(low, high, (), generator=g, device=self.device) for g in self.generators)

    def _stack(self, drawn) -> Tensor:
        return torch.stack(list(drawn))


def mix(*numbers: int) -> int:
    """A seed, from 0 to 2^64 - 1, made of several integers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Seeded by several integers: mixed, for the generator of CPUs takes the lower 32 bits of a seed only."""
    return torch.Generator(device).manual_seed(mix(*numbers) & 0xFFFFFFFF)
