"""The study of DLSR and its baselines, on a few rendered categories and small models."""

import json

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from benchmarks import ood
from dpdiff.metrics import OOD_FIGURES


def test_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ood.DLSR, "TRAINING", ood.DLSR.TRAINING | {"max_steps": 20})
    small = ["--set", "image_size=64", "--set", "hidden=64", "--splits", "2", "--inside", "2", "--outside", "1"]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file in files:
        options = ["--data", "products:3", "--cache", str(tmp_path / "features"), "--json", str(file)]
        assert ood.main([*options, *small]) == 0
    one, other = (json.loads(file.read_text()) for file in files)
    assert one["splits"] == other["splits"]  # the same seed
    assert len(one["splits"]) == 2
    for row in one["splits"]:
        assert len(row["in"]) == 2 and len(row["out"]) == 1 and not set(row["in"]) & set(row["out"])
        assert row["images"] == [32, 16, 8]
    methods = ["DLSR, mse", "DLSR, mfsim", "DLSR, lr", "DLSR, ratio", "Mahalanobis", "k-NN", "PCA"]
    assert list(one["mean"]) == methods
    for name in methods:
        for figure in OOD_FIGURES:
            assert one["mean"][name][figure] == pytest.approx(np.mean([r[name][figure] for r in one["splits"]]))
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in methods)


def test_too_few_categories(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        ood.main(["--data", "products:2", "--inside", "2", "--outside", "1"])
    assert "2 categories in and 1 out of 2" in capsys.readouterr().err


def test_baselines_by_their_definitions():
    rng = np.random.default_rng(0)
    train, x = rng.normal(size=(200, 6)) * [3, 3, 2, 2, 0.1, 0.1], rng.normal(size=(5, 6))
    distances = np.linalg.norm(x[:, None] - train, axis=2)
    np.testing.assert_allclose(ood.nearest_neighbours(train)(x), distances.min(1))
    directions = PCA(4).fit(train).components_  # the others hold less than a hundredth of the variance
    centred = x - train.mean(0)
    residual = centred - centred @ directions.T @ directions
    np.testing.assert_allclose(ood.pca_reconstruction(train)(x), np.square(residual).sum(1), rtol=1e-6)
    inverse = np.linalg.inv(LedoitWolf().fit(train).covariance_)
    np.testing.assert_allclose(ood.mahalanobis(train)(x), np.einsum("ni,ij,nj->n", centred, inverse, centred))


def test_table_marks_the_best():
    figures = {"a": dict(zip(OOD_FIGURES, (0.9, 0.8, 0.7, 0.2))), "b": dict(zip(OOD_FIGURES, (0.8, 0.9, 0.7, 0.1)))}
    lines = ood.table({"mean": figures}).splitlines()
    assert lines[2] == "| a | **90.00** | 80.00 | **70.00** | 20.00 |"
    assert lines[3] == "| b | 80.00 | **90.00** | **70.00** | **10.00** |"
