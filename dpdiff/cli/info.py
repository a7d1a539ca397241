"""`dpdiff info`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dpdiff._version import version_of
from dpdiff.cli.model_options import MODELS, defaults, model_class

_FLAGS = {"max_steps": "steps", "num_workers": "workers"}  # of `dpdiff train`, where not of the function's names
_LIBRARIES = ("torchvision", "timm", "lightning", "torchmetrics", "diffusers", "safetensors")


def info(
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Show what this weights file holds.")] = None,
) -> None:
    """Show versions, devices and backends, and the models' options; or what a weights file holds.

    Example: `dpdiff info --weights runs/mvtec/model.safetensors`
    """
    if weights is not None:
        from dpdiff.serialization import read_header

        print(json.dumps(read_header(weights), indent=2))
        return
    import dpdiff_kernels as dk
    from dpdiff import training

    dk.show_config()
    print()
    for library in _LIBRARIES:
        print(f"{library:<16}  {version_of(library, 'not installed')}")
    of_all_models = {name: value for name, value in defaults(training.train).items() if value is not None}
    del of_all_models["progress"]
    for name in MODELS:
        model = model_class(name)
        print(f"\n--model {name}, set with --set NAME=VALUE:")
        _print_options(defaults(model) | _by_images(model.suggest))
        print(f"\n--model {name}, options of dpdiff train:")
        options = _by_images(model.training_options) | of_all_models
        _print_options({f"--{_FLAGS.get(name, name).replace('_', '-')}": value for name, value in options.items()})


def _by_images(options_for: Callable[[int], dict]) -> dict:
    """What a model chooses for so many training images, as a range where it follows them."""
    few, many = options_for(1), options_for(10**9)
    return {name: few[name] if few[name] == many[name] else f"{few[name]} to {many[name]}, by images" for name in few}


def _print_options(options: dict) -> None:
    for name, default in options.items():
        print(f"  {name:<20}  {'none' if default is None else default}")
