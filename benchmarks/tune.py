"""Times other tile sizes of the Triton kernels beside those in use, on the GPU that is there:

    python -m benchmarks.tune [--only attention] [--seconds 60] [--processes 14] [--json FILE]

Compiling takes far longer than timing. With --processes, as many first run every candidate once, which leaves the
kernels in Triton's cache on disk.

A candidate that doesn't compile, doesn't fit, or answers something else is told and left out. What is faster belongs
into the table of its module; nothing is changed here.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import dpdiff_kernels as dk
from benchmarks import results
from benchmarks.timing import best_time
from dpdiff_kernels import replay

_SECONDS = 0.1  # of timing per candidate
_WARM_UP = 0.3  # seconds in which a GPU's clocks rise, of which else the candidates alone had the benefit


@dataclass(frozen=True)
class Sweep:
    """An operator's call, and what the function `picker` of `module` could return other than it does.

    changes: (what, change): change(picked) is a candidate, made from what is in use.
    """

    name: str
    module: Any
    picker: str
    changes: Sequence[tuple[str, Callable[[Any], Any]]]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Trial:
    """seconds: None where it failed, and error says why. ratio: the time of the tiles in use over the candidate's."""

    sweep: str
    candidate: str
    seconds: float | None = None
    ratio: float | None = None
    error: str = ""


@contextmanager
def tried(sweep: Sweep, change: Callable[[Any], Any]) -> Iterator[None]:
    """In the block, the sweep's kernels have the tiles of a candidate."""
    pick = getattr(sweep.module, sweep.picker)
    setattr(sweep.module, sweep.picker, lambda *args, **kwargs: change(pick(*args, **kwargs)))
    replay.forget()
    try:
        yield
    finally:
        setattr(sweep.module, sweep.picker, pick)
        replay.forget()


