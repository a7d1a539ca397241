"""What the README, docs/ and examples/ show runs as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dpdiff.cli.app import app

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
SKETCHES = ["docs/benchmarking.md"]  # whose Python is to be filled in
BLOCKS = [
    pytest.param(code, id=f"{name}-{i}")
    for name, text in PAGES.items()
    if name not in SKETCHES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = sorted(set(re.findall(r"^dpdiff ([a-z].*?)(?: +#.*)?$", "\n".join(PAGES.values()), re.MULTILINE)))


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_the_pages(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "a page", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_pages_are_understood(line):
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
