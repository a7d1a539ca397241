"""The detector as a whole: what it predicts, what it refuses, and that it learns."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from stripes import as_batch, striped, with_defect

import dpdiff
from dpdiff.data import load_image
from dpdiff.detector import spread


def prepared(model, images):
    """With the statistics and the banks of these images, but untrained."""
    maps = model.backbone(images)
    model.eval().initialise(lambda numbers: [[m[numbers] for m in maps]], len(images), torch.Generator().manual_seed(0))
    model.calibrate([model.encode(maps)])
    return model


@pytest.fixture(scope="module")
def images():
    return as_batch([striped(i) for i in range(16)])


@pytest.fixture
def model(tiny, images):
    return prepared(tiny(n_samples=2, n_steps=2), images)


def test_prediction_has_the_shapes_of_the_contract(model, images):
    out = model.predict(images[:3])
    assert isinstance(out, dpdiff.Prediction)
    assert out.scores.shape == (3,) and out.maps.shape == (3, 64, 64)
    assert out.scores.dtype == out.maps.dtype == torch.float32
    assert out.scores.isfinite().all() and out.maps.isfinite().all()
    assert not out.scores.requires_grad


def test_prediction_depends_on_the_image_alone(model, images):
    together = model.predict(images)
    torch.manual_seed(123)
    again = model.predict(images)
    torch.testing.assert_close(again, together, rtol=0, atol=0)
    for i in (0, 7):
        alone = model.predict(images[i : i + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.maps[0], together.maps[i], rtol=1e-4, atol=1e-4)
    reversed_ = model.predict(images.flip(0))
    torch.testing.assert_close(reversed_.scores.flip(0), together.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (1, 1), (301, 7)])
def test_maps_have_the_size_of_the_images(model, size):
    assert model.predict(torch.rand(2, 3, *size)).maps.shape == (2, *size)


@pytest.mark.parametrize("image_size", [1, 2, 3])
def test_models_of_the_smallest_images(tiny, image_size):
    out = tiny(image_size=image_size).predict(torch.rand(2, 3, 5, 6))
    assert out.maps.shape == (2, 5, 6) and out.maps.isfinite().all() and out.scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_is_refused(tiny, dtype):
    with pytest.raises(TypeError, match=rf"^the model is {dtype}: expected torch.float32; .* torch.autocast$"):
        tiny().to(dtype).predict(torch.rand(1, 3, 64, 64, dtype=dtype))


def test_autocast_changes_predictions_but_little(model, images):
    expected = model.predict(images[:4])
    with torch.autocast("cpu", torch.bfloat16):
        out = model.predict(images[:4])
    assert out.scores.dtype == out.maps.dtype == torch.float32
    torch.testing.assert_close(out.scores, expected.scores, rtol=0.2, atol=0)


def test_no_images_have_no_scores_and_no_maps(tiny, images):
    for options in (dict(), dict(patch_size=3, n_steps=2), dict(route="all"), dict(backbone="test_vit")):
        out = prepared(tiny(**options), images).predict(torch.rand(0, 3, 64, 50))
        assert out.scores.shape == (0,) and out.maps.shape == (0, 64, 50)
        assert out.scores.dtype == out.maps.dtype == torch.float32


def test_images_are_resized_as_in_training(model, tmp_path):
    """predict resizes tensors as load_image resizes files, but for its rounding to 8 bits."""
    Image.fromarray(striped(3, 200)).save(tmp_path / "large.png")
    whole, resized = (load_image(tmp_path / "large.png", size)[None] for size in (None, 64))
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert model.predict(whole).maps.shape == (1, 200, 200)
    torch.testing.assert_close(seen[0], resized, rtol=0, atol=1 / 255)


def test_images_of_any_float_type_and_layout(model, images):
    expected = model.predict(images[:2])
    strided = images[:2].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(model.predict(strided), expected, rtol=1e-4, atol=1e-4)
    for dtype, tolerance in [(torch.float64, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.2)]:
        out = model.predict(images[:2].to(dtype))
        assert out.maps.dtype == torch.float32
        torch.testing.assert_close(out.scores, expected.scores, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.rand(3, 64, 64), ValueError, r"images has shape \(3, 64, 64\): expected \(B, 3, H, W\)"),
        (torch.rand(1, 1, 64, 64), ValueError, r"images has shape \(1, 1, 64, 64\)"),
        (
            torch.rand(1, 3, 0, 64),
            ValueError,
            r"images has shape \(1, 3, 0, 64\): expected a height and width of at least",
        ),
        (torch.rand(0, 3, 64, 0), ValueError, r"images has shape \(0, 3, 64, 0\): expected a height and width"),
        (torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), TypeError, r"images is torch.uint8: expected"),
        ([[0.0]], TypeError, r"images is list"),
        (255 * torch.rand(1, 3, 64, 64), ValueError, r"images .*expected .*\[0, 1\]"),
        (torch.rand(1, 3, 64, 64) - 0.5, ValueError, r"images .*expected .*\[0, 1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), ValueError, r"images .*expected .*\[0, 1\]"),
    ],
)
def test_images_of_another_type_shape_or_range_are_refused(model, given, error, message):
    with pytest.raises(error, match=message):
        model.predict(given)


BOOLS_REFUSED = ("image_size", "depth", "k", "route", "timestep", "min_timestep", "temperature", "ot_weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_local=0), r"n_local is 0: expected a positive int"),
        (dict(pretrained="false"), r"pretrained is 'false': expected a bool"),
        (dict(diffusion=0), r"diffusion is 0: expected a bool"),
        (dict(image_size=64.0), r"image_size is 64.0"),
        *((dict([(name, True)]), rf"{name} is True: expected") for name in BOOLS_REFUSED),
        (dict(k=17), r"k is 17: expected at most n_local \(16\)"),
        (dict(dim=25), r"dim is 25: expected a multiple of num_heads \(2\)"),
        (dict(timestep=1000), r"timestep is 1000: expected 0 to n_timesteps - 1 \(999\)"),
        (dict(timestep=250), r"min_timestep is 300: expected 0 to timestep \(250\)"),
        (dict(n_steps=8, timestep=303), r"n_steps is 8: expected at most timestep - min_timestep \+ 1 \(4\)"),
        (dict(n_steps=2, diffusion=False), r"n_steps is 2: expected 1 without diffusion"),
        (dict(local_weight=1.5), r"local_weight is 1.5: expected 0 to 1"),
        (dict(local_weight=float("nan")), r"local_weight is nan: expected 0 to 1"),
        (dict(temperature=0.0), r"temperature is 0.0: expected a positive finite number"),
        (dict(temperature=float("inf")), r"temperature is inf"),
        (dict(temperature="1"), r"temperature is '1'"),
        (dict(ot_weight=-1.0), r"ot_weight is -1.0: expected a finite number, 0 or more"),
        (dict(ot_weight=float("nan")), r"ot_weight is nan"),
        (dict(ot_weight=float("inf")), r"ot_weight is inf"),
        (dict(route=0), r'route is 0: expected a positive int or "all"'),
        (dict(route="some"), r"route is 'some'"),
        (dict(patch_size=0), r"patch_size is 0"),
        (dict(backbone=5), r"backbone is 5: expected the name of a timm model"),
        (dict(backbone="resnet_eighteen"), r"backbone: timm knows no model 'resnet_eighteen'"),
    ],
)
def test_arguments_out_of_range_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_each_group_learns_from_all_of_its_images(tiny, images):
    model = tiny(n_global=24, n_local=64)  # more groups than images, each of as many prototypes as an image has tokens
    maps = model.backbone(images)
    passes = []

    def batches(numbers):
        passes.append(list(numbers))
        for start in range(0, len(numbers), 5):  # which doesn't end where groups do
            yield [m[passes[-1][start : start + 5]] for m in maps]

    model.initialise(batches, len(images), torch.Generator().manual_seed(0))
    assert passes[0] == passes[1] == list(range(len(images))) and set(passes[2]) == set(passes[0])
    assert len(passes[2]) > len(images)  # groups without an image of their own borrow one
    tokens = model.tokenizer(maps)
    group = model.global_prototypes.route(tokens.mean(1), 1)
    alone = (group == group.T).sum(1) == 1
    assert alone.sum() > 4
    distances = model.local_prototypes(tokens, group)[1]
    assert distances[alone].max() < 1e-5


def test_training_grows_with_the_images_within_limits():
    steps = [dpdiff.DPDiffAD.training_options(n)["max_steps"] for n in (1, 960, 2_560, 100_000)]
    assert steps == [300, 300, 800, 2_000]


def test_statistics_are_of_images_of_the_whole_set():
    assert spread(7) == list(range(7))
    assert spread(24_000) == list(range(0, 24_000, 3))
    numbers = spread(8_001)
    assert len(set(numbers)) == 8_000 and numbers[0] == 0 and numbers[-1] == 7_999


def test_losses_are_finite_and_reach_every_trained_parameter(model, images):
    tokens = model.tokenize(images)
    model.train()
    with torch.no_grad():  # away from zero weights, which let no gradient through
        model.denoiser.out.weight.normal_(std=0.2)
        for block in model.denoiser.blocks:
            block.modulation.weight.normal_(std=0.2)
    losses = model.losses(tokens)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("option", [dict(condition=False), dict(prototype_attention=False)])
def test_ablations_leave_no_parameter_without_a_gradient(tiny, images, option):
    """What takes no part in the loss would stop distributed training."""
    model = prepared(tiny(**option), images).train()
    model.losses(model.tokenize(images))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_without_diffusion_the_denoiser_sees_the_tokens_themselves(tiny, images):
    model = prepared(tiny(diffusion=False), images)
    seen = []
    model.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = model.tokenize(images)
    model.losses(tokens)
    model.predict(images)
    assert len(seen) == 2 and all(torch.equal(given, tokens) for given in seen)


def test_calibration_makes_errors_of_normal_images_comparable(model, images):
    tokens = model.tokenize(images)
    errors, nearest = model._errors(tokens)
    normal = model.normal_errors(errors, nearest)
    torch.testing.assert_close(normal.mean((1, 2)), torch.zeros(2), rtol=0, atol=0.2)  # but for what rare kinds borrow
    assert (normal.std((1, 2)) > 0.4).all() and (normal.std((1, 2)) < 1).all()
    once = model.predict(images)
    model.calibrate([tokens[:5], tokens[5:]])  # batches of different sizes weigh by their tokens
    torch.testing.assert_close(model.predict(images), once, rtol=1e-4, atol=1e-4)


def test_an_image_uses_the_groups_that_it_is_routed_to(tiny, images):
    """Other groups of local prototypes may hold anything; with route="all" every one counts."""
    for route, same in [(2, True), ("all", False)]:
        model = prepared(tiny(route=route), images)
        before = model.predict(images[:1])
        used = model.global_prototypes.route(model.tokenize(images[:1]).mean(1), 2)
        others = (model.local_prototypes.groups[:, None] != used[0]).all(1)
        model.local_prototypes.bank[others] = model.tokenize(images[:1])[0, 0]
        assert torch.equal(model.predict(images[:1]).maps, before.maps) == same


def test_routing_to_every_group_is_route_all(tiny, images):
    routed, whole = (prepared(tiny(route=route), images).predict(images[:4]) for route in (8, "all"))
    torch.testing.assert_close(routed, whole, rtol=0, atol=0)


def test_local_prototypes_of_a_group_are_those_of_its_images(tiny, images):
    """Two kinds of images, two groups: each group's prototypes describe its own kind better."""
    noise = torch.rand(len(images), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = prepared(tiny(n_global=2, route=1), torch.cat([images, noise]))
    groups = model.global_prototypes.route(model.tokenize(torch.cat([images, noise])).mean(1), 1)[:, 0]
    assert groups[:16].unique().numel() == groups[16:].unique().numel() == 1 and groups[0] != groups[-1]
    for kind, group in [(images, groups[0]), (noise, groups[-1])]:
        tokens = model.tokenize(kind)
        right, wrong = (
            model.local_prototypes(tokens, torch.full((len(kind), 1), g))[1].mean() for g in (group, 1 - group)
        )
        assert right < 0.8 * wrong


def test_local_prototypes_know_on_which_side_they_are_normal(tiny, images):
    """Noise on the left, stripes on the right: the first cosine along the width is positive on the left."""
    split = images.clone()
    noise = torch.rand(split.shape, generator=torch.Generator().manual_seed(0))
    split[..., :32] = noise[..., :32]
    model = prepared(tiny(n_global=1, route="all"), split)
    tokens = model.tokenize(split)
    nearest = model.local_prototypes(tokens, None)[2].unflatten(1, model.tokenizer.grid)
    places = model.local_prototypes.places
    assert (places[nearest[..., 0], 1] > 0.3).float().mean() > 0.8
    assert (places[nearest[..., -1], 1] < -0.3).float().mean() > 0.8


def test_fewer_images_than_global_prototypes(tiny, images):
    out = prepared(tiny(n_global=8), images[:3]).predict(images)
    assert out.scores.isfinite().all() and out.maps.isfinite().all()


def test_suggested_prototypes_follow_the_images():
    counts = [dpdiff.DPDiffAD.suggest(n)["n_global"] for n in (1, 256, 707, 2_560, 10**6)]
    assert counts == [16, 16, 44, 160, 2_048]


def test_local_weight_blends_the_two_maps(tiny, images):
    scores = {}
    for weight in (0.0, 0.5, 1.0):
        model = prepared(tiny(local_weight=weight), images)
        scores[weight] = model.predict(images).maps
    torch.testing.assert_close(scores[0.5], (scores[0.0] + scores[1.0]) / 2, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scores[0.0], scores[1.0], atol=1e-2)


def test_training_lowers_the_error_of_good_products_and_finds_painted_defects(tiny, images):
    torch.manual_seed(0)
    model = prepared(tiny(layers=[1, 2], stride=8, n_local=24, dim=48), as_batch([striped(i) for i in range(48)]))
    tokens = model.tokenize(as_batch([striped(i) for i in range(48)]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history = []
    model.train()
    for _ in range(150):
        losses = model.losses(tokens[torch.randperm(48)[:16]])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    model.eval()
    for name in ("loss", "cosine", "mse"):
        first, last = (sum(h[name] for h in part) / 10 for part in (history[:10], history[-10:]))
        assert last < 0.8 * first, (name, first, last)

    new = [striped(1000 + i) for i in range(24)]
    damaged, masks = zip(*(with_defect(image, i) for i, image in enumerate(new)))
    good, bad = model.predict(as_batch(new)), model.predict(as_batch(list(damaged)))
    assert (bad.scores > good.scores).float().mean() >= 0.95
    assert roc_auc_score([0] * 24 + [1] * 24, torch.cat([good.scores, bad.scores])) > 0.95
    per_image = [roc_auc_score(mask.flatten(), m.flatten()) for mask, m in zip(masks, bad.maps)]
    assert np.mean(per_image) > 0.85, per_image


def test_exports_to_one_graph(model, images):
    program = torch.export.export(model, (images[:2],))
    torch.testing.assert_close(program.module()(images[2:4]), model.predict(images[2:4]), rtol=1e-4, atol=1e-4)
