"""benchmarks/gpu.sh without a GPU: its steps, with a stand-in for Python that notes what it is asked."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
SANITIZER = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --target-processes || $1 == --error-exitcode ]] && shift; shift; done
exec "$@"
"""
STAND_IN = """#!/bin/bash
echo "$*" >> "$(dirname "$0")/asked"
case "$*" in *"$FAILS"*) echo "out of memory"; exit 3;; esac
case "$*" in *"$HANGS"*) trap "echo interrupted; exit 2" INT; sleep 60 & wait;; esac
"""
AT_ONCE = ["setup.py", "tests/gpu", "--benchmark-disable", "tests/gpu/test_nearest.py"]
ALONE = ["--results", "benchmarks.tune", "benchmarks.report"]


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "compute-sanitizer").write_text(SANITIZER)
    for command in (python, commands / "compute-sanitizer"):
        command.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{commands}:{os.environ['PATH']}"}

    def run(*arguments: str, fails: str = "nothing", hangs: str = "nothing"):
        done = subprocess.run(
            [SCRIPT, tmp_path / "out", *arguments],
            capture_output=True,
            text=True,
            env=environment | {"FAILS": fails, "HANGS": hangs},
        )
        asked = (tmp_path / "asked").read_text().splitlines()
        return done, [line for line in asked if "import xdist" not in line]

    return run


def test_what_compiles_runs_first_and_the_rest_in_its_order(run):
    done, asked = run()
    assert done.returncode == 0, done.stdout + done.stderr
    first, then = asked[: -len(ALONE)], asked[-len(ALONE) :]
    assert all(any(part in line.split() for line in first) for part in AT_ONCE)
    assert [part for part, line in zip(ALONE, then, strict=True) if part in line.split()] == ALONE
    places = [then[0].index(part) for part in ("attention", "sinkhorn", "nearest", "model", "scaling")]
    assert places == sorted(places)


@pytest.mark.parametrize(("fails", "step"), [("--benchmark-disable", "warm_up"), ("--results", "benchmarks")])
def test_a_step_that_fails_is_told_and_stops_no_other(run, tmp_path, fails, step):
    done, asked = run(fails=fails)
    assert done.returncode == 1 and all(any(part in line for line in asked) for part in AT_ONCE + ALONE)
    assert f"failed: {step} (3)\n" in done.stdout
    assert "out of memory" in (tmp_path / "out" / f"{step}.txt").read_text()


@pytest.mark.parametrize(("hangs", "step"), [("--benchmark-disable", "warm_up"), ("--results", "benchmarks")])
def test_all_steps_end_in_the_time_that_they_are_given(run, tmp_path, hangs, step):
    start = time.monotonic()
    done, asked = run("26", hangs=hangs)
    assert time.monotonic() - start < 30
    assert f"{step} (124)" in done.stdout and "benchmarks.report" in asked[-1]
    assert "interrupted" in (tmp_path / "out" / f"{step}.txt").read_text()
