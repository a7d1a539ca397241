"""GPU kernels compiled ahead of time: none spills, all fit; and one that doesn't is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]

MODULE = '''
import triton
import triton.language as tl

from dpdiff_kernels.triton.launch import Variant


@triton.jit
def square(x, out, SIZE: tl.constexpr):
    """A product of a matrix and itself, all of it in one block's registers."""
    i = tl.arange(0, SIZE)
    a = tl.load(x + i[:, None] * SIZE + i)
    tl.store(out + i[:, None] * SIZE + i, tl.dot(a, a))


def variants(arch):
    for size, warps in ((32, 4), (SIZE, WARPS)):
        yield Variant(square, {"x": "*fp16", "out": "*fp32"}, {"SIZE": size}, num_warps=warps)
'''


def run(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)


@pytest.mark.timeout(600)
def test_a_sample_of_every_kernel_compiles_within_the_limits():
    """All variants: `make gpu-check`, which takes the better part of an hour."""
    done = run("--sample", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 at fault" in done.stdout
    for module in (ROOT / "dpdiff_kernels" / "triton").glob("*.py"):
        if "def variants" in module.read_text(encoding="utf-8"):
            assert module.stem in done.stdout


@pytest.mark.parametrize(("size", "fault"), [(64, None), (128, "spills")])
def test_a_kernel_that_spills_is_found(tmp_path, size, fault):
    (tmp_path / "greedy.py").write_text(MODULE.replace("SIZE, WARPS", f"{size}, 4"))
    done = run("greedy", "--arch", "sm_80", path=tmp_path)
    assert done.returncode == (1 if fault else 0), done.stdout + done.stderr
    assert (fault or "0 at fault") in done.stdout
    assert "2 kernels compiled" in done.stdout


def test_more_shared_memory_than_a_block_may_have_is_a_fault():
    report = gpu_check.Report("x.cu", "kernel", "sm_80", "", limit=1024, registers=8, shared=1025)
    assert report.fault == "1,025 bytes of shared memory, 1,024 allowed"
    assert not replace(report, shared=1024).fault


def test_a_kernel_that_does_not_compile_is_found(tmp_path):
    (tmp_path / "wrong.py").write_text(MODULE.replace("SIZE, WARPS", "100, 4"))  # not a power of two
    done = run("wrong", "--arch", "sm_90", path=tmp_path)
    assert done.returncode == 1 and "1 at fault" in done.stdout, done.stdout + done.stderr


def test_the_report_of_ptxas_is_understood():
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6dpdiff5firstEPf' for 'sm_80'
ptxas info    : Function properties for _ZN6dpdiff5firstEPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 49152 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6dpdiff6secondEPf' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 360 bytes cmem[0]
"""
    first, second = gpu_check.parse_ptxas(text, "x.cu", "sm_80", 166_912)
    assert (first.registers, first.spills, first.shared) == (255, 8, 49152) and "spills 8 bytes" in first.fault
    assert (second.kernel, second.registers, second.spills, second.shared) == ("dpdiff::second", 32, 0, 0)
    assert not second.fault
