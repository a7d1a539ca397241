"""The CUDA C++ kernels without a GPU: the same device code, compiled for the host and run on fibers, against the
definition in float64; how problems are spread over a device; and that everything compiles for GPUs."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sinkhorn_problems import clouds_apart
from torch.testing import assert_close

import dpdiff_kernels as dk

ROOT = Path(__file__).parents[2]
POINTERS = ("cost", "a", "b", "plan", "f", "g", "total", "value", "error", "used", "room")
TAUS = [(None, None), (0.5, None), (None, 0.8), (0.5, 0.8)]
H100 = (227 << 10, 228 << 10, 132, True)
A100 = (163 << 10, 164 << 10, 108, False)


class Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("n", "m")),
        ("n_iters", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("eps", "tol", "tau_a", "tau_b")),
    )


class Device(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("per_block", "per_multiprocessor", "multiprocessors")),
        ("clusters", ctypes.c_bool),
    )


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("lanes", "quads", "size", "threads", "rows", "padded", "width", "held")),
        *((name, ctypes.c_bool) for name in ("shared", "relaxed_a", "relaxed_b")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("cuda") / "sinkhorn.so"
    here = ROOT / "tests" / "kernels" / "cuda"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", here / "sinkhorn.cpp", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    loaded = ctypes.CDLL(str(out))
    loaded.sinkhorn.restype = ctypes.c_bool
    loaded.shape.restype = Shape
    loaded.shape.argtypes = ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_bool, Device
    loaded.shared_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def solve(library):
    """The operator as dpdiff::sinkhorn, on clusters of `size` blocks whose threads take turns in an order by `seed`."""

    def sinkhorn(
        cost, a=None, b=None, eps=0.05, n_iters=50, tol=None, tau_a=None, tau_b=None,
        size=1, seed=0, shared=True, held=0,
    ):  # fmt: skip
        batch, n, m = cost.shape
        a = torch.full((batch, n), 1 / n) if a is None else a
        b = torch.full((batch, m), 1 / m) if b is None else b
        out = {"plan": (batch, n, m), "f": (batch, n), "g": (batch, m), "total": batch, "value": batch, "error": batch}
        out = {name: torch.full(shape if isinstance(shape, tuple) else (shape,), 7.0) for name, shape in out.items()}
        tensors = {"cost": cost.contiguous(), "a": a.contiguous(), "b": b.contiguous(), **out}
        tensors["used"] = torch.zeros(batch, dtype=torch.int64)
        task = Task(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            n=n, m=m, n_iters=n_iters, eps=eps, tol=tol or 0.0, tau_a=tau_a or math.inf, tau_b=tau_b or math.inf,
        )  # fmt: skip
        assert library.sinkhorn(ctypes.byref(task), ctypes.c_int64(batch), size, shared, held, seed)
        names = ("plan", "f", "g", "total", "value", "used", "error")
        return dk.sinkhorn(cost[:0])._replace(**dict(zip(dk.sinkhorn(cost[:0])._fields, (tensors[x] for x in names))))

    return sinkhorn


def problem(*shape, seed=0):
    """A cost in [0, 1] and weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(shape, generator=generator)
    a = torch.rand(shape[:-1], generator=generator) + 0.1
    b = torch.rand((*shape[:-2], shape[-1]), generator=generator) + 0.1
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def in_float64(*inputs, **options):
    return dk.sinkhorn(*(None if x is None else x.double() for x in inputs), **options, backend="reference")


def assert_agrees(t, exact, potential=1e-6):
    assert_close(t.plan, exact.plan.float(), rtol=0, atol=2e-5 * exact.plan.max().item())
    for name in ("f", "g", "cost", "value"):
        expected = getattr(exact, name).float()
        assert_close(getattr(t, name), expected, rtol=1e-5, atol=potential, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(t.error, exact.error, rtol=1e-3, atol=3e-6)
    assert torch.equal(t.n_iters, exact.n_iters)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("eps", [10.0, 0.05, 1e-3, 1e-4])
def test_any_eps(solve, eps, tau):
    inputs = problem(2, 37, 29)
    options = {"eps": eps, "n_iters": 4, "tau_a": tau[0], "tau_b": tau[1]}
    t = solve(*inputs, **options, size=2)
    assert_agrees(t, in_float64(*inputs, **options), potential=max(1e-6, 1e-6 * eps))


# Each width of the kernel, whole and ragged, in one block and in several, of which some have no row.
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 1), (5, 32), (33, 30), (20, 63), (40, 128), (70, 101), (12, 256), (9, 131), (9, 500), (4, 512), (4, 1500)],
)
def test_any_shape(solve, n, m, size):
    inputs = problem(1, n, m)
    for eps in (0.1, 2e-3):
        options = {"eps": eps, "n_iters": 3}
        for shared in (True, False) if m <= 512 else (False,):
            assert_agrees(solve(*inputs, **options, size=size, shared=shared), in_float64(*inputs, **options))


