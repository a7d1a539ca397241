"""What the README and examples/ show runs as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dpdiff.cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^dpdiff ([a-z].*?)(?: +#.*)?$", PAGES, re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_of_the_readme(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_readme_are_understood(line):
    name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    if name == "bench":
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)  # raises for an option that isn't there or a value it doesn't take


def test_example_of_the_operators():
    done = subprocess.run([sys.executable, ROOT / "examples/operators.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of the mass stays within its class" in done.stdout


def test_example_of_own_images(data, tmp_path):
    folders = [data / "bolt/train", data / "bolt/test"]
    command = [sys.executable, ROOT / "examples/own_images.py", *folders, "--steps", "2", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = [line.split()[-1] for line in done.stdout.splitlines()[1:]]
    assert ["hole" in path for path in ranked] == [True] * 3 + [False] * 3
