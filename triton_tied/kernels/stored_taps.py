"""Which taps of a weight a convolution reads as matrices in memory; the rest it derives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..packing import Layout, expand
from .precision import InputPrecision

# Of a group, from which on the centre is unpacked by a launch of its own: each program would gather
# more than one tile of it from its triangle, number by number. A guess until a GPU has timed it.
UNPACKED_FROM = 128
_TF32_STEP = 1 << 13  # of the bits of a float32, between neighbours in TF32


def stored_taps(layout: Layout, precision: InputPrecision) -> int:
    """How many taps are read as they lie in memory: the first ones of the kernel.

    - Half of them, which is what ``packed`` begins with. The centre is gathered from its triangle.
    - With the centre, unpacked.
    - All: products in TF32 want each matrix rounded, and its rows along the sum.
    """
    if precision == "tf32":
        return layout.taps
    if layout.group_channels >= UNPACKED_FROM:
        return layout.pairs + layout.taps % 2
    return layout.pairs


def are_matrices(layout: Layout, precision: InputPrecision) -> bool:
    """Whether the stored taps are more than what ``packed`` begins with."""
    return precision == "tf32" or stored_taps(layout, precision) > layout.pairs


def most_splits(layout: Layout, stored: int, block_k: int) -> int:
    """How many programs at most may share a sum: the steps of the shorter loop over taps."""
    taps = [stored, layout.pairs if stored < layout.taps else 0]
    return min((n for n in taps if n), default=0) * math.ceil(layout.group_channels / block_k) or 1


def expand_matrices(
    packed: Tensor, layout: Layout, stored: int, dtype: torch.dtype, precision: InputPrecision
) -> Tensor:
    """What :func:`.launch.unpack_matrices` makes, in plain PyTorch."""
    dense = expand(packed, layout).to(dtype)
    c, groups = layout.group_channels, layout.groups
    matrices = dense.reshape(groups, c, c, layout.taps).movedim(-1, 1)[:, :stored].contiguous()
    return _to_tf32(matrices) if precision == "tf32" else matrices


def _to_tf32(tensor: Tensor) -> Tensor:
    """float32 to the nearest TF32, ties away from zero."""
    rounded = (tensor.view(torch.int32) + _TF32_STEP // 2) & -_TF32_STEP
    return torch.where(tensor.isfinite(), rounded.view(torch.float32), tensor)
