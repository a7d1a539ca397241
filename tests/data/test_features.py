"""The cache of feature maps: equal to the backbone, reused, renewed when anything changes, whole or not there."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from dpdiff.backbones import Backbone
from dpdiff.data import Sample, load_image
from dpdiff.data import features as module
from dpdiff.data.features import FeatureCache


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone("test_resnet", pretrained=False)


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (80, 72, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(path, "things"))
    return samples


@pytest.fixture
def cached(tmp_path, backbone, samples, monkeypatch):
    """Makes a cache and says whether images went through the backbone for it."""
    runs = []
    extract = module._extract
    monkeypatch.setattr(module, "_extract", lambda *args: runs.append(1) or extract(*args))

    def make(samples=samples, backbone=backbone, image_size=64, **options):
        runs.clear()
        cache = FeatureCache(samples, backbone, image_size, tmp_path / "features", **options)
        return cache, bool(runs)

    return make


@pytest.mark.parametrize("options", [dict(), dict(batch_size=3), dict(num_workers=2)])
def test_items_are_the_feature_maps_in_half_precision(cached, backbone, samples, options):
    cache, computed = cached(**options)
    assert computed and len(cache) == 7
    for i, sample in enumerate(samples):
        with torch.no_grad():
            expected = backbone(load_image(sample.image, 64)[None])
        assert len(cache[i]) == len(expected)
        for got, want in zip(cache[i], expected):
            assert got.dtype == torch.float32 and got.shape == want.shape[1:]
            torch.testing.assert_close(got, want[0], rtol=2e-3, atol=2e-3)


def test_second_use_reads_what_the_first_wrote(cached):
    first, _ = cached()
    items = [first[i] for i in range(7)]
    second, computed = cached()
    assert not computed
    for i in range(7):
        torch.testing.assert_close(second[i], items[i], rtol=0, atol=0)


def test_items_can_be_changed_without_changing_the_cache(cached):
    cache, _ = cached()
    before = cache[0][0].clone()
    cache[0][0].zero_()
    assert torch.equal(cache[0][0], before)


def other_weights(make, samples, backbone):
    next(backbone.model.parameters()).data[0] += 1e-3
    return make(backbone=backbone)


def other_layers(make, samples, backbone):
    torch.manual_seed(0)
    return make(backbone=Backbone("test_resnet", layers=[1, 2], pretrained=False))


def other_content(make, samples, backbone):
    """Of a file whose size and time stay."""
    path = samples[2].image
    status, content = path.stat(), path.read_bytes()
    for last in (b"0", b"1"):
        path.write_bytes(content + last)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        made = make()
    return made


CHANGES = {
    "image size": lambda make, samples, backbone: make(image_size=48),
    "one image less": lambda make, samples, backbone: make(samples=samples[:-1]),
    "another order": lambda make, samples, backbone: make(samples=samples[::-1]),
    "content of an image": other_content,
    "other weights": other_weights,
    "other layers": other_layers,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_makes_a_new_cache(cached, samples, backbone, change):
    old, _ = cached()
    new, computed = CHANGES[change](cached, samples, backbone)
    assert computed
    assert new.path != old.path
    assert not old.path.exists()  # its space is free again


def test_a_file_of_others_in_the_folder_is_left_alone(cached, samples, tmp_path):
    cached()
    theirs = tmp_path / "features" / ".DS_Store"
    theirs.write_bytes(b"of a file browser")
    assert cached(samples=samples[:-1])[1] and theirs.exists()


def test_the_same_images_elsewhere_are_known(cached, samples, tmp_path):
    cached()
    moved = [Sample(sample.image.rename(tmp_path / f"moved-{i}.png"), "things") for i, sample in enumerate(samples)]
    moved[0].image.touch()
    assert not cached(samples=moved)[1]


def test_an_interrupted_run_leaves_nothing(cached, tmp_path, samples):
    def interrupted(loader):
        for i, batch in enumerate(loader):
            if i == 1:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        cached(batch_size=3, progress=interrupted)
    assert list((tmp_path / "features").iterdir()) == []
    cache, computed = cached()
    assert computed and len(cache) == 7


def test_what_a_killed_run_left_is_not_taken_for_a_cache(cached, tmp_path):
    left = tmp_path / "features" / ".partial-abc"
    left.mkdir(parents=True)
    (left / "2.npy").write_bytes(b"half")
    _, computed = cached()
    assert computed
    assert not left.exists()


def test_an_unreadable_image_is_named(cached, samples):
    samples[4].image.write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"cannot read image .*4\.png"):
        cached()


def test_progress_sees_every_batch(cached):
    seen = []

    def progress(loader):
        for batch in loader:
            seen.append(len(batch["image"]))
            yield batch

    cached(batch_size=3, progress=progress)
    assert seen == [3, 3, 1]
