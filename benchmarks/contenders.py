"""Who is timed in a benchmark: we, on the implementation that is chosen by itself and on plain PyTorch, and rivals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache

import pytest

OURS = "dpdiff"
PLAIN = f"{OURS}: reference"  # the name after the colon is a backend's
_COMPILE_SECONDS = 120


def contenders(*rivals: str, yardsticks: Sequence[str] = (), plain: bool = True) -> Callable:
    """Decorator: the fixture `contender` becomes each of us, the rivals and the yardsticks in turn.

    It is "dpdiff" on both of our backends. plain=False leaves the reference out, where it would take the memory or the
    minutes that the fused operators are there to spare. Yardsticks do not solve the case's problem: they are a part of
    it, or another, which tells what the case may cost.
    """
    ours = [OURS, PLAIN] if plain else [OURS]
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
