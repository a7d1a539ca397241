"""How Triton kernels are launched and, without a GPU, compiled ahead of time."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dpdiff_kernels.operators import dispatched
from dpdiff_kernels.replay import Launcher, ReplayedOperator, recorder

# Shared memory that one block may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def registered(kind: Callable, *, replayed: bool = True) -> Callable[[Callable], Callable]:
    """Decorator: makes a function the operator dpdiff_triton::<its name> by `torch.library.triton_op` or `custom_op`.
    The function itself can still be called, and is `replayed`."""

    def register(function: Callable) -> Callable:
        called = ReplayedOperator(function) if replayed else function
        called.definition = kind(f"dpdiff_triton::{function.__name__}", function, mutates_args=())
        return called

    return register


def launch(kernel: Any, *, traced: bool = True) -> Any:
    """`launch(kernel)[grid](...)` in such an operator: what records its calls sees the kernel, and torch.compile, where
    it traces a `triton_op`. traced: False in a `custom_op`, which isn't."""
    recording = recorder()
    if recording is not None:
        return Launcher(recording, kernel)
    return torch.library.wrap_triton(kernel) if traced and dispatched() and isinstance(kernel, JITFunction) else kernel


def arch_of(device: torch.device) -> str:
    """The name in `TARGETS` whose choices of tiles fit `device`; the smallest NVIDIA one in the interpreter."""
    return "sm_80" if device.type != "cuda" else _properties(device.index)[0]


def multiprocessors_of(device: torch.device) -> int:
    return 4 if device.type != "cuda" else _properties(device.index)[1]


@cache  # asking the driver takes as long as a launch
def _properties(index: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(index)
    arch = "gfx942" if torch.version.hip else "sm_90" if found.major >= 9 else "sm_80"
    return arch, found.multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# Triton's own, on the host, look into what they are given each time.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is n or more."""
    return 1 << max(int(n) - 1, 0).bit_length()


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: what `triton.compile` needs.

    signature: the type of each argument that isn't in `constants`, "*fp32", "i32", ...; every pointer, and the integers
    named in `divisible`, are multiples of 16.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name} {constants} warps={self.num_warps} stages={self.num_stages}"


class Resources(NamedTuple):
    """What a compiled kernel takes: registers per thread, bytes of spills per thread and of shared memory per block."""

    registers: int
    spills: int
    shared: int


def compile_variant(variant: Variant, arch: str) -> Resources:
    """Compiles for a device that need not be here. Not in the interpreter: TRITON_INTERPRET must not be set."""
    target, _ = TARGETS[arch]
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    multiples = [n for n, kind in signature.items() if kind.startswith("*") or n in variant.divisible]
    source = ASTSource(
        variant.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        return Resources(*_amd_resources(compiled.asm["amdgcn"]), compiled.metadata.shared)
    return Resources(*_nvidia_resources(compiled.asm["ptx"], arch), compiled.metadata.shared)


def _nvidia_resources(ptx: str, arch: str) -> tuple[int, int]:
    ptxas = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "ptxas"
    arch = "sm_90a" if arch == "sm_90" else arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={arch}", source, "-o", Path(folder, "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return int(re.search(r"Used (\d+) registers", report)[1]), spills


def _amd_resources(assembly: str) -> tuple[int, int]:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return read("vgpr_count"), 4 * (read("vgpr_spill_count") + read("sgpr_spill_count"))
