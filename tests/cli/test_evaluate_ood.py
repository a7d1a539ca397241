"""`dpdiff evaluate --out-data`: the figures of DLSR's scores, and what it refuses."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

FIGURES = ["auroc", "aupr_in", "aupr_out", "fpr95"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, data):
    from dpdiff.cli import main

    out = tmp_path_factory.mktemp("dlsr")
    options = "--model dlsr --image-size 64 --steps 20 --batch-size 4 --set hidden=32 --set depth=1".split()
    assert main(["train", "--data", str(data), "--out", str(out), *options]) == 0
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A plain folder of images: blobs of colour."""
    folder = tmp_path_factory.mktemp("out") / "flowers"
    (folder / "nested").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(pixels).save(folder / ("nested" if i % 2 else "") / f"{i}.png")
    return folder


@pytest.fixture
def scores(dpdiff, weights, tmp_path):
    def scores(*images):
        assert dpdiff("predict", *images, "--weights", weights, "--out", tmp_path / "scored").code == 0
        with open(tmp_path / "scored" / "scores.csv", newline="") as file:
            return [float(row["score"]) for row in csv.DictReader(file)]

    return scores


def test_figures_are_those_of_the_scores_that_predict_gives(dpdiff, data, weights, flowers, scores, tmp_path):
    """In: good test images. Out: a plain folder, and a category of another data set, of which the same goes."""
    other = data / "cloth"
    options = ["--weights", weights, "--json", tmp_path / "out.json", "--batch-size", 4]
    outcome = dpdiff("evaluate", "--data", data, "--out-data", flowers, "--out-data", other, *options)
    assert outcome.code == 0 and not outcome.err
    for word in ("DLSR", "6 images in distribution", "AUPR", "FPR95", "mean"):
        assert word in outcome.out

    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"mean", "out_sets"} and list(found["out_sets"]) == [str(flowers), str(other)]
    inside = scores(*(data / name / "test" / "good" for name in ("bolt", "cloth")))
    for name, out_set in ((str(flowers), scores(flowers)), (str(other), scores(other / "test" / "good"))):
        labels, both = np.repeat([0, 1], [len(inside), len(out_set)]), np.array(inside + out_set)
        figures = found["out_sets"][name]
        assert list(figures) == FIGURES
        assert figures["auroc"] == pytest.approx(roc_auc_score(labels, both), abs=1e-6)
        assert figures["aupr_in"] == pytest.approx(average_precision_score(1 - labels, -both), abs=1e-6)
        assert figures["aupr_out"] == pytest.approx(average_precision_score(labels, both), abs=1e-6)
    for figure in FIGURES:
        assert found["mean"][figure] == pytest.approx(np.mean([f[figure] for f in found["out_sets"].values()]))


def test_a_slice_of_the_products_is_out(dpdiff, data, weights, tmp_path, monkeypatch):
    """Categories 2 and 3 of a seed, none of which is among its first two."""
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    options = ["--weights", weights, "--json", tmp_path / "out.json"]
    outcome = dpdiff("evaluate", "--data", "products:2:5", "--out-data", "products:2-4:5", *options)
    assert outcome.code == 0, outcome.err
    assert "16 images in distribution" in outcome.out
    assert list(json.loads((tmp_path / "out.json").read_text())["out_sets"]) == ["products:2-4:5"]
    (folder,) = (tmp_path / "cache" / "products").iterdir()
    names = {p.name for p in (folder / "2-to-4").iterdir()}
    assert len(names) == 2 and not names & {p.name for p in (folder / "first-2").iterdir()}


@pytest.mark.parametrize("same", ["products:2:0", "products:0-2"])
def test_products_of_another_spelling_are_the_same(dpdiff, weights, tmp_path, monkeypatch, same):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    outcome = dpdiff("evaluate", "--data", "products:2", "--out-data", same, "--weights", weights)
    assert outcome.code == 2 and f"--out-data {same} is given twice" in outcome.error


def test_an_anomaly_detector_has_them_too(dpdiff, data, flowers, tmp_path, tiny):
    options = ["--model", "dpdiff-ad", "--steps", 2, *tiny]
    assert dpdiff("train", "--data", data, "--out", tmp_path / "run", *options).code == 0
    weights = tmp_path / "run" / "model.safetensors"
    outcome = dpdiff("evaluate", "--data", data, "--out-data", flowers, "--weights", weights)
    assert outcome.code == 0 and "DPDiffAD" in outcome.out and "FPR95" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out-data", "nowhere"], "nowhere does not exist"),
        (["--out-data", "products:4-4"], "A below B"),
        (["--out-data", "products:x"], "expected a folder, products:N"),
        (["--out-data", "svhn:nowhere"], "nowhere holds no svhn"),
        (["--out-data", "FLOWERS", "--out-data", "FLOWERS"], "is given twice"),
        (["--out-data", "FLOWERS", "--out-data", "FLOWERS/../flowers/"], "is given twice"),
        (["--out-data", "DATA"], "is given twice"),
        (["--out-data", "DATA/"], "is given twice"),
        (["--out-data", "link"], "is given twice"),
        (["--out-data", "FLOWERS", "--report", "r.html"], "--report shows defects"),
    ],
)
def test_refused(dpdiff, data, weights, flowers, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(data)
    options = [option.replace("FLOWERS", str(flowers)).replace("DATA", str(data)) for option in options]
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights, "--json", "out.json", *options)
    assert outcome.code == 2 and message in outcome.error
    assert not (tmp_path / "out.json").exists()
