"""DLSR beside Mahalanobis distance, k-NN and PCA reconstruction, on the same features, over splits into in and out:

    python -m benchmarks.ood --data products:160 --inside 120 --outside 40 --splits 5 --json ood.json

Each split draws categories to be in and others to be out of distribution. DLSR and the baselines learn from the
training images of the first, without labels; the good test images of both are told apart. The backbone's features of
all images are computed once, and kept where --cache says; a split trains DLSR as `dpdiff train --model dlsr` does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks import results
from dpdiff import DLSR, training
from dpdiff.cli.inputs import read_catalogue
from dpdiff.cli.model_options import parse_settings
from dpdiff.data import Sample
from dpdiff.data.features import FeatureCache
from dpdiff.dlsr import SCORES
from dpdiff.metrics import OOD_FIGURES, ood_metrics
from dpdiff.ood import FIGURE_NAMES, normal_images

Scorer = Callable[[np.ndarray], np.ndarray]  # features (N, D) -> scores (N,), larger is further out


def mahalanobis(train: np.ndarray) -> Scorer:
    """Distance from the mean, by the covariance of all training features, shrunk after Ledoit and Wolf."""
    return LedoitWolf().fit(train).mahalanobis


def nearest_neighbours(train: np.ndarray, k: int = 1) -> Scorer:
    """Distance to the k-th nearest training feature (Sun et al., ICML 2022, without the projection to the sphere)."""
    index = NearestNeighbors(n_neighbors=k).fit(train)
    return lambda x: index.kneighbors(x)[0][:, -1]


def pca_reconstruction(train: np.ndarray, variance: float = 0.99) -> Scorer:
    """Squared distance from the principal components that hold a share of the training features' variance."""
    pca = PCA(variance).fit(train)
    return lambda x: np.square(x - pca.inverse_transform(pca.transform(x))).sum(1)


BASELINES = {"Mahalanobis": mahalanobis, "k-NN": nearest_neighbours, "PCA": pca_reconstruction}


class Part:
    """Some items of a feature cache, as another cache."""

    def __init__(self, features: FeatureCache, indices: Sequence[int]) -> None:
        self.features, self.indices = features, list(indices)
        self.key = f"{features.key}-{hash(tuple(self.indices)):x}"

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        return self.features.batch([self.indices[i] for i in indices])


def splits(categories: Sequence[str], inside: int, outside: int, n: int, seed: int) -> Iterator[tuple[set, set]]:
    """n times, categories in and out of distribution."""
    generator = np.random.default_rng(seed)
    for _ in range(n):
        order = [categories[i] for i in generator.permutation(len(categories))]
        yield set(order[:inside]), set(order[inside : inside + outside])


def study(
    data: str, inside: int, outside: int, n_splits: int, seed: int, settings: Sequence[str], cache: Path, folder: Path
) -> dict:
    """Figures of every method on every split, and their means. cache: of features; folder: for all else."""
    catalogue = read_catalogue(data, need="train")
    if inside < 1 or outside < 1 or inside + outside > len(catalogue.categories):
        raise ValueError(f"{inside} categories in and {outside} out of {len(catalogue.categories)}: expected fewer")
    train, test = catalogue.train, normal_images(catalogue)
    options = parse_settings(DLSR, settings)
    model = DLSR(**options)
    default = model.config["score"]
    features = FeatureCache([*train, *test], model.backbone, model.image_size, cache, reduce=model.reduce)

    rows = []
    for number, (kept, left) in enumerate(splits(catalogue.categories, inside, outside, n_splits, seed)):
        learnt = [i for i, sample in enumerate(train) if sample.category in kept]
        tested = [[i for i, s in enumerate(test, len(train)) if s.category in names] for names in (kept, left)]
        detector = _train(options, [train[i] for i in learnt], Part(features, learnt), folder / str(number), seed)
        x, *sets = (detector.encode(features.batch(indices)) for indices in (learnt, *tested))
        found = {}
        for score in SCORES:
            detector.config["score"] = score
            found[f"DLSR, {score}"] = ood_metrics(*(detector.score(s) for s in sets))
        for name, fit in BASELINES.items():
            scorer = fit(x.double().numpy())
            found[name] = ood_metrics(*(scorer(s.double().numpy()) for s in sets))
        rows.append({"in": sorted(kept), "out": sorted(left), "images": [len(learnt), *map(len, tested)], **found})
        print(f"split {number}: " + ", ".join(f"{name} {f['auroc']:.4f}" for name, f in found.items()), flush=True)
    mean = {name: {key: float(np.mean([row[name][key] for row in rows])) for key in OOD_FIGURES} for name in found}
    about = {"data": data, "seed": seed, "settings": list(settings), "score": default}
    return {"study": "ood", "date": results.now(), "machine": results.machine(), **about, "mean": mean, "splits": rows}


def _train(options: dict, samples: Sequence[Sample], features: Part, folder: Path, seed: int) -> DLSR:
    """With the weights of the first epoch, which the scores "lr" and "ratio" need; the others are the same without."""
    torch.manual_seed(seed)
    detector = DLSR(**options | {"score": "ratio"})
    training.train(detector, samples, folder, seed=seed, features=features, resume=False, progress=False)
    return detector


def table(found: dict) -> str:
    """The means in percent, as Markdown; the best of each column is bold."""
    mean = found["mean"]
    best = {key: (min if key == "fpr95" else max)(figures[key] for figures in mean.values()) for key in OOD_FIGURES}
    lines = [f"| | {' | '.join(FIGURE_NAMES.values())} |", "|---" + "|---:" * len(FIGURE_NAMES) + "|"]
    for name, figures in mean.items():
        cells = (f"**{100 * v:.2f}**" if v == best[key] else f"{100 * v:.2f}" for key, v in figures.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="products:160", help="as for dpdiff train (default: %(default)s)")
    parser.add_argument("--inside", type=int, default=120, metavar="N", help="categories in (default: %(default)s)")
    parser.add_argument("--outside", type=int, default=40, metavar="N", help="categories out (default: %(default)s)")
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of splits and training (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of DLSR")
    parser.add_argument("--cache", metavar="DIR", help="keep the backbone's features there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = (args.data, args.inside, args.outside, args.splits, args.seed, args.set)
            found = study(*options, Path(args.cache or f"{folder}/features"), Path(folder))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    print(table(found))
    if args.json:
        results.save(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
