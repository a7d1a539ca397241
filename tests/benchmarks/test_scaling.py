"""The scaling study's plot, lines and order; the study itself takes hours."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from benchmarks import scaling
from dpdiff import Prediction
from dpdiff.data.products import Products

ROWS = [
    {"model": "dpdiff", "categories": n, "training": 20.0, "inference": 30.0, "peak_memory": 2**30, "aupro": 0.9}
    for n in (10, 160)
] + [{"model": "unified k-NN", "categories": 10, "inference": 3.0, "peak_memory": 2**31}]


def test_a_line_has_what_was_measured_and_no_more():
    assert scaling.describe(ROWS[0]).split() == (
        "10 categories, dpdiff: training 20.0 images/s, inference 30.0 images/s, 1.00 GiB, aupro 0.900".split()
    )
    assert "training" not in scaling.describe(ROWS[2])


def test_plot_as_png_and_svg(tmp_path):
    found = {"rows": ROWS, "machine": {"processor": "a processor"}, "date": "2026-01-02T03:04:05+00:00"}
    scaling.plot(found, str(tmp_path / "new" / "scaling"))
    assert (tmp_path / "new/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new/scaling.svg").read_text(encoding="utf-8")


def test_a_study_goes_on_where_it_stopped(monkeypatch):
    calls, saved = [], []

    def apart(function, model, n, *args):
        calls.append((function.__name__, model, n, *args[:1]))
        if function is scaling.rates:
            return {"training": 2.0, "inference": 1.0, "peak_memory": 2**30}
        first = args[0]
        figures = {f"{i}": dict.fromkeys(scaling.FIGURES, i / 100) for i in range(first, first + n)}
        return {"by_category": figures} | ({"inference": 1.0, "peak_memory": 2**30} if "k-NN" in model else {})

    monkeypatch.setattr(scaling, "_apart", apart)
    known = [{"model": "dpdiff", "categories": 10, "training": 20.0, "inference": 30.0, "peak_memory": 2**30}]
    known[0]["by_category"] = {f"{i}": dict.fromkeys(scaling.FIGURES, 0.5) for i in range(10)}
    scaling.study((10, 20, 40), list(scaling.MODELS), 600, 20, known, lambda found: saved.append(deepcopy(found)))
    assert calls == [
        ("accuracy", "dpdiff", 10, 10),
        ("rates", "reference operators", 10),
        ("accuracy", scaling.KNN, 10, 0),
        ("accuracy", scaling.KNN, 10, 10),
        ("accuracy", scaling.CONSTANT_KNN, 10, 0),
        ("accuracy", scaling.CONSTANT_KNN, 10, 10),
        ("rates", "dpdiff", 20),
        ("accuracy", "dpdiff", 20, 0),
        ("rates", "reference operators", 20),
        ("accuracy", scaling.KNN, 20, 0),
        ("accuracy", scaling.CONSTANT_KNN, 20, 0),
        ("rates", "dpdiff", 40),
        ("rates", "reference operators", 40),
    ]
    assert len(saved) == len(calls) and len(known[0]["by_category"]) == 10  # what is given stays as it is
    rows = saved[-1]["rows"]
    assert [(row["model"], row["categories"]) for row in rows] == [
        *((model, n) for n in (10, 20) for model in scaling.MODELS),
        ("dpdiff", 40),
        ("reference operators", 40),
    ]
    assert rows[0]["training"] == 20.0 and rows[0]["aupro"] == pytest.approx((0.5 + 0.145) / 2)
    assert "aupro" not in saved[2]["rows"][2]  # a mean of half of the categories can't be compared
    assert rows[6]["aupro"] == pytest.approx(0.095)


def test_a_model_of_more_categories_than_are_compared_is_scored_on_these(monkeypatch, tmp_path):
    class Detector(torch.nn.Module):
        def predict(self, images):
            return Prediction(images.mean((1, 2, 3)), images.mean(1))

    trained = []
    small = partial(Products, root=tmp_path, size=32, n_train=1, n_good=1, n_defective=1)
    monkeypatch.setattr(scaling, "Products", small)
    monkeypatch.setattr(scaling, "_dpdiff", lambda catalogue, steps: (trained.append(catalogue), (Detector(), 32))[1])
    monkeypatch.setattr(scaling, "_knn", lambda catalogue, constant: (Detector(), 32))
    monkeypatch.setattr(scaling, "_apart", lambda function, *args: function(*args))
    monkeypatch.setattr(scaling, "rates", lambda *args: {"training": 2.0, "inference": 1.0, "peak_memory": 2**30})
    monkeypatch.setattr(scaling.Call, "seconds", lambda call: (call.run(), 0.5)[1])
    monkeypatch.setattr(scaling, "_SCORED", 3)
    found = scaling.study((2, 5), ["dpdiff", scaling.KNN], None, 5)
    names = small(5).categories
    assert [sorted(catalogue.categories) for catalogue in trained] == [
        sorted(names[:2]), sorted(names[2:4]), sorted(names)
    ]  # fmt: skip
    for row in found["rows"]:
        assert sorted(row["by_category"]) == sorted(names[:3]) and 0 <= row["aupro"] <= 1
        assert row["inference"] == (1.0 if row["model"] == "dpdiff" else 32.0)  # 16 images in half a second
