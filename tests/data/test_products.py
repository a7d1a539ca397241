import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from dpdiff.data import check, load_mask, products, scan
from dpdiff.data.products import Category, Products, render_category
from dpdiff.data.products.canvas import Damage, Draw, blur, cos, sin, turn
from dpdiff.data.products.category import _DEFECTIVE, OBJECTS, SURFACES
from dpdiff.data.products.defects import KINDS

SMALL = {"size": 48, "n_train": 3, "n_good": 2, "n_defective": 4}
# Of the pixels of 100 good images, 100 defective ones and their masks. A change of any needs another products._VERSION.
SHA256 = "3c0c7d80f1aa3cbfe67a0061257f6ee94f5c9b6b86ecc827721f6951990312c9"


def files(folder):
    found = (Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_same_pixels_on_any_machine():
    digest, families, kinds = hashlib.sha256(), set(), set()
    for index in range(100):
        category = Category(seed=0, index=index)
        kind, image, mask = category.defective(index, size=40)
        digest.update(category.name.encode() + category.good("train", 0, size=40).tobytes())
        digest.update(kind.encode() + image.tobytes() + mask.tobytes())
        families.add(category.name.split("_", 1)[1].rsplit("_", 1)[0])
        kinds.add(kind)
    assert families == {family.__name__ for family in OBJECTS + SURFACES}
    assert kinds == set(KINDS)
    assert digest.hexdigest() == SHA256


def test_seeds_differ():
    one, other = (Category(seed, 3).good("train", 0, size=40) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_layout_is_read_by_scan(tmp_path):
    made = Products(3, root=tmp_path, **SMALL)
    found = scan(made.root)
    assert sorted(found.categories) == sorted(made.categories)
    assert len(found.train) == 3 * 3
    assert [sum(sample.label == label for sample in found.test) for label in (0, 1)] == [3 * 2, 3 * 4]
    assert {sample.kind for sample in found.test if sample.label} <= set(KINDS)
    assert check(found.train + found.test)[1] == []
    for sample in found.test:
        if sample.label:
            mask = load_mask(sample.mask)
            assert mask.shape == (48, 48)
            assert 0 < mask.sum() < mask.numel() / 2


def test_categories_and_images_do_not_depend_on_how_many_there_are(tmp_path):
    few = Products(2, root=tmp_path / "few", **SMALL)
    more = Products(4, root=tmp_path / "more", **SMALL | {"n_train": 5, "n_good": 4, "n_defective": 6}, workers=1)
    assert more.categories[:2] == few.categories
    for name in few.categories:
        one, other = files(few.root / name), files(more.root / name)
        assert one == {path: other[path] for path in one}
        assert len(other) == 5 + 4 + 2 * 6


def test_a_range_of_categories(tmp_path):
    first, rest = Products(1, root=tmp_path, **SMALL), Products(2, root=tmp_path, first=1, **SMALL)
    assert first.categories + rest.categories == Products(3, root=tmp_path, **SMALL).categories
    assert sorted(path.name for path in rest.root.iterdir()) == sorted(rest.categories)
    assert Products(2, root=tmp_path, **SMALL).root != rest.root
    with pytest.raises(ValueError, match="first is -1: expected at least 0"):
        Products(2, root=tmp_path, first=-1, **SMALL)


def test_rendered_once_and_shared_by_every_number_of_categories(tmp_path, monkeypatch):
    more = Products(4, root=tmp_path, **SMALL)
    monkeypatch.setattr(products, "render_category", None)
    few = Products(2, root=tmp_path, **SMALL)
    assert sorted(path.name for path in few.root.iterdir()) == sorted(few.categories) == sorted(more.categories[:2])
    assert scan(few.root).categories == sorted(few.categories)
    assert Products(4, root=tmp_path, **SMALL).root == more.root


def test_number_of_processes_changes_nothing(tmp_path):
    alone = Products(5, root=tmp_path / "alone", workers=1, **SMALL)
    shared = Products(5, root=tmp_path / "shared", workers=3, **SMALL)
    assert files(alone.root) == files(shared.root)


def test_specimens_vary():
    category = Category(seed=0, index=4)
    images = [category.good(split, number, 40) for split in ("train", "test") for number in range(2)]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_masks_hold_what_differs_from_the_specimen_without_the_defect(kind):
    for index in range(12):
        category = Category(seed=0, index=index)
        category.kinds = [kind]
        _, image, mask = category.defective(0, size=96)
        sound, light = category._specimen(Draw(0, index, _DEFECTIVE, 0), 96, Damage())
        change = abs(image.transpose(2, 0, 1) - sound.photograph(light)).max(axis=0)
        assert change[mask].max() > 6  # it shows
        assert change[mask].mean() > 4 * change[~mask].mean()
        strong = change > 40  # beside the mask only its shadow, or a glint on its edge
        near = blur(mask.astype(np.float32), 4) > 0
        assert (strong & near).sum() >= 0.95 * strong.sum()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_category(tmp_path, monkeypatch, workers):
    saved = products._save

    def full(pixels, path):
        if Category(0, 1).name in str(path) and path.parent.name in KINDS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved(pixels, path)

    monkeypatch.setattr(products, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        Products(2, root=tmp_path, workers=workers, **SMALL)
    store = next(tmp_path.iterdir()) / "all"
    assert not (store / Category(0, 1).name).exists()
    monkeypatch.undo()
    made = Products(2, root=tmp_path, workers=workers, **SMALL)
    assert len(files(made.root)) == 2 * (3 + 2 + 2 * 4)
    assert not [p for p in store.iterdir() if p.name.startswith(".")]


def test_resumes_after_a_kill(tmp_path):
    script = f"from dpdiff.data.products import Products; Products(60, root={str(tmp_path)!r}, size=96, workers=2)"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(done := list(tmp_path.glob("*/all/[!.]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(done) >= 3
    for folder in tmp_path.glob("*/all/[!.]*"):
        assert len(files(folder)) == 16 + 8 + 2 * 8
    number = len(list(tmp_path.glob("*/all/[!.]*"))) + 2
    made = Products(number, root=tmp_path, size=96)
    assert len(files(made.root)) == number * (16 + 8 + 2 * 8)


def test_what_a_killed_run_left_is_removed_when_it_is_old(tmp_path):
    store = next(Products(1, root=tmp_path, **SMALL).root.parent.glob("all"))
    for name in (".old", ".new"):
        (store / name).mkdir()
    os.utime(store / ".old", (0, 0))
    (store / ".finished").symlink_to("elsewhere")  # as if it were renamed between its being listed and looked at
    Products(1, root=tmp_path, **SMALL)
    assert sorted(path.name for path in store.glob(".*")) == [".finished", ".new"]


def test_two_runs_at_once_agree(tmp_path):
    render_category(0, 0, tmp_path / "a", 40, (1, 1, 4))
    before = files(tmp_path / "a")
    render_category(0, 0, tmp_path / "a", 40, (1, 1, 4))
    assert files(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("variable", "inside"), [("DPDIFF_CACHE", ""), ("XDG_CACHE_HOME", "dpdiff")])
def test_cache_folder(tmp_path, monkeypatch, variable, inside):
    monkeypatch.delenv("DPDIFF_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert Products(1, **SMALL).root.is_relative_to(tmp_path / inside / "products")


@pytest.mark.parametrize("bad", [{"n_categories": 0}, {"seed": -1}, {"size": 16}, {"n_train": 0}, {"n_defective": -1}])
def test_numbers_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))} is -?\d+: expected at least \d+"):
        Products(root=tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_own_functions_are_what_they_say():
    angle = np.linspace(-20, 20, 10001, dtype=np.float32)
    np.testing.assert_allclose(cos(angle), np.cos(angle.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(sin(angle), np.sin(angle.astype(np.float64)), atol=1e-5)
    assert type(cos(1.0)) is float
    assert cos(angle).dtype == np.float32
    x, y = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    np.testing.assert_allclose(turn(x, y), np.arctan2(y, x) / (2 * np.pi), atol=1e-5)
    image = np.random.default_rng(0).random((30, 20), dtype=np.float32)
    np.testing.assert_allclose(blur(image, 2), uniform_filter(image.astype(np.float64), 5, mode="nearest"), atol=2e-5)
    # The published first outputs of PCG64 behind NumPy's SeedSequence never change.
    draw = Draw(12345)
    assert [draw.integer(0, 2**63) for _ in range(2)] == [
        int(word) % (2**63 + 1) for word in np.random.PCG64(12345).random_raw(2)
    ]
