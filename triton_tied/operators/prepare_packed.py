"""What the kernels derive from ``packed`` before they start."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cached_weights import derived_from, is_caching, is_open
from ..dispatch import why_reference
from ..packing import Layout, PreparedWeight
from ..tracing import is_plain
from .definitions import read_weights


def prepare(
    packed: Tensor | PreparedWeight, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``packed`` itself, to which the gradient goes, and what the kernels read of it."""
    if isinstance(packed, PreparedWeight):
        return packed.packed, packed.weights

    if not is_open():
        return packed, weights_of(packed, layout, dtype)

    def make() -> tuple[Tensor, Tensor | None]:
        # where the gradients of all applications meet
        shared = packed.view_as(packed) if is_caching(packed) else packed
        return shared, weights_of(packed, layout, dtype)

    return derived_from(packed, (layout, _setting(dtype), "kernels"), make)


def weights_of(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor | None:
    """What the kernels read in a convolution in ``dtype``; None where the operator makes it. It is
    derived from packed, so that no gradient goes through it; saved, it serves the backward too."""
    if not _has_numbers(packed) or why_reference(packed.device, dtype):
        return None
    return read_weights(packed.detach(), layout, dtype)


def _has_numbers(packed: Tensor) -> bool:
    """Whether there are numbers to read: the compiler, a mode, a transform have none."""
    return not (
        torch.compiler.is_compiling()  # first: it cannot trace the others
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ) and is_plain(packed)


def _setting(dtype: torch.dtype) -> tuple:
    """What tells apart what is derived: the dtype, and whether products of float32 are TF32."""
    if dtype != torch.float32 or torch.compiler.is_compiling():
        return (dtype,)
    return dtype, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
