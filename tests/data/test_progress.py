"""A bar is seen where somebody looks, and nowhere else."""

import io
import sys

import pytest

from dpdiff._progress import track


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_bar_on_a_terminal_where_it_is_wanted(terminal, wanted, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(track(iter("abc"), "Counting", 3, wanted)) == ["a", "b", "c"]
    text = stderr.getvalue()
    assert ("Counting" in text and "3/3" in text) if terminal and wanted else not text
    assert not capsys.readouterr().out
