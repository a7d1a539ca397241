"""DPDiff-AD at its default size on the fast operators, beside the same model on those in plain PyTorch:

    pytest benchmarks/model/bench_dpdiff_ad.py [--device cuda]

A training step is losses, gradients and AdamW on a batch of 16 from cached features; inference is `predict` without the
backbone, which is the same for both. Weights and inputs are random: the time doesn't depend on them.
"""

import pytest
import torch

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


@contenders()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_step(measure, model, tokens, precision, contender):
    model.train()
    measure(f"training step, {BATCH} images, {precision}", training_step(model, tokens, precision == "bfloat16"))


@contenders()
def test_inference(measure, model, tokens, contender):
    model.eval()

    @torch.inference_mode()
    def maps():
        return model._errors(tokens)[0]

    with dk.use_backend("reference"):
        wanted = maps()
    torch.testing.assert_close(maps(), wanted, rtol=1e-3, atol=1e-3)
    measure(f"inference, {BATCH} images, without the backbone", maps)


@contenders()
def test_prediction(measure, model, device, contender):
    model.eval()
    images = torch.rand(BATCH, 3, model.image_size, model.image_size, device=device)
    with torch.inference_mode():
        measure(f"predict, {BATCH} images", lambda: model.predict(images))
