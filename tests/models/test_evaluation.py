"""Evaluation of models whose answers are known beforehand, on small trees of images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from dpdiff.data import AnomalyDataset, scan
from dpdiff.evaluation import evaluate
from dpdiff.metrics import image_metrics, pixel_metrics

SIZE = 32


@pytest.fixture
def tree(tmp_path):
    """Three categories: brightness is the defect; "marked" has masks, "unmarked" none, "good_only" no defect."""
    rng = np.random.default_rng(0)
    for category, n_bad in (("marked", 5), ("unmarked", 3), ("good_only", 0)):
        for kind, n in (("good", 4), ("bright", n_bad)):
            for i in range(n):
                pixels = rng.integers(0, 100, (SIZE, SIZE), dtype=np.uint8)
                mask = np.zeros_like(pixels)
                if kind == "bright":
                    mask[4 : 8 + i, 10:20] = 255
                    pixels[mask > 0] += np.uint8(30 + 20 * i)
                path = tmp_path / category / "test" / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                if kind == "bright" and category == "marked":
                    path = tmp_path / category / "ground_truth" / kind / f"{i}_mask.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)
    return tmp_path


class Brightness(nn.Module):
    """Anomaly map: the grey value; score: its mean."""

    def __init__(self, with_maps=True):
        super().__init__()
        self.with_maps = with_maps
        self.batch_sizes = []

    def predict(self, images):
        assert not self.training
        self.batch_sizes.append(len(images))
        maps = images.mean(1)
        return SimpleNamespace(scores=maps.mean((1, 2)), maps=maps if self.with_maps else None)


def dataset(tree):
    found = scan(tree, need="test")
    return AnomalyDataset(found.test, SIZE, found.categories)


def test_figures_are_those_of_each_category_alone(tree):
    data = dataset(tree)
    model = Brightness()
    results = evaluate(model, data, batch_size=3, progress=False)
    assert model.batch_sizes == [3, 3, 3, 3, 3, 3, 2]  # batches are filled across categories

    expected = {}
    for name in data.categories:
        items = [item for item in data if data.categories[item["category"]] == name]
        maps = torch.stack([item["image"].mean(0) for item in items])
        expected[name] = image_metrics(maps.mean((1, 2)), [item["label"] for item in items])
        if name == "marked":
            expected[name] |= pixel_metrics(maps, torch.stack([item["mask"] for item in items]))
    found = results.to_dict()["categories"]
    assert list(found) == ["good_only", "marked", "unmarked"]
    for name in found:
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert found["good_only"] == {}
    assert set(found["unmarked"]) == {"image_auroc", "image_ap", "image_f1max"}
    assert set(found["marked"]) == {*found["unmarked"], "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"}


def test_mean_is_over_the_categories_that_have_the_figure(tree):
    results = evaluate(Brightness(), dataset(tree), progress=False).to_dict()
    a, b = results["categories"]["marked"], results["categories"]["unmarked"]
    assert results["mean"]["image_auroc"] == pytest.approx((a["image_auroc"] + b["image_auroc"]) / 2)
    assert results["mean"]["aupro"] == a["aupro"]


def test_order_and_batches_do_not_change_the_figures(tree):
    data = dataset(tree)
    shuffled = AnomalyDataset(
        [data.samples[i] for i in np.random.default_rng(1).permutation(len(data))], SIZE, data.categories
    )
    first = evaluate(Brightness(), data, batch_size=16, progress=False).to_dict()
    second = evaluate(Brightness(), shuffled, batch_size=1, progress=False).to_dict()
    for name in first["categories"]:
        assert first["categories"][name] == pytest.approx(second["categories"][name], abs=1e-6)


def test_model_without_maps_has_image_figures_only(tree):
    results = evaluate(Brightness(with_maps=False), dataset(tree), progress=False)
    assert set(results.mean) == {"image_auroc", "image_ap", "image_f1max"}
    assert all(e.map is None for c in results.categories.values() for e in c.examples)


def test_defect_without_a_mask_among_marked_ones_is_no_good_pixel(tree):
    whole = evaluate(Brightness(), dataset(tree), progress=False).categories["marked"].figures
    (tree / "marked" / "ground_truth" / "bright" / "4_mask.png").unlink()
    figures = evaluate(Brightness(), dataset(tree), progress=False).categories["marked"].figures
    assert figures["image_auroc"] == whole["image_auroc"]
    data = dataset(tree)
    kept = [i for i in data if i["has_mask"] and data.categories[i["category"]] == "marked"]
    assert len(kept) == 8
    maps, masks = torch.stack([i["image"].mean(0) for i in kept]), torch.stack([i["mask"] for i in kept])
    assert figures["pixel_auroc"] == pytest.approx(pixel_metrics(maps, masks)["pixel_auroc"])


def test_examples_span_the_scores(tree):
    result = evaluate(Brightness(), dataset(tree), n_examples=4, progress=False).categories["marked"]
    bad, good = sorted(result.scores[result.labels == 1]), sorted(result.scores[result.labels == 0])
    assert [e.score for e in result.examples] == pytest.approx([bad[0], bad[2], bad[4], good[-1]])
    assert [e.label for e in result.examples] == [1, 1, 1, 0]
    example = result.examples[0]
    assert (example.image.shape, example.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (example.mask.shape, example.mask.dtype) == ((SIZE, SIZE), bool)
    assert example.map.shape == (SIZE, SIZE)
    assert np.array_equal(example.image, np.array(Image.open(example.path).convert("RGB")))
    only_good = evaluate(Brightness(), dataset(tree), n_examples=3, progress=False).categories["good_only"]
    assert len(only_good.examples) == 3
    none = evaluate(Brightness(), dataset(tree), n_examples=0, progress=False)
    assert not any(c.examples for c in none.categories.values())


def test_json_and_table(tree, tmp_path):
    results = evaluate(Brightness(), dataset(tree), progress=False)
    results.save_json(tmp_path / "out" / "r.json")
    read = json.loads((tmp_path / "out" / "r.json").read_text())
    assert read == results.to_dict()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(results.table())
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "marked" in line and "unmarked" not in line)
    assert f"{100 * read['categories']['marked']['aupro']:.1f}" in row and "…" not in row
    mean = next(line for line in lines if "mean" in line).split()
    assert mean[1:3] == ["20", f"{100 * read['mean']['image_auroc']:.1f}"]


class Broken(Brightness):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def predict(self, images):
        out = super().predict(images)
        vars(out)[self.output][0] = float("nan")
        return out


@pytest.mark.parametrize("output", ["scores", "maps"])
def test_errors_name_the_category(tree, output):
    with pytest.raises(ValueError, match=f"category 'good_only': {output} hold NaN"):
        evaluate(Broken(output), dataset(tree), progress=False)


def test_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no test image"):
        evaluate(Brightness(), AnomalyDataset([], SIZE), progress=False)
