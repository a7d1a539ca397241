"""Weights files: what comes back, what is refused, and that none is ever half written."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stripes import as_batch, striped

import dpdiff
from dpdiff._version import version_of
from dpdiff.serialization import read_header


@pytest.fixture
def model(tiny):
    """With every weight and buffer away from its initial value."""
    model = tiny(k=2, timestep=450, local_weight=0.4)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture
def file(model, tmp_path):
    dpdiff.save(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def rewrite(file, **header):
    """The same tensors under a header with other entries."""
    with safe_open(file, framework="pt") as old:
        tensors = {name: old.get_tensor(name) for name in old.keys()}
        metadata = json.loads(old.metadata()["dpdiff"])
    save_file(tensors, file, metadata={"dpdiff": json.dumps(metadata | header)})


def test_round_trip_is_exact(model, file):
    loaded = dpdiff.load(file)
    assert type(loaded) is dpdiff.DPDiffAD and not loaded.training
    assert loaded.config == model.config
    weights, expected = loaded.state_dict(), model.state_dict()
    assert list(weights) == list(expected)
    for name in expected:
        assert weights[name].dtype == expected[name].dtype, name
        assert torch.equal(weights[name], expected[name]), name
    images = as_batch([striped(i) for i in range(3)])
    torch.testing.assert_close(loaded.predict(images), model.predict(images), rtol=0, atol=0)


def test_a_compiled_model_is_saved_as_itself_and_others_are_refused(model, file, tmp_path):
    dpdiff.save(torch.compile(model), tmp_path / "compiled.safetensors")
    assert (tmp_path / "compiled.safetensors").read_bytes() == file.read_bytes()
    with pytest.raises(TypeError, match="model is a Linear: expected one of DPDiffAD, DLSR"):
        dpdiff.save(torch.nn.Linear(2, 2), tmp_path / "linear.safetensors")


def test_saving_again_writes_the_same_bytes(file, tmp_path):
    dpdiff.save(dpdiff.load(file), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_prediction_is_the_same_in_another_process(model, file, tmp_path):
    images = as_batch([striped(i) for i in range(2)])
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch, dpdiff; torch.set_num_threads(1)\n"
        "out = dpdiff.load(sys.argv[1]).predict(torch.load(sys.argv[2], weights_only=True))\n"
        "torch.save(out.maps, sys.argv[3])"
    )
    arguments = [str(tmp_path / name) for name in ("m.safetensors", "images.pt", "maps.pt")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    maps = torch.load(tmp_path / "maps.pt", weights_only=True)
    torch.testing.assert_close(maps, model.predict(images).maps, rtol=0, atol=0)


def test_header_tells_class_configuration_and_version(model, file):
    header = read_header(file)
    assert header == {"model": "DPDiffAD", "config": model.config, "version": header["version"]}
    assert header["config"]["n_local"] == 16 and header["config"]["backbone"] == "test_resnet"
    assert header["version"] == version_of("dpdiff", "unknown")
    assert header["config"]["pretrained"] is False  # the file has the backbone's weights: nothing is downloaded


def test_every_option_of_a_model_is_restored(tiny, tmp_path):
    options = dict(
        layers=[1, 3], stride=16, max_channels=20, k=3, condition=False, prototype_attention=False, n_samples=3
    )
    model = tiny(**options)
    dpdiff.save(model, tmp_path / "m.safetensors")
    loaded = dpdiff.load(tmp_path / "m.safetensors")
    assert loaded.backbone.layers == (1, 3)
    images = as_batch([striped(0)])
    torch.testing.assert_close(loaded.predict(images), model.predict(images), rtol=0, atol=0)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights file .*none.safetensors does not exist"):
        dpdiff.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("read", [dpdiff.load, read_header])
def test_a_folder_is_told_from_a_missing_file(tmp_path, read):
    expected = rf"^{tmp_path} is a folder: expected a weights file such as {tmp_path}/model\.safetensors$"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"weights file .*none does not exist"):
        read(tmp_path / "none")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_file(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"weights file .*m.safetensors"):
        dpdiff.load(file)


@pytest.mark.parametrize("content", [b"not weights at all", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_file_of_something_else(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights file .*m.safetensors"):
        dpdiff.load(file)


def test_pickles_are_not_read(file):
    torch.save({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"damaged or no safetensors file"):
        dpdiff.load(file)


def test_safetensors_of_others(file):
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"was not written by dpdiff.save"):
        dpdiff.load(file)
    save_file({"weight": torch.zeros(3)}, file, metadata={"dpdiff": "{"})
    with pytest.raises(ValueError, match=r"was not written by dpdiff.save"):
        dpdiff.load(file)
    save_file({"weight": torch.zeros(3)}, file, metadata={"dpdiff": "[1, 2]"})
    with pytest.raises(ValueError, match=r"was not written by dpdiff.save"):
        dpdiff.load(file)


def test_other_class(file):
    rewrite(file, model="PatchCore")
    with pytest.raises(ValueError, match=r"holds a 'PatchCore': expected one of DPDiffAD"):
        dpdiff.load(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(n_local=17), r"tensor local_prototypes.bank is \(128, \d+\): expected \(136, \d+\)"),
        (dict(depth=2), r"tensor denoiser.blocks.1\.\S+ is none: expected \(\d+"),
        (dict(prototype_attention=False), r"tensor denoiser\.\S+ is \(\d.*: expected none"),
        (dict(new_option=1), r"unexpected keyword argument 'new_option'"),
        (dict(backbone="test_vit"), r"tensor backbone\.\S+ is none"),
        (dict(backbone="nope"), r"timm knows no model 'nope'"),
        (dict(backbone=5), r"backbone is 5: expected the name"),
        (dict(backbone=None), r"backbone is None: expected the name"),
        (dict(temperature="warm"), r"temperature is 'warm': expected a positive finite number"),
        (dict(timestep="late"), r"timestep is 'late': expected 0 to"),
    ],
    ids=str,
)
def test_file_of_another_version(file, change, reason):
    """One whose options or tensors this version doesn't know, or lacks."""
    config = read_header(file)["config"]
    rewrite(file, version="99.0", config=config | change)
    with pytest.raises(ValueError, match=reason) as raised:
        dpdiff.load(file)
    message = str(raised.value)
    assert "m.safetensors, written by dpdiff 99.0, does not fit this version: " in message and "\n" not in message


