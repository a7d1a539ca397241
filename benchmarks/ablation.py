"""What each part of DPDiff-AD is worth: trained without it, or scored without it, on the same images and features.

    python -m benchmarks.ablation --data products:20:7 --json ablation.json

Prints a Markdown table of mean figures in percent. Without the global bank, an image sees as many local prototypes as
its groups hold otherwise, but the same ones as every other image.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import report, results
from dpdiff import DPDiffAD, training
from dpdiff.cli.inputs import read_catalogue
from dpdiff.data import AnomalyDataset
from dpdiff.evaluation import FIGURE_NAMES, evaluate

FIGURES = ("image_auroc", "pixel_auroc", "aupro")
TRAINED = {  # options that differ from the defaults
    "DPDiff-AD": {},
    "no local bank": dict(condition=False, n_local=1, k=1, local_weight=0.0),
    "no global bank, no transport": dict(n_global=1, n_local=1024, route="all", ot_weight=0.0),
    "no transport": dict(ot_weight=0.0),
    "no diffusion: plain reconstruction": dict(diffusion=False),
    "no prototype attention": dict(prototype_attention=False),
}
# How the whole model does when scored in another way.
SCORED = ("errors not standardised by structure", "map of the reconstruction alone", "map of the local bank alone")


def study(data: str, steps: int | None, batch_size: int | None, seed: int) -> dict:
    catalogue = read_catalogue(data, need="test")
    rows = {}
    maps = None
    with tempfile.TemporaryDirectory() as folder:
        for name, options in TRAINED.items():
            start = time.perf_counter()
            torch.manual_seed(seed)
            model = DPDiffAD(**DPDiffAD.suggest(len(catalogue.train)) | options)
            fit = dict(max_steps=steps, batch_size=batch_size, seed=seed, resume=False, progress=False)
            training.train(model, catalogue.train, folder, **fit)  # the features stay in the folder
            model.backbone = maps = Remembered(model.backbone) if maps is None else maps
            rows[name] = _figures(model, catalogue)
            if not options:
                whole = model
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for share in (0.0, 1.0):
        whole.config["local_weight"] = share
        rows[SCORED[1 + int(share)]] = _figures(whole, catalogue)
    whole.config["local_weight"] = DPDiffAD(pretrained=False).config["local_weight"]
    for buffer in (whole.normal_errors.mean, whole.normal_errors.deviation):
        buffer.copy_(buffer.mean(1, keepdim=True).expand_as(buffer))
    rows[SCORED[0]] = _figures(whole, catalogue)
    about = {"data": data, "steps": steps, "batch_size": batch_size, "seed": seed, "machine": results.machine()}
    return {"study": "ablation", "date": results.now(), **about, "rows": rows}


class Remembered(nn.Module):
    """A backbone that computes the maps of a test set once: every evaluation asks for the same batches in turn."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.maps: list[list[Tensor]] = []
        self.batch = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.batch == len(self.maps):
            self.maps.append(self.backbone(images))
        self.batch += 1
        return self.maps[self.batch - 1]


def _figures(model: DPDiffAD, catalogue) -> dict[str, float]:
    model.backbone.batch = 0
    dataset = AnomalyDataset(catalogue.test, model.image_size, catalogue.categories)
    mean = evaluate(model, dataset, n_examples=0, progress=False).mean
    return {name: mean[name] for name in FIGURES if name in mean}


def table(rows: dict[str, dict[str, float]]) -> str:
    def percent(figures: dict[str, float]) -> Iterator[str]:
        return (f"{100 * figures[name]:.1f}" if name in figures else "-" for name in FIGURES)

    header = ("", *(FIGURE_NAMES[name] for name in FIGURES))
    return report.table(header, [(name, *percent(rows[name])) for name in (*TRAINED, *SCORED)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="products:160", help="as for dpdiff train (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of training (default: the model's own for so many images)")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    found = study(args.data, args.steps, args.batch_size, args.seed)
    print(table(found["rows"]))
    if args.json:
        results.save(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
