"""The ablation study's table, and the backbone that remembers; the study itself takes minutes."""

import torch
from torch import nn

from benchmarks import ablation


def test_every_row_has_its_figures_in_percent_and_a_dash_without():
    rows = {name: {"image_auroc": 0.9, "pixel_auroc": 0.956} for name in (*ablation.TRAINED, *ablation.SCORED)}
    lines = ablation.table(rows).splitlines()
    assert lines[0] == "|  | image AUROC | pixel AUROC | AUPRO |"
    assert lines[2] == "| DPDiff-AD | 90.0 | 95.6 | - |"
    assert len(lines) == 2 + len(rows)


def test_the_same_batches_in_turn_are_computed_once():
    calls = []
    backbone = nn.Module()
    backbone.forward = lambda images: calls.append(images) or [images + 1]
    remembered = ablation.Remembered(backbone)
    for _ in range(3):
        remembered.batch = 0
        assert [remembered(torch.tensor(float(i)))[0].item() for i in range(2)] == [1, 2]
    assert len(calls) == 2
