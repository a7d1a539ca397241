"""Results of benchmarks: what is derived from times, and when a ratio counts as lost."""

import pytest

from benchmarks import results
from benchmarks.limits import Limits
from benchmarks.results import Measurement, Record, Work

LIMITS = Limits({"float32": 1e11, "bfloat16": 4e11}, 2e10, "cpu", 1)


def run(ours: float, rival: float) -> dict:
    work = Work(2e9, 1e6, "float32")
    measurements = [
        Measurement("nearest", "K = 4", "dpdiff", ours, None, 2_000_000, work),
        Measurement("nearest", "K = 4", "faiss", rival, rival / ours, None, work),
    ]
    return results.assemble(Record(measurements, {"keops": "not installed"}, LIMITS), LIMITS, ["pytest", "x"])


def test_ratio_floor_and_share():
    (case,) = run(0.04, 0.1)["cases"]
    assert case["ratios"] == {"faiss": pytest.approx(2.5)}
    assert case["memory"] == {"dpdiff": 2_000_000}
    assert case["floor"] == pytest.approx(0.02)  # 2 GFLOP at 100 GFLOP/s
    assert case["share"] == pytest.approx(0.5)


def test_the_slower_of_arithmetic_and_memory_is_the_floor():
    assert LIMITS.floor(1e9, 1e9, "float32") == pytest.approx(0.05)
    assert LIMITS.floor(1e11, 1e9, "bfloat16") == pytest.approx(0.25)


def test_saved_results_are_read_back(tmp_path):
    results.save(run(1, 2), tmp_path / "r.json")
    assert results.load(tmp_path / "r.json") == run(1, 2) | {"date": results.load(tmp_path / "r.json")["date"]}
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other\.json holds no benchmark results"):
        results.load(tmp_path / "other.json")


def test_the_table_names_contenders_limits_and_what_was_skipped():
    text = results.table(run(0.04, 0.1))
    for part in ("nearest: K = 4", "faiss", "2.50", "40.0 ms", "2.0 MB", "50%", "100 GFLOP/s", "keops: not installed"):
        assert part in text


@pytest.mark.parametrize(("ours", "rival", "regressed"), [(1, 4, 0), (1, 3.3, 0), (1, 3.1, 1), (2, 8, 0)])
def test_a_ratio_counts_and_not_the_time(ours, rival, regressed):
    (change,) = results.compare(run(ours, rival), run(1, 4))
    assert change.before == 4
    assert change.regressed(0.2) == regressed


def test_a_case_that_was_not_run_is_listed_and_does_not_count():
    (change,) = results.compare({"cases": []}, run(1, 4))
    assert change.now is None and not change.regressed(0.0)


def test_a_folder_of_results_has_the_cases_of_all(tmp_path):
    results.save(run(1, 2), tmp_path / "a.json")
    other = run(1, 3)
    other["cases"][0]["operator"] = "attention"
    results.save(other, tmp_path / "b.json")
    found = results.load(tmp_path)
    assert [case["operator"] for case in found["cases"]] == ["nearest", "attention"]
    assert found["skipped"] == {"keops": "not installed"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.json file"):
        results.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("about", "name"),
    [
        (
            {"processor": "X, 2 threads", "backend cpp": "yes (_C.abi3.so, avx2 instructions)"},
            "X, 2 threads, avx2 instructions",
        ),
        ({"processor": "X, 2 threads", "backend cpp": "no  (not built)"}, "X, 2 threads"),
        ({"processor": "X, 2 threads", "cuda:0": "NVIDIA Y, sm_90"}, "NVIDIA Y, sm_90"),
    ],
)
def test_a_machine_is_named_by_what_runs_the_operators(about, name):
    assert results.machine_name(about) == name
