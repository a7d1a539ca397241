"""Figures of results: cases beside the machine's limits, and times as sizes grow; each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.contenders import OURS
from benchmarks.results import machine_name

matplotlib.use("Agg")
plt.rcParams["svg.hashsalt"] = "dpdiff"  # the same figure is the same file


def roofline(cases: Sequence[dict], run: dict, stem: Path) -> None:
    """Our rate in every case over its operations per byte, under the roof of each data type."""
    shown = [case for case in cases if case.get("flops") and case.get("bytes") and "sweep" not in case]
    shown = [case for case in shown if OURS in case["seconds"]]
    if not shown:
        return
    limits = run["limits"]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    intensity = {id(case): case["flops"] / case["bytes"] for case in shown}
    reach = np.geomspace(min(intensity.values()) / 2, max(intensity.values()) * 2, 200)
    for dtype, style in zip(dict.fromkeys(case["dtype"] for case in shown), ("-", "--", ":")):
        roof = np.minimum(limits["flops"][dtype], limits["bandwidth"] * reach)
        axis.plot(reach, roof / 1e9, "k" + style, linewidth=1, label=f"limit, {dtype}")
    for color, operator in enumerate(dict.fromkeys(case["operator"] for case in shown)):
        for dtype, marker in (("float32", "o"), ("bfloat16", "^"), ("float16", "s")):
            of_these = [case for case in shown if (case["operator"], case["dtype"]) == (operator, dtype)]
            x = [intensity[id(case)] for case in of_these]
            y = [case["flops"] / case["seconds"][OURS] / 1e9 for case in of_these]
            if of_these:
                axis.plot(x, y, marker, color=f"C{color}", alpha=0.8, label=f"{operator}, {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axis.set_title(f"{machine_name(run['machine'])}, {run['date'][:10]}", fontsize="medium")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3, which="both")
    save(figure, stem)


def growing(cases: Sequence[dict], stem: Path) -> None:
    """A panel per operator and axis, a line per contender and one for the limit. A rival's time is ours times their
    ratio: the times that were measured are minutes apart, in which a machine's speed drifts."""
    shown = [case for case in cases if "sweep" in case]
    if not shown:
        return
    rows, columns = ([*dict.fromkeys(case["sweep"][i] for case in shown)] for i in (0, 1))
    size = (3.4 * len(columns), 2.6 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained", squeeze=False)
    for i, operator in enumerate(rows):
        for j, along in enumerate(columns):
            axis, of_these = axes[i][j], [case for case in shown if case["sweep"][:2] == [operator, along]]
            places = [case["sweep"][2] for case in of_these]
            for name in dict.fromkeys(name for case in of_these for name in case["seconds"]):
                ratios = [1.0 if name == OURS else case["ratios"].get(name, np.nan) for case in of_these]
                times = [1e3 * case["seconds"][OURS] * ratio for case, ratio in zip(of_these, ratios)]
                axis.plot(places, times, "o-", label=name)
            if along != "threads":  # the limit is of all of them
                axis.plot(places, [1e3 * case["floor"] for case in of_these], "k:", label="limit")
            axis.set(xscale="log", yscale="log", xlabel=along)
            axis.set_xticks(places, [f"{place:,}" for place in places])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[i][0].set_ylabel(f"{operator}, ms")
    axes[0][0].legend(fontsize="small")
    save(figure, stem)


def save(figure: plt.Figure, stem: Path) -> None:
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{stem}.png", dpi=120, metadata={"Software": None})
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    plt.close(figure)
