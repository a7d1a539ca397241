"""Figures against scikit-learn, torchmetrics, and AUPRO written out threshold by threshold."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from dpdiff.metrics import OOD_FIGURES, image_metrics, ood_metrics, pixel_metrics

# Few distinct values, so that ties abound within and between good and defective.
TIED = st.integers(-3, 3).map(float)
BINARY = st.booleans()


@st.composite
def maps_and_masks(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    elements = draw(st.sampled_from([TIED, st.floats(-1e6, 1e6, width=32)]))
    return draw(hnp.arrays(np.float32, shape, elements=elements)), draw(hnp.arrays(bool, shape, elements=BINARY))


def regions_by_flood_fill(mask):
    """The 8-connected regions of a mask, each a list of (row, column)."""
    left, regions = {(int(r), int(c)) for r, c in np.argwhere(mask)}, []
    while left:
        region, border = [], [left.pop()]
        while border:
            r, c = border.pop()
            region.append((r, c))
            near = {(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
            left -= near
            border += near
        regions.append(region)
    return regions


def aupro_by_thresholds(maps, masks, limit):
    """The curve's point at every score there is, and its area up to the limit in a loop over its segments."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in regions_by_flood_fill(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.reshape(-1).tolist()), reverse=True):
        found = maps >= threshold
        rate = (found & ~masks).sum() / (~masks).sum()
        overlaps = [np.mean([found[i, r, c] for r, c in region]) for i, region in regions]
        points.append((rate, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x1 > limit:
            if x0 >= limit:
                break
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@settings(deadline=None, max_examples=300)
@given(maps_and_masks(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_pixel_metrics_match_independent_definitions(drawn, limit):
    maps, masks = drawn
    figures = pixel_metrics(maps, masks, max_fpr=limit)
    if masks.all() or not masks.any():
        assert figures == {}
        return
    truth, score = masks.reshape(-1), maps.reshape(-1).astype(np.float64)
    precision, recall, _ = precision_recall_curve(truth, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert figures["pixel_ap"] == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    assert figures["pixel_f1max"] == pytest.approx(f1.max(), abs=1e-12)
    assert figures["aupro"] == pytest.approx(aupro_by_thresholds(maps, masks, limit), abs=1e-12)
    assert all(0 <= figure <= 1 for figure in figures.values())


def test_pixel_metrics_match_torchmetrics_on_larger_maps():
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    rng = np.random.default_rng(0)
    masks = rng.random((4, 128, 128)) < 0.03
    maps = torch.sigmoid(torch.from_numpy(rng.standard_normal(masks.shape) + masks)).float()
    figures = pixel_metrics(maps, masks)
    target = torch.from_numpy(masks).long().reshape(-1)
    assert figures["pixel_auroc"] == pytest.approx(float(binary_auroc(maps.reshape(-1), target)), abs=1e-5)
    assert figures["pixel_ap"] == pytest.approx(float(binary_average_precision(maps.reshape(-1), target)), abs=1e-5)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, n, elements=st.one_of(TIED, st.floats(-(2.0**100), 2.0**100, width=32))),
            hnp.arrays(bool, n, elements=BINARY),
        )
    )
)
def test_image_metrics_match_scikit_learn(drawn):
    scores, labels = drawn
    figures = image_metrics(scores, labels)
    if labels.all() or not labels.any():
        assert figures == {}
        return
    exact = scores.astype(np.float64)
    precision, recall, _ = precision_recall_curve(labels, exact)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, exact), abs=1e-6)
    assert figures["image_ap"] == pytest.approx(average_precision_score(labels, exact), abs=1e-6)
    assert figures["image_f1max"] == pytest.approx(f1.max(), abs=1e-6)


@settings(deadline=None, max_examples=200)
@given(*(st.lists(st.one_of(TIED, st.floats(-(2.0**100), 2.0**100, width=32)), max_size=30) for _ in range(2)))
def test_ood_metrics_match_scikit_learn(inside, outside):
    figures = ood_metrics(inside, outside)
    if not inside or not outside:
        assert figures == {}
        return
    scores, labels = np.array(inside + outside), np.repeat([0, 1], [len(inside), len(outside)])
    # Where at least 95 % of those inside pass, as few outside as any threshold lets through.
    allowed = [t for t in scores if np.mean(inside <= t) >= 0.95]
    passed = min(np.mean(outside <= t) for t in allowed)
    assert tuple(figures) == OOD_FIGURES
    assert figures["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert figures["aupr_in"] == pytest.approx(average_precision_score(1 - labels, -scores), abs=1e-6)
    assert figures["aupr_out"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    assert figures["fpr95"] == pytest.approx(passed, abs=1e-6)


def test_ood_metrics_by_hand():
    """Twenty inside, the highest above two of the four outside: 19 of 20 pass below all four."""
    inside, outside = [*range(19), 50], [40.0, 45.0, 60.0, 70.0]
    figures = ood_metrics(inside, outside)
    assert figures["auroc"] == pytest.approx(78 / 80) and figures["fpr95"] == 0
    assert ood_metrics([*range(18), 50, 51], outside)["fpr95"] == pytest.approx(2 / 4)


def test_large_scores_are_not_squashed():
    """As logits, 50 and 60 would both be 1 and the order between them lost."""
    assert image_metrics([-60.0, 50.0, 60.0, 70.0], [0, 0, 1, 1])["image_auroc"] == 1.0


def test_perfect_maps_score_one_and_never_more():
    masks = np.zeros((3, 32, 32), dtype=bool)
    masks[0, 4:9, 4:7] = masks[1, 20:25, 1:30] = masks[1, 2, 2] = True
    figures = pixel_metrics(masks.astype(np.float32), masks)
    assert figures == {"pixel_auroc": 1.0, "pixel_ap": 1.0, "pixel_f1max": 1.0, "aupro": 1.0}


def test_aupro_weighs_small_and_large_regions_alike():
    """A region of 400 pixels found and one of a single pixel missed make a half; touching at a corner, they are one."""
    masks = np.zeros((1, 64, 64), dtype=bool)
    masks[0, :20, :20] = True
    maps = masks.astype(np.float32)
    for pixel, expected in [((40, 40), 1 / 2), ((20, 20), 400 / 401)]:
        one_more, missed = masks.copy(), maps.copy()
        one_more[0][pixel], missed[0][pixel] = True, -1.0  # below every good pixel
        assert pixel_metrics(missed, one_more)["aupro"] == pytest.approx(expected)


def test_half_precision_tensors_are_taken():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 2:4] = True
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        assert pixel_metrics(maps.to(dtype), masks) == pixel_metrics(maps.to(dtype).float(), masks)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"scores hold NaN \(1 of 3 values\)"):
        image_metrics([0.0, float("nan"), 1.0], [0, 1, 1])
    with pytest.raises(ValueError, match="scores hold NaN"):
        ood_metrics([0.0, float("nan")], [1.0])
    with pytest.raises(ValueError, match="maps hold NaN"):
        pixel_metrics(np.full((1, 2, 2), np.nan), np.eye(2, dtype=bool)[None])
    with pytest.raises(ValueError, match=r"differ in shape: \(2,\) and \(3,\)"):
        image_metrics([0.0, 1.0], [0, 1, 1])
    with pytest.raises(ValueError, match=r"expected \(B, H, W\)"):
        pixel_metrics(np.zeros((2, 2)), np.eye(2, dtype=bool))
    with pytest.raises(ValueError, match="max_fpr is 0: expected"):
        pixel_metrics(np.zeros((1, 2, 2)), np.eye(2, dtype=bool)[None], max_fpr=0)
