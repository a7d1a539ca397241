"""sinkhorn and sinkhorn_points beside their rivals, in one run:

    pytest benchmarks/ops/bench_sinkhorn.py [--device cuda]

Every case has float32 inputs. Costs are uniform in [0, 1]. Rivals are POT, loops in PyTorch and NumPy written as a
careful user would, eager, compiled and on GPUs as a CUDA graph, and for points KeOps, geomloss on KeOps, and
flash-sinkhorn. Each answer is checked against float64 with a tolerance that tells whether the rival computes the same
thing at all.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import dpdiff_kernels as dk
from benchmarks.contenders import contenders, keops, on
from benchmarks.timing import graphed


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def uniform(device) -> Callable[..., Tensor]:
    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)

    return draw


def work(n_problems: int, n: int, m: int, n_iters: int = 50, passes: int = 2) -> dict:
    """An iteration is two products of the kernel and a vector; a cost is read and a plan written once."""
    size = n_problems * n * m
    return {"flops": n_iters * passes * 2 * size, "bytes": 2 * 4 * size}


def check(plan: Tensor, cost: Tensor, eps: float, n_iters: int, tol: float | None = None) -> None:
    expected = dk.sinkhorn(cost[:2].double(), eps=eps, n_iters=n_iters, tol=tol, backend="reference").plan
    torch.testing.assert_close(plan[:2].double(), expected, rtol=0, atol=1e-3 * expected.max().item())


# ------------------------------------------------------------------------------------------- rivals


def scalings_by_products(kernel: Tensor, v: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    u = a / (kernel @ v.unsqueeze(-1)).squeeze(-1)
    return u, b / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)


def scalings_by_sums(kernel: Tensor, v: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    u = a / (kernel * v.unsqueeze(-2)).sum(-1)
    return u, b / (kernel * u.unsqueeze(-1)).sum(-2)


def potentials_by_logsumexp(logits: Tensor, v: Tensor, log_a: float, log_b: float) -> tuple[Tensor, Tensor]:
    u = log_a - (logits + v.unsqueeze(-2)).logsumexp(-1)
    return u, log_b - (logits + u.unsqueeze(-1)).logsumexp(-2)


def kernel_loop(cost: Tensor, eps: float, n_iters: int, step: Callable = scalings_by_products) -> Tensor:
    kernel = (cost / -eps).exp()
    v = torch.ones_like(cost[..., 0, :])
    for _ in range(n_iters):
        u, v = step(kernel, v, 1 / cost.shape[-2], 1 / cost.shape[-1])
    return u.unsqueeze(-1) * kernel * v.unsqueeze(-2)


def mv_loop(cost: Tensor, eps: float, n_iters: int) -> Tensor:
    """A pair of matrix-vector products at a time, problem after problem."""
    n, m = cost.shape[-2:]
    plan = (cost / -eps).exp_()
    for kernel in plan:
        v = torch.ones(m, device=cost.device)
        for _ in range(n_iters):
            u = torch.mv(kernel, v).reciprocal_().div_(n)
            v = torch.mv(kernel.T, u).reciprocal_().div_(m)
        kernel.mul_(u[:, None]).mul_(v)
    return plan


def log_loop(cost: Tensor, eps: float, n_iters: int, step: Callable = potentials_by_logsumexp) -> Tensor:
    logits = cost / -eps
    v = torch.zeros_like(cost[..., 0, :])
    for _ in range(n_iters):
        u, v = step(logits, v, -float(np.log(cost.shape[-2])), -float(np.log(cost.shape[-1])))
    return (u.unsqueeze(-1) + logits + v.unsqueeze(-2)).exp()


def compiled(loop: Callable, step: Callable) -> Callable:
    """The loop around a compiled iteration: compiled as a whole it unrolls, for minutes, to the same code."""
    step = torch.compile(step, dynamic=False)
    return lambda cost, eps, n_iters: loop(cost, eps, n_iters, step)


def pot_batch(method: str) -> Callable:
    ot = pytest.importorskip("ot")

    def solve(cost: Tensor, eps: float, n_iters: int) -> Tensor:
        options = {"reg_type": "kl", "grad": "autodiff" if cost.requires_grad else "detach", "tol": 0.0}
        try:
            return ot.batch.solve_batch(cost, eps, max_iter=n_iters, method=method, **options).plan
        except RuntimeError as error:
            if "on the same device" not in str(error):
                raise
            pytest.skip(f"POT {ot.__version__}'s {method} fails on GPUs: {error}")

    return solve


def dpdiff(cost: Tensor, eps: float, n_iters: int) -> Tensor:
    return dk.sinkhorn(cost, eps=eps, n_iters=n_iters).plan


def batched(contender: str) -> Callable:
    if contender.startswith("ot.batch"):
        return pot_batch("log_sinkhorn" if "log" in contender else "sinkhorn")
    return {
        "dpdiff": dpdiff,
        "batched products": kernel_loop,
        "mv pairs": mv_loop,
        "compiled products": compiled(kernel_loop, scalings_by_products),
        "compiled sums": compiled(kernel_loop, scalings_by_sums),
        "log loop": log_loop,
        "compiled log loop": compiled(log_loop, potentials_by_logsumexp),
    }[contender]


def solved(contender: str, cost: Tensor, eps: float) -> Callable[[], Tensor]:
    """A plan by 50 iterations of any of these, whose name may end in "graph"."""
    solve = batched(contender.removesuffix(" graph"))
    run = lambda: solve(cost, eps, 50)
    return graphed(run) if contender.endswith(" graph") else run


# Problem after problem, with two products an iteration, takes seconds of launches on a GPU.
TORCH_LOOPS = ["batched products", on("cuda", "batched products graph"), on("cpu", "mv pairs")]
TORCH_LOOPS += ["compiled products", "compiled sums"]
SHAPES = [(32, 784, 128), (512, 32, 32), on("cuda", (256, 784, 128))]


# ------------------------------------------------------------------------------------------- from costs


@contenders("ot.batch log", "ot.batch", *TORCH_LOOPS, backends=("triton", "reference"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_many_problems(measure, uniform, shape, contender):
    cost = uniform(*shape)
    run = solved(contender, cost, 0.05)
    check(run(), cost, 0.05, 50)
    measure(f"{shape[0]} problems of {shape[1]} x {shape[2]}, eps 0.05", run, **work(*shape))


@contenders("ot.batch log", "ot.batch", *TORCH_LOOPS, backends=("triton", "reference"))
def test_slow_convergence(measure, uniform, contender):
    """Distances on a line: all 50 iterations count. Of uniform costs most change nothing any more, and are spared."""
    cost = (uniform(32, 784, 1) - uniform(32, 1, 128, seed=1)).abs()
    run = solved(contender, cost, 0.05)
    check(run(), cost, 0.05, 50)
    measure("32 problems of 784 x 128, distances on a line, eps 0.05", run, **work(32, 784, 128))


@contenders(
    "ot.batch log", "log loop", on("cuda", "log loop graph"), "compiled log loop", backends=("triton", "reference")
)
def test_small_eps(measure, uniform, contender):
    cost = uniform(32, 784, 128)
    run = solved(contender, cost, 1e-3)
    check(run(), cost, 1e-3, 50)
    measure("32 problems of 784 x 128, eps 0.001", run, **work(32, 784, 128))


def numpy_loop(cost: np.ndarray, eps: float, n_iters: int) -> np.ndarray:
    kernel = np.exp(cost / -eps)
    v = np.ones(cost.shape[1], cost.dtype)
    for _ in range(n_iters):
        u = 1 / (cost.shape[0] * (kernel @ v))
        v = 1 / (cost.shape[1] * (kernel.T @ u))
    return u[:, None] * kernel * v


@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
@contenders(
    on("cpu", "numpy"),
    "mv pairs",
    on("cuda", "batched products"),
    on("cuda", "batched products graph"),
    "ot.sinkhorn",
    "ot.sinkhorn log",
    backends=("triton", "reference"),
)
def test_one_large_problem(measure, uniform, contender):
    cost = uniform(1, 4096, 4096)
    array = cost[0] if cost.is_cuda else cost[0].numpy()
    weights = torch.full((4096,), 1 / 4096).to(cost) if cost.is_cuda else np.full(4096, 1 / 4096, np.float32)
    ot = pytest.importorskip("ot") if "ot." in contender else None
    pot = {"reg": 0.05, "numItermax": 50, "stopThr": 0}
    others = {
        "numpy": lambda: numpy_loop(array, 0.05, 50),
        "ot.sinkhorn": lambda: ot.sinkhorn(weights, weights, array, **pot),
        "ot.sinkhorn log": lambda: ot.sinkhorn(weights, weights, array, method="sinkhorn_log", **pot),
    }
    run = others[contender] if contender in others else solved(contender, cost, 0.05)
    plan = torch.as_tensor(run()).view(4096, 4096)
    for axis in (0, 1):
        torch.testing.assert_close(plan.sum(axis).cpu(), torch.full((4096,), 1 / 4096), rtol=1e-3, atol=0)
    measure("4,096 x 4,096, eps 0.05", run, **work(1, 4096, 4096))


@contenders(yardsticks=["forward alone", "forward alone, for a gradient"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_value_and_its_gradient(measure, uniform, shape, contender):
    cost = uniform(*shape)
    leaf = cost.clone().requires_grad_()
    run = {
        "dpdiff": lambda: torch.autograd.grad(dk.sinkhorn(leaf).value.sum(), leaf),
        "forward alone": lambda: dk.sinkhorn(cost),
        "forward alone, for a gradient": lambda: dk.sinkhorn(leaf),
    }[contender]
    if contender == "dpdiff":
        few = cost[:2].double().requires_grad_()
        (expected,) = torch.autograd.grad(dk.sinkhorn(few, backend="reference").value.sum(), few)
        torch.testing.assert_close(run()[0][:2].double(), expected, rtol=0, atol=1e-3 * expected.max().item())
    else:
        check(run().plan, cost, 0.05, 50)
    measure(f"value and its gradient, {shape[0]} problems of {shape[1]} x {shape[2]}", run, **work(*shape))


@contenders(
    "ot.batch log", "ot.batch", "batched products", "compiled products", yardsticks=["forward alone"], backends=()
)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
def test_gradient_of_the_plan(measure, uniform, shape, contender):
    cost, weights = uniform(*shape), uniform(*shape, seed=1)
    leaf = cost.clone().requires_grad_()
    solve = batched("dpdiff" if contender == "forward alone" else contender)
    run = lambda: torch.autograd.grad((solve(leaf, 0.05, 50) * weights).sum(), leaf)[0]
    if contender == "forward alone":
        run = lambda: solve(cost, 0.05, 50)
        check(run(), cost, 0.05, 50)
    else:
        few = cost[:2].double().requires_grad_()
        plan = dk.sinkhorn(few, eps=0.05, n_iters=50, backend="reference").plan
        (expected,) = torch.autograd.grad((plan * weights[:2]).sum(), few)
        torch.testing.assert_close(run()[:2].double(), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    measure(f"the plan's gradient, {shape[0]} problems of {shape[1]} x {shape[2]}", run)


@contenders(yardsticks=["as many iterations in all, shared evenly"])
def test_early_stopping(measure, uniform, device, contender):
    """Problems from easy to hard, of which each stops by itself; beside the same sum of iterations in equal parts."""
    cost = uniform(64, 400, 128) * torch.logspace(-1, 0.9, 64)[:, None, None].to(device)
    used = dk.sinkhorn(cost, n_iters=400, tol=1e-6).n_iters
    assert used.min() < 10 and used.max() > 30
    evenly = {"n_iters": round(used.double().mean().item())}
    options = {"n_iters": 400, "tol": 1e-6} if contender == "dpdiff" else evenly
    run = lambda: dk.sinkhorn(cost, **options)
    ends = [0, -1]
    check(run().plan[ends], cost[ends], 0.05, **options)
    measure("tol = 1e-6, easy and hard problems", run)


# ------------------------------------------------------------------------------------------- from points


def potentials(softmin: Callable, x: Tensor, y: Tensor, eps: float, n_iters: int) -> tuple[Tensor, Tensor]:
    """f and g, by a softmin of points p over weighted points q."""
    log_a, log_b = -np.log(len(x)), -np.log(len(y))
    g = torch.zeros(len(y), device=y.device)
    for _ in range(n_iters):
        f = softmin(x, y, g / eps + log_b)
        g = softmin(y, x, f / eps + log_a)
    return f, g


def block_logsumexp(shifted: Tensor, rows: Tensor, q: Tensor, eps: float) -> Tensor:
    return torch.addmm(shifted, rows, q.T, alpha=2 / eps).logsumexp(-1)


def blocked_points(
    x: Tensor, y: Tensor, eps: float, n_iters: int, logsumexp: Callable = block_logsumexp
) -> tuple[Tensor, Tensor]:
    """From blocks of the cost that fit into the cache of a processor, or fill a GPU."""
    block = 2048 if x.is_cuda else 512

    def softmin(p: Tensor, q: Tensor, h: Tensor) -> Tensor:
        shifted = h - q.square().sum(-1) / eps
        parts = [logsumexp(shifted, rows, q, eps) for rows in p.split(block)]
        return eps * (p.square().sum(-1) / eps - torch.cat(parts))

    return potentials(softmin, x, y, eps, n_iters)


def keops_points(x: Tensor, y: Tensor, eps: float, n_iters: int) -> tuple[Tensor, Tensor]:
    """By KeOps' reduction, which streams the cost."""
    LazyTensor = keops()

    def softmin(p: Tensor, q: Tensor, h: Tensor) -> Tensor:
        cost = ((LazyTensor(p[:, None]) - LazyTensor(q[None])) ** 2).sum(-1)
        return -eps * (LazyTensor(h[None, :, None]) - cost * (1 / eps)).logsumexp(1).view(-1)

    return potentials(softmin, x, y, eps, n_iters)


