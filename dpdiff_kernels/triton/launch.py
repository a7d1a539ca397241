"""How Triton kernels are launched and, without a GPU, compiled ahead of time."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Shared memory that one block may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def launch(kernel: Any) -> Any:
    """`launch(kernel)[grid](...)` in a `triton_op`: torch.compile sees the kernel; the interpreter's runs as it is."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def arch_of(device: torch.device) -> str:
    """The name in `TARGETS` whose choices of tiles fit `device`; the smallest NVIDIA one in the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


@contextmanager
def on_device(tensor: torch.Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


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
    name: str = field(default="")

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name or self.kernel.fn.__name__} {constants} warps={self.num_warps} stages={self.num_stages}"


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
