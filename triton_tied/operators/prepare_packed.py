"""What the kernels derive from ``packed`` before they start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cached_weights import derived_from, is_caching
from ..packing import Layout, PreparedWeight
from .definitions import unpack_centre


def prepare(
    packed: Tensor | PreparedWeight,
    layout: Layout,
    dtype: torch.dtype,
    unpacking_pays: Callable[[], bool],
) -> tuple[Tensor, Tensor | None]:
    """``packed`` in the compute dtype; and its centre, unpacked, if that pays for a single
    convolution or if more may follow, else None."""
    if isinstance(packed, PreparedWeight):
        centre = packed.centre
        return packed.packed.to(dtype), None if centre is None else centre.to(dtype)
    reused = is_caching(packed)

    def make() -> tuple[Tensor, Tensor | None]:
        cast = packed.to(dtype)
        if reused:
            cast = cast.view_as(cast)  # where the gradients of all applications meet
        unpacks = _can_unpack(layout) and (reused or unpacking_pays())
        return cast, centre_of(cast, layout) if unpacks else None

    return derived_from(packed, (layout, dtype, "kernels"), make)


def centre_of(packed: Tensor, layout: Layout) -> Tensor | None:
    """The unpacked centre tap, if there is one. It is derived from packed, so that no gradient goes
    through it; saved, it serves the backward too."""
    if not _can_unpack(layout):
        return None
    c, groups = layout.group_channels, layout.groups
    return unpack_centre(packed.detach(), c, groups, layout.pairs, layout.symmetry)


def _can_unpack(layout: Layout) -> bool:
    """The tensors of a ``torch.func`` transform have no memory to unpack from, or to ask about."""
    return layout.taps % 2 == 1 and not torch._C._are_functorch_transforms_active()
