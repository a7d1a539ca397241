"""DPDiff-AD at its default size on the fast operators, beside the same model on those in plain PyTorch:

    pytest benchmarks/model/bench_dpdiff_ad.py [--device cuda]

A training step is losses, gradients and AdamW on a batch of 16 from cached features; inference is `predict` without the
backbone, which is the same for both. Weights and inputs are random: the time doesn't depend on them. What either
computes is compared with what the plain operators do.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import dpdiff_kernels as dk
from benchmarks.contenders import contenders
from benchmarks.training_step import training_step

BATCH = 16


@pytest.fixture(scope="module")
def model(device):
    dpdiff = pytest.importorskip("dpdiff")
    torch.manual_seed(0)
    return dpdiff.DPDiffAD(pretrained=False).to(device)


@pytest.fixture
def tokens(model, device):
    tokenizer = model.tokenizer
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, tokenizer.n_tokens, tokenizer.dim, generator=generator).to(device)


def check(run: Callable[[], Sequence[Tensor]], tolerance: float = 1e-3) -> None:
    with dk.use_backend("reference"):
        wanted = run()
    for found, right in zip(run(), wanted):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


@contenders()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_step(measure, model, tokens, precision, contender):
    from dpdiff.draws import Draws

    model.train()
    bfloat16 = precision == "bfloat16"

    def losses():
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            return list(model.losses(tokens, Draws(range(BATCH), tokens.device)).values())

    check(losses, 2e-2 if bfloat16 else 1e-3)
    measure(f"training step, {BATCH} images, {precision}", training_step(model, tokens, bfloat16))


@contenders()
def test_inference(measure, model, tokens, contender):
    model.eval()

    @torch.inference_mode()
    def maps():
        return model._errors(tokens)[0]

    check(maps)
    measure(f"inference, {BATCH} images, without the backbone", maps)


@contenders()
def test_prediction(measure, model, device, contender):
    model.eval()
    images = torch.rand(BATCH, 3, model.image_size, model.image_size, device=device)
    with torch.inference_mode():
        check(lambda: model.predict(images))
        measure(f"predict, {BATCH} images", lambda: model.predict(images))
