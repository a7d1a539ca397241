"""prototype_attention and PrototypeAttention against per-image float64 loops and torch's own attention."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dpdiff_kernels as dk

BACKENDS = ["reference", *(["cpp"] if dk.backends()["cpp"] else [])]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(
    batch=3, heads=2, n=17, channels=16, m=11, m_global=5, gate=True, batched=False, dtype=torch.float32, seed=0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lead = (batch,) if batched else ()
    tensors = {
        "query": normal(batch, heads, n, channels),
        "local_key": normal(*lead, heads, m, channels),
        "local_value": normal(*lead, heads, m, channels),
    }
    if m_global is not None:
        tensors["global_key"] = normal(heads, m_global, channels)
        tensors["global_value"] = normal(heads, m_global, channels)
        if gate:
            tensors["gate"] = normal(batch, heads, n).sigmoid()
    return tensors


def expected(
    query,
    local_key,
    local_value,
    global_key=None,
    global_value=None,
    gate=None,
    scale=None,
    groups=None,
    active_groups=None,
) -> Tensor:
    """Image by image, head by head, in float64, on the active prototypes alone."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for b in range(query.shape[0]):
        kept = slice(None)
        if groups is not None:
            kept = torch.tensor([g >= 0 and g in active_groups[b].tolist() for g in groups.tolist()], dtype=torch.bool)
        for h in range(query.shape[1]):
            at = (h,) if local_key.dim() == 3 else (b, h)
            q, k, v = query[b, h].double(), local_key[at].double()[kept], local_value[at].double()[kept]
            if global_key is None:
                rows.append((scale * q @ k.T).softmax(-1) @ v)
                continue
            at = (h,) if global_key.dim() == 3 else (b, h)
            gk, gv = global_key[at].double(), global_value[at].double()
            if gate is None:
                rows.append((scale * q @ torch.cat([k, gk]).T).softmax(-1) @ torch.cat([v, gv]))
                continue
            blend = gate.expand(query.shape[:-1])[b, h].double()[:, None] if len(k) else 1.0
            local_out = (scale * q @ k.T).softmax(-1) @ v
            rows.append((1 - blend) * local_out + blend * ((scale * q @ gk.T).softmax(-1) @ gv))
    return torch.stack(rows).reshape(query.shape) if rows else query.double()


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


BANKS = {"one": {"m_global": None}, "joint": {"gate": False}, "gated": {}}


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward(backend, banks, batched, dtype):
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    tensors = inputs(batched=batched, dtype=dtype, **BANKS[banks])
    out = dk.prototype_attention(**tensors, backend=backend)
    assert out.dtype == dtype
    close(out, expected(**tensors), dtype)


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("batched", [False, True])
def test_gradients(backend, banks, batched):
    tensors = inputs(batched=batched, **BANKS[banks])
    check_gradients(backend, tensors)


