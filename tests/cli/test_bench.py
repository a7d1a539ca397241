"""`dpdiff bench` from the command line, on the smallest of its cases."""

import json
import subprocess

import pytest

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "before.json"


def test_results_and_their_guard(dpdiff, stored, tmp_path):
    """One run of a small case writes its results; another keeps its ratio; a ratio beyond reach is lost."""
    options = ["--only", "64-1 and (dpdiff or cdist) and not reference", "--budget", "0.01", "--threads", "1"]
    outcome = dpdiff("bench", "ops", "--json", stored, *options)
    assert outcome.code == 0, outcome.err
    results = json.loads(stored.read_text())
    (case,) = results["cases"]
    assert case["operator"] == "nearest" and set(case["seconds"]) == {"dpdiff", "cdist"}
    assert case["ratios"]["cdist"] > 0
    assert 0 < case["floor"] and results["limits"]["flops"]["float32"] > 1e9 and results["machine"]["torch"]

    case["ratios"]["cdist"] *= 100
    results["machine"]["processor"] = "X, 9 threads"
    beyond = tmp_path / "beyond.json"
    beyond.write_text(json.dumps(results))
    outcome = dpdiff("bench", "ops", "--compare", beyond, *options)
    assert outcome.code == 1 and not outcome.err
    assert "1 ratios compared, 1 fell by more than 20%" in outcome.out
    assert "The stored results are of another machine: X, 9 threads" in outcome.out


def test_where_the_study_is_to_draw_is_checked_before_it_runs(dpdiff, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the study was begun")

    monkeypatch.setattr(subprocess, "run", fail)
    (tmp_path / "file").touch()
    (tmp_path / "curves.svg").mkdir()
    assert "--plot" in dpdiff("bench", "scaling", "--plot", tmp_path / "file" / "curves").error
    outcome = dpdiff("bench", "scaling", "--plot", tmp_path / "curves")
    assert outcome.code == 2 and "curves.svg is a folder" in outcome.error


def test_without_a_command_it_shows_its_help(dpdiff):
    outcome = dpdiff("bench")
    assert (outcome.code, outcome.err) == (0, "") and "scaling" in outcome.out


def test_what_is_wrong_with_the_input_is_code_2(dpdiff, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert "holds no benchmark results" in dpdiff("bench", "ops", "--compare", tmp_path / "other.json").error
    assert "missing.json" in dpdiff("bench", "ops", "--compare", tmp_path / "missing.json").error
    outcome = dpdiff("bench", "model", "--only", "nothing_like_this", "--json", tmp_path / "r.json")
    assert outcome.code == 2 and "nothing_like_this" in outcome.error
    assert not (tmp_path / "r.json").exists()
