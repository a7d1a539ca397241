import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from dpdiff import backbones
from dpdiff.backbones import Backbone, load_packaged_weights

import timm  # isort: skip  (dpdiff makes torchvision importable)
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config  # isort: skip

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def classifier():
    model = timm.create_model(LITE0).eval()
    load_packaged_weights(model)
    return model


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(backbones, "get_session", refuse)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *args: None)


# scikit-learn's two photographs: a dahlia, for which ImageNet's nearest class is the daisy, and Beijing's Summer Palace
@pytest.mark.parametrize(("photograph", "label"), [("flower.jpg", "daisy"), ("china.jpg", "palace")])
def test_packaged_weights_name_what_a_photograph_shows(classifier, photograph, label):
    image = Image.fromarray(load_sample_image(photograph))
    transform = create_transform(**resolve_model_data_config(classifier), is_training=False)
    with torch.no_grad():
        best = classifier(transform(image)[None]).argmax()
    assert ImageNetInfo().index_to_description(int(best)) == label


def test_features_are_those_of_timm_on_normalised_images(classifier):
    images = torch.rand(2, 3, 96, 128)
    mean, std = (torch.tensor(classifier.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = classifier.forward_intermediates((images - mean) / std, intermediates_only=True)
        every_stage = Backbone(layers=range(5))
        for got, want in zip(every_stage(images), expected, strict=True):
            torch.testing.assert_close(got, want)
        last_of_default = Backbone()(images)[-1]
    torch.testing.assert_close(last_of_default, expected[3])


@pytest.mark.parametrize(
    ("name", "size", "layers", "strides"),
    [
        (LITE0, (128, 96), (2, 3), [8, 16]),
        ("resnet10t", (64, 96), (2, 3), [8, 16]),
        ("convnext_atto", (64, 96), (1, 2), [8, 16]),
        ("swin_tiny_patch4_window7_224", (224, 224), (1, 2), [8, 16]),
        ("vit_tiny_patch16_224", (64, 96), (2, 3, 4, 5, 6, 7, 8, 9), [16] * 8),
        ("vit_small_patch14_reg4_dinov2", (56, 84), (2, 3, 4, 5, 6, 7, 8, 9), [14] * 8),
    ],
)
def test_default_layers_and_shapes(name, size, layers, strides):
    backbone = Backbone(name, pretrained=False)
    assert (backbone.layers, backbone.strides) == (layers, strides)
    shapes = [tuple(f.shape) for f in backbone(torch.rand(2, 3, *size))]
    height, width = size
    assert shapes == [(2, c, height // s, width // s) for c, s in zip(backbone.channels, strides, strict=True)]


def test_deeper_transformers_spread_the_eight_layers():
    assert backbones._default_layers("large", [14] * 24) == [4, 6, 8, 10, 12, 14, 16, 18]  # Dinomaly's choice


def test_chosen_layers():
    backbone = Backbone(layers=[0, -1], pretrained=False)
    assert backbone.layers == (0, 4)
    assert backbone.strides == [2, 32]
    assert [f.shape[1] for f in backbone(torch.rand(1, 3, 64, 64))] == backbone.channels == [16, 320]


def test_frozen():
    backbone = Backbone(pretrained=False).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    before = backbone.fingerprint()
    backbone(images)[0].square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert backbone.fingerprint() == before


def test_fingerprint_follows_weights():
    torch.manual_seed(0)
    one, other = Backbone(pretrained=False), Backbone(pretrained=False)
    assert one.fingerprint() != other.fingerprint()
    other.load_state_dict(one.state_dict())
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0].mul_(1 + 2**-20)
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, classifier, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(classifier.state_dict(), path)
    assert Backbone(weights=path).fingerprint() == Backbone().fingerprint()


class _Harmless:
    """Anything that only unpickling could restore."""


@pytest.mark.parametrize(
    ("content", "suffix", "reason"),
    [
        ("absent", ".pth", "no such file"),
        ("empty", ".pth", "damaged"),
        ("truncated", ".pth", "damaged"),
        ("truncated", ".safetensors", "damaged"),
        ("text", ".safetensors", "damaged"),
        ("pickle", ".pth", "more than tensors"),
        ("foreign", ".pth", "don't fit"),
        ("headless", ".safetensors", "don't fit"),
    ],
)
def test_bad_weights_files_are_named(tmp_path, classifier, content, suffix, reason):
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    state = classifier.state_dict()
    if content == "empty":
        path.touch()
    elif content == "truncated":
        save(state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif content == "text":
        path.write_text("not weights")
    elif content == "pickle":
        torch.save({"state_dict": state, "extra": _Harmless()}, path)
    elif content == "foreign":
        save(timm.create_model("resnet10t").state_dict(), path)
    elif content == "headless":
        save({key: value for key, value in state.items() if "classifier" not in key}, path)
    with pytest.raises(ValueError, match=reason) as error:
        Backbone(weights=path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_and_layers():
    with pytest.raises(ValueError, match="did you mean resnet18"):
        Backbone("resnt18")
    with pytest.raises(ValueError, match="tag"):
        Backbone("resnet18.no_such_tag", pretrained=False)
    for layers in ([5], [-6], [], [3, 2], [1, 1]):
        with pytest.raises(ValueError, match=r"layers is \[.*\]: expected increasing indices within 0\.\.4"):
            Backbone(layers=layers, pretrained=False)


@pytest.mark.parametrize(("name", "advice"), [(LITE0, r"dpdiff\[demo\], or"), ("resnet18", "--backbone-weights")])
def test_without_network_or_package_one_line_says_what_to_do(monkeypatch, offline, name, advice):
    monkeypatch.setattr(backbones, "find_spec", lambda module: None)
    with pytest.raises(OSError, match=advice) as error:
        Backbone(name)
    assert "\n" not in str(error.value)


def test_hub_cache_is_used_without_network(monkeypatch, offline, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t")
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *args: str(path))
    state = Backbone("resnet10t").model.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_packaged_weights_refuse_another_model():
    with pytest.raises(ValueError, match="only tf_efficientnet_lite0"):
        load_packaged_weights(timm.create_model("resnet10t"))


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)],
)
def test_bad_images(images):
    with pytest.raises(ValueError, match=r"images is torch.* \(.*\): expected a float tensor"):
        Backbone(pretrained=False)(images)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_no_images_give_empty_maps_of_the_same_shape(name):
    backbone = Backbone(name, pretrained=False)
    expected = [m.shape[1:] for m in backbone(torch.rand(2, 3, 64, 64))]
    assert [m.shape for m in backbone(torch.rand(0, 3, 64, 64))] == [(0, *shape) for shape in expected]


def test_size_that_a_transformer_cannot_take():
    with pytest.raises(ValueError, match="can't take 100x100"):
        Backbone("vit_tiny_patch16_224", pretrained=False)(torch.rand(1, 3, 100, 100))


def test_a_healthy_torchvision_is_left_alone(tmp_path):
    (tmp_path / "torchvision.py").touch()  # imports without error, defines no operator
    script = f"""
import runpy, sys, torch
sys.path.insert(0, {str(tmp_path)!r})
runpy.run_path({str(Path(backbones.__file__).with_name("_torchvision.py"))!r})
assert not hasattr(torch.ops.torchvision, "nms")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