def check_gradients(backend, tensors, **options):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    doubles = {name: t.double().requires_grad_() for name, t in tensors.items()}
    direction = torch.randn(tensors["query"].shape, generator=torch.Generator().manual_seed(9))
    out = dk.prototype_attention(**leaves, **options, backend=backend)
    gradients = torch.autograd.grad((out * direction).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected(**doubles, **options) * direction).sum(), list(doubles.values()))
    for name, gradient, want in zip(leaves, gradients, wanted):
        torch.testing.assert_close(
            gradient.double(), want, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


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


def test_one_bank_is_scaled_dot_product_attention(backend):
    tensors = inputs(m_global=None, n=50, m=40, channels=32)
    wanted = F.scaled_dot_product_attention(
        tensors["query"],
        tensors["local_key"].expand(3, -1, -1, -1),
        tensors["local_value"].expand(3, -1, -1, -1),
        scale=0.3,
    )
    close(dk.prototype_attention(**tensors, scale=0.3, backend=backend), wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "channels", "logits"), [(100, 64, 1), (1024, 64, 1), (100, 20, 1), (100, 256, 1), (100, 64, 3e3)]
)
def test_errors_are_no_larger_than_those_of_scaled_dot_product_attention(backend, dtype, m, channels, logits):
    tensors = inputs(batch=2, heads=2, n=200, channels=channels, m=m, m_global=None, dtype=dtype)
    tensors["query"] *= logits  # up to 1e4
    direction = torch.randn(tensors["query"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def run(attention, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, direction.to(dtype))]

    def theirs(query, key, value):
        return F.scaled_dot_product_attention(query, key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1))

    exact = run(theirs, torch.float64)
    ours, rival = run(lambda *t: dk.prototype_attention(*t, backend=backend), dtype), run(theirs, dtype)
    for our, their, want in zip(ours, rival, exact):
        assert (our - want).square().mean().sqrt() <= 1.5 * (their - want).square().mean().sqrt()


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("batched", [False, True])
def test_leading_dimensions(backend, lead, batched):
    query = torch.randn(*lead, 2, 5, 8)
    bank = torch.randn(2, *(lead if batched else ()), 2, 4, 8)
    groups, active = torch.tensor([0, 0, 1, 1]), torch.randint(0, 2, (*lead, 1))
    gate = torch.rand(*lead, 2, 5)
    out = dk.prototype_attention(query, *bank, *bank, gate=gate, groups=groups, active_groups=active, backend=backend)
    assert out.shape == query.shape
    for at in torch.cartesian_prod(*map(torch.arange, lead)).reshape(-1, len(lead)).tolist() if lead else []:
        at = tuple(at)
        one = bank[(slice(None), *at)] if batched else bank
        alone = dk.prototype_attention(
            query[at], *one, *one, gate=gate[at], groups=groups, active_groups=active[at], backend=backend
        )
        close(out[at], alone, torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 1), (2, 17), (3, 1, 1), (1, 2, 17), (3, 1, 17)])
def test_gate_broadcasts(backend, shape):
    tensors = inputs()
    tensors["gate"] = torch.rand(shape)
    close(dk.prototype_attention(**tensors, backend=backend), expected(**tensors), torch.float32)
    check_gradients(backend, tensors)


def test_gate_of_exactly_zero_and_one(backend):
    tensors = inputs()
    local_out = dk.prototype_attention(
        *(tensors[name] for name in ("query", "local_key", "local_value")), backend=backend
    )
    global_out = dk.prototype_attention(
        *(tensors[name] for name in ("query", "global_key", "global_value")), backend=backend
    )
    for gate, wanted in ((0.0, local_out), (1.0, global_out)):
        tensors["gate"] = torch.full((1,), gate)
        close(dk.prototype_attention(**tensors, backend=backend), wanted, torch.float32)
        check_gradients(backend, tensors)


ROUTES = {
    "some": [[0, 2], [3, 3], [1, -1]],
    "unknown groups": [[0, 9], [9, 1], [2, 100]],
    "all": [[0, 1], [0, 1], [3, 2]],
}


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("routes", ROUTES)
def test_routing(backend, banks, batched, routes):
    tensors = inputs(batched=batched, **BANKS[banks])
    options = {
        "groups": torch.tensor([2, 0, 1, 1, 3, 0, 2, 3, 3, 1, -1]),
        "active_groups": torch.tensor(ROUTES[routes]),
    }
    close(dk.prototype_attention(**tensors, **options, backend=backend), expected(**tensors, **options), torch.float32)
    check_gradients(backend, tensors, **options)


@pytest.mark.parametrize("banks", ["joint", "gated"])
@pytest.mark.parametrize("n_active", [0, 2])
def test_global_bank_answers_alone_where_the_local_one_is_routed_away(backend, banks, n_active):
    tensors = inputs(**BANKS[banks])
    active = torch.full((3, n_active), -1)
    active[1] = 0
    options = {"groups": torch.tensor([0, 1] * 5 + [1]), "active_groups": active}
    out = dk.prototype_attention(**tensors, **options, backend=backend)
    close(out, expected(**tensors, **options), torch.float32)
    alone = dk.prototype_attention(tensors["query"], tensors["global_key"], tensors["global_value"], backend=backend)
    away = [0, 2] if n_active else [0, 1, 2]
    close(out[away], alone[away], torch.float32)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    dk.prototype_attention(**leaves, **options, backend=backend).sum().backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())
    if banks == "gated":
        assert (leaves["gate"].grad[away] == 0).all()


