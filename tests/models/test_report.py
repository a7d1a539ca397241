"""The report stands alone, shows what the results say, and takes no name for markup."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dpdiff.evaluation import CategoryResult, Example, Results
from dpdiff.report import heatmap, write_report

HOSTILE = '<script>alert("x")</script>&amp;\'$title'


class Page(HTMLParser):
    """Tags with their attributes, and the text that is shown."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def example(label=1, side=64, marked=True, with_map=True, path="a/000.png", seed=0):
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    image = np.clip(np.asarray(smooth, int) + rng.integers(-5, 6, (side, side, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[10:20, 10:20] = label
    values = rng.random((side, side), dtype=np.float32) + 3 * mask
    return Example(path, "scratch" if label else "good", label, 0.25, image, mask if marked else None,
                   values if with_map else None)  # fmt: skip


def category(figures, examples):
    scores, labels = np.array([0.1, 0.2, 0.15, 0.9], np.float32), np.array([0, 0, 1, 1])
    return CategoryResult(figures, scores, labels, examples, (0.5, 3.0))


@pytest.fixture
def results():
    every = {"image_auroc": 0.75, "image_ap": 0.8333, "pixel_auroc": 0.98765, "aupro": 0.5}
    return Results(
        {
            "bottle": category(every, [example(), example(label=0)]),
            HOSTILE: category({"image_auroc": 0.25}, [example(marked=False, path=f"{HOSTILE}/\udcff.png")]),
            "empty": category({}, []),
        },
        seconds=2.0,
    )


def written(results, tmp_path, **options):
    write_report(results, tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(results, tmp_path):
    source = written(results, tmp_path)
    page = Page(source)
    assert page.open == []
    assert all(a["src"].startswith("data:image/webp;base64,") for a in page.attributes("img"))
    assert all(a["href"].startswith("#") for a in page.attributes("a"))
    assert not page.attributes("link") and not page.attributes("iframe")
    assert "http://" not in source and "https://" not in source and "url(" not in source and "@import" not in source
    assert "default-src 'none'" in page.attributes("meta")[3]["content"]


def test_names_are_shown_not_run(results, tmp_path):
    page = Page(written(results, tmp_path, title=HOSTILE, details={HOSTILE: HOSTILE}))
    assert len(page.attributes("script")) == 1
    assert page.text.count(HOSTILE) == 6  # title, heading, table, category, and both of the details
    assert HOSTILE in page.attributes("figcaption")[2]["title"]


def test_figures_are_those_of_the_results(results, tmp_path):
    page = Page(written(results, tmp_path))
    cells = [a["data-value"] for a in page.attributes("td") if "style" in a]
    assert cells == ["75.0000", "83.3300", "98.7650", "50.0000", "25.0000"]
    text = " ".join(page.text)
    assert "3 categories · 12 test images · 6.0 images/s" in text
    mean_row = text[text.index("mean") :].split()[:6]
    assert mean_row == ["mean", "12", "50.0", "83.3", "98.8", "50.0"]
    ids = {a.get("id") for _, a in page.tags}
    assert all(a["href"][1:] in ids for a in page.attributes("a"))


def test_examples_show_image_ground_truth_and_heat_map(results, tmp_path):
    page = Page(written(results, tmp_path))
    assert [a["alt"] for a in page.attributes("img")] == ["image", "ground truth", "heat map"] * 2 + [
        "image",
        "heat map",
    ]
    assert "defect not marked" in page.text
    image, truth, heat = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))).convert("RGB"), int)
        for a in page.attributes("img")[:3]
    )
    source = example()
    assert np.abs(image - source.image).mean() < 12  # compressed
    outside = ~source.mask
    assert np.abs(truth - image)[outside].mean() < 5 < np.abs(truth - image)[source.mask].mean()
    assert heat[source.mask].mean() > heat[outside].mean() + 30


def test_run_is_stated(results, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/dpdiff", "evaluate", "--data", "my folder"])
    text = " ".join(Page(written(results, tmp_path, details={"backbone": "tf_efficientnet_lite0"})).text)
    assert "dpdiff evaluate --data 'my folder'" in text
    assert "backbone tf_efficientnet_lite0" in text
    assert f"torch {torch.__version__}" in text
    assert re.search(r"date \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", text)


def test_model_without_maps(tmp_path):
    plain = Results({"c": category({"image_auroc": 1.0}, [example(with_map=False)])}, 1.0)
    assert [a["alt"] for a in Page(written(plain, tmp_path)).attributes("img")] == ["image"]


def test_160_categories_stay_small(tmp_path):
    examples = [example(side=224, seed=seed) for seed in range(5)]
    many = Results({f"c{i}": category({"image_auroc": 0.5}, examples) for i in range(160)}, 1.0)
    source = written(many, tmp_path)
    assert len(source) < 15e6
    assert source.count("<img ") == 160 * 5 * 3


def test_failure_leaves_no_file(results, tmp_path):
    results.categories["bottle"].examples.append(None)
    with pytest.raises(AttributeError):
        write_report(results, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_heat_map_glows_where_the_map_is_high():
    image = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    values = np.zeros((20, 30), np.float32)
    values[5:10, 5:10] = 2.0
    shown = np.asarray(heatmap(image, values))
    assert shown.shape == (40, 60, 3)
    assert (shown[30, 40] == shown[30, 40, 0]).all()  # usual: grey
    hot = shown[14, 14].astype(int)
    assert hot[0] > 200 and hot[1] > 200  # the bright end of the colours
    as_tensor = heatmap(torch.from_numpy(image).permute(2, 0, 1) / 255, torch.from_numpy(values))
    assert np.array_equal(np.asarray(as_tensor), shown)
    assert np.array_equal(np.asarray(heatmap(Image.fromarray(image), values)), shown)


def test_heat_map_range():
    image = np.full((8, 8), 100, np.uint8)
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    cold = np.asarray(heatmap(image, ramp, low=2.0, high=3.0))
    assert (cold == 80).all()  # all below the range: the image alone, dimmed
    flat = np.asarray(heatmap(image, np.ones((8, 8), np.float32)))
    assert np.array_equal(flat, cold)
    above = np.asarray(heatmap(image, ramp + 5, low=0.0, high=1.0))
    assert (above == np.asarray(heatmap(image, ramp))[-1, -1]).all()  # all above it: as hot as can be
