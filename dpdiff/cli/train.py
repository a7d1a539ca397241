"""`dpdiff train`."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dpdiff._files import write_json
from dpdiff.cli.inputs import Corrupt, Data, Workers, canonical, check_writable, read_catalogue, usable
from dpdiff.cli.model_options import ModelName, defaults, model_class, parse_settings

RECORD = "options.json"  # of the run in a folder, lest another one go on from its checkpoint
_ADVICE = "give that run's options, choose another --out, or start anew with --no-resume"
_UNRECORDED = ("num_workers", "checkpoint_interval", "resume", "progress")  # these may change from one part to the next
# The others turn the whole model, statistics and prototypes too, into their type.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_MODEL, _TRAINING, _HARDWARE = ({"rich_help_panel": panel} for panel in ("Model", "Training", "Hardware"))


def train(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where model.safetensors and checkpoints go.")],
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in DIR, if there is one.")] = True,
    on_corrupt: Corrupt = "raise",
    model: Annotated[ModelName, typer.Option(help="What to train.", **_MODEL)] = "dpdiff-ad",
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Any timm model.", **_MODEL)] = None,
    layers: Annotated[str | None, typer.Option(metavar="2,3", help="Its stages or blocks to use.", **_MODEL)] = None,
    backbone_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its weights, .safetensors or .pth.", **_MODEL)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side to which images are resized.", **_MODEL)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other option that `dpdiff info` lists.", **_MODEL),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the optimiser; more of many images.", **_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images per step and device.", **_TRAINING)
    ] = None,
    accumulate: Annotated[int, typer.Option(metavar="N", min=1, help="Batches per step.", **_TRAINING)] = 1,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Highest learning rate.", **_TRAINING)] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="Of weight matrices.", **_TRAINING)] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of all that is random.", **_TRAINING)
    ] = 0,
    checkpoint_interval: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps from one checkpoint to the next.", **_TRAINING)
    ] = None,
    devices: Annotated[str, typer.Option(metavar="N", help="How many, or which ones: 0,1.", **_HARDWARE)] = "auto",
    accelerator: Annotated[str, typer.Option(metavar="NAME", help="cpu, gpu, ...", **_HARDWARE)] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="32-true, bf16-mixed or 16-mixed.", **_HARDWARE)
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the denoiser first.", **_HARDWARE)] = False,
    workers: Workers = 0,
) -> None:
    """Train a detector on normal images, and write DIR/model.safetensors.

    What isn't given has the default that `dpdiff info` shows. The same command again goes on from the last checkpoint.

    Example: `dpdiff train --data mvtec --out runs/mvtec`

    Example: `dpdiff train --data products:160 --out runs/160 --steps 5000 --set n_local=128`

    Example: `dpdiff train --model dlsr --data cifar10:data --out runs/cifar10 --backbone efficientnet_b4`
    """
    cls = model_class(model)
    weights = backbone_weights and backbone_weights.absolute()
    named = {"backbone": backbone, "layers": layers, "backbone_weights": weights, "image_size": image_size}
    settings = [f"{name}={value}" for name, value in named.items() if value is not None]
    options = parse_settings(cls, [*settings, *(set_ or [])])
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"--lr is {lr}: expected a positive finite number")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise ValueError(f"--weight-decay is {weight_decay}: expected a finite number of at least 0")
    check_writable(out, "--out", folder=True)
    _check_hardware(accelerator, devices, precision)

    import torch

    from dpdiff import training

    fit = {"max_steps": steps, "batch_size": batch_size, "lr": lr, "checkpoint_interval": checkpoint_interval}
    fit |= {"seed": seed, "devices": devices, "accelerator": accelerator, "precision": precision}
    fit |= {"accumulate": accumulate, "compile": compile, "weight_decay": weight_decay}
    fit = {name: value for name, value in fit.items() if value is not None}
    samples = read_catalogue(data, need="train").train
    options = cls.suggest(len(samples)) | options
    record = {"data": canonical(data), "images": len(samples), "on_corrupt": on_corrupt, "model": model}
    record |= defaults(cls) | options | defaults(training.train) | cls.training_options(len(samples)) | fit
    record = {name: value for name, value in record.items() if name not in _UNRECORDED}

    result, checkpoint = out / training.WEIGHTS, out / training.CHECKPOINT
    if resume and (result.exists() or checkpoint.exists()):
        _check_same_run(out, record)
        if result.exists():
            print(f"{result} is trained already, with the same options and as many images; --no-resume trains it anew")
            return

    torch.manual_seed(seed)  # of the weights that training begins with
    detector = cls(**options)
    samples = usable(samples, on_corrupt)

    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        checkpoint.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
    write_json(out / RECORD, record)
    categories = len({sample.category for sample in samples})
    verb = "Going on with" if checkpoint.exists() else "Training"
    _say(f"{verb} {cls.__name__}: {len(samples):,} images, categories: {categories:,}; into {out}")
    start = time.monotonic()
    training.train(detector, samples, out, **fit, num_workers=workers, resume=resume)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    _say(f"Trained in {minutes}:{seconds:02d} minutes: {result}")


def _check_same_run(out: Path, record: dict[str, Any]) -> None:
    from dpdiff.training import changes

    try:
        before = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"--out {out} holds a run of unknown options: {_ADVICE}")
    if found := changes(before, json.loads(json.dumps(record))):
        raise ValueError(f"--out {out} holds a run of other options, {found}: {_ADVICE}")


def _check_hardware(accelerator: str, devices: str, precision: str) -> None:
    """Lightning's verdict on these three, and ours on the precision, before any work."""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it tells what devices it found
    options = {"accelerator": accelerator, "devices": devices}
    options |= {} if precision == "auto" else {"precision": precision}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer = L.Trainer(**options, **dict.fromkeys(quiet, False))
    except Exception as error:
        given = f"--accelerator {accelerator} --devices {devices} --precision {precision}"
        raise ValueError(f"{given}: {str(error).splitlines()[0]}") from error
    if trainer.precision not in _PRECISIONS:
        raise ValueError(f"--precision is {precision}: expected one of auto, {', '.join(_PRECISIONS)}")


def _say(message: str) -> None:
    """Once, not from every process of a run on several devices."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0":
        print(message, flush=True)
