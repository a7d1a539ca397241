"""`dpdiff train`: what it writes, resuming, and what it refuses before any work."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dpdiff as package


@pytest.fixture
def train(dpdiff, data, tiny, tmp_path):
    """Runs `dpdiff train` for four steps on `data`, into tmp_path / "run" unless told otherwise."""

    def run(*options: object, **named: object):
        values = {"data": data, "out": tmp_path / "run", "steps": 4} | named
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        return dpdiff("train", *flags, *tiny, *options)

    return run


def test_writes_a_model_of_the_options_given(train, tmp_path):
    outcome = train("--layers", "2,4", "--set", "local_weight=0.5", "--set", "condition=false")
    assert outcome.code == 0 and not outcome.err
    assert "12 images" in outcome.out and "categories: 2" in outcome.out
    model = package.load(tmp_path / "run" / "model.safetensors")
    expected = {"layers": [2, 4], "image_size": 64, "n_local": 16, "local_weight": 0.5, "condition": False}
    assert {name: model.config[name] for name in expected} == expected


def test_a_plain_folder_will_do(train, data, tmp_path):
    assert train(data=data / "bolt" / "train").code == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_rendered_products_will_do(train, tmp_path, monkeypatch):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    outcome = train(data="products:1:7")
    assert outcome.code == 0
    assert "16 images" in outcome.out
    assert list((tmp_path / "cache").rglob("train/good/*.png"))


def test_the_same_run_again_is_done_and_another_is_refused(train, tmp_path):
    train()
    weights = tmp_path / "run" / "model.safetensors"
    before = weights.stat().st_mtime_ns

    again = train()
    assert again.code == 0 and "--no-resume" in again.out
    other = train(steps=5)
    assert other.code == 2 and "max_steps 4 (now 5)" in other.error and "--no-resume" in other.error
    assert weights.stat().st_mtime_ns == before

    anew = train("--no-resume", steps=5)
    assert anew.code == 0 and "Trained" in anew.out
    assert weights.stat().st_mtime_ns > before
    assert json.loads((tmp_path / "run" / "options.json").read_text())["max_steps"] == 5


def test_a_run_of_more_images_is_another(train, data, tmp_path):
    shutil.copytree(data / "bolt/train/good", tmp_path / "photos")
    assert train(data=tmp_path / "photos").code == 0
    shutil.copy(next((tmp_path / "photos").iterdir()), tmp_path / "photos" / "one_more.png")
    outcome = train(data=tmp_path / "photos")
    assert outcome.code == 2 and "images" in outcome.error and "--no-resume" in outcome.error


def test_training_that_diverges_writes_no_model(train, tmp_path):
    outcome = train("--lr", "1e30", steps=12)
    assert outcome.code == 2 and "training diverged" in outcome.error
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("record", [None, "[]", "{"])
def test_a_model_of_unknown_origin_is_not_overwritten(train, weights, tmp_path, record):
    (tmp_path / "run").mkdir()
    shutil.copy(weights, tmp_path / "run")
    if record:
        (tmp_path / "run" / "options.json").write_text(record)
    outcome = train()
    assert outcome.code == 2 and "--no-resume" in outcome.error


def test_goes_on_after_every_way_to_be_stopped(data, tiny, tmp_path):
    out = tmp_path / "run"
    options = ["--data", str(data), "--out", str(out), "--steps", "60", "--checkpoint-interval", "15", *tiny]
    command = [sys.executable, "-m", "dpdiff", "train", *options]
    checkpoint = out / "last.ckpt"

    def run_until_checkpoint(ending: signal.Signals) -> tuple[int, str, str]:
        before = saved_at()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while process.poll() is None and saved_at() == before:
                time.sleep(0.01)
            process.send_signal(ending)
        finally:
            output = process.communicate(timeout=60)
        assert not (out / "model.safetensors").exists(), "it was over before the signal"
        return process.returncode, *output

    def saved_at() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    code, stdout, stderr = run_until_checkpoint(signal.SIGINT)
    assert "Training DPDiffAD" in stdout
    assert (code, stderr) == (130, "dpdiff: interrupted\n")
    assert run_until_checkpoint(signal.SIGTERM)[::2] == (143, "dpdiff: interrupted\n")
    code, stdout, stderr = run_until_checkpoint(signal.SIGKILL)
    assert "Going on with DPDiffAD" in stdout
    assert (code, stderr) == (-signal.SIGKILL, "")

    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Going on with DPDiffAD" in done.stdout
    package.load(out / "model.safetensors")


REFUSED = {
    "unknown backbone": (["--backbone", "tf_efficientnet_lite9"], "did you mean tf_efficientnet_lite4"),
    "layer that isn't there": (["--layers", "2,30"], "layers"),
    "layers that are none": (["--layers", "two"], "layers is 'two': expected integers like 2,3 or none"),
    "missing backbone weights": (["--backbone-weights", "no.pth"], "no.pth"),
    "unknown option": (["--set", "n_locals=3"], "did you mean n_local"),
    "value of another type": (["--set", "k=1.5"], "k is '1.5': expected an integer"),
    "value out of range": (["--set", "k=0"], "k is 0"),
    "no value": (["--set", "k"], "expected name=value"),
    "the same twice": (["--set", "image_size=96"], "image_size is given twice"),
    "learning rate": (["--lr", "-1"], "--lr is -1.0"),
    "weight decay": (["--weight-decay", "-1"], "--weight-decay is -1.0: expected a finite number of at least 0"),
    "unknown tag": (["--backbone", "resnet18.none", "--set", "pretrained=false"], "backbone: Invalid pretrained tag"),
    "infinite learning rate": (["--lr", "inf"], "--lr is inf: expected a positive finite number"),
    "seed": (["--seed", 2**32], "--seed"),
    "weight of no number": (["--set", "ot_weight=nan"], "ot_weight is nan: expected a finite number, 0 or more"),
    "infinite temperature": (["--set", "temperature=inf"], "temperature is inf: expected a positive finite number"),
    "precision": (["--precision", "17"], "--precision 17"),
    "bfloat16 alone": (["--precision", "bf16-true"], "--precision is bf16-true: expected one of auto, 32-true"),
    "float64": (["--precision", "64"], "--precision is 64: expected one of auto, 32-true, 16-mixed, bf16-mixed"),
    "accelerator": (["--accelerator", "abacus"], "--accelerator abacus"),
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.values(), ids=REFUSED)
def test_options_are_refused_before_any_work(train, tmp_path, options, expected):
    outcome = train(*options)
    assert outcome.code == 2 and not outcome.out
    assert expected in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["dpdiff-ad", "dlsr"])
def test_mixed_precision_will_do(dpdiff, data, tiny, tmp_path, model):
    options = tiny if model == "dpdiff-ad" else "--image-size 64 --batch-size 4 --set hidden=16".split()
    arguments = ("train", "--model", model, "--data", data, "--out", tmp_path, "--steps", 2, "--precision", "bf16")
    assert dpdiff(*arguments, *options).code == 0
    scores = package.load(tmp_path / "model.safetensors").predict(torch.rand(2, 3, 64, 64)).scores
    assert scores.isfinite().all()


def test_hardware_is_refused_before_products_are_rendered(train, tmp_path, monkeypatch):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    assert train("--precision", "bf16-true", data="products:1").code == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("spec", ["products:", "products:many", "products:0", "products:2:x"])
def test_products_that_are_none(train, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    outcome = train(data=spec)
    assert outcome.code == 2 and outcome.error
    assert not (tmp_path / "run").exists()


class TestData:
    @pytest.fixture
    def broken(self, make_data, tmp_path) -> Path:
        return make_data(tmp_path / "data")

    def refused(self, train, data: Path) -> str:
        outcome = train(data=data)
        assert outcome.code == 2
        assert not (data.parent / "run").exists()
        return outcome.error

    def test_missing(self, train, tmp_path):
        assert "nowhere does not exist" in self.refused(train, tmp_path / "nowhere")

    def test_empty_name(self, train, broken, monkeypatch):
        monkeypatch.chdir(broken)  # whose images are not meant
        outcome = train(data="")
        assert outcome.code == 2 and "nothing is given after --data" in outcome.error
        assert not (broken.parent / "run").exists()

    def test_a_file(self, train, broken):
        assert "is a file" in self.refused(train, broken / "bolt/train/good/000.png")

    def test_without_images(self, train, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "holds no image" in self.refused(train, tmp_path / "empty")

    def test_empty_category(self, train, broken):
        shutil.rmtree(broken / "cloth/train/good")
        (broken / "cloth/train/good").mkdir()
        assert "'cloth'" in self.refused(train, broken)

    def test_unreadable_image(self, train, broken):
        image = broken / "cloth/train/good/003.png"
        image.write_bytes(image.read_bytes()[:500])
        assert str(image) in self.refused(train, broken)

        skipped = train("--on-corrupt", "skip", data=broken)
        assert skipped.code == 0
        assert "11 images" in skipped.out
        assert skipped.err.startswith("dpdiff: skipped: ") and str(image) in skipped.err

    def test_nothing_usable(self, train, tmp_path):
        (tmp_path / "text").mkdir()
        (tmp_path / "text/a.png").write_text("no image")
        outcome = train("--on-corrupt", "skip", data=tmp_path / "text")
        assert outcome.code == 2 and "no usable image" in outcome.err


def test_a_file_in_the_place_of_the_output_folder(train, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "is a file" in train().error
    assert "can't be made" in train(out=tmp_path / "run" / "deeper").error
    assert (tmp_path / "run").read_text() == "mine"