def geomloss_points(x: Tensor, y: Tensor, eps: float, n_iters: int) -> tuple[Tensor, Tensor]:
    """Its symmetric iterations, eps falling to its final value; as many softmins: two more begin and two end them."""
    ot = pytest.importorskip("geomloss.ot")
    keops()
    solved = ot.solve_sample(x, y, reg=eps, max_iter=max(n_iters - 2, 1))
    return solved.potential_a, solved.potential_b


def flash_points(x: Tensor, y: Tensor, eps: float, n_iters: int) -> tuple[Tensor, Tensor]:
    """Products in float32, as ours; its default is TF32. It tunes itself to each size, for a minute of compiling:
    not to small ones here, whose time is that of launches."""
    if not x.is_cuda:
        pytest.skip("flash-sinkhorn runs on GPUs only")
    solve = pytest.importorskip("flash_sinkhorn.kernels").sinkhorn_flashstyle_alternating
    a, b = (torch.full((len(points),), 1 / len(points), device=points.device) for points in (x, y))
    return solve(x, y, a, b, eps=eps, n_iters=n_iters, allow_tf32=False, autotune=len(x) > 1_000)


def dpdiff_points(x: Tensor, y: Tensor, eps: float, n_iters: int, **options) -> tuple[Tensor, Tensor]:
    return dk.sinkhorn_points(x, y, eps=eps, n_iters=n_iters, **options)[1:3]


