"""How cost and accuracy go as categories grow, for DPDiff-AD on the fast and the plain operators and for unified k-NN,
whose bank, and with it the memory, grows with the categories, or is of one size, that of 10 categories:

    python -m benchmarks.scaling --trained-up-to 160 --json scaling.json --plot scaling

Data are rendered products. Rates of DPDiff-AD are those of a model of the size that `dpdiff train` takes for so many
categories, with random prototypes and images, on which time doesn't depend: training images/s of steps on cached
features, inference images/s of `predict`, backbone included. Up to `--trained-up-to` categories it is trained and
evaluated besides; with the plain operators it isn't, for they compute the same. k-NN has to be evaluated for a rate,
which is that of `predict` too. Peak memory is that of the process in which rates are measured.

Categories differ in difficulty, so that accuracy is of the same ones at every size, the first 160: of 16 models of 10
categories each, of one of 160, of one of 1,600. That takes hours on a CPU. What --json holds already of the same steps
is kept, so that an interrupted study goes on, and can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import torch

import dpdiff_kernels as dk
from benchmarks import results
from benchmarks.timing import Call
from benchmarks.training_step import training_step
from dpdiff import DPDiffAD, training
from dpdiff.data import AnomalyDataset, Catalogue, scan
from dpdiff.data.products import Products
from dpdiff.evaluation import evaluate

CATEGORIES = (10, 20, 40, 80, 160, 320, 1600)
KNN = "unified k-NN"
CONSTANT_KNN = "unified k-NN, constant bank"
MODELS = {"dpdiff": "auto", "reference operators": "reference", KNN: None, CONSTANT_KNN: None}
FIGURES = ("image_auroc", "pixel_auroc", "aupro")
QUANTITIES = {"training": "training, images/s", "inference": "inference, images/s", "peak_memory": "peak memory, GiB"}
QUANTITIES |= {name: name.replace("_", " ") for name in FIGURES}
_BATCH = 16
_SCORED = 160  # categories whose accuracy is compared
_IMAGES = 16  # for training, of a rendered category


def rates(model: str, n_categories: int) -> dict:
    """Images/s of DPDiff-AD at its size for so many categories."""
    torch.manual_seed(0)
    # The plain operators take minutes for 16 images of so many categories, and each as long as any.
    batch = 2 if MODELS[model] == "reference" and n_categories > _SCORED else _BATCH
    with dk.use_backend(MODELS[model]):
        detector = DPDiffAD(**DPDiffAD.suggest(_IMAGES * n_categories)).eval()
        images = torch.rand(batch, 3, detector.image_size, detector.image_size)
        found = {"inference": _rate(lambda: detector.predict(images), batch)}
        tokens = detector.tokenize(images).clone()
        step = training_step(detector.train(), tokens, training._best_precision("cpu") == "bf16-mixed")
        return found | {"training": _rate(step, batch), "peak_memory": _peak_memory()}


def _rate(run: Callable[[], object], n_images: int) -> float:
    """Images/s, by the fastest of as many calls as fit in four seconds; by the first, where it alone takes seconds."""
    call = Call.warmed_up(run, "cpu")
    rounds = call.rounds(4.0)
    return n_images / (min(call.seconds() for _ in range(rounds)) if rounds > 1 else call.once)


def accuracy(model: str, n_categories: int, first: int, n_scored: int, steps: int | None) -> dict:
    """Of a model trained on `n_categories` from `first` on: the figures of the first `n_scored` ("by_category")."""
    products = Products(n_categories, first=first, progress=False)
    catalogue = scan(products.root, need="test")
    is_knn = MODELS[model] is None
    detector, size = _knn(catalogue, model == CONSTANT_KNN) if is_knn else _dpdiff(catalogue, steps)
    scored = products.categories[:n_scored]
    test = [sample for sample in catalogue.test if sample.category in scored]
    dataset = AnomalyDataset(test, size)
    found = evaluate(detector, dataset, progress=False)
    by_category = {
        name: {figure: result.figures[figure] for figure in FIGURES} for name, result in found.categories.items()
    }
    if not is_knn:
        return {"by_category": by_category}
    images = torch.stack([dataset[i * len(dataset) // _BATCH]["image"] for i in range(_BATCH)])
    # Of real images, on which the search in a large bank depends.
    rate = _rate(lambda: detector.predict(images), _BATCH)
    return {"by_category": by_category, "inference": rate, "peak_memory": _peak_memory()}


def _dpdiff(catalogue: Catalogue, steps: int | None) -> tuple[torch.nn.Module, int]:
    torch.manual_seed(0)
    detector = DPDiffAD(**DPDiffAD.suggest(len(catalogue.train)))
    with tempfile.TemporaryDirectory() as folder:
        training.train(detector, catalogue.train, folder, max_steps=steps, accelerator="cpu", progress=False)
    return detector, detector.image_size


def _knn(catalogue: Catalogue, constant: bool) -> tuple[torch.nn.Module, int]:
    from benchmarks import baseline_knn as knn

    size = 256
    features = knn.PatchFeatures(knn.Backbone(knn.DEFAULT_BACKBONE, None))
    share = knn.SHARE * (CATEGORIES[0] / len(catalogue.categories) if constant else 1)
    banks = knn.build_banks(features, catalogue.train, catalogue.categories, size, share)
    return knn.PatchCore(features, knn.joined(banks)), size


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def study(
    categories: Sequence[int],
    models: Sequence[str],
    steps: int | None,
    trained_up_to: int,
    known: Sequence[dict] = (),
    save: Callable[[dict], None] = lambda found: None,
) -> dict:
    """Every model at every number of categories, one after the other; `save` is called whenever there is more."""
    rows = {(row["model"], row["categories"]): dict(row) for row in known}
    n_scored = min(_SCORED, trained_up_to)
    found = {"study": "scaling", "date": results.now(), "steps": steps, "threads": torch.get_num_threads()}
    found |= {"machine": results.machine(), "rows": list(rows.values())}

    def keep(row: dict, more: dict) -> None:
        row |= more
        rows[row["model"], row["categories"]] = row
        found["date"] = results.now()
        found["rows"] = sorted(rows.values(), key=lambda row: (row["categories"], list(MODELS).index(row["model"])))
        save(found)

    for n in categories:
        for model in models:
            row = rows.get((model, n), {"model": model, "categories": n})
            if "training" not in row and MODELS[model] is not None:
                keep(row, _apart(rates, model, n))
            done = row.get("by_category", {})
            while MODELS[model] != "reference" and n <= trained_up_to and len(done) < n_scored:
                more = _apart(accuracy, model, n, len(done), n_scored - len(done), steps)
                more["by_category"] = done = done | more["by_category"]
                if len(done) == n_scored:
                    more |= {name: fmean(figures[name] for figures in done.values()) for name in FIGURES}
                keep(row, more)
            if "peak_memory" in row:  # not of k-NN that isn't to be trained
                print(describe(row), flush=True)
    return found


def _apart(function: Callable, *args) -> dict:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def describe(row: dict) -> str:
    rates = ", ".join(f"{name} {_images(row[name])} images/s" for name in ("training", "inference") if name in row)
    figures = "".join(f", {name} {row[name]:.3f}" for name in FIGURES if name in row)
    return f"{row['categories']:>5} categories, {row['model']}: {rates}, {row['peak_memory'] / 2**30:.2f} GiB{figures}"


def shown(row: dict, name: str) -> str:
    """A quantity of a row as text, empty where it wasn't measured."""
    if name not in row:
        return ""
    if name == "peak_memory":
        return f"{row[name] / 2**30:.2f}"
    return f"{row[name]:.3f}" if name in FIGURES else _images(row[name])


def _images(per_second: float) -> str:
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


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
    figure.suptitle(f"{results.machine_name(found['machine'])}, {found['date'][:10]}")
    save(figure, Path(stem))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--categories", type=int, nargs="+", default=CATEGORIES, metavar="N")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, help="of training (default: the model's own for so many images)")
    parser.add_argument(
        "--trained-up-to",
        type=int,
        default=160,
        metavar="N",
        help="train models of sizes up to N, for accuracy; 0: rates alone (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, after every model")
    parser.add_argument("--plot", metavar="STEM", help="write STEM.png and STEM.svg")
    args = parser.parse_args(arguments)
    known: list[dict] = []
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        here = results.machine_name(results.machine())
        if (before["steps"], results.machine_name(before["machine"])) != (args.steps, here):
            parser.error(f"--json {args.json} holds a study of other steps or of another machine: give another file")
        known = before["rows"]

    command = shlex.join(["python", "-m", "benchmarks.scaling", *(sys.argv[1:] if arguments is None else arguments)])

    def save(found: dict) -> None:
        if args.json:
            results.save(found | {"command": command}, args.json)

    found = study(args.categories, args.models, args.steps, args.trained_up_to, known, save)
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
