"""torchvision's sets of small images, which the user has on disk, as image files that all else can read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpdiff._torchvision  # noqa: F401  (before torchvision)
from dpdiff._files import atomic_folder, user_cache
from dpdiff._progress import track

from torchvision import datasets  # isort: skip

SETS: dict[str, Callable[..., Any]] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "svhn": datasets.SVHN,
    "mnist": datasets.MNIST,
    "fashionmnist": datasets.FashionMNIST,
}
_LIES_IN = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat or test_32x32.mat",
    "mnist": "MNIST/raw",
    "fashionmnist": "FashionMNIST/raw",
}


def unpack(name: str, root: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """Write the images of one of `SETS` as PNG files, once, and return their folder: `train/good`, `test/good`.

    root: what torchvision calls so, the folder that holds `cifar-10-batches-py` or `MNIST`, or SVHN's .mat files. Of
    the two splits those that are there are taken; torchvision checks them (all but MNIST's by their MD5 sums) before
    it reads them. cache: where the folder is made; the user's cache folder, see `Products`, when None.

    Raises FileNotFoundError where the root has neither split.
    """
    root = Path(root)
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    folder = (user_cache() if cache is None else Path(cache)) / "torchvision" / f"{name}-{place}"
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            options = {"split": split} if name == "svhn" else {"train": split == "train"}
            try:
                images = SETS[name](root, **options)
            except RuntimeError:  # not there, or damaged
                continue
            _write(images, folder / split, f"Unpacking {name}, {split}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{root} holds no {name} as torchvision keeps it, in {_LIES_IN[name]}, or a damaged one"
        )
    return folder


def _write(images: Any, folder: Path, description: str) -> None:
    with atomic_folder(folder) as partial:
        (partial / "good").mkdir()
        for i, (image, _) in enumerate(track(images, description)):
            image.save(partial / "good" / f"{i:06d}.png", compress_level=1)
