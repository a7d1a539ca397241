"""The sweep over tile sizes, on a module whose tiles are seconds to sleep."""

import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dpdiff_kernels as dk
from benchmarks import tune
from benchmarks.tune import Sweep, attempt, table
from dpdiff_kernels.replay import ReplayedOperator


@pytest.fixture
def sweep() -> Sweep:
    module = SimpleNamespace(pick=lambda seconds: seconds)

    def run() -> torch.Tensor:
        seconds = module.pick(0.004)
        if seconds > 1:
            raise RuntimeError("out of resources: shared memory")
        time.sleep(seconds)
        return torch.tensor(1.0 if seconds > 0.0005 else 2.0)

    changes = [
        ("half", lambda seconds: seconds / 2),
        ("double", lambda seconds: 2 * seconds),
        ("too large", lambda seconds: 1000 * seconds),
        ("wrong", lambda seconds: seconds / 100),
    ]
    return Sweep("sleep", module, "pick", changes, run)


def test_candidates_are_timed_beside_what_is_in_use(sweep):
    pick = sweep.module.pick
    trials = {trial.candidate: trial for trial in attempt(sweep, "cpu")}
    assert trials["in use"].seconds == pytest.approx(0.004, rel=0.3)
    assert trials["half"].ratio == pytest.approx(2, rel=0.3) and trials["double"].ratio == pytest.approx(0.5, rel=0.3)
    assert "shared memory" in trials["too large"].error and "not close" in trials["wrong"].error
    assert trials["too large"].seconds is None and trials["wrong"].ratio is None
    assert sweep.module.pick is pick


def test_no_candidate_begins_after_the_time_is_up(sweep):
    assert [trial.candidate for trial in attempt(sweep, "cpu", until=time.perf_counter())] == ["in use"]


def test_candidates_are_shared_by_processes_that_compile_ahead(sweep, monkeypatch):
    tried, pick, run = [], sweep.module.pick, sweep.run
    noting = replace(sweep, run=lambda: (tried.append(sweep.module.pick(0.004)), run()))
    monkeypatch.setattr(tune, "sweeps", lambda device: [noting])
    monkeypatch.setattr(dk, "use_backend", lambda name: nullcontext())
    tune.compile_ahead("", 0, 2, float("inf"))
    assert tried == [0.002, 4.0]  # every second one, also where it fails
    tune.compile_ahead("", 1, 2, float("inf"))
    assert tried == [0.002, 4.0, 0.008, 0.00004] and sweep.module.pick is pick
    tune.compile_ahead("", 0, 1, until=0)
    assert len(tried) == 4


def test_a_replayed_operator_has_a_candidate_s_tiles(sweep):
    module, seen = sweep.module, []
    operator = ReplayedOperator(lambda x: (seen.append(module.pick(0.004)), x + 1)[1])
    list(attempt(replace(sweep, run=lambda: operator(torch.ones(1))), "cpu"))
    assert seen == [0.004, 0.002, 0.008, 4.0, 0.00004]


def test_the_table_has_what_is_faster(sweep):
    rows = table(list(attempt(sweep, "cpu")))
    assert list(rows.columns[1].cells) == ["half", "in use"]
