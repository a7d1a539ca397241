"""The rival to beat: PatchCore on the backbone, layers and image size that DPDiff-AD uses by default.

    python benchmarks/baseline_knn.py --data FOLDER [--mode unified|separate] [--json FILE]

K. Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022. Patch features are 3 x 3 means of each
layer, brought to the finest layer's grid and concatenated. Those of a category are thinned to a greedy coreset of 10 %.
Mode "separate" searches the coreset of the test image's own category, which it has to be told; "unified" searches all
of them together, as DPDiff-AD has to. So the modes differ in nothing but what is searched. The distance to the nearest
neighbour is the anomaly map; the image's score is that of its furthest patch, re-weighted (the paper's equation 7).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpdiff import Prediction
from dpdiff._progress import track
from dpdiff.backbones import DEFAULT_BACKBONE, Backbone
from dpdiff.cli.inputs import read_catalogue
from dpdiff.data import AnomalyDataset, Sample, check
from dpdiff.evaluation import Results, evaluate

from torchvision.transforms.v2.functional import gaussian_blur  # isort: skip  (dpdiff makes it importable)

SHARE = 0.1  # of a category's patches that its coreset keeps
CANDIDATES = 65_536  # of a category's coreset
NEIGHBOURS = 9  # that weight an image's score
EXACT = 10_000  # bank size up to which every entry is compared: beyond, clusters are faster
RECALL = 0.99  # share of exact nearest neighbours that the search in larger banks must find
SAMPLES = 16_000  # patches, at most, by which that share is known


class PatchFeatures(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> patch features (B, h, w, D)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        maps = [F.avg_pool2d(m, 3, stride=1, padding=1) for m in self.backbone(images)]
        finest = max((m.shape[-2:] for m in maps), key=lambda size: size[0])
        maps = [F.interpolate(m, size=finest, mode="bilinear", align_corners=False) for m in maps]
        return torch.cat(maps, 1).movedim(1, -1).contiguous()


def coreset(features: Tensor, share: float) -> Tensor:
    """Greedy k-centre selection of a share of features (N, D): each next one is the furthest from those chosen.

    Distances are those of a random projection to 128 dimensions, as in the authors' code. Of more than 64k features a
    random 64k are candidates: the time is O(candidates x chosen).
    """
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(share * len(features)))
    features = features[torch.randperm(len(features), generator=generator)[: max(CANDIDATES, count)]]
    x = features
    if x.shape[1] > 128:
        x = x @ torch.randn(x.shape[1], 128, generator=generator).div_(128**0.5)
    norms = x.square().sum(1)
    nearest = torch.full((len(x),), torch.inf)
    chosen = [0]
    while len(chosen) < count:
        last = chosen[-1]
        torch.minimum(nearest, norms + norms[last] - 2 * (x @ x[last]), out=nearest)
        nearest[last] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return features[chosen]


@dataclass
class Bank:
    """A category's coreset (M, D), and some of its patches (S, D) to try a search with."""

    coreset: Tensor
    samples: Tensor


class PatchCore(nn.Module):
    """Nearest-neighbour detector over a bank."""

    def __init__(self, features: PatchFeatures, bank: Bank):
        super().__init__()
        self.features, self.bank = features, bank.coreset.numpy()
        self.index = _index(self.bank, bank.samples.numpy())

    def predict(self, images: Tensor) -> Prediction:
        patches = self.features(images)
        batch, height, width, dim = patches.shape
        patches = patches.reshape(batch, -1, dim)
        squared, nearest = self.index.search(patches.reshape(-1, dim).numpy(), 1)
        distances = torch.from_numpy(squared).clamp_min(0).sqrt().view(batch, -1)
        scores = self._weighted(patches, distances, nearest.reshape(batch, -1))
        maps = F.interpolate(
            distances.view(batch, 1, height, width), size=images.shape[-2:], mode="bilinear", align_corners=False
        )
        sigma = 4 * images.shape[-1] / 224  # 4 pixels of the paper's 224
        size = 2 * round(3 * sigma) + 1
        return Prediction(scores, gaussian_blur(maps, [size, size], [sigma, sigma]).squeeze(1))

    def _weighted(self, patches: Tensor, distances: Tensor, nearest: np.ndarray) -> Tensor:
        """The largest distance of each image, less where its neighbour lies alone in the bank (equation 7)."""
        largest, furthest = distances.max(1)
        if len(self.bank) < NEIGHBOURS:
            return largest
        rows = torch.arange(len(patches))
        neighbour = nearest[rows.numpy(), furthest.numpy()]
        around = self.index.search(self.bank[neighbour], NEIGHBOURS)[1]
        beside = (patches[rows, furthest].unsqueeze(1) - torch.from_numpy(self.bank[around])).norm(dim=-1)
        return (1 - (largest - beside.logsumexp(1)).exp()) * largest


