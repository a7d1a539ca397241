"""Who is timed in a benchmark: we, on the implementation that is chosen by itself and on others, and rivals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

OURS = "dpdiff"
_COMPILE_SECONDS = 120


def on(device: str, *values: object) -> Any:
    """A contender, or another parameter of a benchmark, that is there on this device only."""
    return pytest.param(*values, marks=pytest.mark.device(device))


def contenders(*rivals: Any, yardsticks: Sequence[str] = (), backends: Sequence[str] = ("reference",)) -> Callable:
    """Decorator: the fixture `contender` becomes each of us, the rivals and the yardsticks in turn.

    It is "dpdiff" on each of our backends: the one that is chosen by itself, and `backends`. The reference is left out
    of these where it takes the memory or the minutes that the fused operators are there to spare. Yardsticks do not
    solve the case's problem: they are a part of it, or another, which tells what the case may cost.
    """
    ours = [OURS, *(f"{OURS}: {backend}" for backend in backends)]
    marked = [pytest.param(name, marks=pytest.mark.yardstick) for name in yardsticks]
    return pytest.mark.parametrize("contender", [*ours, *rivals, *marked], indirect=True)


def chosen_backend() -> str:
    """What "dpdiff" runs on: the variable DPDIFF_BACKEND names it, or it is chosen by itself."""
    return os.environ.get("DPDIFF_BACKEND", "auto")


@cache
def keops() -> type:
    """KeOps' LazyTensor. It compiles at first use, which is done in a process of its own, as it may take minutes."""
    lazy_tensor = pytest.importorskip("pykeops.torch").LazyTensor
    code = (
        "import torch; from pykeops.torch import LazyTensor as L; x = torch.rand(2, 64);"
        "((L(torch.rand(1, 2, 1)) - ((L(x[:, None]) - L(x[None])) ** 2).sum(-1) * 2.0).logsumexp(1))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"KeOps did not compile its kernel in {_COMPILE_SECONDS} s")
    if done.returncode:
        pytest.skip(f"KeOps could not compile its kernel: {done.stderr.strip().splitlines()[-1]}")
    return lazy_tensor
