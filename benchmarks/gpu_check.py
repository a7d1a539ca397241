"""Compiles every GPU kernel ahead of time, on any machine, and reports what it takes:

    python -m benchmarks.gpu_check [MODULE or FILE.cu...] [--arch sm_90] [--sample 1] [--json FILE]

Triton kernels: all variants that `variants(arch)` of the modules in dpdiff_kernels/triton lists, for sm_80, sm_90 and
gfx942. CUDA files: csrc/cuda/*.cu by nvcc, where there is one, for sm_80 and sm_90a (of a sample, for the latter only).
Exits with 1 where something doesn't compile, spills registers, or takes more shared memory than a block may have.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # what the interpreter runs can't be compiled

import argparse
import importlib
import itertools
import multiprocessing
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.limits import processors

ROOT = Path(__file__).parents[1]
CUDA_LIMITS = {"sm_80": 163 << 10, "sm_90a": 227 << 10}  # bytes of shared memory of one block


@dataclass(frozen=True)
class Report:
    """One compiled kernel. error: why it didn't compile, and then the rest is 0. shared: bytes per block, without what
    a CUDA kernel asks for at its launch. spills: bytes per thread."""

    source: str
    kernel: str
    arch: str
    variant: str
    limit: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""

    @property
    def fault(self) -> str:
        if self.error:
            return self.error
        faults = [f"spills {self.spills} bytes"] if self.spills else []
        if self.shared > self.limit:
            faults.append(f"{self.shared:,} bytes of shared memory, {self.limit:,} allowed")
        return " and ".join(faults)


def triton_modules() -> list[str]:
    """The modules of dpdiff_kernels.triton that list variants."""
    import dpdiff_kernels.triton as package

    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "variants")]


def triton_jobs(modules: Sequence[str], archs: Sequence[str], sample: int | None) -> Iterator[tuple[str, str, int]]:
    """Module, architecture and place in `variants(arch)`; of each kernel all, or `sample`, evenly spread back from the
    last, which is the widest."""
    for module, arch in itertools.product(modules, archs):
        places: dict[str, list[int]] = {}
        for place, variant in enumerate(importlib.import_module(module).variants(arch)):
            places.setdefault(variant.name, []).append(place)
        for found in places.values():
            n = len(found) if sample is None else min(sample, len(found))
            yield from ((module, arch, found[-1 - i * len(found) // n]) for i in range(n))


def compile_triton(job: tuple[str, str, int]) -> Report:
    from dpdiff_kernels.triton.launch import TARGETS, compile_variant

    module, arch, place = job
    variant = next(itertools.islice(importlib.import_module(module).variants(arch), place, None))
    about = (module.rpartition(".")[2], variant.name, arch, str(variant), TARGETS[arch][1])
    try:
        return Report(*about, *compile_variant(variant, arch))
    except Exception as error:  # whatever the compiler raises is the finding
        return Report(*about, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def compile_cuda(job: tuple[Path, str]) -> list[Report]:
    """Every kernel of a file for one architecture, with the flags of setup.py."""
    from torch.utils.cpp_extension import include_paths

    file, arch = job
    abi = re.search(r'ABI_VERSION = "(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    flags = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={abi}", "-DUSE_CUDA", "-Xptxas", "-v"]
    flags += [f"-I{path}" for path in include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        target = ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
        done = subprocess.run(
            ["nvcc", *flags, *target, "-c", file, "-o", Path(folder, "kernels.o")], capture_output=True, text=True
        )
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "nvcc failed")
        return [Report(file.name, "", arch, "", CUDA_LIMITS[arch], error=reason)]
    return parse_ptxas(done.stderr, file.name, arch, CUDA_LIMITS[arch])


def parse_ptxas(text: str, source: str, arch: str, limit: int) -> list[Report]:
    """The kernels that `ptxas -v` reports."""
    reports = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        mangled = part.partition("'")[0]
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
        spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", part)))  # with what the kernel calls
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        kernel = re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "")).removeprefix("void ")
        reports.append(Report(source, kernel, arch, "", limit, registers, spills, int(shared[1]) if shared else 0))
    return reports


def table(reports: Sequence[Report]) -> Table:
    """A row per kernel and architecture, with the most that any variant takes."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("source", "kernel", "for"):
        rows.add_column(name, overflow="fold")
    for name in ("variants", "registers", "spills", "shared", "faults"):
        rows.add_column(name, justify="right")
    key = lambda report: (report.source, report.kernel, report.arch)
    for names, group in itertools.groupby(sorted(reports, key=key), key=key):
        found = list(group)
        most = [max(getattr(report, name) for report in found) for name in ("registers", "spills", "shared")]
        faults = sum(bool(report.fault) for report in found)
        rows.add_row(*names, str(len(found)), *(f"{m:,}" for m in most), str(faults), style="red" if faults else None)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="with variants(), or CUDA files (default: all)")
    parser.add_argument("--arch", action="append", help="of Triton kernels: sm_80, sm_90 or gfx942 (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="variants of each kernel, evenly spread (default: all)")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every variant's registers, spills and shared memory")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    reports: list[Report] = []

    files = [Path(name) for name in args.modules if name.endswith(".cu")]
    modules = [name for name in args.modules if not name.endswith(".cu")]
    if not args.modules:
        files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    if importlib.util.find_spec("triton") is None:
        console.print("Triton kernels are skipped: triton is not installed")
    elif modules or not args.modules:
        from dpdiff_kernels.triton.launch import TARGETS

        unknown = set(args.arch or ()) - set(TARGETS)
        if unknown:
            parser.error(f"--arch {unknown.pop()}: expected {', '.join(TARGETS)}")
        jobs = list(triton_jobs(modules or triton_modules(), args.arch or list(TARGETS), args.sample))
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            reports += pool.map(compile_triton, jobs, chunksize=max(1, min(8, len(jobs) // (4 * args.jobs))))
    if files and shutil.which("nvcc") is None:
        console.print("CUDA files are skipped: nvcc is not in PATH")
    elif files:
        archs = [arch for arch in CUDA_LIMITS if not args.arch or arch.removesuffix("a") in args.arch]
        with ThreadPoolExecutor(args.jobs) as pool:
            for found in pool.map(compile_cuda, itertools.product(files, archs if args.sample is None else archs[-1:])):
                reports += found

    console.print(table(reports))
    faults = [report for report in reports if report.fault]
    for report in faults:
        name = report.variant or f"{report.source} {report.kernel}"
        console.print(f"{report.arch} {name}: {report.fault}", style="red", markup=False)
    console.print(f"{len(reports):,} kernels compiled, {len(faults):,} at fault")
    if args.json:
        results.save([asdict(report) for report in reports], args.json)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
