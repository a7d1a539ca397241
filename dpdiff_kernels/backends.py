"""Which implementation of an operator runs, and why.

`reference` is plain PyTorch on any device; `cpp` is the native library on CPU tensors; `triton` and `cuda` are for
CUDA tensors. The choice is, in this order: the operator's keyword `backend=`, the innermost `use_backend` block, the
environment variable DPDIFF_BACKEND, and `auto`: the fastest implementation that the tensors' device and dtype allow.
On AMD's GPUs, where they have not run yet, Triton's kernels have to be asked for. On NVIDIA's, kernels need a compute
capability of 8.0 or above.
"""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from dpdiff_kernels.checks import check_choice
from dpdiff_kernels.replay import forgo

NAMES = ("reference", "cpp", "triton", "cuda")


class Backend(NamedTuple):
    """Whether an implementation can run here, and why (not)."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


# As the native library reads it, once. That passes over what it doesn't know, so calls check it: an error at import
# would be a traceback on the command line.
_CPU_CAPABILITY = os.environ.get("DPDIFF_CPU_CAPABILITY")
# Whether Triton kernels run in its interpreter, on CPU tensors: slow, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _load_library() -> Backend:
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return Backend(False, "the native library was not built")
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return Backend(False, f"{libraries[0].name} does not load: {str(error).splitlines()[0]}")
    return Backend(True, f"{libraries[0].name}, {torch.ops.dpdiff.cpu_capability()} instructions")


# At import: without a CUDA context, with which processes can't be forked.
def _find_triton() -> Backend:
    if not _INTERPRETED and not torch.cuda.is_available():
        return Backend(False, "torch sees no CUDA device")
    try:
        import triton
    except ImportError as error:
        return Backend(False, f"triton does not import: {error}")
    if _INTERPRETED:
        return Backend(True, f"triton {triton.__version__}, interpreted, on CPU tensors (TRITON_INTERPRET)")
    if torch.version.hip:
        return Backend(True, f"triton {triton.__version__}, when asked for: its kernels have not run on AMD's GPUs yet")
    return Backend(True, f"triton {triton.__version__}")


def _find_cuda() -> Backend:
    if not torch.cuda.is_available():
        return Backend(False, "torch sees no CUDA device")
    if not _LIBRARY:
        return Backend(False, _LIBRARY.reason)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dpdiff::sinkhorn", "CUDA"):
        return Backend(False, f"{_LIBRARY.reason.partition(',')[0]} was built without DPDIFF_BUILD_CUDA=1")
    return Backend(True, "sinkhorn alone, of costs of up to 4,096 columns")


_LIBRARY = _load_library()
_FOUND = {
    "reference": Backend(True, "plain PyTorch, any device"),
    "cpp": _LIBRARY,
    "triton": _find_triton(),
    "cuda": _find_cuda(),
}
_REMEDY = "reinstall with a C++17 compiler: pip install --no-build-isolation --force-reinstall --no-deps ."
_warned = False


@dataclass(eq=False)  # each is equal to itself only: of two with one name, the right one leaves
class _Block:
    """A `use_backend` block that runs."""

    name: str


# The innermost last. Of the process, not of the thread: a backward pass runs in threads of autograd's own.
_blocks: list[_Block] = []


def backends() -> dict[str, Backend]:
    """Returns every backend's name with `available` and `reason`.

    >>> dpdiff_kernels.backends()["reference"].available
    True
    """
    return dict(_FOUND)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator in the block on one backend; `"auto"` gives the choice back to the library.

    Applies to the whole process (all threads). An operator called with a keyword `backend=` keeps that.

    Raises:
        ValueError: `name` is unknown, or that backend isn't available here.
    """
    _check(name, "use_backend's name")
    block = _Block(name)
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)  # not always the last: another thread's may have begun since


def asked_for() -> str:
    """The choice that a call without `backend=` has: of the innermost `use_backend` block, else of DPDIFF_BACKEND."""
    return _blocks[-1].name if _blocks else os.environ.get("DPDIFF_BACKEND", "auto")