@pytest.mark.parametrize("banks", ["joint", "gated"])
def test_an_empty_bank_leaves_the_answer_to_the_other(backend, banks):
    for empty, full in (("local", "global"), ("global", "local")):
        tensors = inputs(**BANKS[banks])
        for part in ("key", "value"):
            tensors[f"{empty}_{part}"] = tensors[f"{empty}_{part}"][:, :0]
        wanted = dk.prototype_attention(
            tensors["query"], tensors[f"{full}_key"], tensors[f"{full}_value"], backend=backend
        )
        close(dk.prototype_attention(**tensors, backend=backend), wanted, torch.float32)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"n": 0}, {"heads": 0}, {"channels": 0}])
@pytest.mark.parametrize("banks", BANKS)
def test_zero_sizes(backend, sizes, banks):
    tensors = {name: t.requires_grad_() for name, t in inputs(**sizes, **BANKS[banks]).items()}
    out = dk.prototype_attention(**tensors, backend=backend)
    assert out.shape == tensors["query"].shape
    out.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad is None or tensor.grad.shape == tensor.shape
        assert "value" not in name or (tensor.grad == 0).all()


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 64, 100, 129, 300])
@pytest.mark.parametrize("channels", [1, 8, 20, 33, 64, 80, 128, 256])
def test_sizes(backend, m, channels):
    tensors = inputs(batch=2, n=53, m=m, m_global=3, channels=channels)
    close(dk.prototype_attention(**tensors, backend=backend), expected(**tensors), torch.float32)


def test_strides(backend):
    tensors = inputs(batched=True)
    wanted = expected(**tensors)
    for name, tensor in tensors.items():
        for axis in range(tensor.dim()):
            for changed in (
                tensor.transpose(axis, -1).contiguous().transpose(axis, -1),
                tensor.repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)],
                tensor.flip(axis).contiguous().flip(axis),
            ):
                close(dk.prototype_attention(**{**tensors, name: changed}, backend=backend), wanted, torch.float32)
    query, key = torch.randn(1, 1, 1, 16).expand(3, 2, 17, 16), torch.randn(1, 1, 16).expand(2, 11, 16)
    tensors = {**inputs(gate=False), "query": query, "local_key": key}
    close(dk.prototype_attention(**tensors, backend=backend), expected(**tensors), torch.float32)


@pytest.mark.parametrize("logit", [1e4, 1e30])
@pytest.mark.parametrize("banks", BANKS)
def test_huge_logits(backend, logit, banks):
    tensors = inputs(**BANKS[banks])
    for name in ("local_key", "global_key"):
        if name in tensors:
            tensors[name] *= logit
    out = dk.prototype_attention(**tensors, backend=backend)
    # float32 rounding of the scores alone decides between near-ties, so compare with the same scores in float32.
    assert out.isfinite().all()
    if logit == 1e4:
        torch.testing.assert_close(out.double(), expected(**tensors), rtol=0, atol=5e-2)


