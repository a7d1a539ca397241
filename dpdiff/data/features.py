"""The backbone's feature maps of a whole training set, computed once and memory-mapped from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpdiff.backbones import Backbone
from dpdiff.data.dataset import AnomalyDataset
from dpdiff.data.samples import Sample


class FeatureCache(Dataset):
    """Feature maps of images, float16, one file per layer: item i is a list of (C_l, H_l, W_l) tensors.

    Lies in `folder/<key>`, where the key stands for the backbone's weights, its layers, the image size and the images'
    paths, sizes and modification times: whatever changes one of these makes a new cache. It is written under another
    name first, so that an interrupted run leaves none that looks complete; caches of other keys are removed.
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
    ) -> None:
        folder = Path(folder)
        self.path = folder / _key(samples, backbone, image_size)
        if not self.path.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                shutil.rmtree(old)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
            try:
                loader = DataLoader(
                    AnomalyDataset(samples, image_size), batch_size=batch_size, num_workers=num_workers
                )
                _extract(backbone, progress(loader), len(samples), partial)
                partial.rename(self.path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        self.layers = [np.load(self.path / f"{layer}.npy", mmap_mode="r") for layer in backbone.layers]

    def __len__(self) -> int:
        return len(self.layers[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [torch.from_numpy(np.array(layer[index])).float() for layer in self.layers]


def _extract(backbone: Backbone, batches, n: int, folder: Path) -> None:
    files: list[np.ndarray] = []
    device = next(backbone.parameters()).device
    start = 0
    for batch in batches:
        with torch.inference_mode():
            maps = [m.half().cpu().numpy() for m in backbone(batch["image"].to(device))]
        if not files:
            files = [
                np.lib.format.open_memmap(folder / f"{layer}.npy", "w+", np.float16, (n, *m.shape[1:]))
                for layer, m in zip(backbone.layers, maps)
            ]
        for file, m in zip(files, maps):
            file[start : start + len(m)] = m
        start += len(maps[0])
    for file in files:
        file.flush()


def _key(samples: Sequence[Sample], backbone: Backbone, image_size: int) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([backbone.name, backbone.fingerprint(), backbone.layers, image_size]).encode())
    for sample in samples:
        status = sample.image.stat()
        digest.update(f"{sample.image.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
