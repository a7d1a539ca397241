"""DLSR: its features, its scores by their definitions, and that it tells other images from those it learnt."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stripes import SIZE, as_batch, striped

import dpdiff
from dpdiff.dlsr import SCORES
from dpdiff.training import train


@pytest.fixture
def make():
    """Makes small DLSR models on a random backbone; the same weights for the same options."""

    def make(**options) -> dpdiff.DLSR:
        small = dict(backbone="test_efficientnet", pretrained=False, image_size=SIZE, depth=2, hidden=48, n_samples=2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return dpdiff.DLSR(**small | options).eval()

    return make


def moved(model: dpdiff.DLSR) -> dpdiff.DLSR:
    """With random weights, where all reconstructions would be zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "denoiser" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def spotted(seed: int) -> np.ndarray:
    """What is out of distribution to stripes: noise in blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)


@pytest.fixture
def images():
    return as_batch([striped(i) for i in range(5)])


def test_features_are_standardised_averages_of_every_stage(make, images):
    model = make()
    features = model.features(images)
    with torch.no_grad():
        maps = model.backbone(images)
    assert len(maps) == 5 and features.shape == (5, sum(m.shape[1] for m in maps))
    for part, m in zip(features.split([m.shape[1] for m in maps], 1), maps):
        means = m.double().mean((2, 3))
        expected = (means - means.mean(1, keepdim=True)) / means.var(1, correction=0, keepdim=True).add(1e-6).sqrt()
        torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(layers=[1, 3]), dict(backbone="test_resnet"), dict(backbone="test_vit")])
def test_any_backbone_and_any_layers(make, options):
    model = make(**options)
    out = model.predict(torch.rand(2, 3, SIZE, SIZE))
    assert out.scores.shape == (2,) and out.scores.dtype == torch.float32 and out.maps is None


@pytest.mark.parametrize(
    "options", [dict(inference="paper", score="mfsim"), dict(n_samples=1), dict(backbone="test_vit")]
)
def test_no_images_have_no_scores(make, options):
    assert make(**options).predict(torch.rand(0, 3, SIZE, SIZE)).scores.shape == (0,)


def test_the_layout_of_the_paper(make, products, tmp_path):
    """The five stages of efficientnet_b4, 720 numbers."""
    model = make(backbone="efficientnet_b4")
    assert model.backbone.channels == [24, 32, 56, 160, 448] and model.mean.shape == (720,)
    before = copy.deepcopy(model.denoiser.state_dict())
    train(model, products(6), tmp_path / "out", max_steps=3, batch_size=4, accelerator="cpu", precision="32-true")
    assert any(not torch.equal(t, before[name]) for name, t in model.denoiser.state_dict().items())
    images = as_batch([striped(0), spotted(0)])
    assert model.features(images).shape == (2, 720)
    scores, _ = model.predict(images)
    assert scores.shape == (2,) and scores.isfinite().all() and scores[0] != scores[1]


def alpha_bars(model):
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, model.config["n_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def reconstructions(model, denoiser, x):
    """Of each noise sample, one step from the noisy vector, by the definition."""
    abar = alpha_bars(model)[model.config["timestep"]]
    timesteps = torch.full((len(x),), model.config["timestep"])
    with torch.no_grad():
        return [denoiser((abar.sqrt() * x + (1 - abar).sqrt() * n).float(), timesteps) for n in model.noise]


def test_mse(make, images):
    model = moved(make(score="mse"))
    x = model.features(images)
    expected = torch.stack([(r - x).square().mean(1) for r in reconstructions(model, model.denoiser, x)]).mean(0)
    torch.testing.assert_close(model.predict(images).scores, expected, rtol=1e-4, atol=1e-5)


def test_mfsim(make, images):
    model = moved(make(score="mfsim"))
    x, widths = model.features(images), model.backbone.channels
    similarities = [
        torch.stack([F.cosine_similarity(a, b) for a, b in zip(r.split(widths, 1), x.split(widths, 1))]).mean(0)
        for r in reconstructions(model, model.denoiser, x)
    ]
    torch.testing.assert_close(model.predict(images).scores, -torch.stack(similarities).mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inference_of_the_paper(make, images):
    """From timestep 3 through 2 and 1, with every 15th number hidden from the first."""
    model = moved(make(inference="paper"))
    x, abar = model.features(images).double(), alpha_bars(model)
    errors = []
    for noise in model.noise:
        noisy = abar[3].sqrt() * x + (1 - abar[3]).sqrt() * noise
        noisy[:, ::15] = 0
        for t in (3, 2, 1):
            clean = model.denoiser(noisy.float(), torch.full((len(x),), t)).double()
            direction = (noisy - abar[t].sqrt() * clean) / (1 - abar[t]).sqrt()
            noisy = abar[t - 1].sqrt() * clean + (1 - abar[t - 1]).sqrt() * direction
        errors.append((clean - x).square().mean(1))
    expected = torch.stack(errors).mean(0).float()
    torch.testing.assert_close(model.predict(images).scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["lr", "ratio"])
def test_comparison_with_the_first_epoch(make, images, score):
    model = moved(make(score=score))
    x = model.features(images)
    first, final = (
        torch.stack([(r - x).square().mean(1) for r in reconstructions(model, denoiser, x)]).mean(0)
        for denoiser in (model.first_denoiser, model.denoiser)
    )
    assert (first - final).abs().max() > 0.01
    expected = first - final if score == "lr" else final / first
    torch.testing.assert_close(model.predict(images).scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_depends_on_the_image_alone(make, images, score):
    model = moved(make(score=score, n_steps=3))
    together = model.predict(images).scores
    for i, image in enumerate(images):
        torch.testing.assert_close(model.predict(image[None]).scores, together[i : i + 1], rtol=1e-5, atol=1e-6)


def test_features_of_the_training_images_are_standardised(make, products, tmp_path):
    """Each number over the images, after each image's stages."""
    model = make()
    train(model, products(12), tmp_path / "out", max_steps=1, batch_size=4, accelerator="cpu", precision="32-true")
    features = model.features(as_batch([striped(i) for i in range(12)]))
    varying = model.scale > 0.01
    assert varying.float().mean() > 0.9
    torch.testing.assert_close(features.mean(0)[varying], torch.zeros(varying.sum()), rtol=0, atol=0.05)
    torch.testing.assert_close(features.std(0, correction=0)[varying], torch.ones(varying.sum()), rtol=0.05, atol=0)