def select(backend: str | None, implemented: tuple[str, ...], *tensors: torch.Tensor | None) -> str:
    """Returns the backend that an operator call is to run on.

    Args:
        backend: the call's own `backend=` keyword.
        implemented: the backends that have this operator, fastest first.
        tensors: the floating-point inputs that it is differentiable in, of one dtype, None where one isn't given;
            float64 runs on the reference only.

    Raises:
        ValueError: the backend asked for is unknown, isn't available, or can't take these tensors; or, for tensors on
            a CPU, DPDIFF_CPU_CAPABILITY is unknown.
        NotImplementedError: an input carries a forward-mode derivative, and the backend is another than the reference.
    """
    asked_by = "DPDIFF_BACKEND" if backend is None and not _blocks else "backend"
    if backend is None:
        backend = asked_for()
    if backend == "reference":
        forgo()  # its results hold little, but what it makes on the way may fill a GPU
        return backend
    _check(backend, asked_by)

    device = tensors[0].device.type
    if device == "cpu" and _CPU_CAPABILITY is not None:
        check_choice("DPDIFF_CPU_CAPABILITY", _CPU_CAPABILITY, ("amx", "avx512", "avx2", "portable"))
    possible = [name for name in implemented if _runs_on(name, device)]
    if tensors[0].dtype == torch.float64:
        possible = ["reference"]
    shortcoming = _shortcoming(tensors[0].device) if len(possible) > 1 else ""
    if shortcoming:
        possible = ["reference"]
    if backend != "auto":
        if backend not in possible:
            raise ValueError(
                f"{asked_by} is {backend!r}, which can't run this call on {device} {tensors[0].dtype} tensors"
                f"{shortcoming and f' ({shortcoming})'}: expected one of {', '.join(possible)}"
            )
        refuse_tangents(backend, *tensors)
        return backend
    if device == "cpu" and not _LIBRARY and "cpp" in implemented:
        _warn_once(f"{_LIBRARY.reason}; {_REMEDY}")
    if shortcoming:
        _warn_once(shortcoming)
    on_request = {"triton"} if device == "cpu" or torch.version.hip else set()
    backend = next(name for name in possible if name not in on_request)
    if backend == "reference":
        forgo()
    refuse_tangents(backend, *tensors)
    return backend


def refuse_tangents(backend: str, *tensors: torch.Tensor | None) -> None:
    """Native operators would drop forward-mode derivatives without a word: an error instead."""
    if forward_ad._current_level < 0 or backend == "reference":  # nearly always: costs a comparison
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"forward-mode derivatives are not on backend {backend!r}: expected backend='reference', which has those "
            "of nearest_prototype, aggregate_nearest and prototype_attention"
        )


def _runs_on(name: str, device: str) -> bool:
    if name == "reference":
        return True
    if name == "cpp":
        return device == "cpu" and _LIBRARY.available
    on = "cpu" if name == "triton" and _INTERPRETED else "cuda"
    return device == on and _FOUND[name].available


def _shortcoming(device: torch.device) -> str:
    """Why kernels for GPUs don't run on this one, if they don't."""
    if device.type != "cuda" or torch.version.hip:
        return ""
    major, minor = capability(device)
    return "" if major >= 8 else f"cuda:{device.index} has compute capability {major}.{minor}, below 8.0"


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    # torch.compile, which warns of caches, asks once anyway.
    return (_capability if torch.compiler.is_compiling() else _known_capability)(device.index)


def _capability(index: int) -> tuple[int, int]:
    # Not get_device_capability, which torch.compile would leave in its graph.
    found = torch.cuda.get_device_properties(index)
    return found.major, found.minor


_known_capability = cache(_capability)  # asking the driver takes as long as a launch


def _check(name: str, argument: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{argument} is {name!r}: expected auto, {', '.join(NAMES)}")
    if name != "auto" and not _FOUND[name]:
        raise ValueError(f"{argument} is {name!r}, which isn't available here: {_FOUND[name].reason}")


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"dpdiff_kernels runs on its slow reference implementation: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def show_config() -> str:
    """Prints, and returns, one screen for a bug report: versions, devices, backends, instruction sets."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        dpdiff_version = version("dpdiff")
    except PackageNotFoundError:
        dpdiff_version = "not installed (imported from a source tree)"
    rows = {
        "dpdiff": dpdiff_version,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        "processor": f"{_processor()}, {torch.get_num_threads()} threads",
    }
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        rows[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB"
    for name, backend in backends().items():
        rows[f"backend {name}"] = f"{'yes' if backend else 'no '} ({backend.reason})"
    rows["DPDIFF_BACKEND"] = os.environ.get("DPDIFF_BACKEND", "auto (not set)")
    width = max(map(len, rows))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
    print(text)
    return text


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