@pytest.mark.parametrize("banks", BANKS)
def test_nan_query_stays_in_its_row(backend, banks):
    tensors = inputs(**BANKS[banks])
    clean = dk.prototype_attention(**tensors, backend=backend)
    tensors["query"][1, 0, 4, 3] = torch.nan
    out = dk.prototype_attention(**tensors, backend=backend)
    assert out[1, 0, 4].isnan().all()
    out[1, 0, 4] = clean[1, 0, 4]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("name", ["local_key", "local_value", "global_key", "global_value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_prototype_reaches_whoever_attends(backend, name, value):
    tensors = inputs()
    tensors[name][1, 2, 3] = value
    groups, active = torch.arange(11), torch.tensor([[0, 1], [2, 3], [4, 5]])
    out = dk.prototype_attention(**tensors, groups=groups, active_groups=active, backend=backend)
    touched = torch.zeros(3, 2, dtype=torch.bool)
    touched[1 if name.startswith("local") else slice(None), 1] = True
    assert out[~touched].isfinite().all()
    if value != value or name.endswith("value"):
        assert (~out[touched].isfinite()).any(-1).all()
    close(out[~touched], expected(**tensors, groups=groups, active_groups=active)[~touched], torch.float32)


@pytest.mark.parametrize("name", ["local_key", "local_value"])
def test_gradients_stay_clean_of_a_nan_that_is_routed_away(backend, name):
    tensors = inputs()
    tensors[name][:, 2] = torch.nan
    leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
    options = {"groups": torch.arange(11), "active_groups": torch.tensor([[0, 1], [3, 4], [5, -1]])}
    dk.prototype_attention(**leaves, **options, backend=backend).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


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


WRONG = {
    "query is a list": (TypeError, "query is a list", {"query": [1]}),
    "integers": (TypeError, "local_key has dtype torch.int64", {"local_key": torch.ones(2, 11, 16, dtype=torch.int64)}),
    "two dtypes": (
        TypeError,
        "gate has dtype torch.bfloat16: expected torch.float32",
        {"gate": torch.ones(1).bfloat16()},
    ),
    "flat query": (ValueError, r"query has shape \(17, 16\)", {"query": torch.ones(17, 16)}),
    "channels": (ValueError, r"local_key has shape \(2, 11, 8\)", {"local_key": torch.ones(2, 11, 8)}),
    "heads": (ValueError, r"local_key has shape \(1, 11, 16\)", {"local_key": torch.ones(1, 11, 16)}),
    "batch": (ValueError, r"global_key has shape \(2, 2, 5, 16\)", {"global_key": torch.ones(2, 2, 5, 16)}),
    "values": (ValueError, r"local_value has shape \(2, 10, 16\)", {"local_value": torch.ones(2, 10, 16)}),
    "half a bank": (ValueError, "global_key is given without global_value", {"global_value": None}),
    "other half": (ValueError, "global_value is given without global_key", {"global_key": None}),
    "lone gate": (ValueError, "gate is given without a global bank", {"global_key": None, "global_value": None}),
    "gate": (ValueError, r"gate has shape \(3, 17\): expected one that broadcasts", {"gate": torch.ones(3, 17)}),
    "scale": (TypeError, "scale is '1'", {"scale": "1"}),
    "infinite scale": (ValueError, "scale is inf", {"scale": float("inf")}),
    "half a route": (
        ValueError,
        "groups is given without active_groups",
        {"groups": torch.zeros(11, dtype=torch.int64)},
    ),
    "short groups": (
        ValueError,
        r"groups has shape \(10,\)",
        {"groups": torch.zeros(10, dtype=torch.int64), "active_groups": torch.zeros(3, 1, dtype=torch.int64)},
    ),
    "active groups": (
        ValueError,
        r"active_groups has shape \(2, 1\)",
        {"groups": torch.zeros(11, dtype=torch.int64), "active_groups": torch.zeros(2, 1, dtype=torch.int64)},
    ),
    "float groups": (TypeError, "groups has dtype", {"groups": torch.zeros(11), "active_groups": torch.zeros(3, 1)}),
    "backend": (ValueError, "backend is 'fast'", {"backend": "fast"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    error, message, changes = WRONG[case]
    with pytest.raises(error, match=message):
        dk.prototype_attention(**{**inputs(), **changes})


def test_nothing_to_attend_to_is_an_error(backend):
    tensors = inputs(m_global=None)
    active = torch.tensor([[0, 1], [-1, 5], [1, 1]])
    with pytest.raises(ValueError, match="active_groups"):
        dk.prototype_attention(
            **tensors, groups=torch.zeros(11, dtype=torch.int64), active_groups=active, backend=backend
        )
    for m_global in (None, 0):
        with pytest.raises(ValueError, match="local_key has no prototypes"):
            dk.prototype_attention(**inputs(m=0, m_global=m_global), backend=backend)


def test_mixed_devices():
    with pytest.raises(ValueError, match="local_value is on meta"):
        dk.prototype_attention(**{**inputs(), "local_value": torch.ones(2, 11, 16, device="meta")})


def flat_arguments(banks: str, batched: bool, routed: bool, dtype=torch.float32) -> tuple:
    tensors = inputs(batched=batched, dtype=dtype, **BANKS[banks])
    names = ("query", "local_key", "local_value", "global_key", "global_value", "gate")
    arguments = [tensors[name].requires_grad_() if name in tensors else None for name in names]
    if banks == "gated":
        arguments[-1] = arguments[-1].detach().float().requires_grad_()
    routes = (torch.arange(11) % 3, torch.tensor([[0, -1], [2, 1], [1, 1]])) if routed else (None, None)
    return *arguments, 0.3, *routes


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library was not built")
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


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library was not built")
def test_second_derivatives_are_the_references():
    query, key, value = (t.requires_grad_() for t in inputs(m_global=None).values())
    (grad,) = torch.autograd.grad(dk.prototype_attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library was not built")
@pytest.mark.parametrize("capability", ["avx512", "avx2", "portable"])
def test_every_instruction_set(capability):
    """Runs this file again in a process of its own: the variable is read once per process."""
    if capability in dk.backends()["cpp"].reason:
        pytest.skip("what all other tests here run on")
    if capability == "avx512" or (capability == "avx2" and "portable" in dk.backends()["cpp"].reason):
        pytest.skip("not on this processor")
    chosen = "cpp and (forward or gradients or routing or sizes or strides or nan or huge or zero)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "DPDIFF_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library was not built")
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


# PrototypeAttention


def test_module_cache_and_balance():
    torch.manual_seed(0)
    module = dk.PrototypeAttention(24, 3, bank_dim=10)
    tokens, local, general = torch.randn(2, 7, 24), torch.randn(9, 10), torch.randn(4, 10)
    out = module(tokens, local, general)
    assert out.shape == tokens.shape
    assert torch.equal(module(tokens, cache=module.project_banks(local, general)), out)

    # Balanced at the start: the mean of the two banks' answers, which the output projection (affine) keeps.
    local_only = module(tokens, local)
    keys = module.project_banks(local, general)
    global_only = module(tokens, cache=dk.ProjectedBanks(keys.global_key, keys.global_value, None, None))
    close(out, (local_only + global_only) / 2, torch.float32)


@pytest.mark.parametrize("gated", [False, True])
def test_module_against_multi_head_attention(gated):
    """Same weights, local bank only: torch.nn.MultiheadAttention's answer."""
    torch.manual_seed(0)
    module = dk.PrototypeAttention(16, 4, gated=gated)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([module.query.weight, module.local_bank.weight]))
        theirs.in_proj_bias.copy_(torch.cat([module.query.bias, module.local_bank.bias]))
        theirs.out_proj.load_state_dict(module.out.state_dict())
    tokens, local = torch.randn(2, 7, 16), torch.randn(9, 16)
    bank = local.expand(2, -1, -1)
    close(module(tokens, local), theirs(tokens, bank, bank)[0], torch.float32)


@pytest.mark.parametrize("batched", [False, True])
def test_module_routes_and_learns(batched):
    torch.manual_seed(0)
    module = dk.PrototypeAttention(16, 2)
    local = torch.randn(*((3,) if batched else ()), 6, 16, requires_grad=True)
    general, tokens = torch.randn(4, 16, requires_grad=True), torch.randn(3, 5, 16, requires_grad=True)
    groups, active = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[0], [1], [1]])
    module(tokens, local, general, groups, active).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert tokens.grad.abs().sum() > 0 and general.grad.abs().sum() > 0
    assert (local.grad[..., 4:, :] == 0).all() and local.grad[..., :2, :].abs().sum() > 0


def test_module_errors():
    with pytest.raises(ValueError, match="dim is 10: expected a multiple of num_heads"):
        dk.PrototypeAttention(10, 4)
    module = dk.PrototypeAttention(8, 2)
    with pytest.raises(ValueError, match="either local_prototypes"):
        module(torch.ones(1, 2, 8))