def _index(bank: np.ndarray, queries: np.ndarray) -> faiss.Index:
    """Exact search in a small bank; in a large one, as many of its clusters as it takes to find what queries would."""
    exact = faiss.IndexFlatL2(bank.shape[1])
    exact.add(bank)
    if len(bank) <= EXACT:
        return exact
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(bank.shape[1]), bank.shape[1], 4 * round(len(bank) ** 0.5))
    index.train(bank)
    index.add(bank)
    nearest = exact.search(queries, 1)[1]
    while (index.search(queries, 1)[1] == nearest).mean() < RECALL and index.nprobe < index.nlist:
        index.nprobe *= 2
    return index


def build_banks(
    features: PatchFeatures, train: Sequence[Sample], categories: Sequence[str], image_size: int, share: float = SHARE
) -> dict[str, Bank]:
    banks = {}
    n_samples = max(1, min(100, SAMPLES // len(categories)))
    for category in track(categories, "Building banks"):
        samples = [sample for sample in train if sample.category == category]
        loader = DataLoader(AnomalyDataset(samples, image_size), batch_size=16)
        patches = torch.cat([features(batch["image"]).flatten(0, 2) for batch in loader])
        few = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:n_samples]
        banks[category] = Bank(coreset(patches, share), patches[few])
    return banks


def joined(banks: dict[str, Bank]) -> Bank:
    """One bank for all categories."""
    return Bank(*(torch.cat([getattr(bank, part) for bank in banks.values()]) for part in ("coreset", "samples")))


def evaluate_unified(
    features: PatchFeatures, banks: dict[str, Bank], test: Sequence[Sample], image_size: int
) -> Results:
    """All categories by one bank."""
    return evaluate(PatchCore(features, joined(banks)), AnomalyDataset(test, image_size, list(banks)))


def evaluate_separate(
    features: PatchFeatures, banks: dict[str, Bank], test: Sequence[Sample], image_size: int
) -> Results:
    """Each category by its own bank."""
    parts = []
    for category, bank in banks.items():
        samples = [sample for sample in test if sample.category == category]
        if samples:
            parts.append(evaluate(PatchCore(features, bank), AnomalyDataset(samples, image_size)))
    return Results({k: v for part in parts for k, v in part.categories.items()}, sum(part.seconds for part in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", required=True, help="as for dpdiff train; products:N too")
    parser.add_argument("--mode", choices=("unified", "separate"), default="unified")
    parser.add_argument("--json", metavar="FILE", help="write the figures, laid out as by dpdiff evaluate")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="a timm model (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help="its stages or blocks (default: as DPDiff-AD)")
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--coreset", type=float, default=SHARE, help="share of patches kept (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.coreset <= 1:
        parser.error(f"--coreset is {args.coreset}: expected above 0 and at most 1")
    start = time.perf_counter()
    try:
        found = read_catalogue(args.data, need="train")
        check(found.train + found.test)
        backbone = Backbone(args.backbone, args.layers)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not found.test:
        parser.error(f"{args.data} has no test images")
    features = PatchFeatures(backbone)
    banks = build_banks(features, found.train, found.categories, args.image_size, args.coreset)
    evaluate_banks = evaluate_unified if args.mode == "unified" else evaluate_separate
    results = evaluate_banks(features, banks, found.test, args.image_size)
    console = Console()
    console.print(f"{args.mode} k-NN, {args.backbone}, layers {backbone.layers}, {args.image_size} pixels")
    console.print(results.table())
    console.print(f"{results.images_per_second:.1f} images/s, {time.perf_counter() - start:.0f} s in all")
    if args.json:
        results.save_json(args.json)


if __name__ == "__main__":
    main()
