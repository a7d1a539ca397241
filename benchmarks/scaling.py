"""How cost and accuracy go as categories grow, for DPDiff-AD on the fast and the plain operators and for unified k-NN:

    python -m benchmarks.scaling --categories 10 20 40 80 160 --steps 600 --json scaling.json --plot scaling

Data are rendered products. Each model runs in a process of its own, whose peak memory is taken. Training images/s is of
steps on cached features, inference images/s of `predict`, backbone included; accuracy is of the whole test set and,
since categories differ in difficulty, of those that the smallest number has too (`_shared`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import dpdiff_kernels as dk
from benchmarks import results
from benchmarks.timing import best_time
from benchmarks.training_step import training_step
from dpdiff import DPDiffAD, training
from dpdiff.data import AnomalyDataset, scan
from dpdiff.data.products import Products
from dpdiff.evaluation import Results, evaluate

CATEGORIES = (10, 20, 40, 80, 160, 320, 1600)
MODELS = {"dpdiff": "auto", "reference operators": "reference", "unified k-NN": None}
FIGURES = ("image_auroc", "pixel_auroc", "aupro", "image_auroc_shared", "pixel_auroc_shared", "aupro_shared")
QUANTITIES = {"training": "training, images/s", "inference": "inference, images/s", "peak_memory": "peak memory, GiB"}
QUANTITIES |= {name: name.replace("_", " ") for name in FIGURES}
_BATCH = 16


def measure(model: str, n_categories: int, steps: int, shared: int) -> dict:
    """One model at one number of categories: its images/s, peak memory in bytes and, unless `shared` is 0, its accuracy
    on all of them and on the first `shared`."""
    catalogue = scan(Products(n_categories, progress=False).root, need="train")
    run = _knn if MODELS[model] is None else _dpdiff
    found = run(model, catalogue, steps, Products(shared, progress=False).categories if shared else [])
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": model, "categories": n_categories, **found, "peak_memory": 1024 * kibibytes}


def _dpdiff(model: str, catalogue, steps: int, shared: Sequence[str]) -> dict:
    with dk.use_backend(MODELS[model]), tempfile.TemporaryDirectory() as folder:
        detector = DPDiffAD(**DPDiffAD.suggest(len(catalogue.train)))
        training.train(detector, catalogue.train, folder, max_steps=steps, accelerator="cpu", progress=False)
        images = _images(catalogue.train, detector.image_size)
        found = {"inference": len(images) / best_time(lambda: detector.predict(images), "cpu", 2.0)}
        tokens = detector.tokenize(images).clone()
        detector.train()
        step = training_step(detector, tokens, training._best_precision("cpu") == "bf16-mixed")
        found["training"] = len(images) / best_time(step, "cpu", 2.0)
        return found | (_accuracy(detector.eval(), catalogue, detector.image_size, shared) if shared else {})


def _knn(model: str, catalogue, steps: int, shared: Sequence[str]) -> dict:
    from benchmarks import baseline_knn as knn

    size = 256
    features = knn.PatchFeatures(knn.Backbone(knn.DEFAULT_BACKBONE, None))
    banks = knn.build_banks(features, catalogue.train, catalogue.categories, size)
    parts = (torch.cat([getattr(bank, part) for bank in banks.values()]) for part in ("coreset", "samples"))
    detector = knn.PatchCore(features, knn.Bank(*parts))
    images = _images(catalogue.train, size)
    found = {"inference": len(images) / best_time(lambda: detector.predict(images), "cpu", 2.0)}
    return found | (_accuracy(detector, catalogue, size, shared) if shared else {})


def _images(samples: Sequence, size: int) -> torch.Tensor:
    dataset = AnomalyDataset(samples[:: max(1, len(samples) // _BATCH)][:_BATCH], size)
    return torch.stack([dataset[i]["image"] for i in range(len(dataset))])


def _accuracy(detector, catalogue, size: int, shared: Sequence[str]) -> dict:
    found = evaluate(detector, AnomalyDataset(catalogue.test, size, catalogue.categories), progress=False)
    few = Results({name: found.categories[name] for name in shared}, found.seconds)
    means = found.mean | {f"{name}_shared": value for name, value in few.mean.items()}
    return {name: means[name] for name in FIGURES if name in means}


def study(
    categories: Sequence[int], models: Sequence[str], steps: int, accuracy: bool, say: Callable[[str], None] = print
) -> dict:
    """Every model at every number of categories, one after the other, as it is saved."""
    rows = []
    for n in categories:
        for model in models:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(measure, model, n, steps, min(categories) if accuracy else 0).result())
            say(describe(rows[-1]))
    about = {"steps": steps, "threads": torch.get_num_threads(), "machine": results.machine()}
    return {"study": "scaling", "date": results.now(), **about, "rows": rows}


def describe(row: dict) -> str:
    rates = ", ".join(f"{name} {row[name]:.1f} images/s" for name in ("training", "inference") if name in row)
    figures = "".join(f", {name} {row[name]:.3f}" for name in FIGURES if name in row)
    return f"{row['categories']:>5} categories, {row['model']}: {rates}, {row['peak_memory'] / 2**30:.2f} GiB{figures}"


def shown(row: dict, name: str) -> str:
    """A quantity of a row as text, empty where it wasn't measured."""
    if name not in row:
        return ""
    return f"{row[name] / 2**30:.2f}" if name == "peak_memory" else f"{row[name]:.{3 if name in FIGURES else 1}f}"


def plot(found: dict, stem: str) -> None:
    """Writes stem.png and stem.svg: a panel per quantity, a line per model."""
    from benchmarks.plots import plt, save

    names = [name for name in QUANTITIES if any(name in row for row in found["rows"])]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names):
        for model in dict.fromkeys(row["model"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["model"] == model and name in row]
            scale = 2**30 if name == "peak_memory" else 1
            axis.plot([r["categories"] for r in rows], [r[name] / scale for r in rows], marker="o", label=model)
        axis.set(title=QUANTITIES[name], xlabel="categories", xscale="log")
        if name not in FIGURES:
            axis.set_ylim(bottom=0)
    axes[0][0].legend()
    figure.suptitle(f"{found['machine']['processor']}, {found['date'][:10]}")
    save(figure, Path(stem))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--categories", type=int, nargs="+", default=CATEGORIES, metavar="N")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=600, help="of training (default: %(default)s)")
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True, help="evaluate too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="STEM", help="write STEM.png and STEM.svg")
    args = parser.parse_args(arguments)
    found = study(args.categories, args.models, args.steps, args.accuracy)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
