"""A tiny data set, a tiny trained model, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dpdiff.cli import main

SIZE = 72  # pixels of an image; the model's own is 64, so that everything is resized
TINY = "--image-size 64 --batch-size 4 --set n_local=16 --set n_global=8 --set dim=32 --set num_heads=2 --set depth=1"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error may print."""
        assert self.err.startswith("dpdiff: error: ") and self.err.count("\n") == 1, self.err
        return self.err.rstrip("\n")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dpdiff(capsys, monkeypatch) -> Callable[..., Outcome]:
    """`dpdiff("info", "--weights", path)` runs the command line."""
    monkeypatch.setenv("DPDIFF_DEBUG", "")  # set, so that --debug is undone after the test

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of a model that trains in no time."""
    return TINY.split()


@pytest.fixture(scope="session")
def make_data() -> Callable[[Path], Path]:
    return _make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two categories in the MVTec AD layout, a bright hole as the defect."""
    return _make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory, data, tiny) -> Path:
    """Four steps on `data` teach the denoiser nothing: maps are the local prototypes' alone."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--steps", "4", *tiny, "--set", "local_weight=1"]
    assert main(["train", "--data", str(data), "--out", str(out), *options]) == 0
    return out / "model.safetensors"


def _make_data(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for category, base in (("bolt", 90), ("cloth", 150)):
        for folder, n in (("train/good", 6), ("test/good", 3), ("test/hole", 3)):
            for i in range(n):
                pixels = rng.normal(base, 12, (SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)
                if folder == "test/hole":
                    y, x = rng.integers(0, SIZE - 20, 2)
                    pixels[y : y + 20, x : x + 20] = 255
                    mask = np.zeros((SIZE, SIZE), np.uint8)
                    mask[y : y + 20, x : x + 20] = 255
                    _save(mask, root / category / "ground_truth" / "hole" / f"{i:03d}_mask.png")
                _save(pixels, root / category / folder / f"{i:03d}.png")
    return root


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
