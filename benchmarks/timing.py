"""Calls, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Self

import torch

_RESOLVED = {"cpu": 1e-3, "cuda": 1e-2}  # seconds that a round lasts at least
_SLOW = 2.5  # seconds of a call from which on one round has to do
_LONG = 0.1  # seconds of a call to which a cold start makes no difference
_LONGEST_WAIT = 0.5  # seconds until the processors are idle


@dataclass(frozen=True)
class Call:
    """`run`, which takes about `once` seconds, and how often it is called in a round so that a clock resolves it."""

    run: Callable[[], object]
    device: str
    once: float
    iterations: int

    @classmethod
    def warmed_up(cls, run: Callable[[], object], device: str) -> Self:
        for _ in range(2):  # the first call may compile
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            once = time.perf_counter() - start
            if once > _SLOW:
                break
        return cls(run, device, once, max(1, round(_RESOLVED[device] / once)))

    def rounds(self, budget: float) -> int:
        """How many fit in so many seconds: from 3 to 100, or one where a call alone takes seconds."""
        if self.once > _SLOW:
            return 1
        return min(max(round(budget / (self.once * self.iterations)), 3), 100)

    def take_turn(self) -> None:
        """After another contender, on processors: waits until its threads are at rest, and wakes one's own.

        Those of a library go on looking for work after a call, OpenBLAS's for a tenth of a second: ours took twice as
        long after NumPy's products. And the first call on an idle machine may take twice as long as the next.
        """
        if self.device != "cpu":
            return
        deadline = time.perf_counter() + _LONGEST_WAIT
        idle = 0
        while idle < 3 and time.perf_counter() < deadline:
            before = time.process_time()
            time.sleep(2e-3)
            idle = idle + 1 if time.process_time() - before < 2e-4 else 0
        if self.once < _LONG:
            self.run()

    def seconds(self) -> float:
        """Of a call, by a round."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.iterations):
            self.run()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.iterations


def best_time(run: Callable, device: str, seconds: float) -> float:
    """Seconds of the fastest of as many calls as fit in `seconds`, at least three, after one to warm up."""
    run()
    call, times = Call(run, device, 0.0, 1), []
    while len(times) < 3 or sum(times) < seconds:
        times.append(call.seconds())
    return min(times)


def graphed(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`run`, captured once as a CUDA graph: the same kernels without Python's time and that of each launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles or allocates at the first call can't be captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    @wraps(run)
    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