def test_what_the_header_says_brings_in_no_other_weights(file, monkeypatch):
    expected = dpdiff.load(file).state_dict()
    created = []
    monkeypatch.setattr("dpdiff.backbones._create_from_hub", lambda *args: created.append(args))
    monkeypatch.setattr("dpdiff.backbones._create_from_file", lambda *args: created.append(args))
    for change in (dict(pretrained=True), dict(backbone_weights="mine.safetensors")):
        rewrite(file, config=read_header(file)["config"] | change)
        loaded = dpdiff.load(file)
        assert not created and loaded.config["pretrained"] is False and loaded.config["backbone_weights"] is None
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [dict(config=None), dict(config=[1]), dict(model=["DPDiffAD"]), dict(model={}), dict(model=None)],
    ids=str,
)
def test_headers_of_another_form(file, change):
    rewrite(file, **change)
    for read in (dpdiff.load, read_header):
        with pytest.raises(ValueError, match=r"m.safetensors was not written by dpdiff.save"):
            read(file)


def test_header_without_a_configuration(file):
    save_file({"weight": torch.zeros(3)}, file, metadata={"dpdiff": '{"model": "DPDiffAD"}'})
    with pytest.raises(ValueError, match=r"m.safetensors was not written by dpdiff.save"):
        dpdiff.load(file)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(model, file, monkeypatch):
    before = file.read_bytes()

    def disk_full(path, data):
        with open(path, "wb") as part:
            part.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        dpdiff.save(model, file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_saving_a_model_in_training_keeps_its_mode(model, tmp_path):
    model.train()
    dpdiff.save(model, tmp_path / "m.safetensors")
    assert model.training
