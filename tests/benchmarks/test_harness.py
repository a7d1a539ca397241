"""The harness that all benchmarks share, on contenders that sleep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
BENCHMARK = """
import threading
import time
import pytest
import torch
import dpdiff_kernels as dk
from benchmarks.contenders import contenders, on

tokens, prototypes = torch.rand(64, 8), torch.rand(4, 8)

@contenders("twice as slow", "absent")
@pytest.mark.parametrize("seconds", [0.01, 0.02])
def test_sleep(measure, contender, seconds):
    if contender == "absent":
        pytest.importorskip("no_such_library")
    run = lambda: time.sleep(seconds * (2 if contender == "twice as slow" else 1))
    measure(f"{seconds} s", run, flops=1e6)

def spin():
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        pass

@contenders("leaves a thread busy", backends=())
def test_busy_threads(measure, contender):
    work = lambda: sum(range(300_000))
    measure("busy threads", work if contender == "dpdiff" else lambda: threading.Thread(target=spin).start())

@contenders("wrong", on("cuda", "on GPUs"), backends=())
def test_answer(measure, contender):
    assert contender != "wrong", "another answer"
    measure("answer", lambda: None)

@contenders(backends=())
def test_memory(measure, contender):
    measure("memory", lambda: torch.ones(16 << 20))

@contenders()
def test_backend(measure, contender):
    from dpdiff_kernels.backends import select
    on_reference = select(None, ("cpp", "reference"), tokens) == "reference"
    measure(f"reference: {on_reference}", lambda: dk.nearest_prototype(tokens, prototypes))
"""
HANGS = """
def test_hangs():
    open("hangs", "w").close()
    time.sleep(60)
"""


def start(folder: Path, benchmark: str, *options: str) -> subprocess.Popen:
    (folder / "bench_sleep.py").write_text(benchmark)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-c", ROOT / "pyproject.toml", "-q"]
    command += [f"--rootdir={folder}", "--budget=0.1", "--threads=1", "--results=found.json", "bench_sleep.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], cwd=folder, env=environment, start_new_session=True, **output)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("harness"))


def run(folder: Path) -> dict:
    process = start(folder, BENCHMARK)
    told = process.communicate()[0]
    assert process.returncode == 1 and "1 failed" in told, told  # the contender whose answer is wrong
    return json.loads((folder / "found.json").read_text())


def case(found: dict, name: str) -> dict:
    return next(case for case in found["cases"] if case["case"] == name)


def test_contenders_of_a_case_one_after_the_other_ours_first(found):
    assert [case["case"] for case in found["cases"]][:2] == ["0.01 s", "0.02 s"]
    for name in ("0.01 s", "0.02 s"):
        assert list(case(found, name)["seconds"]) == ["dpdiff", "dpdiff: reference", "twice as slow"]


def test_ratios_are_of_rounds_side_by_side(found):
    ratios = case(found, "0.02 s")["ratios"]
    assert ratios == {"dpdiff: reference": pytest.approx(1, rel=0.3), "twice as slow": pytest.approx(2, rel=0.3)}
    assert case(found, "0.02 s")["seconds"]["dpdiff"] == pytest.approx(0.02, rel=0.3)


def test_threads_that_a_rival_leaves_busy_do_not_slow_us(found, tmp_path_factory):
    for again in range(3):  # the two times are seconds apart, in which a shared machine may have become slower
        busy = case(run(tmp_path_factory.mktemp("again")) if again else found, "busy threads")
        beside = busy["seconds"]["leaves a thread busy"] / busy["ratios"]["leaves a thread busy"]
        alone = pytest.approx(busy["seconds"]["dpdiff"], rel=0.3)
        if beside == alone:
            break
    assert beside == alone


def test_peak_memory_of_a_call(found):
    assert case(found, "memory")["memory"]["dpdiff"] == pytest.approx(64 << 20, rel=0.1)


def test_the_reference_is_what_the_second_of_us_runs_on(found):
    assert list(case(found, "reference: True")["seconds"]) == ["dpdiff: reference"]


def test_a_rival_that_is_not_installed_is_named_with_the_reason(found):
    assert "no_such_library" in found["skipped"]["sleep: absent"]


def test_a_contender_that_fails_is_named_and_one_of_another_device_is_not(found):
    assert found["skipped"]["sleep: test_answer[wrong]"] == "failed: AssertionError: another answer"
    assert list(case(found, "answer")["seconds"]) == ["dpdiff"]
    assert not any("GPUs" in name for name in found["skipped"])


@pytest.mark.parametrize(
    ("number", "status", "why"),
    [(signal.SIGINT, 2, "the run was interrupted"), (signal.SIGKILL, -signal.SIGKILL, "the run was stopped")],
)
def test_a_run_that_is_ended_keeps_what_it_has(tmp_path, number, status, why):
    """As `timeout --signal=INT` does, to the process and to its group, and where that has no effect."""
    process = start(tmp_path, BENCHMARK + HANGS)
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.kill(process.pid, number)
    time.sleep(0.1)
    os.killpg(process.pid, number)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == status, told
    found = json.loads((tmp_path / "found.json").read_text())
    assert {case["case"] for case in found["cases"]} >= {"0.01 s", "0.02 s"}
    assert found["skipped"]["the cases that follow"] == why


def test_with_benchmarks_disabled_everything_runs_and_nothing_is_timed(tmp_path):
    process = start(tmp_path, BENCHMARK, "--benchmark-disable")
    told = process.communicate()[0]
    assert "1 failed, 12 passed" in told, told
    assert not (tmp_path / "found.json").exists()
