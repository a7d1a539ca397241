"""`dpdiff evaluate`: the figures, and what it refuses."""

import csv
import json
import shutil

import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import dpdiff as package

IMAGE = {"image_auroc", "image_ap", "image_f1max"}
PIXEL = {"pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"}


def test_writes_table_figures_and_report(dpdiff, data, weights, tmp_path):
    file, report = tmp_path / "deep" / "out.json", tmp_path / "report.html"
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights, "--json", file, "--report", report)
    assert outcome.code == 0 and not outcome.err
    for word in ("bolt", "cloth", "mean", "AUROC", "AUPRO"):
        assert word in outcome.out

    figures = json.loads(file.read_text())
    assert set(figures) == {"mean", "categories"} and set(figures["categories"]) == {"bolt", "cloth"}
    for category in (figures["mean"], *figures["categories"].values()):
        assert set(category) == IMAGE | PIXEL
        assert all(0 <= value <= 1 for value in category.values())
    page = report.read_text()
    assert "data:image/" in page and "mean" in page


def test_the_figures_are_those_of_the_scores_that_predict_gives(dpdiff, data, weights, tmp_path):
    dpdiff("evaluate", "--data", data, "--weights", weights, "--json", tmp_path / "out.json", "--batch-size", 5)
    figures = json.loads((tmp_path / "out.json").read_text())
    dpdiff("predict", data / "cloth" / "test", "--weights", weights, "--out", tmp_path / "out")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = ["hole" in row["image"] for row in rows]
    expected = roc_auc_score(labels, [float(row["score"]) for row in rows])
    assert figures["categories"]["cloth"]["image_auroc"] == pytest.approx(expected, abs=1e-6)


def test_a_category_without_ground_truth_has_image_figures_only(dpdiff, make_data, weights, tmp_path):
    data = make_data(tmp_path / "data")
    shutil.rmtree(data / "cloth" / "ground_truth")
    assert dpdiff("evaluate", "--data", data, "--weights", weights, "--json", tmp_path / "out.json").code == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(figures["categories"]["cloth"]) == IMAGE
    assert figures["mean"]["aupro"] == figures["categories"]["bolt"]["aupro"]


def test_a_category_without_test_images_is_named(dpdiff, make_data, weights, tmp_path):
    data = make_data(tmp_path / "data")
    shutil.rmtree(data / "cloth" / "test")
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights, "--json", tmp_path / "out.json")
    assert outcome.code == 0 and "left out: cloth" in outcome.out
    assert set(json.loads((tmp_path / "out.json").read_text())["categories"]) == {"bolt"}


def test_one_file_for_two_things_is_refused(dpdiff, data, weights, tmp_path):
    for options in (("--json", weights), ("--json", tmp_path / "x", "--report", tmp_path / "x")):
        outcome = dpdiff("evaluate", "--data", data, "--weights", weights, *options)
        assert outcome.code == 2 and "expected another one" in outcome.error
    package.load(weights)


def test_names_are_shown_as_they_are(dpdiff, make_data, weights, tmp_path):
    data = make_data(tmp_path / "data")
    (data / "bolt").rename(data / "[red]bolt")
    (data / "[").mkdir()
    (data / "cloth").rename(data / "[" / "x]")
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights)
    assert outcome.code == 0 and "[red]bolt" in outcome.out and "[/x]" in outcome.out
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights, "--out-data", data / "[" / "x]")
    assert outcome.code == 0 and "[/x]" in outcome.out


def test_figures_and_report_are_kept_whatever_happens_to_the_table(dpdiff, data, weights, tmp_path, monkeypatch):
    def fail(*args):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "no such letter")

    monkeypatch.setattr("rich.console.Console.print", fail)
    arguments = ("evaluate", "--data", data, "--weights", weights, "--json", tmp_path / "out.json")
    assert dpdiff(*arguments, "--report", tmp_path / "report.html").code == 1
    assert json.loads((tmp_path / "out.json").read_text())["mean"]
    assert (tmp_path / "report.html").exists()
    (tmp_path / "out.json").unlink()
    assert dpdiff(*arguments, "--out-data", data / "bolt" / "train").code == 1
    assert json.loads((tmp_path / "out.json").read_text())["mean"]


class TestRefuses:
    @pytest.fixture
    def refused(self, dpdiff, make_data, weights, tmp_path):
        def run(data=None, *options) -> str:
            files = ("--json", tmp_path / "out.json", "--report", tmp_path / "report.html")
            outcome = dpdiff("evaluate", "--data", data or tmp_path / "data", "--weights", weights, *files, *options)
            assert outcome.code == 2
            assert not [p for p in tmp_path.iterdir() if p.is_file()]
            return outcome.error

        make_data(tmp_path / "data")
        return run

    def test_mask_of_another_size(self, refused, tmp_path):
        mask = tmp_path / "data/cloth/ground_truth/hole/001_mask.png"
        Image.new("L", (60, 60)).save(mask)
        assert str(mask) in refused() and "60 x 60" in refused()

    def test_unreadable_image(self, refused, tmp_path):
        image = tmp_path / "data/cloth/test/good/001.png"
        image.write_bytes(b"no image")
        assert str(image) in refused()

    def test_missing_data(self, refused, tmp_path):
        assert "nowhere does not exist" in refused(tmp_path / "nowhere")

    def test_data_without_test_images(self, refused, tmp_path):
        assert "no test image" in refused(tmp_path / "data/bolt/train")

    def test_device(self, refused):
        for device in ("abacus", "meta"):
            assert f"--device is {device!r}" in refused(None, "--device", device)

    def test_a_folder_in_the_place_of_a_file(self, refused, tmp_path):
        (tmp_path / "folder").mkdir()
        assert "is a folder" in refused(None, "--json", tmp_path / "folder")
