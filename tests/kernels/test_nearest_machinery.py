"""The nearest prototypes in PyTorch's machinery, on every instruction set and on any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_backends import CAPABILITIES, each_backend, needs_cpp, skip_unless_lesser
from nearest_problems import random

import dpdiff_kernels as dk


@needs_cpp
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_opcheck(shared, metric):
    ops = torch.ops.dpdiff
    tokens, prototypes = random(2, 9, 12), random(*([] if shared else [2]), 7, 12, seed=1)
    routes = (torch.arange(7) // 2, torch.tensor([[0, 1], [3, 2]]))
    for t in (tokens, prototypes):
        t.requires_grad_()
    for groups in ((None, None), routes):
        torch.library.opcheck(ops.nearest_prototype.default, (tokens, prototypes, 2, metric, *groups))
        torch.library.opcheck(ops.aggregate_nearest.default, (tokens, prototypes, 2, metric, 0.1, *groups))
    tokens, prototypes = tokens.detach(), prototypes.detach()
    indices = torch.randint(7, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    scores, weights = random(2, 9, 3, seed=2), random(2, 9, 3, seed=3)
    arguments = (tokens, prototypes, indices, scores, weights, tokens, random(2, 9, 3), metric, 0.1)
    torch.library.opcheck(ops.nearest_backward.default, (*arguments, True, True))
    torch.library.opcheck(ops.nearest_backward.default, (*arguments, False, True))
    if shared:
        torch.library.opcheck(ops.prototype_statistics.default, (tokens[0], prototypes, metric, None, True))


@pytest.mark.parametrize("namespace", [pytest.param("dpdiff", marks=needs_cpp), "dpdiff_triton"])
@pytest.mark.parametrize("layout", ["expanded", "strided", "permuted"])
def test_native_operators_take_any_stride(layout, namespace):
    """Whoever calls them, torch.compile included."""
    if namespace == "dpdiff_triton":
        pytest.importorskip("dpdiff_kernels.triton.nearest")
    operators, generator = getattr(torch.ops, namespace), torch.Generator().manual_seed(0)

    def laid_out(x):
        if layout == "expanded":
            return x[:1].expand_as(x)
        if layout == "strided":
            return x.repeat_interleave(2, -1)[..., ::2]
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    tokens, prototypes, grad_values = (laid_out(random(2, n, 12, seed=n)) for n in (9, 7, 9))
    groups = laid_out(torch.randint(3, (7,), generator=generator))
    active = laid_out(torch.tensor([[0, 1, 2], [2, 0, 1]]))
    scores, weights, grad_scores = (laid_out(random(2, 9, 3, seed=seed)) for seed in (2, 3, 4))
    indices = laid_out(torch.randint(7, (2, 9, 3), generator=generator))
    of_tokens = laid_out(random(9, seed=5).abs())
    for operator, arguments in (
        (operators.nearest_prototype, (tokens, prototypes, 2, "l2", groups, active)),
        (operators.aggregate_nearest, (tokens, prototypes, 2, "l2", 0.1, groups, active)),
        (
            operators.nearest_backward,
            (tokens, prototypes, indices, scores, weights, grad_values, grad_scores, "l2", 0.1, True, True),
        ),
        (operators.prototype_statistics, (tokens[0], prototypes[0], "l2", of_tokens, True)),
    ):
        expected = operator(*(t.contiguous() if isinstance(t, torch.Tensor) else t for t in arguments))
        assert all(torch.equal(x, y) for x, y in zip(operator(*arguments), expected))
        if namespace == "dpdiff":  # Triton's interpreter knows no fake tensors
            torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")


@needs_cpp
@pytest.mark.skipif("DPDIFF_CPU_CAPABILITY" in os.environ, reason="runs itself")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_other_instruction_sets(capability):
    """All that is tested of them once more: a process chooses its instruction set when it starts."""
    skip_unless_lesser(capability)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "cpp and not compile and not export and not opcheck"]
    command += Path(__file__).parent.glob("test_nearest*.py")
    result = subprocess.run(
        command, env=os.environ | {"DPDIFF_CPU_CAPABILITY": capability}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:]


class Module(torch.nn.Module):
    def __init__(self, k=2, metric="cosine", backend=None):
        super().__init__()
        self.k, self.metric, self.backend = k, metric, backend

    def forward(self, tokens, prototypes, groups=None, active_groups=None):
        options = dict(groups=groups, active_groups=active_groups, backend=self.backend)
        values, scores, _ = dk.aggregate_nearest(tokens, prototypes, self.k, self.metric, **options)
        nearest = dk.nearest_prototype(tokens, prototypes, self.k, self.metric, **options)
        statistics = dk.prototype_statistics(tokens, prototypes, self.metric, backend=self.backend)
        return values, scores, nearest.scores, nearest.indices, statistics.sums


@pytest.mark.parametrize(
    ("backend", "metric", "compiler"),
    [
        ("reference", "cosine", "aot_eager"),
        pytest.param("cpp", "l2", "aot_eager", marks=needs_cpp),
        pytest.param("cpp", "cosine", "inductor", marks=needs_cpp),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_compile_with_dynamic_shapes(backend, metric, compiler):
    module = Module(metric=metric, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    for n, n_prototypes in ((20, 30), (33, 21)):
        tokens, prototypes = random(2, n, 12), random(n_prototypes, 12, seed=1)
        eager_inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
        compiled_inputs = [t.clone().requires_grad_() for t in (tokens, prototypes)]
        routed = (torch.arange(n_prototypes) // 3, torch.tensor([[0, 1, 4], [2, 6, -1]]))
        for extra in ((), routed):
            expected, found = module(*eager_inputs, *extra), compiled(*compiled_inputs, *extra)
            torch.testing.assert_close(found, expected)
            for outputs in (expected, found):
                (outputs[0].square().sum() + outputs[1].sin().sum() + outputs[2].sum()).backward()
        for a, b in zip(eager_inputs, compiled_inputs):
            torch.testing.assert_close(b.grad, a.grad)


@each_backend
@pytest.mark.filterwarnings("ignore")
def test_export(backend):
    module, tokens, prototypes = Module(backend=backend), random(2, 20, 12), random(30, 12, seed=1)
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("n")}, {0: torch.export.Dim("k", min=3)})
    program = torch.export.export(module, (tokens, prototypes), dynamic_shapes=dynamic)
    tokens, prototypes = random(3, 31, 12), random(17, 12, seed=1)
    torch.testing.assert_close(program.module()(tokens, prototypes), module(tokens, prototypes))


@each_backend
def test_autocast_promotes_to_the_widest(backend):
    tokens, prototypes = random(20, 12, dtype=torch.bfloat16), random(30, 12, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = dk.aggregate_nearest(tokens, prototypes, backend=backend)
        same = dk.nearest_prototype(prototypes, prototypes, backend=backend)
        statistics = dk.prototype_statistics(tokens, prototypes, backend=backend)
    expected = dk.aggregate_nearest(tokens.float(), prototypes, backend=backend)
    assert result.values.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(result, expected))
    assert torch.equal(same.indices.flatten(), torch.arange(30))
    assert statistics.sums.dtype == torch.float32


@each_backend
def test_same_bits_every_time(backend):
    tokens, prototypes = random(300, 64), random(100, 64, seed=1)
    runs = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x, p = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
            values, scores, indices = dk.aggregate_nearest(x, p, k=4, backend=backend)
            (values.sin().sum() + scores.cos().sum()).backward()
            statistics = dk.prototype_statistics(tokens, prototypes, backend=backend)
        finally:
            torch.set_num_threads(before)
        runs.append((values, scores, indices, *statistics, x.grad, p.grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
