"""Runs a detector over images in and out of distribution and says how well its scores tell them apart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader

from dpdiff._files import write_json
from dpdiff._progress import track
from dpdiff.data import AnomalyDataset, Catalogue, Sample
from dpdiff.evaluation import predictions
from dpdiff.metrics import OOD_FIGURES, ood_metrics

FIGURE_NAMES = dict(zip(OOD_FIGURES, ("AUROC", "AUPR in", "AUPR out", "FPR95")))


@dataclass(frozen=True)
class OODResults:
    """scores: of every image, of the in-set (N,) and of each out-set (M,), larger is further out."""

    inside: np.ndarray
    outside: dict[str, np.ndarray]

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Of each out-set, those of `ood_metrics`."""
        return {name: ood_metrics(self.inside, scores) for name, scores in self.outside.items()}

    def to_dict(self) -> dict[str, dict]:
        """``{"mean": {figure: value}, "out_sets": {name: {figure: value}}}``, all from 0 to 1; see `ood_metrics`."""
        figures = self.figures
        mean = {name: float(np.mean([f[name] for f in figures.values()])) for name in OOD_FIGURES}
        return {"mean": mean, "out_sets": figures}

    def save_json(self, path: str | os.PathLike) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def table(self) -> Table:
        """The figures in percent, a row per out-set (n images) and their mean as the last."""
        found = self.to_dict()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("out of distribution", overflow="fold")
        for heading in ("n", *FIGURE_NAMES.values()):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, figures in found["out_sets"].items():
            shown = (f"{100 * figures[key]:.2f}" for key in OOD_FIGURES)
            table.add_row(Text(name), str(len(self.outside[name])), *shown)
        table.add_section()
        total = sum(map(len, self.outside.values()))
        table.add_row("mean", str(total), *(f"{100 * found['mean'][key]:.2f}" for key in OOD_FIGURES), style="bold")
        return table


def normal_images(catalogue: Catalogue) -> list[Sample]:
    """The images of a data set that show what it is about: good test images, or all where there is no test split."""
    return [sample for sample in catalogue.test if sample.label == 0] or list(catalogue.train)


def evaluate_ood(
    model: nn.Module,
    inside: Sequence[Sample],
    outside: Mapping[str, Sequence[Sample]],
    *,
    batch_size: int = 16,
    num_workers: int = 0,
) -> OODResults:
    """Scores every image of the in-set and of the out-sets.

    model: has ``predict(images)``, as for `dpdiff.evaluation.evaluate`, and `image_size`. inside: images like those of
    training, but not of it. outside: name -> images.

    Raises ValueError for a set without images and for scores with NaN, naming the set.
    """
    sets = {"in-distribution": inside, **{f"out-set {name!r}": samples for name, samples in outside.items()}}
    for name, samples in sets.items():
        if not samples:
            raise ValueError(f"{name}: there are no images")
    if not outside:
        raise ValueError("outside is empty: expected at least one set")
    model.eval()
    datasets = [AnomalyDataset(samples, model.image_size) for samples in sets.values()]
    loaders = (DataLoader(dataset, batch_size=batch_size, num_workers=num_workers) for dataset in datasets)
    outputs = chain.from_iterable(predictions(model, loader) for loader in loaders)
    scores = []
    with closing(track(outputs, "Evaluating", sum(map(len, datasets)))) as outputs:
        for name, dataset in zip(sets, datasets):
            found = np.array([float(score) for score, _, _ in islice(outputs, len(dataset))], np.float32)
            if np.isnan(found).any():
                raise ValueError(f"{name}: scores hold NaN ({np.isnan(found).sum()} of {len(found)} values)")
            scores.append(found)
    return OODResults(scores[0], dict(zip(outside, scores[1:])))
