"""Weights that are made once and passed to the functions instead of ``packed``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import takes_operators
from .functional import compute_dtype
from .operators.prepare_packed import weights_of
from .packing import (
    SUPPORTED_DTYPES,
    PreparedWeight,
    Symmetry,
    dense_weight,
    make_layout,
    numbers_of,
    wants_channels_last,
)
from .tracing import overridable


@overridable
def prepare(
    packed: Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> PreparedWeight:
    """What the convolutions make of ``packed`` before they start, made once for many of them.

    The result takes the place of ``packed`` in ``tied_conv1d``, ``tied_conv2d``, ``tied_conv3d``
    and ``unpack``, and in ``reference``, with the same other arguments. It is differentiable: the
    gradients of all applications meet in it and reach ``packed`` as one, in each of any number of
    backwards. It is a value: after a change of ``packed`` prepare it again.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``.
        dtype: of the convolutions; by default that of ``packed``, or autocast's.
        memory_format: of the images; the dense weight, where one is made, is written in this order.
            With images in the other it is copied on each application.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; a dtype that is not supported.

    Examples:
        >>> packed = torch.randn(packed_size(8, 3))
        >>> weight = prepare(packed, 8, 3)
        >>> y = tied_conv2d(torch.randn(1, 8, 5, 5), weight, kernel_size=3)
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    channels_last = wants_channels_last(layout, memory_format)
    numbers = numbers_of("prepare", packed, layout)
    dtype = compute_dtype(numbers) if dtype is None else dtype
    if dtype not in SUPPORTED_DTYPES:
        raise NotImplementedError(f"prepare is not implemented for dtype {dtype}")
    if takes_operators(numbers.device, dtype, (1,) * len(layout.kernel_size)):
        # The kernels read its memory, which is not to change with that of packed.
        copy = numbers.to(dtype, copy=True)
        return PreparedWeight(layout, copy, weights=weights_of(copy, layout, dtype))
    cast = numbers.to(dtype)
    dense = dense_weight(cast, layout, dtype, channels_last)
    return PreparedWeight(layout, cast, dense, channels_last)
