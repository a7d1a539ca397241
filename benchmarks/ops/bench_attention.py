"""prototype_attention beside scaled_dot_product_attention in each of the forms that a user could give it:

    pytest benchmarks/ops/bench_attention.py [--device cuda]

Tokens are (16, 12, 784, 64); banks are shared by the batch. Rivals have banks expanded to the batch, or the batch
folded into the tokens. On processors they are eager and compiled; on GPUs, where compiling leaves the kernel as it is,
PyTorch picks the kernel or it is named. Every contender's answer is checked against float64 on one image, and so are
its gradients.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dpdiff_kernels as dk
from benchmarks.contenders import contenders, on
from benchmarks.memory import peak_memory

BATCH, HEADS, TOKENS, CHANNELS = 16, 12, 784, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def expanded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shape = (query.shape[0], *key.shape)
    return F.scaled_dot_product_attention(query, key.expand(shape), value.expand(shape))


def folded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, n_tokens, channels = query.shape
    tokens = query.transpose(0, 1).reshape(1, heads, batch * n_tokens, channels)
    out = F.scaled_dot_product_attention(tokens, key[None], value[None])
    return out.view(heads, batch, n_tokens, channels).transpose(0, 1)


def blended(attention: Callable) -> Callable:
    """Two calls and a blend: the rival of the gate."""

    def blend(query, local_key, local_value, global_key, global_value, gate):
        gate = gate[..., None]
        local_out = attention(query, local_key, local_value)
        return (1 - gate) * local_out + gate * attention(query, global_key, global_value)

    return blend


FORMS = {"expanded": expanded, "folded": folded}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RIVALS = {f"sdpa, {form}": run for form, run in FORMS.items()}
RIVALS |= {f"sdpa, {form}, compiled": torch.compile(run, dynamic=False) for form, run in FORMS.items()}
BLENDS = {f"2 sdpa, {form}": blended(run) for form, run in FORMS.items()}
BLENDS |= {f"2 sdpa, {form}, compiled": torch.compile(blended(run), dynamic=False) for form, run in FORMS.items()}
NAMED = {f"{kernel} sdpa, {form}": run for kernel in KERNELS for form, run in FORMS.items()}
NAMED_BLENDS = {f"2 {name}": blended(run) for name, run in NAMED.items()}


def eager_or_compiled(rivals: dict[str, Callable], compiled_on_gpus: tuple[str, ...] = ()) -> list:
    on_both = lambda name: not name.endswith("compiled") or name in compiled_on_gpus
    return [name if on_both(name) else on("cpu", name) for name in rivals]


@contextlib.contextmanager
def named_kernel(contender: str, dtype: str):
    """SDPA on the kernel that the contender's name has, if it has one; skipped where that can't run the case."""
    kernel = next((kernel for name, kernel in KERNELS.items() if name in contender), None)
    if kernel is None:
        yield
        return
    if dtype == "float32" and kernel != SDPBackend.EFFICIENT_ATTENTION:
        pytest.skip("in float32: this kernel takes float16 and bfloat16 only")
    with sdpa_kernel(kernel):
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            pytest.skip(f"in {dtype}: {error}")


def operands(device: str, dtype: str, *banks: int, gate: bool = False) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(BATCH, HEADS, TOKENS, CHANNELS)] + [(HEADS, m, CHANNELS) for m in banks for _ in ("key", "value")]
    tensors = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    if gate:
        tensors.append(torch.rand(BATCH, HEADS, TOKENS, generator=generator, device=device))
    return [t.to(DTYPES[dtype]).requires_grad_() for t in tensors]


def check(attention: Callable, tensors: list[Tensor], seen: Tensor | slice) -> None:
    first = [t[:1].detach() if t.shape[0] == BATCH else t[:, seen].detach() for t in tensors]
    with torch.no_grad():
        wanted = dk.prototype_attention(*(t.double() for t in first), backend="reference")
        out = attention(*(t.detach() for t in tensors))[:1]
    tolerance = 1e-5 if tensors[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


def check_gradients(attention: Callable, tensors: list[Tensor], seen: Tensor | slice) -> None:
    """Of the first image's output alone, so that those of the banks, sums over images, are its own."""
    grad_out = torch.zeros_like(tensors[0])
    grad_out[:1] = torch.randn(grad_out[:1].shape, generator=torch.Generator().manual_seed(1)).to(grad_out)
    first = [t[:1] if t.shape[0] == BATCH else t[:, seen] for t in tensors]
    first = [t.detach().double().requires_grad_() for t in first]
    wanted = torch.autograd.grad(dk.prototype_attention(*first, backend="reference"), first, grad_out[:1].double())
    found = torch.autograd.grad(attention(*tensors), tensors, grad_out)
    tolerance = 1e-4 if grad_out.dtype == torch.float32 else 5e-2
    for gradient, right in zip(found, wanted):
        gradient = gradient[:1] if gradient.shape[0] == BATCH else gradient[:, seen]
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=tolerance * right.abs().max().item())


