"""How well scores tell defective from good: figures from 0 to 1, larger is better.

A figure that is not defined, for want of good or of defective ones, is left out, never replaced by a number.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage

import dpdiff._torchvision  # noqa: F401  (before torchmetrics, which imports torchvision)

from torchmetrics.functional.classification import (  # isort: skip
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
    binary_specificity_at_sensitivity,
)

IMAGE_FIGURES = ("image_auroc", "image_ap", "image_f1max")
PIXEL_FIGURES = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
OOD_FIGURES = ("auroc", "aupr_in", "aupr_out", "fpr95")
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def image_metrics(scores: ArrayLike | torch.Tensor, labels: ArrayLike | torch.Tensor) -> dict[str, float]:
    """Area under the ROC curve, average precision and best F1 score of image scores, from torchmetrics.

    scores (B,): larger is more anomalous; only their order matters. labels (B,): true, or 1, is defective.

    Returns ``image_auroc``, ``image_ap`` and ``image_f1max``; nothing where all labels are the same. Raises
    ValueError for NaN scores and for shapes that differ.
    """
    scores, labels = _checked(scores, labels, "scores", "labels")
    if labels.all() or not labels.any():
        return {}
    predictions, target = _ranks(scores), torch.from_numpy(labels).long().reshape(-1)
    precision, recall, _ = binary_precision_recall_curve(predictions, target)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(precision.dtype).tiny)
    return {
        "image_auroc": float(binary_auroc(predictions, target)),
        "image_ap": float(binary_average_precision(predictions, target)),
        "image_f1max": float(f1.max()),
    }


def ood_metrics(inside: ArrayLike | torch.Tensor, outside: ArrayLike | torch.Tensor) -> dict[str, float]:
    """How well scores tell images out of distribution from those in it, from torchmetrics.

    inside (N,), outside (M,): scores, larger is further out; only their order matters.

    Returns ``auroc``; ``aupr_in`` and ``aupr_out``, average precision with the images in, or out of, distribution as
    those to find (Hendrycks and Gimpel, ICLR 2017); ``fpr95``, the share of images out of distribution that pass where
    at least 95 % of those in it do (Liang et al., ICLR 2018): of this alone smaller is better. Nothing where either is
    empty. Raises ValueError for NaN.
    """
    inside, outside = _numpy(inside).reshape(-1), _numpy(outside).reshape(-1)
    labels = np.repeat([False, True], [len(inside), len(outside)])
    scores, labels = _checked(np.concatenate([inside, outside]), labels, "scores", "labels")
    if not len(inside) or not len(outside):
        return {}
    outness, out = _ranks(scores), torch.from_numpy(labels).long()
    passed, _ = binary_specificity_at_sensitivity(1 - outness, 1 - out, min_sensitivity=0.95)
    return {
        "auroc": float(binary_auroc(outness, out)),
        "aupr_in": float(binary_average_precision(1 - outness, 1 - out)),
        "aupr_out": float(binary_average_precision(outness, out)),
        "fpr95": float(1 - passed),
    }


def _ranks(scores: np.ndarray) -> torch.Tensor:
    """Ranks in [0, 1], ties alike: torchmetrics takes scores beyond it for logits and squashes large ones into one."""
    ranks = np.unique(scores, return_inverse=True)[1].reshape(-1)
    return torch.from_numpy(ranks / max(ranks.max(), 1))


def pixel_metrics(
    maps: ArrayLike | torch.Tensor, masks: ArrayLike | torch.Tensor, max_fpr: float = 0.3
) -> dict[str, float]:
    """Area under the ROC curve, average precision, best F1 score and AUPRO of anomaly maps.

    maps (B, H, W): larger is more anomalous; only the order matters. masks (B, H, W): true, or 1, is defective.

    AUPRO (Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021) is the area under the curve of the
    mean share of a defect that is found, over all 8-connected defects, against the false positive rate over all good
    pixels, up to ``max_fpr`` and divided by it; the curve is interpolated at the limit.

    Returns ``pixel_auroc``, ``pixel_ap``, ``pixel_f1max`` and ``aupro``; nothing where there are no defective, or no
    good, pixels. Raises ValueError for NaN in the maps and for shapes that differ.

    All four are exact, ties included. They come from one sort of the good pixels' scores, O(n log n), since all four
    depend only on how many of these lie above each defective pixel; torchmetrics sorts all pixels for each figure.
    Memory: one copy of the maps.
    """
    maps, masks = _checked(maps, masks, "maps", "masks")
    if maps.ndim != 3:
        raise ValueError(f"maps has shape {maps.shape}: expected (B, H, W)")
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr is {max_fpr}: expected above 0 and at most 1")
    if masks.all() or not masks.any():
        return {}
    good = np.sort(maps[~masks])
    scores, share = maps[masks], _share_of_region(masks)
    n_good, n_bad = len(good), len(scores)

    # Distinct scores of defective pixels, from the highest, as thresholds; with each what lies at or above it.
    thresholds, index = np.unique(scores, return_inverse=True)
    thresholds = thresholds[::-1]
    index = len(thresholds) - 1 - index
    true_positives = np.cumsum(np.bincount(index))
    overlap = np.cumsum(np.bincount(index, weights=share))
    above = n_good - np.searchsorted(good, thresholds, side="right")  # good pixels above the threshold
    false_positives = n_good - np.searchsorted(good, thresholds, side="left")  # and those at it too

    precision = true_positives / (true_positives + false_positives)
    step = np.diff(true_positives, prepend=0)
    return {
        "pixel_auroc": float((step * (2 * n_good - above - false_positives)).sum() / (2 * n_good * n_bad)),
        "pixel_ap": float((step * precision).sum() / n_bad),
        "pixel_f1max": float((2 * true_positives / (true_positives + false_positives + n_bad)).max()),
        "aupro": _area_below(above / n_good, false_positives / n_good, overlap / overlap[-1], max_fpr),
    }


def _area_below(above: np.ndarray, at: np.ndarray, overlap: np.ndarray, limit: float) -> float:
    """Area under overlap against false positive rate up to ``limit``, over ``limit``.

    At each threshold the rate goes from ``above`` to ``at`` and the overlap rises in a straight line: steeply where no
    good pixel ties with the defective ones. Between thresholds the rate grows and the overlap stays.
    """
    x = np.concatenate([[0], np.stack([above, at], axis=1).reshape(-1), [1]])
    y = np.concatenate([[0, 0], np.repeat(overlap, 2)])
    end = np.searchsorted(x, limit, side="right")
    if end < len(x):
        y_limit = y[end - 1] + (y[end] - y[end - 1]) * (limit - x[end - 1]) / (x[end] - x[end - 1])
        x, y = np.append(x[:end], limit), np.append(y[:end], y_limit)
    area = np.diff(x) @ (y[1:] + y[:-1]) / 2
    return min(float(area) / limit, 1.0)  # by rounding alone it could exceed 1


def _share_of_region(masks: np.ndarray) -> np.ndarray:
    """For each defective pixel, 1 / (pixels of its region): a region's sum up to 1."""
    shares = []
    for mask in masks:
        if mask.any():
            regions = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)[0][mask]
            shares.append(1 / np.bincount(regions)[regions])
    return np.concatenate(shares)


def _checked(scores, labels, scores_name: str, labels_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as NumPy arrays of one shape, floating point and bool."""
    scores, labels = _numpy(scores), _numpy(labels).astype(bool)
    if scores.shape != labels.shape:
        raise ValueError(f"{scores_name} and {labels_name} differ in shape: {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{scores_name} hold NaN ({np.isnan(scores).sum()} of {scores.size} values)")
    return scores, labels


def _numpy(values: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)
