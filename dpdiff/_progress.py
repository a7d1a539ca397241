"""The one progress bar, which all that takes its time shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def track(items: Iterable[Any], description: str, total: int | None = None, wanted: bool = True) -> Iterator[Any]:
    """Yield the items under a bar on standard error, where that is a terminal; it goes with the last of them.

    total: how many there are, where they don't know. Whoever keeps the iterator beyond its loop has to close it, for
    an error would leave the bar there as long as its traceback.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        yield from bar.track(items, total=total, description=description)
