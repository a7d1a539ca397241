"""Reads images and masks, and tells before any work starts which can't be read."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dpdiff.data.samples import Sample, walk_images

_ORIENTATION = ExifTags.Base.Orientation
_QUARTER_TURNS = (5, 6, 7, 8)
_PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # where Pillow looks for an orientation
_OPEN_RANGE = ("F", "I")  # modes of grey with values that `load_image` refuses
_OTHER_COLOURS = ("CMYK", "YCbCr")  # in which black isn't zero
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # any but those within pixel data, and padding


def load_image(path: str | os.PathLike, size: int | None = None) -> Tensor:
    """Read an image of any format, grey or colour, as float32 (3, H, W) in [0, 1].

    size: resize to (size, size), antialiased bilinear; None keeps the image's own. Orientation by EXIF or
    XMP is applied, transparency shows black, grey is repeated over the three channels, and of several frames the first
    is read. 16-bit grey is divided by 65,535; floating-point grey is taken as it is where it lies in [0, 1] and
    divided by 255 where it lies in [0, 255].

    Raises ValueError with the path for a file that is no image, is damaged, or lies outside of these ranges.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                image = Image.fromarray(_unit_range(np.asarray(image)))
            elif image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            elif image.mode != "L":
                image = image.convert("RGB")
            if size is not None:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.array(image)
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise ValueError(f"cannot read image {path}: {_reason(error)}") from error
    tensor = torch.from_numpy(pixels)
    tensor = tensor.expand(3, -1, -1) if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    tensor = tensor.contiguous()
    return tensor if tensor.is_floating_point() else tensor.float().div_(255)


def _unit_range(pixels: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits as float32 in [0, 1]."""
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        scale = 1 if high <= 1 else 255
    else:
        scale = 65535
    if not (low >= 0 and high <= scale):  # NaN fails it too
        raise ValueError(f"its values run from {low:g} to {high:g}: expected 0 to {scale}")
    return pixels.astype(np.float32) / scale


def load_mask(path: str | os.PathLike, size: int | None = None) -> Tensor:
    """Read a mask as bool (H, W): true where the file, or any file of the folder ``path``, is not black.

    size: resize to (size, size), nearest. JPEG files, whose compression blurs black, count from half of white on. In a
    palette that is black throughout, every entry but the first is a mark.

    Raises ValueError with the path for a file that cannot be read.
    """
    mask = np.logical_or.reduce([_read_mask(file) for file in _mask_files(Path(path))]).astype(np.uint8)
    if size is not None:
        mask = np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return torch.from_numpy(mask).bool()


def _mask_files(path: Path) -> list[Path]:
    return list(walk_images(path)) if path.is_dir() else [path]


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            least = 127 if image.format == "JPEG" else 0
            image = ImageOps.exif_transpose(image)
            if image.mode in _OTHER_COLOURS or (image.mode in ("P", "PA") and any(image.getpalette())):
                image = image.convert("RGB")
            marked = np.asarray(image) > least
            if marked.ndim == 3:  # colour: any but black, however opaque
                marked = marked[..., : 1 if image.mode == "LA" else 3].any(axis=-1)
            return marked
    except Exception as error:
        raise ValueError(f"cannot read mask {path}: {_reason(error)}") from error


def check(samples: Iterable[Sample], on_error: Literal["raise", "skip"] = "raise") -> tuple[list[Sample], list[str]]:
    """Tell which samples can't be used, before anything is computed from them.

    A sample's image and mask must be readable and whole, the image's values must lie in a range that
    :func:`load_image` knows, its mask must have the size of its image, and a defective
    image must have a mask where other images of its category have one: without, its defect would pass for good.

    Returns the samples that can be used and one line for each that can't, which names the file. With ``"raise"``
    there is no such line: the first of them is raised as ValueError. Files are read whole, but decoded only in formats
    that don't tell a truncated file otherwise (not PNG, not JPEG) and where an orientation may stand behind the pixels.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
    samples = list(samples)
    masked = {sample.category for sample in samples if sample.mask is not None}

    def problem(sample: Sample) -> str | None:
        try:
            width, height = _verified_size("image", sample.image)
            for mask in _mask_files(sample.mask) if sample.mask else ():
                w, h = _verified_size("mask", mask)
                if (w, h) != (width, height):
                    return f"mask {mask} is {w} x {h} but its image {sample.image} is {width} x {height}"
        except ValueError as error:
            return str(error)
        if sample.label and sample.mask is None and sample.category in masked:
            return f"image {sample.image} has no mask, but others of category {sample.category!r} have one"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow and zlib let other threads run
        problems = list(pool.map(problem, samples))
    usable = [sample for sample, p in zip(samples, problems, strict=True) if p is None]
    problems = [p for p in problems if p is not None]
    if problems and on_error == "raise":
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""))
    return usable, problems


def _verified_size(what: str, path: Path) -> tuple[int, int]:
    """Width and height as they are seen, of a file that is whole."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "PNG":
                image.verify()  # reads it to the end, by its check sums
                behind = content[content.rfind(b"IDAT") :]
                header_tells = not any(name in behind for name in _PNG_METADATA)
            else:
                header_tells = image.format in ("JPEG", "MPO") and _is_whole_jpeg(content)
            if header_tells:
                width, height = image.size
                exif = Image.Image.getexif(image)  # what was read so far, where a PNG's own would decode it
                return (height, width) if exif.get(_ORIENTATION) in _QUARTER_TURNS else (width, height)
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if what == "image" and image.mode in _OPEN_RANGE:
                _unit_range(np.asarray(image))
            return image.size
    except Exception as error:
        raise ValueError(f"cannot read {what} {path}: {_reason(error)}") from error


def _is_whole_jpeg(content: bytes) -> bool:
    """Whether the marker that ends a JPEG file is found, segment by segment, behind the pixels of its first image.

    Pixel data can't hold a marker, but other segments can: a thumbnail in the header has an end of its own.
    """
    at, has_pixels = 2, False
    while marker := _JPEG_MARKER.search(content, at):
        if marker[0] == b"\xff\xd9":
            return has_pixels
        has_pixels |= marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or is damaged"
    return " ".join(str(error).split()) or type(error).__name__
