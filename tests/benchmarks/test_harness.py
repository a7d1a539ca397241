"""The harness that all benchmarks share, on contenders that sleep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
BENCHMARK = """
import time
import pytest
import torch
import dpdiff_kernels as dk
from benchmarks.contenders import contenders

tokens, prototypes = torch.rand(64, 8), torch.rand(4, 8)

@contenders("twice as slow", "absent")
@pytest.mark.parametrize("seconds", [0.01, 0.02])
def test_sleep(measure, contender, seconds):
    if contender == "absent":
        pytest.importorskip("no_such_library")
    run = lambda: time.sleep(seconds * (2 if contender == "twice as slow" else 1))
    measure(f"{seconds} s", run, flops=1e6)

@contenders(backends=())
def test_memory(measure, contender):
    measure("memory", lambda: torch.ones(16 << 20))

@contenders()
def test_backend(measure, contender):
    from dpdiff_kernels.backends import select
    on_reference = select(None, ("cpp", "reference"), tokens) == "reference"
    measure(f"reference: {on_reference}", lambda: dk.nearest_prototype(tokens, prototypes))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "bench_sleep.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-c", ROOT / "pyproject.toml", "-q"]
    command += [f"--rootdir={folder}", "--budget=0.1", "--threads=1", "--results=found.json", "bench_sleep.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_peak_memory_of_a_call(found):
    assert case(found, "memory")["memory"]["dpdiff"] == pytest.approx(64 << 20, rel=0.1)


def test_the_reference_is_what_the_second_of_us_runs_on(found):
    assert list(case(found, "reference: True")["seconds"]) == ["dpdiff: reference"]


def test_a_rival_that_is_not_installed_is_named_with_the_reason(found):
    assert "no_such_library" in found["skipped"]["absent"]
