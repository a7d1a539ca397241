"""Trains a detector with Lightning, on features of the frozen backbone that are computed once."""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from diffusers.optimization import get_cosine_schedule_with_warmup
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from dpdiff._files import atomic_write
from dpdiff._progress import track
from dpdiff.data import Sample
from dpdiff.data.features import FeatureCache
from dpdiff.data.stream import Batches, Stream
from dpdiff.detector import Detector, spread
from dpdiff.draws import Draws, mix
from dpdiff.serialization import save

CHECKPOINT = "last.ckpt"
WEIGHTS = "model.safetensors"
_FIT_BATCH = 32


class Training(L.LightningModule):
    """A detector's losses and optimiser, as Lightning wants them. A batch is one of `Stream`.

    A step is a function of the weights, the optimiser's state, the seed and the step's number, and all of these are in
    a checkpoint or given: training that is killed and resumed ends with the very weights of training that isn't.
    """

    def __init__(
        self,
        model: Detector,
        batches: Batches,
        max_steps: int,
        epoch_steps: int,
        lr: float,
        weight_decay: float,
        seed: int,
        run: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.average = _average(model) if model.ema_decay else None
        self.batches = batches
        self.max_steps = max_steps
        self.epoch_steps = epoch_steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.seed = seed
        self.run = run
        # No step changes a buffer but in the same way everywhere: `on_fit_start` sends them once, not DDP every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    @property
    def denoiser(self) -> torch.nn.Module:
        """With the weights that count in the end."""
        return self.model.denoiser if self.average is None else self.average.module

    def on_fit_start(self) -> None:
        if dist.is_initialized():
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_index: int) -> Tensor:
        reduced, positions = batch
        with torch.autocast(self.device.type, enabled=False):  # the targets stay float32
            features = self.model.encode(reduced)
            if batch_index % self.trainer.accumulate_grad_batches == 0:
                self.model.between_steps(self.global_step, features, self.epoch_steps, self.denoiser)
        draws = Draws([mix(self.seed, position) for position in positions.tolist()], self.device)
        losses = self.model.losses(features, draws)
        means = self.trainer.strategy.reduce(torch.stack(list(losses.values())).detach(), reduce_op="mean")
        for name, value in zip(losses, means):
            self.log(name, value, prog_bar=name == "loss", batch_size=len(features))
        return losses["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:  # here, since hooks after a batch come after its checkpoint
            self.average.update_parameters(self.model.denoiser)

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

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        kept = self.state_dict()
        checkpoint["buffers"] = {name: buffer for name, buffer in self.named_buffers() if name not in kept}
        checkpoint["run"] = self.run

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches.start = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        buffers = dict(self.named_buffers())
        for name, buffer in checkpoint["buffers"].items():
            buffers[name].copy_(buffer)


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own writes them elsewhere and moves them, which leaves part of one where that is another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch doesn't say of a full disk that it is full
        torch.save(checkpoint, buffer)
        with atomic_write(path) as tmp:
            tmp.write_bytes(buffer.getbuffer())


def train(
    model: Detector,
    samples: Sequence[Sample],
    out: str | os.PathLike,
    *,
    features: FeatureCache | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    weight_decay: float | None = None,
    seed: int = 0,
    devices: str | int = "auto",
    accelerator: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    num_workers: int = 0,
    checkpoint_interval: int = 200,
    resume: bool = True,
    progress: bool = True,
) -> Detector:
    """Trains `model` on normal images and writes `out/model.safetensors`.

    The result is a function of the model, the samples, the options up to `compile`, and the machine; neither of
    `num_workers` nor of interruptions.

    Args:
        samples: the normal images; their categories are not used.
        out: folder. Besides the weights it gets `last.ckpt` (what resuming needs, from `checkpoint_interval` steps on),
            `metrics.csv` (the losses) and `features` (what the model needs of the backbone's feature maps).
        features: of the samples, in their order, where they are known already.
        max_steps: optimiser steps; the model's own (`model.training_options`) when None, and so for the next ones.
            batch_size: images at a time on a device. accumulate: batches per step. lr: AdamW's peak learning rate,
            after a warm-up and before a cosine decay to zero. weight_decay: of weight matrices.
        seed: of all that is random.
        devices, accelerator, precision: Lightning's, of precisions those that leave the model in float32: "32-true",
            "bf16-mixed", "16-mixed"; "auto" is bf16-mixed where the processor multiplies bfloat16, else float32.
        compile: compile the denoiser with `torch.compile`, which takes a minute and pays in long runs.
        num_workers: processes that read images and features.
        checkpoint_interval: steps between checkpoints.
        resume: continue from `out/last.ckpt` where there is one.

    Returns:
        `model`, trained, in evaluation mode.

    Raises:
        ValueError: no samples; training diverged; a checkpoint in `out` that is damaged, or of another model, other
            images or options.
        SystemExit: 143, after SIGTERM.
    """
    out = Path(out)
    if not samples:
        raise ValueError("samples is empty: expected at least one normal image")
    given = {"max_steps": max_steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
    numbers = model.training_options(len(samples)) | {name: value for name, value in given.items() if value is not None}
    max_steps, batch_size, lr = (numbers[name] for name in ("max_steps", "batch_size", "lr"))
    for name, value in (numbers | {"accumulate": accumulate, "checkpoint_interval": checkpoint_interval}).items():
        if not (0 < value < math.inf or (value == 0 and name == "weight_decay")):
            raise ValueError(f"{name} is {value}: expected a positive finite number")
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    show = progress and sys.stderr.isatty()

    if features is None:
        features = FeatureCache(
            samples,
            model.backbone,
            model.image_size,
            out / "features",
            num_workers=num_workers,
            progress=partial(track, description="Features", wanted=show),
            reduce=model.reduce,
        )
    checkpoint = out / CHECKPOINT
    resumed = resume and checkpoint.is_file()
    run = {"model": type(model).__name__, **model.config, **numbers, "accumulate": accumulate, "seed": seed}
    run["images"] = features.key
    if resumed:
        _check_same_run(checkpoint, run)
    elif rank_zero_only.rank == 0:  # the others are sent it
        _initialise(model, features, seed, show)
    batches = Batches(batch_size, max_steps * accumulate)
    loader = DataLoader(
        Stream(features, seed),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    with _quiet_lightning():
        trainer = L.Trainer(
            max_steps=max_steps,
            accelerator=accelerator,
            devices=devices,
            precision=_best_precision(accelerator) if precision == "auto" else precision,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,  # Batches does that
            callbacks=[
                ModelCheckpoint(out, "last", every_n_train_steps=checkpoint_interval, enable_version_counter=False),
                *([RichProgressBar()] if show else []),
            ],
            logger=CSVLogger(out, name=None, version=""),
            enable_progress_bar=show,
            enable_model_summary=False,
            log_every_n_steps=min(10, max_steps),
            plugins=[_WholeCheckpoints()],
        )
        model.train()
        if compile:
            model.denoiser.compile()
        epoch_steps = -(-len(features) // (batch_size * accumulate * trainer.world_size))
        epoch_steps = min(epoch_steps, max(1, max_steps // 10))  # of many images training may see each but once
        training = Training(model, batches, max_steps, epoch_steps, lr, numbers["weight_decay"], seed, run)
        try:
            trainer.fit(training, loader, ckpt_path=checkpoint if resumed else None, weights_only=True)
        except SIGTERMException:  # which would end the process as if it had done its work
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    model.eval()
    if training.average is not None:
        model.denoiser.load_state_dict(training.average.module.state_dict())
    if trainer.is_global_zero:
        some = _in_batches(features, spread(len(features)), "Calibrating", show)
        model.calibrate(model.encode(reduced) for reduced in some)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise ValueError("training diverged, weights are infinite or NaN: expected a lower lr")
        save(model, out / WEIGHTS)
    return model


def _check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raises ValueError where `checkpoint` can't be read or is of another run than this."""
    try:
        before = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["run"]
    except Exception as error:  # whatever torch makes of a damaged file
        raise ValueError(f"{checkpoint} is damaged or of another version: remove it, or don't resume") from error
    if found := changes(before, run):
        raise ValueError(f"{checkpoint} is of another run, {found}: give another folder, or don't resume")


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first few options in which two runs differ, for a message."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} (now {now.get(name)})" for name in names[:3])


def _initialise(model: Detector, features: FeatureCache, seed: int, show: bool) -> None:
    batches = partial(_in_batches, features, description="Initialising", show=show)
    model.initialise(batches, len(features), torch.Generator().manual_seed(seed))


def _in_batches(features: FeatureCache, numbers: Sequence[int], description: str, show: bool) -> Iterator[list[Tensor]]:
    """The images of these numbers, a few at a time."""
    for start in track(range(0, len(numbers), _FIT_BATCH), description, wanted=show):
        yield features.batch(numbers[start : start + _FIT_BATCH])


def _as_is(batch: Any) -> Any:  # Stream makes batches
    return batch


def _average(model: Detector) -> AveragedModel:
    """The running mean of the denoiser's weights, of short memory in the beginning (as in latent diffusion's code)."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
        decay = min(model.ema_decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    return AveragedModel(model.denoiser, multi_avg_fn=update).requires_grad_(False)


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