def test_the_same_seed_gives_the_same_scores(make, products, tmp_path):
    settings = dict(max_steps=6, batch_size=4, accelerator="cpu", precision="32-true")
    images = as_batch([striped(200), spotted(200)])
    scores = [
        train(make(), products(12), tmp_path / str(i), seed=seed, **settings).predict(images).scores
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("score", SCORES)
def test_learns_to_tell_other_images(make, products, tmp_path, score):
    model = make(score=score, hidden=96)
    settings = dict(max_steps=150, batch_size=16, lr=2e-3, accelerator="cpu", precision="32-true")
    train(model, products(48), tmp_path / "out", **settings)
    inside = model.predict(as_batch([striped(i) for i in range(100, 116)])).scores
    outside = model.predict(as_batch([spotted(i) for i in range(16)])).scores
    assert (inside[:, None] < outside).float().mean() > 0.95  # AUROC
    loaded = dpdiff.load(tmp_path / "out" / "model.safetensors")
    images = as_batch([striped(200), spotted(200)])
    assert torch.equal(loaded.predict(images).scores, model.predict(images).scores)
    assert loaded.config == model.config


def test_the_first_epoch_is_kept_for_scores_that_need_it(make, products, tmp_path):
    model = make(score="ratio")
    kept = []
    original = model.first_denoiser.load_state_dict
    model.first_denoiser.load_state_dict = lambda state: kept.append(copy.deepcopy(state)) or original(state)
    train(model, products(12), tmp_path / "out", max_steps=9, batch_size=4, accelerator="cpu", precision="32-true")
    (state,) = kept
    for name, tensor in model.first_denoiser.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert any(not torch.equal(t, model.denoiser.state_dict()[name]) for name, t in state.items())
    assert make(score="mse").first_denoiser is None


@pytest.mark.parametrize(
    "options",
    [
        dict(score="auc"),
        dict(timestep=100),
        dict(timestep=-1),
        dict(depth=0),
        dict(n_steps=62),
        dict(hidden=0),
        dict(inference="ddim"),
        dict(n_timesteps=3),
        dict(hidden=True),
        dict(n_timesteps=True),
        dict(backbone=5),
        dict(pretrained="false"),
    ],
)
def test_arguments_out_of_range(make, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {options[name]!r}"):
        make(**options)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.ones(1, 3, 8, 8) * 2]
)
def test_images_that_are_none(make, images):
    with pytest.raises((TypeError, ValueError), match="images"):
        make().predict(images)


def test_a_model_of_another_type_is_refused(make):
    with pytest.raises(TypeError, match=r"^the model is torch\.float16: expected torch\.float32; "):
        make().half().predict(torch.zeros(1, 3, 8, 8))
