"""Results of a run: assembled, saved as JSON, shown as a table, and compared with those of another run.

Times of two runs are never compared. What is kept from one to the next are ratios between a rival and us in one run.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

import dpdiff_kernels as dk
from benchmarks.contenders import OURS
from benchmarks.limits import Limits

RIVALS = ("faiss-cpu", "flash-kmeans", "flash-sinkhorn", "geomloss", "POT", "pykeops", "scikit-learn", "triton")


@dataclass(frozen=True)
class Work:
    """Operations of matrix products of `dtype`, and bytes moved, that a case can't do without; 0 where not stated."""

    flops: float
    bytes: float
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """operator: of the file bench_<operator>.py. seconds: the median of a contender's rounds. ratio: of a rival, its
    seconds over ours in alternating rounds. memory: peak bytes of a call, see `peak_memory`. yardstick and sweep: see
    `contenders` and the fixture `measure`."""

    operator: str
    case: str
    contender: str
    seconds: float
    ratio: float | None
    memory: int | None
    work: Work
    yardstick: bool = False
    sweep: tuple[str, str, int] | None = None


@dataclass
class Record:
    """What a run gathers. skipped: operator and contender, or the test that failed, -> reason."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    limits: Limits | None = None


def assemble(record: Record, limits: Limits, command: Sequence[str]) -> dict:
    """The results as they are saved: `cases`, each with seconds, ratios (theirs / ours) and memory by contender."""
    cases: dict[tuple[str, str], dict] = {}
    for m in record.measurements:
        new = {"operator": m.operator, "case": m.case, "seconds": {}, "ratios": {}, "memory": {}, "yardsticks": []}
        case = cases.setdefault((m.operator, m.case), new)
        case["seconds"][m.contender] = m.seconds
        if m.ratio is not None:
            case["ratios"][m.contender] = m.ratio
        if m.memory is not None:
            case["memory"][m.contender] = m.memory
        if m.yardstick:
            case["yardsticks"].append(m.contender)
        if m.sweep is not None:
            case["sweep"] = list(m.sweep)
        if m.work.flops or m.work.bytes:
            case |= asdict(m.work) | {"floor": limits.floor(m.work.flops, m.work.bytes, m.work.dtype)}
            if m.contender == OURS:
                case["share"] = case["floor"] / m.seconds
    return {
        "date": now(),
        "command": shlex.join(map(str, command)),
        "machine": machine(),
        "limits": asdict(limits),
        "cases": list(cases.values()),
        "skipped": record.skipped,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, str]:
    """`show_config` as a dictionary, with the processor's caches and the versions of the rivals that are installed."""
    with contextlib.redirect_stdout(io.StringIO()):
        lines = dk.show_config().splitlines()
    found = dict(line.split("  ", 1) for line in lines)
    found["caches"] = _caches()
    for name in RIVALS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {name.strip(): value.strip() for name, value in found.items()}


def machine_name(about: dict[str, str]) -> str:
    """Of what `machine` tells: the GPU, or the processor with the instructions that ours use of it."""
    instructions = re.search(r", \w+ instructions", about.get("backend cpp", ""))
    return about.get("cuda:0") or about["processor"] + (instructions[0] if instructions else "")


def _caches() -> str:
    """Of the first core, "L1 32K, L2 1024K, L3 32768K", where Linux tells."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
            found += [f"L{level} {size}"] if kind != "Instruction" else []
    return ", ".join(found) or "unknown"


def save(results: dict | list, path: str | os.PathLike) -> None:
    """As JSON, whole or not at all; the folder is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by dpdiff's own helper: importing the package takes all that its models need, which benchmarks of operators do
    # without.
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: str | os.PathLike) -> dict:
    """The results of a file, or of all files of a folder, as of the last of them, with the cases of all.

    Raises FileNotFoundError, and ValueError for what `save` didn't write.
    """
    if Path(path).is_dir():
        files = [one for one in map(_read, sorted(Path(path).glob("*.json"))) if "cases" in one]  # not studies
        if not files:
            raise FileNotFoundError(f"{path} holds no .json file of benchmarks")
        return files[-1] | {
            "cases": [case for one in files for case in one["cases"]],
            "skipped": {name: reason for one in files for name, reason in one["skipped"].items()},
        }
    found = _read(path)
    if "cases" not in found:
        raise ValueError(f"{path} holds no benchmark results: expected what --json writes")
    return found


def _read(path: str | os.PathLike) -> dict:
    """What a run or a study has saved."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & {"cases", "study"}:
        raise ValueError(f"{path} holds no benchmark results: expected what --json writes")
    return found


def table(results: dict) -> str:
    """Every case: times, how much faster than each rival we are, peak memory, and the share of the machine's limit."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("case", "left"), ("contender", "left"), ("time", "right"), ("ratio", "right")):
        rows.add_column(name, justify=justify, overflow="fold")
    rows.add_column("memory", justify="right")
    rows.add_column("of the limit", justify="right")
    for case in results["cases"]:
        for i, (contender, seconds) in enumerate(case["seconds"].items()):
            ratio, memory = (case[name].get(contender) for name in ("ratios", "memory"))
            share = f"{case['floor'] / seconds:.0%}" if "floor" in case else ""
            title = f"{case['operator']}: {case['case']}" if i == 0 else ""
            ratio = "" if ratio is None else f"{ratio:.2f}"
            rows.add_row(title, contender, milliseconds(seconds), ratio, megabytes(memory), share)
        rows.add_section()
    limits = results["limits"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits["flops"].items())
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(rows)
    console.print(f"Limits of {limits['device']}, {limits['threads']} threads: {rates}, copy", end=" ")
    console.print(f"{limits['bandwidth'] / 1e9:,.1f} GB/s. A ratio above 1: so many times as slow as dpdiff.")
    for name, reason in results["skipped"].items():
        console.print(f"Skipped: {name}: {reason}")
    return text.getvalue()


def milliseconds(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3))) if seconds > 0 else 0
    return f"{seconds * 1e3:,.{min(digits, 4)}f} ms"


def megabytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.{0 if n_bytes >= 1e7 else 1}f} MB"


@dataclass(frozen=True)
class Change:
    """A rival's ratio in two runs of one case; `now` is None where this run has none."""

    case: str
    rival: str
    before: float
    now: float | None

    def regressed(self, threshold: float) -> bool:
        return self.now is not None and self.now < self.before * (1 - threshold)


def compare(results: dict, stored: dict) -> list[Change]:
    """Every ratio that `stored` has, beside the one of `results`."""
    now = {(c["operator"], c["case"]): c["ratios"] for c in results["cases"]}
    return [
        Change(f"{c['operator']}: {c['case']}", rival, ratio, now.get((c["operator"], c["case"]), {}).get(rival))
        for c in stored["cases"]
        for rival, ratio in c["ratios"].items()
    ]


def comparison_table(changes: Sequence[Change], threshold: float) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("case", "rival"):
        rows.add_column(name, overflow="fold")
    for name in ("stored", "now", "change"):
        rows.add_column(name, justify="right")
    for change in changes:
        if change.now is None:
            rows.add_row(change.case, change.rival, f"{change.before:.2f}", "not measured", "")
        else:
            style = "red" if change.regressed(threshold) else None
            difference = f"{change.now / change.before - 1:+.0%}"
            ratios = (f"{change.before:.2f}", f"{change.now:.2f}")
            rows.add_row(change.case, change.rival, *ratios, difference, style=style)
    return rows
