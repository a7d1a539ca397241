"""Data sets whose splits are written in a file: VisA and Real-IAD, as published."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dpdiff.data.samples import Catalogue, Sample, natural_key, subfolders

_VISA_SPLIT = Path("split_csv", "1cls.csv")
_VISA_DEFECTS = Path("Data", "Images", "Anomaly")  # of a category


def is_visa(root: Path) -> bool:
    """Whether ``root`` is VisA as published, one category of it, or the folder around it; without its split too, lest
    defective images be taken for good ones."""
    inside = subfolders(root)
    folders = (root, *inside, *(f for folder in inside for f in subfolders(folder)))
    return (root / _VISA_SPLIT).is_file() or any((f / _VISA_DEFECTS).is_dir() for f in folders)


def scan_visa(root: Path) -> Catalogue:
    """VisA: rows of object, split (train, test), label (normal, anomaly), image, mask."""
    split = root / _VISA_SPLIT
    if not split.is_file():
        near = next((f for f in (root.absolute().parent, *subfolders(root)) if (f / _VISA_SPLIT).is_file()), None)
        instead = f"; give {near}, which has it" if near else ""
        raise FileNotFoundError(f"VisA folder {root} lacks {_VISA_SPLIT}, which says what to train on{instead}")
    catalogue = Catalogue()
    with split.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"object", "split", "label", "image", "mask"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{split} lacks the columns {', '.join(sorted(missing))}")
        for row in rows:
            if None in row.values():
                raise ValueError(f"{split}, line {rows.line_num}, lacks columns: expected {', '.join(rows.fieldnames)}")
            image, category = _inside(root, row["image"], split), row["object"]
            if row["label"] == "normal":
                samples = catalogue.train if row["split"] == "train" else catalogue.test
                samples.append(Sample(image, category))
            elif row["split"] == "test":
                mask = _inside(root, row["mask"], split) if row["mask"] else None
                catalogue.test.append(Sample(image, category, row["label"], 1, mask))
    return _ordered(catalogue, (s.category for s in (*catalogue.train, *catalogue.test)))


def is_real_iad(root: Path) -> bool:
    """Whether there are its lists. JSON files of other kinds may lie beside images too; of its own, some be damaged."""
    return any(_is_real_iad_list(files[0]) for files in _json_folders(root))


def _is_real_iad_list(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"train", "test"} <= content.keys()


def scan_real_iad(root: Path) -> Catalogue:
    """Real-IAD: ``<lists>/<category>.json`` with the lists ``train`` and ``test`` of ``image_path``, ``mask_path`` and
    ``anomaly_class``, whose paths are relative to the category's folder among the images."""
    folders = _json_folders(root)
    if not folders:
        raise FileNotFoundError(f"Real-IAD folder {root} lacks its lists, realiad_jsons/<category>.json")
    lists = folders[0]
    catalogue = Catalogue()
    for file in lists:
        category = file.stem
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            normal = content.get("meta", {}).get("normal_class", "OK")
            train = [e["image_path"] for e in content["train"] if e["anomaly_class"] == normal]
            test = [(e["image_path"], e["anomaly_class"], e.get("mask_path")) for e in content["test"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a Real-IAD list: {type(error).__name__}: {error}") from None
        named = train + [image for image, _, _ in test]
        if not named:
            continue
        folder = _real_iad_images(root, category, named[0])
        if folder is None:
            raise FileNotFoundError(f"{file} lists {named[0]}, which is in no folder {category} of {root}")
        masked = any(mask for _, _, mask in test)
        catalogue.train += [Sample(_inside(folder, image, file), category) for image in train]
        for image, kind, mask in test:
            image = _inside(folder, image, file)
            if kind == normal or (masked and not mask):  # no defect, or none to be seen from this side
                catalogue.test.append(Sample(image, category))
            else:
                mask = _inside(folder, mask, file) if mask else None
                catalogue.test.append(Sample(image, category, kind, 1, mask))
    return _ordered(catalogue, (file.stem for file in lists))


def _json_folders(root: Path) -> list[list[Path]]:
    """The JSON files of each folder of such. There are several (single-view, noisy); first comes the plain one."""
    folders = [f for child in subfolders(root) if "json" in child.name.lower() for f in (child, *subfolders(child))]
    found = [sorted(f.glob("*.json"), key=lambda p: natural_key(p.name)) for f in folders]
    return sorted(filter(None, found), key=lambda files: len(files[0].parent.name))


def _real_iad_images(root: Path, category: str, image: str) -> Path | None:
    """The folder that ``image`` is relative to: ``realiad_1024/<category>``, where unpacking may nest it once more."""
    for base in (*reversed(subfolders(root)), root):  # realiad_1024 before realiad_512 before realiad_256
        for folder in (base / category, base / category / category, base):
            if (folder / image).is_file():
                return folder
    return None


def _inside(folder: Path, path: str, source: Path) -> Path:
    """``folder / path``, refusing a path that leads out of the data set."""
    if not isinstance(path, str):
        raise ValueError(f"{source} names {path!r}: expected a path")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{source} names {path!r}, which lies outside of {folder}")
    return folder / path


def _ordered(catalogue: Catalogue, categories: Iterable[str]) -> Catalogue:
    catalogue.categories = sorted(set(categories), key=natural_key)
    number = {category: i for i, category in enumerate(catalogue.categories)}
    for samples in (catalogue.train, catalogue.test):
        samples.sort(key=lambda s: (number[s.category], s.label, s.kind, natural_key(s.image.as_posix())))
    return catalogue
