"""prototype_attention in torch's machinery, on every instruction set and on any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_problems import BANKS, close, expected, inputs
from cpu_backends import CAPABILITIES, needs_cpp, skip_unless_lesser
from torch import Tensor

import dpdiff_kernels as dk


def test_autocast(backend):
    tensors = {name: t.requires_grad_() for name, t in inputs().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dk.prototype_attention(**tensors, backend=backend)
        mixed = dk.prototype_attention(**{**tensors, "query": tensors["query"].bfloat16()}, backend=backend)
    assert out.dtype == mixed.dtype == torch.bfloat16
    close(out, expected(**tensors), torch.bfloat16)
    out.sum().backward()
    assert tensors["local_key"].grad.dtype == torch.float32


@pytest.mark.parametrize(("banks", "dynamic"), [("one", False), ("joint", True), ("gated", True)])
def test_compile(backend, banks, dynamic):
    torch.compiler.reset()

    def function(tensors, options):
        return dk.prototype_attention(**tensors, **options, backend=backend).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, n, m, channels in ((3, 17, 11, 16), (2, 9, 6, 8)):
        tensors = {k: t.requires_grad_() for k, t in inputs(batch, n=n, m=m, channels=channels, **BANKS[banks]).items()}
        options = {"groups": torch.arange(m) % 3, "active_groups": torch.zeros(batch, 1, dtype=torch.int64)}
        out, wanted = compiled(tensors, options), function(tensors, options)
        close(out, wanted, torch.float32)
        for actual, want in zip(
            torch.autograd.grad(out.sum(), list(tensors.values())),
            torch.autograd.grad(wanted.sum(), list(tensors.values())),
        ):
            torch.testing.assert_close(actual, want, rtol=2e-5, atol=2e-5)


def test_export(backend):
    module = dk.PrototypeAttention(32, 4).eval()
    arguments = (torch.randn(3, 9, 32), torch.randn(12, 32), torch.randn(5, 32))
    batch, n, m = torch.export.Dim("batch"), torch.export.Dim("n"), torch.export.Dim("m")
    with dk.use_backend(backend), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=({0: batch, 1: n}, {0: m}, None))
        others = (torch.randn(2, 20, 32), torch.randn(7, 32), torch.randn(5, 32))
        close(program.module()(*others), module(*others), torch.float32)


def flat_arguments(banks: str, batched: bool, routed: bool, dtype=torch.float32) -> tuple:
    tensors = inputs(batched=batched, dtype=dtype, **BANKS[banks])
    names = ("query", "local_key", "local_value", "global_key", "global_value", "gate")
    arguments = [tensors[name].requires_grad_() if name in tensors else None for name in names]
    if banks == "gated":
        arguments[-1] = arguments[-1].detach().float().requires_grad_()
    routes = (torch.arange(11) % 3, torch.tensor([[0, -1], [2, 1], [1, 1]])) if routed else (None, None)
    return *arguments, 0.3, *routes


@needs_cpp
@pytest.mark.parametrize(
    ("banks", "batched", "dtype"),
    [("one", False, torch.bfloat16), ("joint", True, torch.float32), ("gated", False, torch.float32)],
)
def test_opcheck(banks, batched, dtype):
    arguments = flat_arguments(banks, batched, routed=True, dtype=dtype)
    # Its gradient test compares eager with compiled: half precision rounds alike, as it is the same kernel.
    torch.library.opcheck(torch.ops.dpdiff.prototype_attention, (*arguments, True))
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(torch.ops.dpdiff.prototype_attention, (*detached, False))
    outputs = torch.ops.dpdiff.prototype_attention(*detached, True)
    grad_out = torch.randn(outputs[0].shape).to(dtype)
    torch.library.opcheck(torch.ops.dpdiff.prototype_attention_backward, (grad_out, *detached, *outputs))


@needs_cpp
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    """Runs the tests again in a process of their own: the variable is read once per process."""
    skip_unless_lesser(capability)
    files = Path(__file__).parent.glob("test_attention*.py")
    chosen = "cpp and (forward or gradients or routing or sizes or strides or nan or huge or zero)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**os.environ, "DPDIFF_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@needs_cpp
@pytest.mark.parametrize("routed", [False, True])
def test_bits_do_not_depend_on_threads_or_neighbours(routed):
    tensors = {name: t.requires_grad_() for name, t in inputs(batch=4, n=333, m=150, channels=40).items()}
    options = {"groups": torch.arange(150) % 4, "active_groups": torch.tensor([[0], [2], [1], [2]])} if routed else {}

    def run():
        out = dk.prototype_attention(**tensors, **options, backend="cpp")
        return out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    image = {name: t[2:3] if name in ("query", "gate") else t for name, t in tensors.items()}
    if routed:
        options["active_groups"] = options["active_groups"][2:3]
    assert torch.equal(dk.prototype_attention(**image, **options, backend="cpp"), alone[0][2:3])
