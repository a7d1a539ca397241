"""What all benchmarks share: device, threads, how long and how they are timed, and what is kept of each.

A benchmark is a pytest-benchmark test with the decorator `contenders`, which ends in a call of the fixture `measure`.
Tests with the same group are one case, and their times are compared.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: an installed dpdiff keeps its place

# POT would have these reserve most of a GPU's memory as it is imported, where they are installed.
os.environ |= dict.fromkeys(("POT_BACKEND_DISABLE_JAX", "POT_BACKEND_DISABLE_TENSORFLOW"), "1")

import dpdiff_kernels as dk  # noqa: E402
from benchmarks import results  # noqa: E402
from benchmarks.contenders import OURS, chosen_backend  # noqa: E402
from benchmarks.limits import measure_limits, processors  # noqa: E402
from benchmarks.memory import peak_memory  # noqa: E402
from benchmarks.timing import Call  # noqa: E402

_RECORD = pytest.StashKey[results.Record]()
_OURS = pytest.StashKey[tuple[Path, str, Call]]()  # the case that was timed last


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpdiff")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where operands lie (default: cpu)")
    group.addoption("--threads", type=int, default=processors(), help="of the processor (default: all)")
    group.addoption("--budget", type=float, default=1.0, help="seconds of timing per contender (default: 1)")
    group.addoption("--results", metavar="FILE", help="write cases, ratios, limits and what was skipped, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    config.stash[_RECORD] = results.Record()
    config.addinivalue_line("markers", "yardstick: a contender that doesn't solve the case's problem")
    config.addinivalue_line("markers", "device(name): where a case or contender is run, if not on both")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("device")
    items[:] = [item for item in items if all(mark.args == (device,) for mark in item.iter_markers("device"))]
    timer = _cuda_timer if device == "cuda" else time.perf_counter
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer))
    cases = {item: place for place, item in reversed(list(enumerate(map(_case_of, items))))}
    items.sort(key=lambda item: cases[_case_of(item)])  # the contenders of a case one after the other, ours first


def _case_of(item: pytest.Item) -> tuple:
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    parameters.pop("contender", None)
    return (item.path, item.originalname, *parameters.items())


def _operator(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")


def _cuda_timer() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator:
    report, operator = (yield), _operator(item)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        name = getattr(item, "callspec", None) and item.callspec.params.get("contender")
        item.config.stash[_RECORD].skipped[f"{operator}: {name or item.name}"] = reason.removeprefix("Skipped: ")
    elif report.failed:
        why = str(call.excinfo.value).strip().partition("\n")[0]
        item.config.stash[_RECORD].skipped[f"{operator}: {item.name}"] = f"failed: {call.excinfo.typename}: {why}"
    if report.when == "teardown" and item.config.getoption("results"):
        _save(item.config, "the run was stopped")
    return report


def _save(config: pytest.Config, stopped: str | None) -> dict | None:
    """What there is by now, for a run that is killed keeps it too; stopped: why there is no more."""
    record = config.stash[_RECORD]
    if not record.measurements:
        return None
    found = results.assemble(record, record.limits, ["pytest", *config.invocation_params.args])
    if stopped is not None:
        found["skipped"] = record.skipped | {"the cases that follow": stopped}
    if config.getoption("results"):
        results.save(found, config.getoption("results"))
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt() -> None:
    """`timeout` interrupts a process, and then its group: a second time, by which what there is would be lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.hookimpl(trylast=True)  # after the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    found = _save(config, None if complete else "the run was interrupted")
    if found is not None:
        terminalreporter.write(results.table(found))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda": where a benchmark's operands lie."""
    return request.config.getoption("device")


@pytest.fixture(scope="session", autouse=True)
def limits(request: pytest.FixtureRequest, device: str) -> None:
    """This machine's limits, measured before all else, with the threads that every library is to use."""
    threads = request.config.getoption("threads")
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(threads)
    with contextlib.suppress(ImportError):
        import sklearn  # noqa: F401
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)  # of all that is loaded by now
    if not request.config.getoption("benchmark_disable"):
        request.config.stash[_RECORD].limits = measure_limits(device)


@pytest.fixture(autouse=True)
def released_memory(device: str) -> Generator[None]:
    """What torch's allocator kept from a case is not missing in another, of another process it may be."""
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def contender(request: pytest.FixtureRequest) -> Generator[str]:
    """Who is timed; "dpdiff" for us on any backend, which is in use until the test ends."""
    name, _, backend = request.param.partition(": ")
    if backend and not dk.backends()[backend]:
        pytest.skip(dk.backends()[backend].reason)
    with dk.use_backend(backend) if backend else contextlib.nullcontext():
        yield name


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest, device: str) -> Callable[..., None]:
    """`measure(group, run, flops=, bytes=, dtype=, sweep=)` times `run()`, keeps the median, and takes its peak memory.

    After each round of a rival there is one of ours, so that the ratio between them is of the same minute, in which the
    machine was as fast for both. Each has its own threads awake and the other's at rest (`Call.take_turn`). With
    --benchmark-disable `run()` is called once and nothing is timed, which leaves compiled kernels in the caches on
    disk.

    Args:
        group: the case, a short text; the same for all contenders.
        flops: operations (two per multiply-add) of the matrix products that any implementation has to do, and
        bytes: operands read once and results written once. Both may be left out where they mean nothing.
        dtype: of the operands: which measured rate bounds the operations.
        sweep: the line, the axis and the place on it, of a case that is one of several with a growing size.
    """
    name, config = request.node.callspec.params["contender"], request.config

    def run_and_record(
        group: str,
        run: Callable[[], object],
        *,
        flops: float = 0,
        bytes: float = 0,
        dtype: str = "float32",
        sweep: tuple[str, str, int] | None = None,
    ) -> None:
        if config.getoption("benchmark_disable"):
            run()
            return
        benchmark.group = group
        call = Call.warmed_up(run, device)
        if name == OURS:
            config.stash[_OURS] = (request.path, group, call)
        ours = config.stash.get(_OURS, (None, None, call))
        ours = None if name == OURS or ours[:2] != (request.path, group) else ours[2]
        beside: list[float] = []

        def time_ours() -> None:
            with dk.use_backend(chosen_backend()):
                ours.take_turn()
                beside.append(ours.seconds())
            call.take_turn()

        rounds = call.rounds(config.getoption("budget"))
        teardown = None if ours is None else time_ours
        call.take_turn()
        benchmark.pedantic(run, rounds=rounds, iterations=call.iterations, teardown=teardown)
        seconds = benchmark.stats.stats.median
        config.stash[_RECORD].measurements.append(
            results.Measurement(
                operator=_operator(request.node),
                case=group,
                contender=name,
                seconds=seconds,
                ratio=seconds / statistics.median(beside) if beside else None,
                memory=peak_memory(inspect.unwrap(run), device),  # of what a graph has captured
                work=results.Work(flops, bytes, dtype),
                yardstick=request.node.get_closest_marker("yardstick") is not None,
                sweep=sweep,
            )
        )

    return run_and_record
