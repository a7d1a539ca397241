"""Trains a detector with Lightning, on features of the frozen backbone that are computed once."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dpdiff.data import Sample
from dpdiff.data.features import FeatureCache
from dpdiff.dpdiff_ad import DPDiffAD
from dpdiff.serialization import save

CHECKPOINT = "last.ckpt"
WEIGHTS = "model.safetensors"
_REVIVAL_INTERVAL = 200  # steps
_INITIAL_TOKENS = 50_000  # on which k-means runs
_FIT_IMAGES = 1_000  # on which statistics and the maps' scales are computed


class Training(L.LightningModule):
    """A detector's losses and optimiser, as Lightning wants them. A batch is a list of the backbone's feature maps."""

    def __init__(self, model: DPDiffAD, max_steps: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.model = model
        self.max_steps = max_steps
        self.lr = lr
        self.weight_decay = weight_decay

    def training_step(self, maps: list[Tensor], batch_index: int) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # the targets stay float32
            tokens = self.model.tokenizer(maps)
            # Between two steps: the backward pass needs the bank as the losses saw it.
            if self.global_step and self.global_step % _REVIVAL_INTERVAL == 0:
                self.model.revive(tokens)
        losses = self.model.losses(tokens)
        for name, value in losses.items():
            self.log(name, value.detach(), prog_bar=name == "loss", batch_size=len(tokens))
        return losses["loss"]

    def configure_optimizers(self) -> dict:
        decayed, plain = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (decayed if parameter.dim() > 1 and "bank" not in name.split(".")[-1] else plain).append(parameter)
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        warmup = min(100, self.max_steps // 10)
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(
    model: DPDiffAD,
    samples: Sequence[Sample],
    out: str | os.PathLike,
    *,
    max_steps: int = 1_200,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    devices: str | int = "auto",
    accelerator: str = "auto",
    precision: str = "auto",
    num_workers: int = 0,
    checkpoint_interval: int = 200,
    resume: bool = True,
    progress: bool = True,
) -> DPDiffAD:
    """Trains `model` on normal images and writes `out/model.safetensors`.

    Args:
        samples: the normal images; their categories are not used.
        out: folder. Besides the weights it gets `last.ckpt` (what resuming needs), `metrics.csv` (the losses) and
            `features` (the backbone's feature maps, removed at the end).
        max_steps: optimiser steps, whatever the number of images. batch_size: images per step and device.
        lr: AdamW's peak learning rate, after a warm-up and before a cosine decay to zero.
        devices, accelerator, precision: Lightning's; precision "auto" is bf16-mixed where the processor multiplies
            bfloat16, else float32.
        num_workers: processes that read images and features.
        checkpoint_interval: steps between checkpoints.
        resume: continue from `out/last.ckpt` where there is one.

    Returns:
        `model`, trained, in evaluation mode.

    Raises:
        ValueError: no samples, or a checkpoint of another model in `out`.
    """
    out = Path(out)
    if not samples:
        raise ValueError("samples is empty: expected at least one normal image")
    numbers = {"max_steps": max_steps, "batch_size": batch_size, "lr": lr, "checkpoint_interval": checkpoint_interval}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: expected a positive number")
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    show = progress and sys.stderr.isatty()

    features = FeatureCache(
        samples,
        model.backbone,
        model.image_size,
        out / "features",
        num_workers=num_workers,
        progress=_tracker("Features", show),
    )
    checkpoint = out / CHECKPOINT
    resumed = resume and checkpoint.is_file()
    if not resumed:
        initialise(model, features, seed, show)
    loader = DataLoader(
        features,
        batch_size=batch_size,
        shuffle=True,
        drop_last=len(features) >= batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    with _quiet_lightning():
        trainer = L.Trainer(
            max_steps=max_steps,
            accelerator=accelerator,
            devices=devices,
            precision=_best_precision(accelerator) if precision == "auto" else precision,
            gradient_clip_val=1.0,
            callbacks=[
                ModelCheckpoint(out, "last", every_n_train_steps=checkpoint_interval, enable_version_counter=False),
                *([RichProgressBar()] if show else []),
            ],
            logger=CSVLogger(out, name=None, version=""),
            enable_progress_bar=show,
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        model.train()
        training = Training(model, max_steps, lr, weight_decay)
        try:
            trainer.fit(training, loader, ckpt_path=checkpoint if resumed else None, weights_only=True)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except RuntimeError as error:
            if resumed and "PytorchStreamReader" in str(error):
                raise ValueError(f"{checkpoint} is damaged: remove it, or don't resume") from error
            if resumed and "state_dict" in str(error):
                raise ValueError(f"{checkpoint} is of another model: give another folder, or don't resume") from error
            raise
    model.eval()
    if trainer.is_global_zero:
        model.calibrate(_tokens(model, features, "Calibrating", show))
        save(model, out / WEIGHTS)
    return model


def initialise(model: DPDiffAD, features: FeatureCache, seed: int, show: bool) -> None:
    """Sets what is computed rather than learnt: the tokenizer's statistics and the first local bank."""
    generator = torch.Generator().manual_seed(seed)
    chosen = _some(features, _FIT_IMAGES)
    model.tokenizer.fit(_batches(chosen, "Statistics", show))
    per_image = -(-_INITIAL_TOKENS // len(chosen))
    tokens = []
    for batch in _tokens(model, features, "Tokens", show):
        picked = torch.randperm(batch.shape[1], generator=generator)[:per_image]
        tokens.append(batch[:, picked].flatten(0, 1))
    model.initialise(torch.cat(tokens), generator=generator)


def _tokens(model: DPDiffAD, features: FeatureCache, description: str, show: bool) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for maps in _batches(_some(features, _FIT_IMAGES), description, show):
        yield model.tokenizer([m.to(device) for m in maps])


def _batches(features: Subset, description: str, show: bool) -> Iterator[list[Tensor]]:
    return iter(_tracker(description, show)(DataLoader(features, batch_size=32)))


def _some(features: FeatureCache, n: int) -> Subset:
    """At most n of the images, evenly spread."""
    n = min(n, len(features))
    return Subset(features, [i * len(features) // n for i in range(n)])


def _tracker(description: str, show: bool) -> Callable:
    return lambda sequence: track(sequence, description, disable=not show, transient=True)


def _best_precision(accelerator: str) -> str:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Its advice (more workers, devices it found, folders that exist) is not about anything that the user did."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield
