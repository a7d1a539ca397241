"""What commands are given, checked before any work: data, devices and places to write to."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

    from dpdiff.data import Catalogue, Sample

TORCHVISION_SETS = ("cifar10", "cifar100", "svhn", "mnist", "fashionmnist")
OnCorrupt = Literal["raise", "skip"]

Data = Annotated[
    str,
    typer.Option(
        metavar="FOLDER",
        help="MVTec AD style, VisA, Real-IAD, or any folder of normal images; products:N[:SEED] renders N categories, "
        "products:A-B[:SEED] those from number A up to B; cifar10:ROOT, cifar100, svhn, mnist, fashionmnist: as "
        "torchvision keeps them.",
    ),
]
Weights = Annotated[Path, typer.Option(metavar="FILE", help="A model that train wrote, DIR/model.safetensors.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; else a GPU if there is one.", rich_help_panel="Hardware"),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.", rich_help_panel="Hardware")]
Workers = Annotated[
    int, typer.Option(metavar="N", min=0, help="Processes that read images.", rich_help_panel="Hardware")
]
Corrupt = Annotated[OnCorrupt, typer.Option(help="Unreadable images: refuse them, or name and skip them.")]


def read_catalogue(data: str, need: Literal["train", "test"] | None = None) -> Catalogue:
    """The data set that --data names, rendered or unpacked if need be."""
    from dpdiff.data import scan

    return scan(data_folder(data), need=need)


def canonical(data: str) -> str:
    """What --data names, wherever the command is run."""
    kind, colon, place = data.partition(":")
    if kind == "products" and colon:
        return data
    return f"{kind}:{os.path.abspath(place)}" if kind in TORCHVISION_SETS and colon else os.path.abspath(data)


def data_folder(data: str) -> Path:
    """The folder that --data names; one of products or of a torchvision set is made first unless it is there."""
    if not data:  # as a Path it would be the current folder
        raise ValueError("--data is '': expected a folder or the name of a data set")
    kind, colon, place = data.partition(":")
    if kind in TORCHVISION_SETS and colon:
        from dpdiff.data.torchvision_sets import unpack

        return unpack(kind, place)
    if kind != "products" or not colon:
        return Path(data)
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?", place)
    if not match:
        raise ValueError(f"--data is {data!r}: expected a folder, products:N[:SEED] or products:A-B[:SEED]")
    from dpdiff.data.products import Products

    first, end, seed = (int(number or 0) for number in match.groups())
    if match[1] and first >= end:
        raise ValueError(f"--data is {data!r}: expected products:A-B with A below B")
    return Products(end - first, seed, first=first).root


def usable(samples: Sequence[Sample], on_corrupt: OnCorrupt) -> list[Sample]:
    """The samples whose files are fit for use; names the others on standard error, or raises for them."""
    from dpdiff.data import check

    good, problems = check(samples, on_corrupt)
    for problem in problems:
        print(f"dpdiff: skipped: {problem}", file=sys.stderr)
    if not good:
        raise ValueError("no usable image is left")
    return good


def find_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        there = torch.zeros(1, device=name)
        there.cpu()  # "meta" has no numbers
    except Exception as error:  # an unknown name, a device that isn't there, a torch built without it
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with all that it knows
        raise ValueError(f"--device is {name!r}, which can't be used here: {reason}") from error
    return there.device


def check_different(**paths: Path | None) -> None:
    """Refuses two options that name one file, of which the second written would replace the first."""
    options: dict[str, str] = {}
    for name, path in paths.items():
        if path is None or (path.exists() and not path.is_file()):  # /dev/stdout may serve twice
            continue
        option, real = f"--{name}", os.path.realpath(path)
        if real in options:
            raise ValueError(f"{option} {path} is the file of {options[real]} too: expected another one")
        options[real] = option


def check_writable(path: Path, option: str, *, folder: bool) -> None:
    """Refuses a place that can't be written to; makes nothing yet."""
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path} is a file: expected a folder")
    if not folder and path.is_dir():
        raise ValueError(f"{option} {path} is a folder: expected a file")
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not path.exists() and not there.is_dir():
        raise ValueError(f"{option} {path} can't be made: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {path} can't be written: no permission for {there}")