# Eight warps hold 16 rows each at once; the others are in shared memory.
@pytest.mark.parametrize(("n", "held"), [(129, 1), (170, 1), (411, 3)])
@pytest.mark.parametrize("m", [3, 128])
def test_rows_in_registers(solve, n, m, held):
    cost, a, b = problem(1, n, m)
    a[:, 5] = b[:, 2] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    error = in_float64(cost, a, b, eps=0.1, n_iters=1).error.item()
    # costs from zero potentials, and from others; going on, and stopping
    for eps, tol in ((0.1, None), (2e-3, None), (0.1, 0.999 * error), (0.1, 1.001 * error)):
        options = {"eps": eps, "n_iters": 3, "tol": tol}
        t = solve(cost, a, b, **options, held=held)
        assert_agrees(t, in_float64(cost, a, b, **options))
    assert t.n_iters == 1
    cost[:, 128, 1:] = cost[:, 3] = math.inf  # in either place; the latter can't be carried
    for eps in (0.1, 1e-3, 1e-4):  # scalings, those that are absorbed, and the log domain
        options = {"eps": eps, "n_iters": 3}
        assert_agrees(solve(cost, a, b, **options, held=held), in_float64(cost, a, b, **options))


def test_the_order_of_threads_changes_no_bit(solve):
    for inputs, options in (
        (problem(1, 90, 40), {"eps": 0.05, "size": 4}),
        (problem(1, 30, 140), {"eps": 1e-3, "size": 4}),
        (problem(1, 50, 20), {"eps": 1e-3, "size": 1}),
        (problem(1, 140, 40), {"eps": 1e-3, "held": 1}),
    ):
        results = [solve(*inputs, **options, n_iters=4, tol=1e-6, seed=seed) for seed in range(4)]
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("tau_a", [None, 0.5])
@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_each_problem_stops_by_itself(solve, eps, tau_a):
    cost = problem(4, 20, 10)[0] * torch.tensor([0.05, 0.5, 1.0, 20.0])[:, None, None] * eps * 10
    options = {"eps": eps, "n_iters": 12, "tol": 1e-3 if tau_a is None else 4e-2, "tau_a": tau_a}
    t = solve(cost, **options, size=2)
    assert len(t.n_iters.unique()) >= 2 and t.n_iters[3] == 12
    assert_agrees(t, in_float64(cost, **options), potential=2e-5)


@pytest.mark.parametrize(
    ("where", "tau"),
    [({"held": 1}, TAUS[0])] + [(where, tau) for where in ({"size": 1}, {"size": 2, "shared": False}) for tau in TAUS],
)
def test_iterations_that_change_nothing_are_spared(solve, where, tau):
    """At another iteration each, or not at all; from zero potentials and others, with absorption in between."""
    eps = 0.02
    cost, a, b = problem(6, 131, 20)
    cost *= eps * 2 * torch.logspace(-1, 2, 6)[:, None, None]
    cost[0, :, 3] = math.inf  # infeasible where balanced: f and g go on moving, though the plan doesn't
    options = {"eps": eps, "n_iters": 24, "tau_a": tau[0], "tau_b": tau[1]}
    exact = in_float64(cost, a, b, **options)
    results = [solve(cost, a, b, **options, **where, seed=seed) for seed in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*results))
    assert_agrees(results[0], exact, potential=1e-5 * eps)
    seen = exact.plan > 1e-30
    assert_close(results[0].plan.double()[seen], exact.plan[seen], rtol=3e-5, atol=0)


@pytest.mark.parametrize("size", [1, 4])
def test_zero_weights_forbidden_and_infeasible_pairs(solve, size):
    cost, a, b = problem(3, 40, 6)
    a[:, 1] = b[:, 2] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost[0, 2, 3:] = math.inf
    cost[1, 4] = math.inf  # a row that can't be carried
    cost[2, :, 0] = math.inf  # a column that nothing reaches
    for eps, tol in ((0.1, None), (1e-3, None), (1e-4, None), (0.1, 1e-3)):
        options = {"eps": eps, "n_iters": 6, "tol": tol}
        t = solve(cost, a, b, **options, size=size)
        assert_agrees(t, in_float64(cost, a, b, **options))
        assert t.f[1, 4] == math.inf and t.g[2, 0] == math.inf and (t.value[1:] == math.inf).all()
        assert not t.plan[cost == math.inf].any() and t.error[1] >= 0.99 * a[1, 4]
    relaxed = {"eps": 0.1, "n_iters": 30, "tau_a": 0.2, "tau_b": 0.2, "tol": 1e-2}
    assert_agrees(solve(cost, a, b, **relaxed, size=size), in_float64(cost, a, b, **relaxed))


@pytest.mark.parametrize("tau", TAUS)
def test_near_columns_without_weight_change_nothing(solve, tau):
    x, y, a, b = clouds_apart(20, 15, eps=2e-3)
    cost = torch.cdist(x.double(), y.double()).square().float()
    for n_iters in (1, 3):
        options = {"eps": 2e-3, "n_iters": n_iters, "tau_a": tau[0], "tau_b": tau[1]}
        inputs = cost[None], a[None], b[None]
        assert_agrees(solve(*inputs, **options, size=2), in_float64(*inputs, **options), potential=2e-6)


