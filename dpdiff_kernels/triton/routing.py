"""Routes on a GPU: which prototypes each image's active groups name, as lists that kernels walk without the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpdiff_kernels.triton.launch import ceil_div, launch

_BLOCK = 1024


def active_mask(groups: Tensor, active_groups: Tensor) -> Tensor:
    """groups (M,), active_groups (B, G) int64 -> (B, M) bool: whether the image uses the prototype."""
    batch, n_active = active_groups.shape
    mask = torch.empty(batch, groups.shape[0], dtype=torch.bool, device=groups.device)
    if mask.numel():
        grid = (batch * ceil_div(groups.shape[0], _BLOCK),)
        launch(mark_kernel)[grid](
            groups.contiguous(), active_groups.contiguous(), mask, groups.shape[0], n_active, BLOCK=_BLOCK
        )
    return mask


def active_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (B, M) bool -> the columns that are true, ascending, (B, M) int32, and how many there are, (B,) int32.

    What comes after them in a row is undefined.
    """
    lists = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    counts = torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device)
    if mask.shape[0]:
        launch(compact_kernel)[(mask.shape[0],)](mask, lists, counts, mask.shape[1], BLOCK=_BLOCK)
    return lists, counts


@triton.jit
def mark_kernel(groups, active_groups, mask, n_prototypes, n_active, BLOCK: tl.constexpr):
    """One program for BLOCK prototypes of an image."""
    blocks = tl.cdiv(n_prototypes, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(groups + m, mask=m < n_prototypes, other=-1)
    active = tl.zeros([BLOCK], tl.int1)
    for i in range(n_active):
        active = active | (group == tl.load(active_groups + image * n_active + i))
    tl.store(mask + image * n_prototypes + m, active & (group >= 0), mask=m < n_prototypes)


@triton.jit
def compact_kernel(mask, lists, counts, n_prototypes, BLOCK: tl.constexpr):
    """One program for an image."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.int32)
    for first in range(0, n_prototypes, BLOCK):
        m = first + tl.arange(0, BLOCK)
        active = tl.load(mask + image * n_prototypes + m, mask=m < n_prototypes, other=0).to(tl.int32)
        place = count + tl.cumsum(active) - 1
        tl.store(lists + image * n_prototypes + place, m, mask=active != 0)
        count += tl.sum(active)
    tl.store(counts + image, count)
