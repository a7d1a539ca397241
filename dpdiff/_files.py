"""Files and folders that are either whole or not there, and where those go that can be made again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of a temporary file that takes the name ``path`` once the block ends well.

    The temporary file is empty, lies in the folder of ``path`` (made if missing) and keeps its suffix, from which
    many writers tell the format. It is flushed to disk before it is renamed, so that ``path`` holds either what it
    held before or all of the new content, whatever happens in between; an exception in the block removes it.

        with atomic_write("scores.csv") as tmp:
            tmp.write_text(...)

    A device or pipe, such as /dev/stdout, has no old content to keep and mustn't be replaced: it is yielded itself.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))  # through a symbolic link: its target is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{secrets.token_hex(8)}{path.suffix or '.part'}")  # torch.export wants a suffix
    os.close(os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the permissions of an ordinary new file
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of a temporary folder that takes the name ``path`` once the block ends well.

    The temporary folder is empty, hidden, and lies in the folder of ``path`` (made if missing). An exception in the
    block removes it, and so does a folder ``path`` that another process has finished meanwhile, which stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    tmp.mkdir()  # not by tempfile, whose folders nobody else may read
    try:
        yield tmp
        try:
            os.replace(tmp, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write content as JSON, whole or not at all. Raises ValueError for NaN and infinity, which JSON doesn't have."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def user_cache() -> Path:
    """`DPDIFF_CACHE`, else `dpdiff` in `XDG_CACHE_HOME`, else in `~/.cache`."""
    if "DPDIFF_CACHE" in os.environ:
        return Path(os.environ["DPDIFF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpdiff"