POINTS = {
    "blocked PyTorch": blocked_points,
    "compiled blocked PyTorch": partial(blocked_points, logsumexp=torch.compile(block_logsumexp)),
    "KeOps": keops_points,
    "geomloss": geomloss_points,
    "flash-sinkhorn": flash_points,
}


@contenders(*POINTS, yardsticks=["dpdiff cosine"], backends=())  # which is in float64
@pytest.mark.parametrize("n", [1_000, 10_000, on("cuda", 50_000)])
def test_points(measure, uniform, device, n, contender):
    if contender in ("KeOps", "geomloss") and device == "cpu" and n > 1_000:
        pytest.skip("KeOps takes minutes of a processor; it is in the smaller case")
    x, y = uniform(n, 64), uniform(n, 64, seed=1)
    eps, n_iters = 0.5, 20
    metric = "cosine" if contender == "dpdiff cosine" else "l2"
    solve = POINTS.get(contender, partial(dpdiff_points, metric=metric))
    # Where the iterations end, but for the constant that may pass from f to g. geomloss, whose eps falls to the last
    # iteration, doesn't quite get there.
    tolerance = 0.1 if contender == "geomloss" else 1e-4
    few = x[:100], y[:200]
    expected = dpdiff_points(few[0].double(), few[1].double(), eps, 200, metric=metric, backend="reference")
    for potential, right in zip(solve(*few, eps, 200), expected):
        potential = potential.double().flatten()
        torch.testing.assert_close(potential - potential.mean(), right - right.mean(), rtol=0, atol=tolerance)
    flops = n_iters * 2 * 2 * 64 * n**2  # the products that give the cost, in each half of each iteration
    group, n_bytes = f"points, {n:,} x {n:,}, D = 64, {n_iters} iterations", 4 * 2 * n * 65
    measure(group, lambda: solve(x, y, eps, n_iters), flops=flops, bytes=n_bytes)
