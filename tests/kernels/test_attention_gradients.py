"""Gradients of prototype_attention against per-image float64 loops and finite differences, and their memory."""

import subprocess
import sys

import pytest
import torch
from attention_problems import BANKS, check_gradients, inputs
from cpu_backends import BACKENDS, needs_cpp

import dpdiff_kernels as dk


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("batched", [False, True])
def test_gradients(backend, banks, batched):
    tensors = inputs(batched=batched, **BANKS[banks])
    check_gradients(backend, tensors)


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("routed", [False, True])
def test_gradcheck_of_the_reference(banks, routed):
    tensors = inputs(batch=2, n=3, channels=4, m=5, m_global=BANKS[banks].get("m_global", 3), dtype=torch.float64)
    if banks == "joint":
        del tensors["gate"]
    routes = {}
    if routed:
        away = -1 if banks != "one" else 0  # the second image has only the global bank, where there is one
        routes = {"groups": torch.tensor([0, 0, 1, 2, 2]), "active_groups": torch.tensor([[2, 0, -1], [away, -1, 7]])}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: dk.prototype_attention(**dict(zip(names, values)), **routes),
        [t.requires_grad_() for t in tensors.values()],
    )


@pytest.mark.parametrize("name", ["local_key", "local_value"])
def test_gradients_stay_clean_of_a_nan_that_is_routed_away(backend, name):
    tensors = inputs()
    tensors[name][:, 2] = torch.nan
    leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
    options = {"groups": torch.arange(11), "active_groups": torch.tensor([[0, 1], [3, 4], [5, -1]])}
    dk.prototype_attention(**leaves, **options, backend=backend).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@needs_cpp
def test_second_derivatives_are_the_references():
    query, key, value = (t.requires_grad_() for t in inputs(m_global=None).values())
    (grad,) = torch.autograd.grad(dk.prototype_attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


MEMORY = """
import re, sys, torch, dpdiff_kernels as dk

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def extra(n, m):
    query = torch.randn(16, 12, n, 64).to(dtype).requires_grad_()
    banks = [torch.randn(12, k, 64).to(dtype).requires_grad_() for k in (m, m, 128, 128)]
    gate = torch.rand(16, 12, n).to(dtype).requires_grad_()
    out = dk.prototype_attention(query, *banks, gate)
    grad_out = torch.ones_like(out)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark comes down to what is in use
    before = status("VmRSS")
    gradients = torch.autograd.grad(out, [query, *banks, gate], grad_out, retain_graph=True)
    return status("VmHWM") - before - sum(g.numel() * g.element_size() for g in gradients) / 2**20

dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(2)
extra(1, 1)  # loads what autograd loads at first use
print(extra(100, 2432))
"""


@pytest.mark.skipif("cpp" not in BACKENDS or sys.platform != "linux", reason="needs the native library, and /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_memory(dtype):
    """At most 64 MiB beyond inputs and outputs: one (N, M) matrix would be 190 MiB here, expanded banks 240 MiB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=True)
    assert 8 <= float(run.stdout) <= 64