def attempt(sweep: Sweep, device: str, until: float = float("inf")) -> Iterator[Trial]:
    """The tiles in use, then every candidate, while the clock is below `until`."""
    right = sweep.run()
    best_time(sweep.run, device, _WARM_UP)
    in_use = best_time(sweep.run, device, _SECONDS)
    yield Trial(sweep.name, "in use", in_use, 1.0)
    for candidate, change in sweep.changes:
        if time.perf_counter() > until:
            return
        try:
            with tried(sweep, change):
                torch.testing.assert_close(sweep.run(), right, rtol=2e-2, atol=2e-2)
                seconds = best_time(sweep.run, device, _SECONDS)
            yield Trial(sweep.name, candidate, seconds, in_use / seconds)
        except Exception as error:  # whatever the compiler or the driver raises is the finding
            yield Trial(sweep.name, candidate, error=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


def compile_ahead(only: str, place: int, step: int, until: float) -> None:
    """Runs once every `step`-th candidate from `place` on, in a process of its own, while `time.time()` is below
    `until`. What fails will fail again when it is to be timed, and is told then."""
    with dk.use_backend("triton"):
        candidates = [(sweep, change) for sweep in chosen(only) for _, change in sweep.changes]
        for sweep, change in candidates[place::step]:
            if time.time() > until:
                return
            with suppress(Exception), tried(sweep, change):
                sweep.run()


def chosen(only: str) -> list[Sweep]:
    return [sweep for sweep in sweeps("cuda") if only in sweep.name]


def sweeps(device: str) -> list[Sweep]:
    """Of every operator, at the sizes of its benchmark, backward passes included."""
    attention, nearest, sinkhorn, whole, points = (
        importlib.import_module(f"dpdiff_kernels.triton.{name}")
        for name in ("attention", "nearest", "sinkhorn", "sinkhorn_whole", "sinkhorn_points")
    )
    draw = lambda *shape, dtype=torch.float32: torch.rand(*shape, device=device).to(dtype)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        query = draw(16, 12, 784, 64, dtype=dtype).requires_grad_()
        banks = [draw(12, 1024, 64, dtype=dtype).requires_grad_() for _ in range(2)]
        forward = lambda query=query, banks=banks: dk.prototype_attention(query, *banks).detach()
        backward = lambda query=query, banks=banks: torch.autograd.grad(
            dk.prototype_attention(query, *banks).sum(), [query, *banks]
        )
        sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
        tiles = [attention.Tile(*size) for size in sizes]
        for part, run in (("forward", forward), ("query_gradient", backward), ("bank_gradient", backward)):
            changes = [(str(t), lambda picked, part=part, t=t: picked._replace(**{part: t})) for t in tiles]
            found.append(Sweep(f"attention {part} {dtype}", attention, "pick_tiles", changes, run))
    tokens, prototypes = draw(12_544, 768), draw(1024, 768)
    tiles = [nearest.Tile(*size) for size in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))]
    changes = [(str(t), lambda _, t=t: t) for t in tiles]
    run = lambda: dk.nearest_prototype(tokens, prototypes, metric="l2").scores
    found.append(Sweep("nearest screening", nearest, "screen_tile", changes, run))
    small, large, x, y = draw(32, 784, 128).requires_grad_(), draw(1, 2048, 2048), draw(10_000, 64), draw(10_000, 64)
    sizes = itertools.product((2048, 4096, 8192, 16384), (64, 128, 256), (4, 8, 16))
    changes = [
        (
            f"{size // width} x {width}, {warps} warps",
            lambda picked, size=size, width=width, warps=warps: (
                picked | dict(HEIGHT=size // width, WIDTH=width, POINTS=32 * warps, num_warps=warps)
            ),
        )
        for size, width, warps in sizes
    ]
    there_and_back = lambda: torch.autograd.grad(dk.sinkhorn(small).plan.square().sum(), small)
    found.append(Sweep("sinkhorn_whole", whole, "_tile", changes, there_and_back))
    for module, run in (
        (sinkhorn, lambda: dk.sinkhorn(large).plan),
        (points, lambda: dk.sinkhorn_points(x, y, eps=0.5, n_iters=5).f),
    ):
        sizes = itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8))
        changes = [
            (f"{o} x {r}, {w} warps", lambda picked, o=o, r=r, w=w: picked | dict(OUT=o, REDUCED=r, num_warps=w))
            for o, r, w in sizes
        ]
        found.append(Sweep(module.__name__.rpartition(".")[2], module, "_tiles", changes, run))
    return found


def table(trials: Sequence[Trial]) -> Table:
    """Of each sweep what is in use and what is faster, the fastest first."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("sweep", "left"), ("tiles", "left"), ("time", "right"), ("in use / this", "right")):
        rows.add_column(name, justify=justify)
    for name in dict.fromkeys(trial.sweep for trial in trials):
        timed = [trial for trial in trials if trial.sweep == name and trial.seconds is not None]
        for trial in sorted(timed, key=lambda trial: trial.seconds):
            if trial.ratio >= 1:
                rows.add_row(name, trial.candidate, results.milliseconds(trial.seconds), f"{trial.ratio:.2f}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="sweeps whose name has it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of timing, shared evenly by the sweeps")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="compile first, for as many seconds")
    parser.add_argument("--json", metavar="FILE", help="write every trial")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.processes:
        with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            until = time.time() + args.seconds
            for place in range(args.processes):
                pool.submit(compile_ahead, args.only, place, args.processes, until)
    trials: list[Trial] = []
    with dk.use_backend("triton"):
        found = chosen(args.only)
        end = time.perf_counter() + args.seconds
        for i, sweep in enumerate(found):
            now = time.perf_counter()
            trials += attempt(sweep, "cuda", now + (end - now) / (len(found) - i))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(trials))
    failed = sum(trial.seconds is None for trial in trials)
    console.print(f"{len(trials)} timed or tried, {failed} failed")
    if args.json:
        machine = results.machine()
        results.save({"date": results.now(), "machine": machine, "trials": [asdict(t) for t in trials]}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