def work(dtype: str, n_prototypes: int, backward: bool) -> dict:
    """Two products forward; backward the scores again and four more. Bytes of tokens, since banks are small."""
    products = 7 if backward else 2
    size = BATCH * HEADS * TOKENS * CHANNELS
    n_bytes = DTYPES[dtype].itemsize * size * (5 if backward else 2)  # query, out; also out's gradient, out, query's
    return {"flops": products * 2 * size * n_prototypes, "bytes": n_bytes, "dtype": dtype}


def timed(attention: Callable, tensors: list[Tensor], backward: bool, seen: Tensor | slice = slice(None)) -> Callable:
    """seen: the prototypes that the first image attends to."""
    torch.compiler.reset()  # after eight shapes, compiled rivals would be run as they are
    check(attention, tensors, seen)
    if backward:
        check_gradients(attention, tensors, seen)
    grad_out = torch.randn(tensors[0].shape, device=tensors[0].device).to(tensors[0])

    def forward():
        with torch.no_grad():
            attention(*tensors)

    def forward_and_backward():
        torch.autograd.grad(attention(*tensors), tensors, grad_out)

    return forward_and_backward if backward else forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [256, 1024, 2560, on("cuda", 4096)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@contenders(*eager_or_compiled(RIVALS), *(on("cuda", name) for name in NAMED))
def test_one_bank(measure, device, contender, backward, m, dtype):
    attention = (RIVALS | NAMED).get(contender, dk.prototype_attention)
    group = f"{dtype}, M = {m:,}, {'forward + backward' if backward else 'forward'}"
    with named_kernel(contender, dtype):
        run = timed(attention, operands(device, dtype, m), backward)
        measure(group, run, **work(dtype, m, backward))


@pytest.mark.parametrize("dtype", DTYPES)
@contenders(*eager_or_compiled(BLENDS, ("2 sdpa, folded, compiled",)), *(on("cuda", name) for name in NAMED_BLENDS))
def test_two_banks(measure, device, contender, dtype):
    attention = (BLENDS | NAMED_BLENDS).get(contender, dk.prototype_attention)
    group = f"{dtype}, 1,024 and 128 prototypes with gate, forward + backward"
    with named_kernel(contender, dtype):
        run = timed(attention, operands(device, dtype, 1024, 128, gate=True), backward=True)
        measure(group, run, **work(dtype, 1024 + 128, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@contenders(yardsticks=["32 prototypes"], backends=())  # whose scores of 12,800 prototypes take gigabytes
def test_routing(measure, device, contender, backward, dtype):
    """4 of 1,600 groups of 8 for each image, beside as many prototypes when there are no others."""
    if contender == "dpdiff":
        draw = torch.Generator().manual_seed(0)
        groups = torch.arange(1600).repeat_interleave(8)
        active = torch.stack([torch.randperm(1600, generator=draw)[:4] for _ in range(BATCH)])
        attention = partial(dk.prototype_attention, groups=groups.to(device), active_groups=active.to(device))
        seen = torch.isin(groups, active[0])
        run = timed(attention, operands(device, dtype, 12_800), backward, seen.to(device))
    else:
        run = timed(dk.prototype_attention, operands(device, dtype, 32), backward)
    group = f"{dtype}, 4 active groups of 8, of 1,600 groups, {'forward + backward' if backward else 'forward'}"
    measure(group, run, **work(dtype, 32, backward))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_backward(device, dtype, capsys):
    """Beyond inputs and outputs: at most 64 MB. One matrix of tokens and prototypes would be gigabytes."""
    tensors = operands(device, dtype, 2560, 128, gate=True)
    out = dk.prototype_attention(*tensors)
    backward = partial(torch.autograd.grad, out, tensors, torch.ones_like(out), retain_graph=True)
    backward()
    peak = peak_memory(backward, device)
    if peak is None:
        pytest.skip("this system does not tell how much memory a call takes")
    extra = peak - sum(t.nbytes for t in tensors)
    with capsys.disabled():
        print(f"\n{dtype}, 2,560 and 128 prototypes with gate, backward: {extra / 1e6:.1f} MB beyond the gradients")
    assert extra <= 64e6
