"""What a data set is to the rest of the project: two lists of samples."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

GOOD = "good"


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it.

    image: the file. category: the product it shows. kind: ``"good"`` or the name of the defect. label: 0 good,
    1 defective. mask: the file whose non-zero pixels are the defect, or a folder of such files whose union is
    (MVTec LOCO); None for a good image, and for a defective one whose defect is not marked.
    """

    image: Path
    category: str
    kind: str = GOOD
    label: int = 0
    mask: Path | None = None


@dataclass
class Catalogue:
    """The samples of a data set: ``train`` (good images only), ``test``, and the names of the categories.

    ``categories`` is sorted and gives a category its number; it names those without any image too.
    """

    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sort key that orders ``img2`` before ``img10``; what differs in nothing else is ordered by the text itself."""
    parts = re.split(r"([0-9]+)", text)  # words and numbers in turn
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], text


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file suffixes of the image formats that Pillow can read here, such as ``.png``."""
    Image.init()
    # Formats that Pillow knows by name but reads only with a program or a handler from elsewhere.
    elsewhere = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
    return frozenset(s for s, f in Image.registered_extensions().items() if f in Image.OPEN and f not in elsewhere)


def walk_images(folder: Path) -> Iterator[Path]:
    """Every image file under ``folder``, nested ones too, in natural order; hidden files and folders are passed by.

    Links to folders are followed, but for those back to a folder around them.
    """
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: natural_key(e.name))
    for entry in entries:
        if _is_folder(entry):
            yield from walk_images(Path(entry.path))
        elif os.path.splitext(entry.name)[1].lower() in image_suffixes():
            yield Path(entry.path)


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in ``folder``, in natural order, hidden ones and archive leftovers passed by."""
    with os.scandir(folder) as found:
        names = [e.name for e in found if _is_folder(e) and not e.name.startswith((".", "__"))]
    return [folder / name for name in sorted(names, key=natural_key)]


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder to go into. A link back to a folder around it would lead in circles, out of its split."""
    try:
        if not entry.is_dir():
            return False
    except OSError as error:
        if error.errno != errno.ELOOP:  # which is a link to itself
            raise
        return False
    around = Path(entry.path).absolute().parents
    return not (entry.is_symlink() and any(os.path.samefile(entry.path, folder) for folder in around))
