"""The most memory that a call holds at once."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

import dpdiff_kernels as dk

_PROCESS = Path("/proc/self")


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Most bytes held at any moment of `run()` beyond those held before, its result included.

    On processors this is resident memory, whichever library allocates; memory that was freed before is given back to
    the system first, dpdiff's too, and what other libraries keep from an earlier call counts as held. None where the
    system (other than Linux with glibc) doesn't tell. On GPUs it is what torch's allocator hands out.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    if dk.backends()["cpp"]:
        torch.ops.dpdiff.release_memory()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # the high-water mark falls to what is held now
    except (OSError, AttributeError):
        return None
    before = _status("VmHWM")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
