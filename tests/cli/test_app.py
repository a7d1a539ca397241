"""What all commands have in common: help, exit codes, one line per error."""

import errno
import json
import os
import subprocess
import sys

import pytest

import dpdiff as package
from dpdiff import evaluation

COMMANDS = ("train", "evaluate", "predict", "export", "bench", "demo", "info")


def test_help_lists_every_command_with_an_example_each(dpdiff):
    listed = dpdiff("--help")
    assert listed.code == 0 and not listed.err
    for command in COMMANDS:
        assert f" {command} " in listed.out
        help = dpdiff(command, "--help")
        assert help.code == 0
        assert f"dpdiff {command} " in help.out.partition("Example:")[2]


def test_without_arguments_it_prints_the_help(dpdiff):
    assert dpdiff().out == dpdiff("--help").out


def test_help_loads_nothing_heavy():
    """The commands' modules, that is; what `import dpdiff` itself loads is left out."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('dpdiff')\n"
        "package.__path__ = importlib.util.find_spec('dpdiff').submodule_search_locations\n"
        "sys.modules['dpdiff'] = package\n"
        "from dpdiff.cli import main\n"
        "code = main(['--help'])\n"
        "assert not {'torch', 'numpy', 'timm', 'matplotlib', 'dpdiff_kernels'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout


def test_version(dpdiff):
    from importlib.metadata import version

    assert dpdiff("--version").out == f"dpdiff {version('dpdiff')}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], "trian"),
        (["train", "--data", "x"], "--out"),
        (["train", "--data", "x", "--out", "y", "--steps", "0"], "--steps"),
        (["train", "--data", "x", "--out", "y", "--model", "patchcore"], "dpdiff-ad"),
        (["train", "--data", "x", "--out", "y", "--step", "3"], "--step"),
        (["predict", "--weights", "x", "--out", "y"], "IMAGE_OR_FOLDER"),
        (["predict", "", "--weights", "x", "--out", "y"], "nothing is given after predict"),
        (["predict", "x", "--weights", "x", "--out="], "nothing is given after --out="),
        (["train", "--data", "", "--out", "y"], "nothing is given after --data"),
    ],
)
def test_misuse_is_one_line_and_code_2(dpdiff, arguments, named):
    outcome = dpdiff(*arguments)
    assert outcome.code == 2
    assert named in outcome.error


def test_a_failure_is_one_line_and_code_1_and_debug_shows_where(dpdiff, data, weights, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the flux is exhausted\nand more")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    arguments = ("evaluate", "--data", data, "--weights", weights)
    outcome = dpdiff(*arguments)
    assert outcome.code == 1
    assert "the flux is exhausted" in outcome.error and "RuntimeError" in outcome.error

    debugged = dpdiff("--debug", *arguments)
    assert debugged.code == 1
    assert "Traceback" in debugged.err and 'raise RuntimeError("the flux' in debugged.err
    assert debugged.err.splitlines()[-1] == outcome.error


def test_a_value_error_of_a_library_is_not_blamed_on_the_user(dpdiff, data, weights, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: json.loads("{"))  # raises deep in json
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights)
    assert outcome.code == 1 and "not your mistake" in outcome.error


def test_ctrl_c_is_one_line_and_code_130(dpdiff, weights, data, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights)
    assert outcome == (130, "", "dpdiff: interrupted\n")


def test_an_end_of_file_is_no_ctrl_c(dpdiff, weights, data, monkeypatch):
    def end(*args, **kwargs):
        raise EOFError("Ran out of input")

    monkeypatch.setattr(evaluation, "evaluate", end)
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights)
    assert outcome.code == 1 and "dpdiff: error: Ran out of input (EOFError" in outcome.err


def test_a_closed_pipe_is_silent():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", "dpdiff", "train", "--help"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE)
    assert b"interrupted" not in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, os.strerror(errno.EIO))],
)
@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_full_or_broken_disk_is_one_line_and_code_1(
    dpdiff, data, weights, tmp_path, monkeypatch, number, message, option
):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)  # where a file system that allots late reports it
    file = tmp_path / "result"
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights, option, file)
    assert outcome.code == 1
    assert message in outcome.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--json", "--weights", "--data"])
def test_a_name_too_long_is_the_users_error(dpdiff, data, weights, tmp_path, option):
    given = {"--data": data, "--weights": weights, option: tmp_path / ("x" * 300)}
    outcome = dpdiff("evaluate", *(part for pair in given.items() for part in pair))
    assert outcome.code == 2 and "x" * 300 in outcome.error


def test_a_link_in_circles_is_the_users_error(dpdiff, data, weights, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: (tmp_path / "loop").read_text())
    outcome = dpdiff("evaluate", "--data", data, "--weights", weights)
    assert outcome.code == 2 and str(tmp_path / "loop") in outcome.error


def test_info_shows_the_machine_and_every_option(dpdiff):
    text = dpdiff("info").out
    for part in ("torch", "backend cpp", "timm", "image_size", "n_local", "300 to 2000", "1200"):
        assert part in text


def test_info_shows_what_a_weights_file_holds(dpdiff, weights):
    header = json.loads(dpdiff("info", "--weights", weights).out)
    assert header["model"] == "DPDiffAD"
    assert header["config"] == package.load(weights).config


@pytest.mark.parametrize("command", ["info", "evaluate", "predict", "export"])
def test_weights_that_are_none_are_refused(dpdiff, data, weights, tmp_path, command):
    import safetensors.torch
    import torch

    whole = weights.read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.safetensors").write_bytes(whole[:100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "foreign.safetensors")
    header = {"dpdiff": '{"model": ["DPDiffAD"], "config": {}}'}
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "header.safetensors", metadata=header)
    torch.save({"weight": torch.ones(3)}, tmp_path / "pickle.pt")
    (tmp_path / "folder").mkdir()
    files = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    rest = {
        "info": [],
        "evaluate": ["--data", data, "--json", out],
        "predict": [data / "bolt", "--out", out],
        "export": ["--out", out],
    }[command]
    for file in (*files, tmp_path / "missing.safetensors"):
        outcome = dpdiff(command, *rest, "--weights", file)
        assert outcome.code == 2, file
        assert file.name in outcome.error
        assert not out.exists()
