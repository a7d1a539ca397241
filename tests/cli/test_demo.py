"""`dpdiff demo`, on one category."""

import json


def test_demo_and_again(dpdiff, tmp_path, monkeypatch):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    arguments = ("demo", "--categories", 1, "--steps", 2, "--out", tmp_path / "demo")
    first = dpdiff(*arguments)
    assert first.code == 0
    (name,) = json.loads((tmp_path / "demo/results.json").read_text())["categories"]
    assert name[:20] in first.out and "mean" in first.out
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000

    trained = (tmp_path / "demo/model.safetensors").stat().st_mtime_ns
    again = dpdiff(*arguments)
    assert again.code == 0 and "trained already" in again.out
    assert (tmp_path / "demo/model.safetensors").stat().st_mtime_ns == trained
