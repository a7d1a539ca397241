"""`dpdiff demo`, on one category."""

import json


def test_a_file_in_the_place_of_the_output_folder(dpdiff, tmp_path, monkeypatch):
    monkeypatch.setenv("DPDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "demo").write_text("mine")
    outcome = dpdiff("demo", "--categories", 1, "--out", tmp_path / "demo")
    assert outcome.code == 2 and "demo is a file" in outcome.error
    assert not outcome.out and not (tmp_path / "cache").exists()


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
