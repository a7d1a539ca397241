"""benchmarks/gpu.sh without a GPU: its steps, with a stand-in for Python that notes what it is asked."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
SANITIZER = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --target-processes || $1 == --error-exitcode ]] && shift; shift; done
exec "$@"
"""
STAND_IN = """#!/bin/bash
echo "$DPDIFF_BACKEND $*" >> "$(dirname "$0")/asked"
case "$*" in *"$FAILS"*) echo "out of memory"; exit 3;; esac
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    path = f"{sanitizer.parent}:{os.environ['PATH']}"

    def run(fails: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        environment = os.environ | {"PYTHON": str(python), "FAILS": fails, "DPDIFF_BACKEND": "auto", "PATH": path}
        done = subprocess.run([SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment)
        return done, (tmp_path / "asked").read_text().splitlines()

    return run


def test_every_step_runs_in_its_order(run):
    done, asked = run("nothing")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["setup.py", "tests/gpu", "tests/gpu/test_nearest.py"]
    parts += ["bench_attention", "bench_nearest", "bench_sinkhorn", "bench_scaling"]
    parts += ["benchmarks/model", "benchmarks.tune", "benchmarks.report"]
    assert [part for part, line in zip(parts, asked, strict=True) if part in line] == parts
    assert all(line.startswith("triton") for line in asked if "--device cuda" in line)


def test_a_step_that_fails_is_told_and_stops_no_other(run, tmp_path):
    done, asked = run("bench_nearest")
    assert done.returncode == 1 and len(asked) == 10
    assert "failed: bench_nearest.py (3)" in done.stdout
    assert "out of memory" in (tmp_path / "out" / "bench_nearest.py.txt").read_text()


def test_all_steps_together_stay_below_nine_minutes():
    steps = re.findall(r"^ *(?:step \w+|bench \S+) (\d+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(steps) == 11 and sum(map(int, steps)) < 540