@pytest.mark.parametrize("width", [10, 140])
@pytest.mark.parametrize("tau", TAUS)
def test_weights_out_of_the_range_of_scalings(solve, width, tau):
    """Iterated in the log domain: weights of 1e-30, of 0 at a small eps, and few weights far from each other."""
    cost, a, b = problem(3, 24, width)
    a[0, :5] = b[0, 3] = 1e-30
    a[1, ::2] = b[1, ::3] = 0
    cost[2] = (torch.arange(24)[:, None] - torch.arange(width)).abs() / 24
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    for eps, tol in ((3e-4, None), (1e-4, 1e-2)):
        options = {"eps": eps, "n_iters": 5, "tau_a": tau[0], "tau_b": tau[1], "tol": tol}
        assert_agrees(solve(cost, a, b, **options, size=2), in_float64(cost, a, b, **options), potential=2e-6)


def test_large_and_offset_costs_and_masses(solve):
    cost, a, b = problem(2, 30, 20)
    for scale, offset, mass in ((1e4, 0.0, 1.0), (1.0, -50.0, 1e6), (1e-3, 1.0, 1e-20)):
        inputs = scale * cost + offset, mass * a, mass * b
        options = {"eps": 0.02 * scale, "n_iters": 5}
        t, exact = solve(*inputs, **options, size=2), in_float64(*inputs, **options)
        assert_close(t.plan, exact.plan.float(), rtol=1e-4, atol=2e-5 * exact.plan.max().item())
        for x, y in ((t.f, exact.f), (t.g, exact.g), (t.cost, exact.cost), (t.value, exact.value)):
            assert_close(x, y.float(), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_meaningless_input_makes_its_problem_nan_and_no_other(solve, bad, where):
    inputs = dict(zip(("cost", "a", "b"), problem(3, 5, 4)))
    expected = solve(**inputs, n_iters=4, tol=1e-3, size=2)
    inputs[where] = inputs[where].clone()
    inputs[where][1].view(-1)[2] = bad if where == "cost" else abs(bad)
    t = solve(**inputs, n_iters=4, tol=1e-3, size=2)
    for name, x, y in zip(t._fields, t, expected):
        assert_close(x[[0, 2]], y[[0, 2]])
        if name != "n_iters":
            assert x[1].isnan().all(), name
    assert (solve(inputs["cost"], -inputs["a"], inputs["b"], n_iters=2).error.isnan()).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_problems(solve, shape, shared):
    cost = torch.zeros(shape)
    options = {"n_iters": 3}
    t = solve(cost, *(torch.full((2, size), 0.5) for size in shape[1:]), **options, shared=shared)
    exact = in_float64(cost, *(torch.full((2, size), 0.5) for size in shape[1:]), tau_a=1e9, **options)
    assert t.plan.numel() == 0 and torch.equal(t.f, exact.f.float()) and torch.equal(t.g, exact.g.float())
    assert (t.error == 0.5 * sum(shape[1:])).all() and (t.n_iters == 3).all()


# ------------------------------------------------------------------------------------------- spread over a device


def spread(library, batch, n, m, device, relaxed=False):
    shape = library.shape(batch, n, m, relaxed, Device(*device))
    return shape, library.shared_bytes(shape)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("device", [H100, A100])
def test_every_problem_fits_its_blocks(library, device, relaxed):
    for n in (0, 1, 31, 784, 5000, 100_000):
        for m in (0, 1, 33, 128, 513, 1024, 1025, 4096):
            for batch in (1, 7, 4096):
                shape, shared = spread(library, batch, n, m, device, relaxed)
                assert shared <= device[0], (n, m)
                assert shape.threads % 32 == 0 and 32 <= shape.threads <= 256
                assert shape.size in ((1, 2, 4, 8) if device[3] else (1,))
                assert shape.size * shape.rows >= n and shape.padded >= shape.rows and shape.width >= max(m, 4)
                assert shape.width <= shape.lanes * shape.quads * 4


def test_patches_of_an_image_against_prototypes_stay_on_a_multiprocessor(library):
    """784 x 128 floats are 401 KB: a cluster of four, of which two blocks share a multiprocessor, or, of more problems
    than such clusters fit at once, about half of them in registers."""
    for batch in (32, 64):
        shape, shared = spread(library, batch, 784, 128, H100)
        assert shape.shared and shape.size == 4 and 2 * (shared + 1024) <= H100[1] and shape.held == 0
    shape, shared = spread(library, 256, 784, 128, H100)
    assert shape.size == 1 and shape.held == 384 and shape.threads == 256
    assert spread(library, 256, 784, 128, H100, relaxed=True)[0].held == 0  # it takes more
    assert spread(library, 256, 600, 100, A100)[0].held == 384
    assert spread(library, 1, 784, 128, H100)[0].size == 8  # one problem, and nothing else to do
    assert spread(library, 512, 32, 32, H100)[0].size == 1
    assert not spread(library, 1, 4096, 4096, H100)[0].shared
    assert not spread(library, 256, 784, 128, A100)[0].shared
