"""prototype_attention against per-image float64 loops and torch's own attention."""

import pytest
import torch
import torch.nn.functional as F
from attention_problems import BANKS, check_gradients, close, expected, inputs

import dpdiff_kernels as dk


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
    ("m", "channels", "logits"),
    [
        (1, 64, 1),
        (1, 200, 1),
        (2, 64, 1),
        (3, 64, 1),
        (4, 128, 1),
        (100, 64, 1),
        (1024, 64, 1),
        (100, 20, 1),
        (100, 256, 1),
        (100, 64, 3e3),
    ],
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
