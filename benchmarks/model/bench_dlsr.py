"""DLSR at its default size: what scoring costs beside its backbone, and training on cached features:

    pytest benchmarks/model/bench_dlsr.py [--device cuda] [--threads 1]

Scoring is to add at most a tenth to the time of the backbone, whose ratio then is 10 or more. Weights and
inputs are random: the time doesn't depend on them.
"""

import pytest
import torch

from benchmarks.contenders import contenders
from benchmarks.training_step import training_step

ours = pytest.mark.parametrize("contender", ["dpdiff"])


@pytest.fixture(scope="module")
def model(device):
    dpdiff = pytest.importorskip("dpdiff")
    torch.manual_seed(0)
    return dpdiff.DLSR(pretrained=False).to(device).eval()


def vectors(model, n: int) -> torch.Tensor:
    return torch.randn(n, len(model.mean), generator=torch.Generator().manual_seed(0)).to(model.mean.device)


@contenders(backends=(), yardsticks=["backbone"])
@pytest.mark.parametrize("batch", [1, 16])
def test_share_of_scoring(measure, model, device, batch, contender):
    """`predict` without its backbone, and the backbone."""
    images = torch.rand(batch, 3, model.image_size, model.image_size, device=device)
    x = vectors(model, batch)
    run = (lambda: model.score(x)) if contender == "dpdiff" else (lambda: model.backbone(images))
    with torch.inference_mode():
        measure(f"scoring {batch} images", run)


@ours
def test_scoring_many(measure, model, contender):
    x = vectors(model, 10_000)
    with torch.inference_mode():
        measure("scoring 10,000 cached vectors", lambda: model.score(x))


@ours
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_step(measure, model, precision, contender):
    batch = model.TRAINING["batch_size"]
    x = vectors(model, batch)
    measure(f"training step, {batch} cached vectors, {precision}", training_step(model, x, precision == "bfloat16"))
