"""torchvision's sets as image files: made of files in their formats, small ones."""

import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dpdiff.data import check, scan
from dpdiff.data.torchvision_sets import SETS, unpack

N = {"train": 6, "test": 4}


def pixels(split: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(len(split)).integers(0, 256, (N[split], *shape), dtype=np.uint8)


def write_mnist(folder):
    """The format of idx files: a magic number, the sizes, the bytes."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        images = pixels(split, 28, 28)
        sizes = np.array([2051, *images.shape], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
        labels = np.array([2049, N[split]], ">i4").tobytes() + bytes(N[split])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, cls, label_key):
    """One file per split, whose MD5 sums torchvision is told to expect."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    for split in N:
        batch = {"data": pixels(split, 3, 32, 32).reshape(N[split], -1), label_key: [0] * N[split]}
        (folder / split).write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(cls, f"{split}_list", [[split, md5(folder / split)]])
    (folder / "meta").write_bytes(pickle.dumps({"names": ["thing"]}))
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": "names", "md5": md5(folder / "meta")})


def write_svhn(root, monkeypatch):
    sums = {}
    for split in N:
        file = root / f"{split}_32x32.mat"
        savemat(file, {"X": pixels(split, 3, 32, 32).transpose(2, 3, 1, 0), "y": np.ones((N[split], 1), np.uint8)})
        sums[split] = ["", file.name, md5(file)]
    monkeypatch.setattr(SETS["svhn"], "split_list", sums)


@pytest.fixture(params=SETS)
def kept(request, tmp_path, monkeypatch):
    """A set's name, its root, and pixels (N, C, H, W) by split."""
    root, name = tmp_path / "root", request.param
    root.mkdir()
    if name in ("mnist", "fashionmnist"):
        write_mnist(root / SETS[name].__name__)
    elif name == "svhn":
        write_svhn(root, monkeypatch)
    else:
        write_cifar(root, monkeypatch, SETS[name], "labels" if name == "cifar10" else "fine_labels")
    shape = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    return name, root, {split: pixels(split, *shape) for split in N}


def test_every_pixel_of_every_set(kept, tmp_path):
    name, root, expected = kept
    catalogue = scan(unpack(name, root, tmp_path / "cache"))
    assert len(catalogue.categories) == 1 and all(sample.label == 0 for sample in catalogue.test)
    assert not check(catalogue.train + catalogue.test)[1]
    for split, samples in (("train", catalogue.train), ("test", catalogue.test)):
        found = np.stack([np.array(Image.open(sample.image)) for sample in samples])
        found = found[:, None] if found.ndim == 3 else found.transpose(0, 3, 1, 2)
        assert np.array_equal(found, expected[split])


def test_unpacked_once(kept, tmp_path, monkeypatch):
    name, root, _ = kept
    folder = unpack(name, root, tmp_path / "cache")
    monkeypatch.setitem(SETS, name, None)
    assert unpack(name, root, tmp_path / "cache") == folder


def test_one_split_is_enough_and_the_other_may_follow(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    train = tmp_path / "train_32x32.mat"
    hidden = train.rename(tmp_path / "hidden")
    catalogue = scan(unpack("svhn", tmp_path, tmp_path / "cache"))
    assert (len(catalogue.train), len(catalogue.test)) == (0, N["test"])
    hidden.rename(train)
    catalogue = scan(unpack("svhn", tmp_path, tmp_path / "cache"))
    assert (len(catalogue.train), len(catalogue.test)) == (N["train"], N["test"])


def test_what_is_not_there_or_damaged(tmp_path, monkeypatch):
    for name in SETS:
        with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
            unpack(name, tmp_path, tmp_path / "cache")
    write_cifar(tmp_path, monkeypatch, SETS["cifar10"], "labels")
    for split in N:
        (tmp_path / SETS["cifar10"].base_folder / split).write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="damaged"):
        unpack("cifar10", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_interrupted_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    write_mnist(tmp_path / "MNIST")
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, path, **kw: 1 / (path.stem != "000002") and save(self, path, **kw)
    )
    with pytest.raises(ZeroDivisionError):
        unpack("mnist", tmp_path, tmp_path / "cache")
    monkeypatch.undo()
    assert len(scan(unpack("mnist", tmp_path, tmp_path / "cache")).train) == N["train"]
