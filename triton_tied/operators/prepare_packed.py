"""What the kernels derive from ``packed`` before they start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cached_weights import derived_from, is_caching
from ..packing import Layout
from .definitions import unpack_centre


def prepare(
    packed: Tensor, layout: Layout, dtype: torch.dtype, unpacking_pays: Callable[[], bool]
) -> tuple[Tensor, Tensor | None]:
    """``packed`` in the compute dtype; and its centre, unpacked, if that pays for a single
    convolution or if more may follow, else None."""
    reused = is_caching()

    def make() -> tuple[Tensor, Tensor | None]:
        cast = packed.to(dtype)
        if layout.taps % 2 == 0 or torch._C._are_functorch_transforms_active():
            return cast, None
        if not reused and not unpacking_pays():
            return cast, None
        # Derived from packed, so no gradient goes through it; saved, it serves the backward too.
        c, groups = layout.group_channels, layout.groups
        return cast, unpack_centre(cast.detach(), c, groups, layout.pairs, layout.symmetry)

    return derived_from(packed, (layout, dtype, "kernels"), make)
