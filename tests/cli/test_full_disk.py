"""A disk that is really full: one line, exit code 1, and nothing partial under its final name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def disk(tmp_path):
    """Makes a file system of so many bytes, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: str) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(mount, capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount on this system")
        if done.returncode:
            pytest.skip("mounting needs the rights to")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


MESSAGE = "dpdiff: error: the disk is full: free some space and run the command again"


@pytest.mark.parametrize("room", [pytest.param("64k", id="features"), pytest.param("2m", id="checkpoint"), "5m"])
def test_training(disk, data, tiny, room):
    out = disk(room) / "run"
    options = ["--data", data, "--out", out, "--steps", "2", "--checkpoint-interval", "2", *tiny]
    # A process of its own, for what a full disk does to mapped memory is a signal.
    done = subprocess.run([sys.executable, "-m", "dpdiff", "train", *options], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"{MESSAGE}\n")
    assert not (out / "model.safetensors").exists()
    if (out / "last.ckpt").exists():
        torch.load(out / "last.ckpt", weights_only=True)


def test_prediction_and_evaluation(dpdiff, disk, data, weights):
    full = disk("16k")
    (full / "filler").write_bytes(bytes(12 * 1024))
    predicted = dpdiff("predict", data, "--weights", weights, "--out", full / "out")
    assert (predicted.code, predicted.error) == (1, MESSAGE)
    evaluated = dpdiff("evaluate", "--data", data, "--weights", weights, "--report", full / "report.html")
    assert (evaluated.code, evaluated.error) == (1, MESSAGE)
    assert not list(full.rglob("*.csv")) and not list(full.rglob("*.html"))
