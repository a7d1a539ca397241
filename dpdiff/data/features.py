"""The backbone's feature maps of a whole training set, computed once and memory-mapped from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpdiff._files import atomic_folder
from dpdiff.backbones import Backbone
from dpdiff.data.dataset import AnomalyDataset
from dpdiff.data.samples import Sample


class FeatureCache(Dataset):
    """Feature maps of images, float16, one file per layer: item i is a list of (C_l, H_l, W_l) tensors.

    Or what the function `reduce` makes of them: from a list of (B, C_l, H_l, W_l) to a list of any tensors (B, ...).

    Lies in `folder/<key>`, where the key stands for the backbone's weights, its layers, the image size, the name of
    `reduce` and what is in the images' files, wherever they lie: whatever changes one of these makes a new cache. It is
    written under another name first, so that an interrupted run leaves none that looks complete; caches of other keys
    are removed. Of several processes that want one, the first computes it; the others wait.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        backbone: Backbone,
        image_size: int,
        folder: str | os.PathLike,
        *,
        batch_size: int = 16,
        num_workers: int = 0,
        progress: Callable = iter,
        reduce: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> None:
        folder = Path(folder)
        self.path = folder / _key(samples, backbone, image_size, reduce)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes one computes, the others wait
            if not self.path.is_dir():
                for old in folder.iterdir():
                    if old.is_dir():  # a file browser may leave files of its own
                        shutil.rmtree(old)
                data = AnomalyDataset(samples, image_size)
                loader = DataLoader(data, batch_size=batch_size, num_workers=num_workers)
                with atomic_folder(self.path) as partial:
                    _extract(backbone, reduce, progress(loader), len(samples), partial)
        files = sorted(self.path.glob("*.npy"), key=lambda file: int(file.stem))
        self.arrays = [np.load(file, mmap_mode="r") for file in files]

    @property
    def key(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[0] for tensor in self.batch([index])]

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Items, stacked: float32 (len(indices), ...) each."""
        return [torch.from_numpy(array[list(indices)]).float() for array in self.arrays]


def _extract(backbone: Backbone, reduce: Callable, batches: Iterable[dict], n: int, folder: Path) -> None:
    device = next(backbone.parameters()).device
    with ExitStack() as stack:
        files: list[BinaryIO] = []  # not mapped: a full disk is an error of a write, but the end of who maps
        for batch in batches:
            with torch.inference_mode():
                tensors = [t.half().cpu().numpy() for t in reduce(backbone(batch["image"].to(device)))]
            if not files:
                for i, t in enumerate(tensors):
                    files.append(stack.enter_context(open(folder / f"{i}.npy", "wb")))
                    about = np.lib.format.header_data_from_array_1_0(t) | {"shape": (n, *t.shape[1:])}
                    np.lib.format.write_array_header_1_0(files[i], about)
            for file, t in zip(files, tensors):
                file.write(np.ascontiguousarray(t).data)
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _key(samples: Sequence[Sample], backbone: Backbone, image_size: int, reduce: Callable) -> str:
    digest = hashlib.sha256()
    parts = [backbone.name, backbone.fingerprint(), backbone.layers, image_size, reduce.__qualname__]
    digest.update(json.dumps(parts).encode())
    with ThreadPoolExecutor() as pool:
        for content in pool.map(_content, samples):
            digest.update(content)
    return digest.hexdigest()[:16]


def _content(sample: Sample) -> bytes:
    with sample.image.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
