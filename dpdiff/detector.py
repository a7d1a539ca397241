"""What the models have in common, and what training asks of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from dpdiff.draws import Draws

_ENOUGH_IMAGES = 8_000  # for statistics
_ROUNDING = 1e-3  # by which resizing or half precision may take pixels out of [0, 1]

# From the numbers of training images to what a model's `reduce` gave for these, a few images at a time.
BatchesOf = Callable[[Sequence[int]], Iterable[list[Tensor]]]


class Prediction(NamedTuple):
    """scores (B,) float32, larger is more anomalous; maps (B, H, W) float32, None where a model has none."""

    scores: Tensor
    maps: Tensor | None


class Detector(nn.Module):
    """A frozen `backbone`, and on its features a `denoiser` that learns from normal images.

    Training goes: `reduce` on the backbone's maps of every image, whose results are kept on disk; `initialise` once;
    for every batch `encode` and, before the first of a step, `between_steps`, then `losses`; in the end `calibrate`.
    """

    TRAINING: ClassVar[dict[str, Any]]  # max_steps, batch_size, lr, weight_decay
    ema_decay: float = 0.0  # of the running mean of the denoiser's weights, which in the end replaces them; 0: none
    config: dict[str, Any]  # the constructor's arguments, which `load` gives it again
    backbone: nn.Module
    denoiser: nn.Module

    @classmethod
    def training_options(cls, n_images: int) -> dict[str, Any]:
        """What `train` takes by default for so many images."""
        return cls.TRAINING

    @classmethod
    def suggest(cls, n_images: int) -> dict[str, Any]:
        """Options of the constructor that should follow the number of training images."""
        return {}

    @property
    def image_size(self) -> int:
        return self.config["image_size"]

    def predict(self, images: Tensor) -> Prediction:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Prediction:
        """The same as `predict`: what `torch.export` and `torch.compile` see."""
        return self.predict(images)

    def reduce(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps (B, C_l, H_l, W_l) -> tensors (B, ...), what training needs of them."""
        return list(maps)

    def encode(self, reduced: Sequence[Tensor]) -> Tensor:
        """What `reduce` gave -> the features (B, ...) that are noised and reconstructed."""
        raise NotImplementedError

    def initialise(self, batches: BatchesOf, n_images: int, generator: torch.Generator) -> None:
        """Sets what is computed rather than learnt, from the images numbered from 0 to `n_images`."""

    def between_steps(self, step: int, features: Tensor, epoch_steps: int, average: nn.Module) -> None:
        """Before step `step`, on features (B, ...). `epoch_steps` go through all images once, or are a tenth of
        training where that is less; `average` is the denoiser with the weights that count: the running mean, where
        there is one."""

    def losses(self, features: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Losses of features (B, ...): "loss", what to minimise, and its parts, all scalars."""
        raise NotImplementedError

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Sets what depends on the trained weights, from the features (B, ...) of normal images."""

    def _checked(self, images: Tensor) -> Tensor:
        """Images as float32, if these and the model are fit for `predict`."""
        check_images(images)
        dtype = next(self.parameters()).dtype
        if dtype != torch.float32:
            raise TypeError(f"the model is {dtype}: expected torch.float32; to predict faster, use torch.autocast")
        return images.float()

    def _resize(self, images: Tensor) -> Tensor:
        size = [self.image_size, self.image_size]
        return images if list(images.shape[-2:]) == size else TF.resize(images, size, antialias=True)


def spread(n_images: int) -> Sequence[int]:
    """The numbers of at most 8,000 of the images, evenly spread."""
    n = min(_ENOUGH_IMAGES, n_images)
    return [i * n_images // n for i in range(n)]


def expect(arguments: dict[str, Any], name: str, fits: bool, expected: str) -> None:
    """Raises ValueError where an argument doesn't fit, which says what it is and what is expected."""
    if not fits:
        raise ValueError(f"{name} is {arguments[name]!r}: expected {expected}")


def is_int(value: Any) -> bool:
    """Not a bool, which passes for an int but is none that anybody means."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_arguments(arguments: dict[str, Any], positive: Iterable[str], flags: Iterable[str]) -> None:
    """Checks what the models' constructors have in common: `backbone`, `timestep`, the positive ints and the bools."""
    expect(arguments, "backbone", isinstance(arguments["backbone"], str), "the name of a timm model")
    for name in positive:
        expect(arguments, name, is_int(arguments[name]) and arguments[name] >= 1, "a positive int")
    for name in flags:
        expect(arguments, name, isinstance(arguments[name], bool), "a bool")
    timestep, last = arguments["timestep"], arguments["n_timesteps"] - 1
    fits = is_int(timestep) and 0 <= timestep <= last
    expect(arguments, "timestep", fits, f"0 to n_timesteps - 1 ({last})")


def check_images(images: Tensor) -> None:
    """Raises TypeError or ValueError for anything but float images (B, 3, H, W) in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images is {given}: expected a float tensor in [0, 1]")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}: expected (B, 3, H, W)")
    if 0 in images.shape[2:]:
        raise ValueError(f"images has shape {tuple(images.shape)}: expected a height and width of at least 1")
    if images.numel() and not torch.compiler.is_compiling():
        low, high = (x.item() for x in images.aminmax())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails it too
            raise ValueError(f"images hold values from {low:g} to {high:g}: expected [0, 1]")
