"""`dpdiff predict`: scores and heat maps of whatever images it is given."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpdiff as package
from dpdiff.cli.predict import _MAP_RANGE
from dpdiff.data import load_image, load_mask
from dpdiff.report import heatmap


@pytest.fixture
def predict(dpdiff, weights, tmp_path):
    def run(*arguments: object, out: Path = tmp_path / "out"):
        return dpdiff("predict", *arguments, "--weights", weights, "--out", out)

    return run


@pytest.fixture
def photos(data, tmp_path) -> Path:
    """Nested and flat, equal names in several folders, several formats and sizes."""
    root = tmp_path / "photos"
    source = Image.open(data / "bolt/test/good/000.png")
    for name, size in (("top.png", (72, 72)), ("a/1.png", (72, 72)), ("a/b/1.png", (90, 40)), ("c/1.jpg", (40, 50))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        source.resize(size).save(root / name)
    source.convert("L").save(root / "grey.tiff")
    (root / "notes.txt").write_text("no image")
    return root


def read_scores(out: Path) -> dict[str, float]:
    with open(out / "scores.csv", newline="") as file:
        assert file.readline() == "image,score\n"
        return {name: float(score) for name, score in csv.reader(file)}


def heat_maps(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*.png")}


def test_scores_every_image_of_nested_folders(predict, photos, weights, tmp_path):
    assert predict(photos).code == 0
    scores = read_scores(tmp_path / "out")
    names = ["a/1.png", "a/b/1.png", "c/1.jpg", "grey.tiff", "top.png"]
    assert list(scores) == [str(photos / name) for name in names]
    assert heat_maps(tmp_path / "out") == {"a/1.png", "a/b/1.png", "c/1.png", "grey.png", "top.png"}
    assert Image.open(tmp_path / "out/a/b/1.png").size == (90, 40)

    model = package.load(weights)
    for path, score in scores.items():
        expected = model.predict(load_image(path, model.image_size)[None]).scores.item()
        assert score == pytest.approx(expected, rel=1e-5)


def test_a_defect_scores_higher_and_glows(predict, weights, data, tmp_path):
    good, bad = data / "bolt/test/good/000.png", data / "bolt/test/hole/000.png"
    predict(good, bad)
    scores = read_scores(tmp_path / "out")
    assert scores[str(bad)] > scores[str(good)]
    model = package.load(weights)
    heat = model.predict(load_image(bad, model.image_size)[None]).maps[0]
    mask = load_mask(data / "bolt/ground_truth/hole/000_mask.png", model.image_size)
    assert heat[mask].mean() > heat[~mask].mean() + 0.5  # of deviations of twelve normal images
    expected = heatmap(load_image(bad), heat, *_MAP_RANGE)
    np.testing.assert_allclose(Image.open(tmp_path / "out/hole/000.png"), expected, atol=1)


def test_a_score_and_its_heat_map_do_not_depend_on_the_other_images(predict, photos, data, tmp_path):
    predict(photos, data / "bolt/test/hole")
    alone = tmp_path / "alone"
    predict(photos / "top.png", out=alone)
    path = str(photos / "top.png")
    assert read_scores(alone)[path] == pytest.approx(read_scores(tmp_path / "out")[path], rel=1e-5)
    (together,) = (tmp_path / "out").rglob("top.png")
    difference = np.array(Image.open(alone / "top.png")).astype(int) - np.array(Image.open(together))
    assert abs(difference).max() <= 2


def test_an_image_given_twice_has_one_row(predict, photos, tmp_path):
    assert predict(photos / "a/1.png", photos / "a", photos / "a/../a/1.png").code == 0
    assert list(read_scores(tmp_path / "out")) == [str(photos / "a/1.png"), str(photos / "a/b/1.png")]


def test_names_that_differ_in_their_suffix_only_keep_it(predict, photos, tmp_path):
    shutil.copy(photos / "top.png", photos / "a/2.png")
    Image.open(photos / "top.png").save(photos / "a/2.jpg")
    predict(photos / "a")
    assert heat_maps(tmp_path / "out") == {"1.png.png", "2.png.png", "2.jpg.png", "b/1.png.png"}


def test_equal_names_of_several_folders_do_not_collide(predict, photos, tmp_path):
    predict(photos / "a/b", photos / "c", photos / "top.png")
    assert heat_maps(tmp_path / "out") == {"a/b/1.png", "c/1.png", "top.png"}


def test_heat_maps_inside_the_folder_are_not_predicted_the_next_time(predict, photos):
    for _ in range(2):
        assert predict(photos, out=photos / "out").code == 0
        assert len(read_scores(photos / "out")) == 5


def test_large_pictures_make_heat_maps_of_bounded_size(predict, tmp_path):
    Image.new("RGB", (3000, 1500), "gray").save(tmp_path / "large.png")
    predict(tmp_path / "large.png")
    assert Image.open(tmp_path / "out/large.png").size == (1024, 512)


class TestRefuses:
    @pytest.fixture
    def refused(self, predict, tmp_path):
        def run(*arguments, out=tmp_path / "out") -> str:
            outcome = predict(*arguments, out=out)
            assert outcome.code == 2
            assert not list(tmp_path.rglob("scores.csv")) and not (tmp_path / "out").exists()
            return outcome.error

        return run

    def test_the_folder_of_an_image(self, refused, photos):
        assert "is the folder of the images" in refused(photos / "top.png", out=photos)

    def test_missing_image(self, refused, photos):
        assert "missing.png does not exist" in refused(photos, photos / "missing.png")

    def test_folder_without_images(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "holds no image" in refused(tmp_path / "empty")

    def test_unreadable_image(self, refused, predict, photos, tmp_path):
        (photos / "a/1.png").write_bytes(b"no image")
        assert str(photos / "a/1.png") in refused(photos)
        skipped = predict(photos, "--on-corrupt", "skip")
        assert skipped.code == 0 and str(photos / "a/1.png") in skipped.err
        assert len(read_scores(tmp_path / "out")) == 4

    def test_a_link_to_itself(self, refused, predict, photos, tmp_path):
        (photos / "loop.png").symlink_to("loop.png")
        assert str(photos / "loop.png") in refused(photos)
        assert predict(photos, "--on-corrupt", "skip", out=photos / "out").code == 0
        assert len(read_scores(photos / "out")) == 5

    def test_a_file_that_is_no_image(self, refused, photos):
        assert "notes.txt" in refused(photos / "notes.txt")

    def test_the_folder_of_the_images_as_output(self, refused, photos):
        assert "is the folder of the images" in refused(photos, out=photos)

    def test_a_heat_map_in_the_place_of_an_image(self, refused, photos):
        before = (photos / "a/1.png").read_bytes()
        assert "would replace the image" in refused(photos / "a/1.png", photos / "c/1.jpg", out=photos)
        assert (photos / "a/1.png").read_bytes() == before
