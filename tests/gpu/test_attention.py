"""prototype_attention's Triton kernels against the reference in float64."""

import pytest
import torch

import dpdiff_kernels as dk

pytestmark = pytest.mark.skipif(not dk.backends()["triton"], reason="triton is not available")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
BANKS = ("one", "joint", "gated")


def inputs(device, banks="gated", batch=3, heads=2, n=17, channels=16, m=11, batched=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    lead = (batch,) if batched else ()
    tensors = {"query": normal(batch, heads, n, channels)}
    tensors |= {f"local_{part}": normal(*lead, heads, m, channels) for part in ("key", "value")}
    if banks != "one":
        tensors |= {f"global_{part}": normal(heads, 5, channels) for part in ("key", "value")}
    if banks == "gated":
        tensors["gate"] = normal(batch, heads, n).detach().sigmoid().requires_grad_()
    return tensors


def check(tensors, **options):
    dtype = tensors["query"].dtype
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    out = dk.prototype_attention(**tensors, **options, backend="triton")
    wanted = dk.prototype_attention(**doubles, **options, backend="reference")
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, list(tensors.values()), direction)
    wanted_gradients = torch.autograd.grad(wanted, list(doubles.values()), direction.double())
    assert out.dtype == dtype
    for actual, want in zip((out, *gradients), (wanted, *wanted_gradients)):
        atol = TOLERANCE[dtype] * (max(1.0, float(want.abs().max())) if want.numel() else 1.0)
        torch.testing.assert_close(actual.double(), want, rtol=TOLERANCE[dtype], atol=atol)
    return out, *gradients


@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_options(device, banks, batched, routed):
    options = {}
    if routed:  # the second image has only the global bank, where there is one
        away = 1 if banks == "one" else 9
        options["groups"] = torch.tensor([2, 0, 1, 1, 3, 0, 2, 3, 3, 1, -1], device=device)
        options["active_groups"] = torch.tensor([[0, 2], [away, -1], [1, 1]], device=device)
    check(inputs(device, banks, batched=batched), **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [8, 24, 80])
def test_dtypes_and_head_sizes(device, dtype, channels):
    check(inputs(device, channels=channels, n=9, dtype=dtype))


@pytest.mark.parametrize("m", [1, 130])
def test_tiles_left_over(device, m):
    check(inputs(device, m=m, n=140, heads=1, batch=2))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"n": 0}])
def test_zero_sizes(device, sizes):
    check(inputs(device, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(device, dtype):
    tensors = {name: t.detach() for name, t in inputs(device, dtype=dtype).items()}
    clean = dk.prototype_attention(**tensors, backend="triton")
    tensors["query"][1, 0, 4, 3] = torch.nan
    out = dk.prototype_attention(**tensors, backend="triton")
    assert out[1, 0, 4].isnan().all()
    out[1, 0, 4] = clean[1, 0, 4]
    assert torch.equal(out, clean)


def test_scores_in_the_thousands(device):
    tensors = {name: t.detach() for name, t in inputs(device, "one").items()}
    tensors["query"] *= 1e4
    out = dk.prototype_attention(**tensors, backend="triton")
    wanted = dk.prototype_attention(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("banks", BANKS)
def test_bfloat16_weights_of_any_size(device, banks):
    """In float32, some rows' weights overflow where they aren't relative to the greatest one, and some all vanish."""
    tensors = inputs(device, banks, n=40, m=70, dtype=torch.bfloat16)
    sizes = torch.tensor([1.0, 60.0, -40.0, 10.0, 20.0], device=device).repeat(8)[:, None]
    with torch.no_grad():
        tensors["query"][1:] = (sizes + torch.randn(3, 2, 40, 16, device=device)[1:]).bfloat16()
        tensors["local_key"] -= 1  # scores of the queries above are of one sign
    tensors = {name: t.detach() for name, t in tensors.items()}
    out = dk.prototype_attention(**tensors, backend="triton")
    wanted = dk.prototype_attention(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(out.double(), wanted, rtol=3e-2, atol=3e-2)
    alone = tensors | {name: tensors[name][:1] for name in ("query", "gate") if name in tensors}
    assert torch.equal(out[:1], dk.prototype_attention(**alone, backend="triton"))  # whatever else is in the tile


@pytest.mark.parametrize("programs", [12, 48, 192, 480, 5000])
def test_parts_of_a_gradient_leave_few_slots_idle(programs):
    from dpdiff_kernels.triton.attention import _PARTS_BYTES, _parts

    parts = _parts(264, programs, 196, 10_000)
    assert -(-programs * parts // 264) * 264 < 1.2 * programs * parts
    large = _PARTS_BYTES // 8 // 3
    assert _parts(264, programs, 196, large) <= 3 and _parts(264, programs, 1, 10_000) == 1


def test_deterministic(device):
    first, second = (check(inputs(device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [64, 96, 256])
def test_large(device, dtype, channels):
    check(inputs(device, n=784, m=1000, channels=channels, dtype=dtype))


@pytest.mark.cuda_only
def test_compile(device):
    tensors = inputs(device)
    function = torch.compile(lambda **t: dk.prototype_attention(**t, backend="triton"), fullgraph=True)
    torch.testing.assert_close(function(**tensors), dk.prototype_attention(**tensors, backend="triton"))
