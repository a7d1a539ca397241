"""Training on features: it learns, stops and goes on, and refuses what is not its own."""

import csv
import os
import signal

import pytest
import torch
from stripes import as_batch, striped

import dpdiff
from dpdiff import training
from dpdiff.training import train

STEPS = 12


@pytest.fixture
def run(tiny, products, tmp_path):
    """Trains a small model in `tmp_path/name` and returns it."""

    def run(name="out", n=20, **options):
        model = options.pop("model", None) or tiny()
        settings = dict(max_steps=STEPS, batch_size=4, accelerator="cpu", precision="32-true", checkpoint_interval=4)
        return train(model, products(n), tmp_path / name, **settings | options)

    return run


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses(folder):
    with open(folder / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_writes_weights_a_checkpoint_and_the_losses(run, tmp_path):
    model = run()
    assert not model.training
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "last.ckpt", "metrics.csv"} <= names
    loaded = dpdiff.load(tmp_path / "out" / "model.safetensors")
    assert_same(weights(loaded), weights(model))
    images = as_batch([striped(i) for i in range(2)])
    torch.testing.assert_close(loaded.predict(images), model.predict(images), rtol=0, atol=0)


def test_the_loss_falls(run, tmp_path):
    run(max_steps=120, lr=3e-3, checkpoint_interval=1000)
    history = losses(tmp_path / "out")
    assert len(history) == 12  # every tenth step
    assert sum(history[-3:]) < 0.8 * sum(history[:3])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_of_few_steps_are_written_too(run, tmp_path, accumulate):
    run(max_steps=3, accumulate=accumulate, checkpoint_interval=1000)
    assert losses(tmp_path / "out")
    assert not (tmp_path / "out" / "last.ckpt").exists()  # there is nothing to go on with


def test_only_what_is_learnt_changes(run, tiny):
    before, after = weights(tiny()), weights(run())
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"tokenizer", "local_prototypes", "global_prototypes", "denoiser", "normal_errors"}
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone"))


def test_same_seed_same_weights(run):
    first = weights(run("a", seed=3))
    assert_same(weights(run("b", seed=3)), first)
    other = weights(run("c", seed=4))
    assert any(not torch.equal(other[name], first[name]) for name in first)


class Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Lets training raise an exception before a step, as a kill would end it there."""

    def arrange(step, how):
        original = training.Training.training_step

        def training_step(self, *args):
            if self.global_step == step:
                monkeypatch.setattr(training.Training, "training_step", original)
                how()
            return original(self, *args)

        monkeypatch.setattr(training.Training, "training_step", training_step)

    return arrange


def die():
    raise Stop


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(run, stop_after, tmp_path):
    stop_after(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run("cut", checkpoint_interval=2)
    assert (tmp_path / "cut" / "last.ckpt").is_file()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    run("cut", checkpoint_interval=2)
    assert (tmp_path / "cut" / "model.safetensors").exists()


@pytest.mark.parametrize("options", [dict(), dict(num_workers=1)])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(run, tiny, stop_after, options):
    expected = weights(run("whole", model=tiny()))
    stop_after(7, die)
    with pytest.raises(Stop):
        run("cut", model=tiny(), **options)
    assert_same(weights(run("cut", model=tiny(), **options)), expected)


def test_a_killed_run_of_dlsr_ends_with_the_same_weights(run, stop_after):
    def model():
        torch.manual_seed(0)
        return dpdiff.DLSR("test_resnet", pretrained=False, image_size=64, hidden=32, depth=2, score="lr")

    expected = weights(run("whole", model=model()))
    stop_after(7, die)
    with pytest.raises(Stop):
        run("cut", model=model())
    assert_same(weights(run("cut", model=model())), expected)


def test_accumulated_batches_make_the_step_of_one_batch(run, tiny):
    """But for the transport, which is of the images of a batch."""
    whole = weights(run("whole", model=tiny(ot_weight=0.0)))
    halves = weights(run("halves", model=tiny(ot_weight=0.0), batch_size=2, accumulate=2))
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-2, atol=1e-3, msg=name)


def test_compiled_training_learns_the_same(run, tiny, monkeypatch):
    """Traced whole, forward and backward; generating code of that takes minutes and is torch's to test."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager", fullgraph=True))
    plain = weights(run("plain", model=tiny(), max_steps=4))
    compiled = weights(run("compiled", model=tiny(), max_steps=4, compile=True))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_finished_run_is_not_trained_again(run):
    first = weights(run())
    assert_same(weights(run()), first)


def test_resume_false_starts_anew(run, tmp_path):
    expected = weights(run("a", seed=1))
    run("b", seed=2)
    assert_same(weights(run("b", seed=1, resume=False)), expected)


OTHER_RUNS = {
    "model": (dict(model=dict(dim=48)), r"dim 24 \(now 48\)"),
    "prototypes": (dict(model=dict(n_local=17)), r"n_local 16 \(now 17\)"),
    "scores": (dict(model=dict(local_weight=0.5)), r"local_weight 0.25 \(now 0.5\)"),
    "backbone": (dict(model=dict(backbone="test_efficientnet")), r"backbone test_resnet \(now test_efficientnet\)"),
    "images": (dict(n=19), r"images \w+ \(now \w+\)"),
    "seed": (dict(seed=1), r"seed 0 \(now 1\)"),
    "steps": (dict(max_steps=2 * STEPS), rf"max_steps {STEPS} \(now {2 * STEPS}\)"),
    "fewer steps": (dict(max_steps=4), rf"max_steps {STEPS} \(now 4\)"),
    "batches": (dict(batch_size=2, accumulate=2), r"batch_size 4 \(now 2\), accumulate 1 \(now 2\)"),
}


@pytest.mark.parametrize(("options", "difference"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(run, tiny, tmp_path, options, difference):
    run()
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"last\.ckpt is of another run, .*{difference}"):
        run(**options | ({"model": tiny(**options["model"])} if "model" in options else {}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zeros", "a pickle", "of something else"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, damage):
    run()
    checkpoint = tmp_path / "out" / "last.ckpt"
    content = {"cut": checkpoint.read_bytes()[:1000], "empty": b"", "text": b"not a checkpoint\n", "zeros": bytes(5000)}
    if damage in content:
        checkpoint.write_bytes(content[damage])
    else:
        torch.save({"weights": torch.zeros(3)} if damage == "of something else" else [object()], checkpoint)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or of another version: remove it, or don't resume$"):
        run()


def test_no_samples(tiny, tmp_path):
    with pytest.raises(ValueError, match="samples is empty"):
        train(tiny(), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_a_batch(run):
    model = run(n=3, batch_size=16, max_steps=3)
    assert model.predict(as_batch([striped(0)])).scores.isfinite().all()


def test_random_numbers_of_the_caller_do_not_matter(run):
    torch.manual_seed(5)
    first = weights(run("a"))
    torch.manual_seed(6)
    assert_same(weights(run("b")), first)


@pytest.mark.parametrize(
    "options",
    [dict(max_steps=0), dict(batch_size=0), dict(checkpoint_interval=0), dict(lr=-1.0), dict(lr=float("inf"))],
)
def test_arguments_out_of_range_are_refused_before_any_work(tiny, products, tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {options[name]}"):
        train(tiny(), products(2), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
