"""`dpdiff export`: the program gives what the model gives."""

import subprocess
import sys

import pytest
import torch

import dpdiff as package
from dpdiff.export import export


@pytest.fixture(scope="session")
def images():
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("operators", ["--portable", "--fused"])
def test_the_program_gives_what_the_model_gives_for_any_batch(dpdiff, weights, tmp_path, images, operators):
    file = tmp_path / "programs" / "detector.pt2"
    outcome = dpdiff("export", "--weights", weights, "--out", file, operators)
    assert outcome.code == 0, outcome.err
    assert str(file) in outcome.out
    program, model = torch.export.load(file).module(), package.load(weights)
    for batch in (images, images[:1]):
        out, expected = program(batch), model.predict(batch)
        torch.testing.assert_close(out["scores"], expected.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out["maps"], expected.maps, rtol=1e-4, atol=1e-4)


def test_a_portable_program_runs_without_this_package(dpdiff, weights, tmp_path, images):
    file, data = tmp_path / "detector.pt2", tmp_path / "images.pt"
    assert dpdiff("export", "--weights", weights, "--out", file).code == 0
    torch.save(images, data)
    code = (
        "import sys, torch\n"
        "out = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))\n"
        "assert not any(name.partition('.')[0] in ('dpdiff', 'dpdiff_kernels', 'timm') for name in sys.modules)\n"
        "torch.save(out['scores'], sys.argv[2])"
    )
    # Away from the source tree, and with no package but torch and what it needs.
    done = subprocess.run([sys.executable, "-c", code, file, data], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(data), package.load(weights).predict(images).scores, rtol=1e-4, atol=1e-4)


def test_a_name_without_suffix_will_do_and_that_of_the_weights_not(dpdiff, weights, tmp_path, images):
    assert dpdiff("export", "--weights", weights, "--out", tmp_path / "detector").code == 0
    assert "scores" in torch.export.load(tmp_path / "detector").module()(images)
    before = weights.read_bytes()
    outcome = dpdiff("export", "--weights", weights, "--out", weights)
    assert outcome.code == 2 and f"--out {weights} is the file of --weights too" in outcome.error
    assert weights.read_bytes() == before


def test_a_program_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    model = package.load(weights)
    file = tmp_path / "detector.pt2"
    predict, calls = model.predict, []

    def drift(images):
        calls.append(1)
        out = predict(images)
        return out._replace(scores=out.scores * (1 + 0.01 * (len(calls) - 1)))  # as traced at the first call

    monkeypatch.setattr(model, "predict", drift)
    with pytest.raises(RuntimeError, match="scores are off"):
        export(model, file)
    assert not list(tmp_path.iterdir())


def test_a_detector_without_maps(tmp_path):
    model = package.DLSR(pretrained=False, image_size=64).eval()
    export(model, tmp_path / "dlsr.pt2")
    program = torch.export.load(tmp_path / "dlsr.pt2").module()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    out = program(images)
    assert list(out) == ["scores"]
    torch.testing.assert_close(out["scores"], model.predict(images).scores, rtol=1e-3, atol=1e-5)
