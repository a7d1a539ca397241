"""`dpdiff bench`: the benchmarks of the source tree."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpdiff.cli.inputs import check_writable, find_device

bench = typer.Typer(rich_markup_mode="markdown", invoke_without_command=True)

Kind = Literal["cpu", "cuda"]
Device = Annotated[Kind, typer.Option(help="Where operands lie.")]
Json = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there.")]
Compare = Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="Results of --json whose ratios are to hold.")]
Threshold = Annotated[float, typer.Option(metavar="X", min=0, max=1, help="Loss of a ratio that --compare accepts.")]
Only = Annotated[str | None, typer.Option(metavar="EXPR", help="Which benchmarks, as for pytest -k.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the processor; all by default.")]
Budget = Annotated[float, typer.Option(metavar="S", min=0, help="Seconds of timing per contender.")]


@bench.callback()
def _bench(context: typer.Context) -> None:
    """Measure the operators and models beside their rivals, on this machine. Runs in a clone of the source tree.

    Example: `dpdiff bench ops --json before.json`, and after a change `dpdiff bench ops --compare before.json`
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def ops(
    device: Device = "cpu",
    json: Json = None,
    compare: Compare = None,
    threshold: Threshold = 0.2,
    only: Only = None,
    threads: Threads = None,
    budget: Budget = 1.0,
) -> None:
    """The operators beside PyTorch, faiss, scikit-learn, POT and others that are installed, and the machine's limits.

    With --compare, exits with 1 where a rival's time over ours fell by more than the threshold.

    Example: `dpdiff bench ops --only "nearest and 1024" --json nearest.json`
    """
    _run("ops", device, json, compare, threshold, only, threads, budget)


@bench.command()
def model(
    device: Device = "cpu",
    json: Json = None,
    compare: Compare = None,
    threshold: Threshold = 0.2,
    only: Only = None,
    threads: Threads = None,
    budget: Budget = 1.0,
) -> None:
    """Training steps and inference of the models, on the fast operators and on those in plain PyTorch.

    Example: `dpdiff bench model --compare benchmarks/results/2026-11-25-amd-epyc-avx2-2-threads/model.json`
    """
    _run("model", device, json, compare, threshold, only, threads, budget)


@bench.command()
def scaling(
    categories: Annotated[str, typer.Option(metavar="N,N,...", help="How many.")] = "10,20,40,80,160,320,1600",
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of training; the model's own by default.")
    ] = None,
    trained_up_to: Annotated[
        int, typer.Option(metavar="N", min=0, help="Train models of sizes up to N, for accuracy; or 0.")
    ] = 160,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(metavar="STEM", help="Write STEM.png and STEM.svg.")] = None,
) -> None:
    """Speed, memory and accuracy as categories grow, for DPDiff-AD on fast and plain operators and for unified k-NN.

    Example: `dpdiff bench scaling --categories 10,160 --trained-up-to 0 --json scaling.json`
    """
    numbers = [part.strip() for part in categories.split(",")]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"--categories is {categories!r}: expected positive numbers, 10,160")
    if json is not None:
        check_writable(json, "--json", folder=False)
    for suffix in () if plot is None else (".png", ".svg"):
        check_writable(Path(f"{plot}{suffix}"), "--plot", folder=False)
    command = [sys.executable, "-m", "benchmarks.scaling", "--categories", *numbers]
    command += [] if steps is None else ["--steps", str(steps)]
    command += ["--trained-up-to", str(trained_up_to)]
    command += [] if json is None else ["--json", str(json.absolute())]
    command += [] if plot is None else ["--plot", str(plot.absolute())]
    code = subprocess.run(command, cwd=source_tree()).returncode
    if code:
        raise RuntimeError(f"the study failed, see above: it ended with {code}")


def _run(
    suite: str,
    device: Kind,
    json: Path | None,
    compare: Path | None,
    threshold: float,
    only: str | None,
    threads: int | None,
    budget: float,
) -> None:
    root = source_tree()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("pytest-benchmark is not installed: pip install '.[bench]'")
    if json is not None:
        check_writable(json, "--json", folder=False)
    find_device(device)
    from benchmarks import results

    stored = None if compare is None else results.load(compare)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        command = [sys.executable, "-m", "pytest", root / "benchmarks" / suite, "-q", "--benchmark-columns=median,iqr"]
        command += [f"--device={device}", f"--budget={budget}", f"--results={file}", f"--rootdir={root}"]
        command += [] if only is None else ["-k", only]
        command += [] if threads is None else [f"--threads={threads}"]
        code = subprocess.run(command).returncode
        if code == 5:  # pytest's, for nothing to run
            raise ValueError(f"--only {only}: no benchmark of {suite} fits")
        if code:
            raise RuntimeError(f"benchmarks failed, see above: pytest ended with {code}")
        if not file.exists():
            raise ValueError(f"every benchmark of {suite} that was asked for was skipped, see above")
        found = results.load(file)
    shown = ["dpdiff", "bench", suite, "--device", device, "--budget", f"{budget:g}"]
    shown += [] if only is None else ["--only", only]
    found["command"] = shlex.join([*shown, *([] if threads is None else ["--threads", str(threads)])])
    if json is not None:
        results.save(found, json)
        print(f"Results: {json}")
    if stored is not None:
        _compare(found, stored, threshold)


def _compare(found: dict, stored: dict, threshold: float) -> None:
    from rich.console import Console

    from benchmarks import results

    changes = results.compare(found, stored)
    both = [change for change in changes if change.now is not None]
    if not both:
        raise ValueError("--compare: the stored results and these have no case in common")
    Console(width=None if sys.stdout.isatty() else 120).print(results.comparison_table(changes, threshold))
    before, now = (results.machine_name(run["machine"]) for run in (stored, found))
    if before != now:
        print(f"The stored results are of another machine: {before}; now {now}")
    lost = [change for change in both if change.regressed(threshold)]
    print(f"{len(both)} ratios compared, {len(lost)} fell by more than {threshold:.0%}")
    if lost:
        raise typer.Exit(1)


def source_tree() -> Path:
    """The clone that holds the benchmarks: this package's own, or the current folder; importable from here on."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / "benchmarks" / "conftest.py").is_file():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return root
    raise ValueError("the benchmarks are in the source tree: run dpdiff bench in a clone of it")
