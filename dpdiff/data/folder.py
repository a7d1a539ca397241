"""Lists the images of a folder, whatever its layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from dpdiff.data.listed import is_real_iad, is_visa, scan_real_iad, scan_visa
from dpdiff.data.samples import Catalogue, Sample, natural_key, subfolders, walk_images

# Names of folders are known in whatever case they are written.
_GOOD_NAMES = {"good", "ok", "normal"}
_TEST_NAMES = ("test", "test_public")  # the second is MVTec AD 2's; its private tests come without labels
_MASKS = "ground_truth"
_DEPTH = 3  # of a category below the root, at most: <category>, VisA_pytorch/1cls/<category>, MANTA/<domain>/<category>


def scan(root: str | os.PathLike, layout: str = "auto", need: str | None = None) -> Catalogue:
    """List the samples of a data set.

    layout, which ``"auto"`` tells from the folder itself:

    - ``"mvtec"``: ``<category>/train/good/*``, ``<category>/test/<kind>/*``,
      ``<category>/ground_truth/<kind>/<name>_mask.png``, where the categories lie in ``root`` or up to three levels
      below, or ``root`` is one itself. Known too: good images called ok or normal (BTAD), a mask ``<name>.*`` (VisA
      converted, BTAD, MANTA), a folder of masks ``<name>/*`` (MVTec LOCO), ``test_public/<kind>/*`` with
      ``test_public/ground_truth/<kind>/*`` (MVTec AD 2), and ``<kind>/img/*`` with ``<kind>/label/*`` (BMAD).
      Images that lie in ``train`` itself, beside ``test``, are good. ``validation`` folders are not used. Whether
      these names are written in capitals or not makes no difference.
    - ``"visa"``: VisA as published, ``split_csv/1cls.csv`` and the files it names.
    - ``"real-iad"``: Real-IAD and Real-IAD Variety as published, one JSON file per category and the images of one
      resolution (the largest there is). A view of a defective object in which no defect is marked counts as good, as
      in the published figures.
    - ``"plain"``: good images only, nested or flat. Each first-level folder is a category, but for one that holds other
      files only; images that lie in ``root`` itself make up a category of its name. A folder named as those of
      defects and masks are (NG, Anomaly, Masks, ...) is refused, and so is one of several kinds beside
      ``ground_truth``.

    Files are images by their suffix; which open is for :func:`dpdiff.data.check` to tell. The order is natural
    (2 before 10) and the same on every machine.

    need: ``"train"`` refuses a category without training images, ``"test"`` a data set without test images, None
    only one without any image. All but ``"train"`` refuse images that lie in ``test`` itself, which nothing tells to be
    good or defective, and a kind of defect whose masks all have other names than its images.

    Raises FileNotFoundError for a missing folder and ValueError for one that holds no such data set, in one line.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"data folder {root} is a file, not a folder")
    layouts = {
        "mvtec": partial(scan_mvtec, need=need),
        "visa": scan_visa,
        "real-iad": scan_real_iad,
        "plain": scan_plain,
    }
    if layout != "auto" and layout not in layouts:
        raise ValueError(f"layout is {layout!r}: expected one of auto, {', '.join(layouts)}")
    if need not in (None, "train", "test"):
        raise ValueError(f"need is {need!r}: expected 'train', 'test' or None")
    if layout == "auto":
        layout = _recognise(root)
    catalogue = layouts[layout](root)

    if need == "train":
        trained = {sample.category for sample in catalogue.train}
        empty = [category for category in catalogue.categories if category not in trained]
        if empty:
            more = f" (and {len(empty) - 1} more categories)" if len(empty) > 1 else ""
            raise ValueError(f"category {empty[0]!r} of {root} has no training images{more}")
    if not catalogue.train and not catalogue.test:
        raise ValueError(f"data folder {root} holds no image")
    if need == "test" and not catalogue.test:
        raise ValueError(f"data folder {root} holds no test image: expected <category>/test/<kind>/*")
    return catalogue


def _recognise(root: Path) -> str:
    if is_visa(root):
        return "visa"
    if is_real_iad(root):
        return "real-iad"
    if _find_categories(root, _DEPTH):
        return "mvtec"
    return "plain"


# MVTec-AD style


def scan_mvtec(root: Path, need: str | None = None) -> Catalogue:
    folders = _find_categories(root, _DEPTH)
    parents = {folder.parent for folder in folders}
    if root in folders:
        named = {root.resolve().name: root}
    else:
        folders += [folder for parent in parents for folder in _empty_folders(parent)]
        # Where all lie in one folder, their own names tell them apart (VisA/1cls/candle: candle).
        named = {f.name if len(parents) == 1 else f.relative_to(root).as_posix(): f for f in folders}
    catalogue = Catalogue(categories=sorted(named, key=natural_key))
    for category in catalogue.categories:
        catalogue.train += [Sample(image, category) for image in _training_images(named[category])]
        catalogue.test += _test_samples(named[category], category, need)
    return catalogue


def _find_categories(folder: Path, depth: int) -> list[Path]:
    """The folders at or below ``folder`` that have train/good, test/<kind>, or train beside test.

    One of these two alone, without kinds, may be a class of images.
    """
    children = subfolders(folder)
    tests, train = _tests(children), _named(children, "train")
    split = train and (tests or any(_is_good(kind) for kind in subfolders(train)))
    if split or any(subfolders(test) for test in tests):
        return [folder]
    if depth == 0:
        return []
    return [found for child in children for found in _find_categories(child, depth - 1)]


def _empty_folders(parent: Path) -> list[Path]:
    """Those without any file. Beside categories they were meant to be such and aren't to be passed by in silence."""
    return [folder for folder in subfolders(parent) if not any(files for _, _, files in os.walk(folder))]


def _named(folders: Iterable[Path], name: str) -> Path | None:
    """The one of this name, in its own case if there is such."""
    same = [folder for folder in folders if folder.name.lower() == name.lower()]
    return min(same, key=lambda folder: folder.name != name, default=None)


def _tests(children: list[Path]) -> list[Path]:
    return [test for name in _TEST_NAMES if (test := _named(children, name))]


def _is_good(kind: Path) -> bool:
    return kind.name.lower() in _GOOD_NAMES


def _training_images(category: Path) -> list[Path]:
    train = _named(subfolders(category), "train")
    if not train:
        return []
    kinds = subfolders(train)
    folders = [kind for kind in kinds if _is_good(kind)] if kinds else [train]
    return [image for folder in folders for image in walk_images(folder)]


def _test_samples(category: Path, name: str, need: str | None) -> list[Sample]:
    samples = []
    children = subfolders(category)
    for test in _tests(children):
        kinds = subfolders(test)
        if not kinds and need != "train" and any(walk_images(test)):
            expected = f"{test.name}/good/* and {test.name}/<kind>/*"
            raise ValueError(f"images lie loose in {test}: expected {expected}; if all are good, give {test} alone")
        for kind in kinds:
            if _is_good(kind):
                images = _named(subfolders(kind), "img") or kind
                samples += [Sample(image, name) for image in walk_images(images)]
            elif kind.name.lower() != _MASKS:  # which lies beside the kinds in MVTec AD 2
                samples += _defects(kind, [_named(kinds, _MASKS), _named(children, _MASKS)], name, need)
    return samples


def _defects(kind: Path, ground_truths: list[Path | None], name: str, need: str | None) -> list[Sample]:
    parts = subfolders(kind)
    images = _named(parts, "img")
    if images:
        masks = _named(parts, "label")
    else:
        images = kind
        masks = next((m for g in ground_truths if g and (m := _named(subfolders(g), kind.name))), None)
    found = _masks_by_name(masks) if masks else {}
    samples = []
    for image in walk_images(images):
        stem = image.relative_to(images).with_suffix("").as_posix()
        samples.append(Sample(image, name, kind.name, 1, found.get(f"{stem}_mask") or found.get(stem)))
    if found and samples and need != "train" and not any(sample.mask for sample in samples):
        mask = next(iter(found.values()))
        raise ValueError(f"mask {mask} matches no image in {images}: expected a name like {stem}_mask.* or {stem}.*")
    return samples


def _masks_by_name(folder: Path) -> dict[str, Path]:
    """Masks by their path without suffix; by that of their folder too, whose masks then are one (MVTec LOCO)."""
    found = {}
    for mask in walk_images(folder):
        found[mask.relative_to(folder).with_suffix("").as_posix()] = mask
        if mask.parent != folder:
            found.setdefault(mask.parent.relative_to(folder).as_posix(), mask.parent)
    return found


# A plain folder

# Names of folders that hold no good images.
_NOT_GOOD = re.compile(
    r"ng|bad|abnormal|anomal(y|ies|ous)|defect(?![ _-]?free).*|masks|ground[ _-]?truth", re.IGNORECASE
)
_BESIDE_MASKS = {"train", "validation", *_GOOD_NAMES}  # what holds good images all the same
_EXPECTED = "the folder that holds the whole data set, its splits too, or one of good images alone"


def scan_plain(root: Path) -> Catalogue:
    own, around = root.resolve().name, root.resolve().parent
    beside = subfolders(around) if os.access(around, os.R_OK) else []
    marked = _named(beside, _MASKS)  # as there is beside the test images of a category
    train = []
    for image in walk_images(root):
        inside = image.relative_to(root).parts
        if any(_NOT_GOOD.fullmatch(folder) for folder in inside[:-1]):
            raise ValueError(f"{image.parent} seems to hold defective images or masks: expected {_EXPECTED}")
        category = inside[0] if len(inside) > 1 else own
        if marked and not {own.lower(), category.lower()} & _BESIDE_MASKS:
            raise ValueError(f"{image.parent} may hold defective images, as {marked} has masks: expected {_EXPECTED}")
        train.append(Sample(image, category))
    categories = {folder.name for folder in _empty_folders(root)} | {sample.category for sample in train}
    return Catalogue(train, [], sorted(categories, key=natural_key))
