"""The embedded data set: procedurally rendered product categories, as many as asked for."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from PIL import Image

from dpdiff._files import atomic_folder, user_cache
from dpdiff._progress import track
from dpdiff.data.products.category import Category

_VERSION = 1  # of the pixels; those of another are not used
_STALE = 3600.0  # seconds after which what a killed run left behind may go


class Products:
    """Product categories rendered into a folder of the MVTec AD layout, once; the next time they are there.

    Fasteners, electronics, packages, textiles, tiles and more, ``n_categories`` of them. Within a category pose, light,
    exposure, noise and the grain of materials vary; test images are good or show one of four of the seven kinds of
    defect (scratch, crack, stain, missing_part, deformation, wrong_texture, foreign_object), from barely visible to
    obvious, with an exact mask.

    Args:
        first: the number of the first of the categories: those of 40 from 120 on are none of 120 from 0 on.
        seed: of everything: the same seed gives the same pixels on any machine. Category i of a seed is the same
            whatever ``n_categories`` is, and image j of a category however many there are.
        root: where to keep the images; by default ``products`` in the user's cache folder (``DPDIFF_CACHE``, else
            ``dpdiff`` in ``XDG_CACHE_HOME``, else in ``~/.cache``).
        size: side of the images in pixels.
        n_train, n_good, n_defective: good training images, good test images and defective ones per category.
        workers: processes that render; by default as many as there are processors.
        progress: show a progress bar where standard error is a terminal.

    Attributes: ``root``, the folder that holds exactly these categories; ``categories``, their names.

    A category takes a processor core about a second and 3 MB of disk; an interrupted run goes on where it stopped.

    Raises ValueError for a number out of range, and OSError where the folder can't be written.
    """

    def __init__(
        self,
        n_categories: int = 160,
        seed: int = 0,
        root: str | os.PathLike | None = None,
        *,
        first: int = 0,
        size: int = 256,
        n_train: int = 16,
        n_good: int = 8,
        n_defective: int = 8,
        workers: int | None = None,
        progress: bool = True,
    ):
        counts = {"n_train": n_train, "n_good": n_good, "n_defective": n_defective}
        least = {"n_categories": (n_categories, 1), "first": (first, 0), "seed": (seed, 0), "size": (size, 32)}
        least |= {name: (count, 1) for name, count in counts.items()}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} is {value}: expected at least {low}")
        folder = Path(root) if root is not None else user_cache() / "products"
        folder = folder / "-".join(map(str, (f"v{_VERSION}", f"seed{seed}", f"{size}px", *counts.values())))
        store = folder / "all"
        store.mkdir(parents=True, exist_ok=True)
        _remove_stale(store)
        self.categories = [Category(seed, index).name for index in range(first, first + n_categories)]
        jobs = [
            (seed, index, store / name, size, tuple(counts.values()))
            for index, name in enumerate(self.categories, first)
            if not (store / name).is_dir()
        ]
        rendered = _in_processes(jobs, min(len(jobs), workers or _processors()))
        for _ in track(rendered, "Rendering products", len(jobs), progress and bool(jobs)):
            pass
        self.root = folder / (f"{first}-to-{first + n_categories}" if first else f"first-{n_categories}")
        _link(self.root, store, self.categories)


def render_category(seed: int, index: int, folder: Path, size: int, counts: tuple[int, int, int]) -> None:
    """Render a category into a folder that is there only when it is complete."""
    category = Category(seed, index)
    n_train, n_good, n_defective = counts
    with atomic_folder(folder) as temporary:
        for split, count in (("train", n_train), ("test", n_good)):
            for number in range(count):
                _save(category.good(split, number, size), temporary / split / "good" / f"{number:03d}.png")
        for number in range(n_defective):
            kind, image, mask = category.defective(number, size)
            _save(image, temporary / "test" / kind / f"{number:03d}.png")
            _save(mask.astype(np.uint8) * 255, temporary / "ground_truth" / kind / f"{number:03d}_mask.png")


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)  # noise doesn't compress, however long one tries


def _in_processes(jobs: Sequence[tuple], workers: int) -> Iterator[None]:
    """Yield whenever a category is complete.

    Plain processes with a share of the work each rather than a pool, whose workers outlive a killed parent for ever.
    """
    if workers < 2:
        for job in jobs:
            render_category(*job)
            yield
        return
    # Forked where that is safe enough (a child runs nothing but NumPy and zlib), to spare it the import of torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = {}
    try:
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, os.getpid(), jobs[worker::workers]), daemon=True)
            process.start()
            sender.close()
            processes[receiver] = process
        running = dict(processes)
        while running:
            for receiver in wait(list(running)):
                try:
                    error = receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(
                            f"a process that renders was killed (exit code {process.exitcode})"
                        ) from None
                    continue
                if error is not None:
                    raise error
                yield
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _work(sender: Connection, parent: int, jobs: Sequence[tuple]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends this process, tidily
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # glibc hands freed arrays of this size back to the system, and takes them anew page by page, until it has seen
    # a larger one freed: a third of the time of rendering.
    np.empty(2**25 - 2**13, np.uint8)
    try:
        for job in jobs:
            if os.getppid() != parent:
                return
            render_category(*job)
            sender.send(None)
    except Exception as error:
        sender.send(error)


def _link(root: Path, store: Path, names: Sequence[str]) -> None:
    """Make a folder with links to the named categories of the store."""
    if root.is_dir() and sorted(os.listdir(root)) == sorted(names):
        return
    shutil.rmtree(root, ignore_errors=True)
    with atomic_folder(root) as temporary:
        for name in names:
            (temporary / name).symlink_to(Path("..", store.name, name), target_is_directory=True)


def _remove_stale(store: Path) -> None:
    for left in store.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # a process beside this one may have just finished it
            if left.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(left, ignore_errors=True)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
