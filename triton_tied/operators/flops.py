"""The operators' FLOPs, for PyTorch's ``FlopCounterMode``.

Its module imports Triton, which is slow: so it is told when it is there and counts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..packing import Layout


def tell_counters() -> None:
    """Tells PyTorch's counter the formulas, and the counters that are counting now."""
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    counting = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    for counter in (flop_counter, *counting):
        registry = getattr(counter, "flop_registry", {})
        for operator, formula in _FORMULAS.items():
            registry.setdefault(operator, flop_counter.shape_wrapper(formula))


def _conv_flops(
    x_shape: Sequence[int],
    packed_shape: Sequence[int],
    weights_shape: Sequence[int] | None,
    bias_shape: Sequence[int] | None,
    residual_shape: Sequence[int] | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *others: Any,
    out_shape: Sequence[int],
    **options: Any,
) -> int:
    return _flops(out_shape, kernel_size, groups)


def _weight_grad_flops(
    x_shape: Sequence[int],
    grad_shape: Sequence[int],
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *others: Any,
    **options: Any,
) -> int:
    return _flops(grad_shape, kernel_size, groups)


def _flops(output_shape: Sequence[int], kernel_size: Sequence[int], groups: int) -> int:
    images, channels, *sides = output_shape
    return Layout(channels, tuple(kernel_size), groups).flops(images * math.prod(sides))


_FORMULAS: dict[object, Callable[..., int]] = {
    torch.ops.triton_tied.conv: _conv_flops,
    torch.ops.triton_tied.weight_grad: _weight_grad_flops,
}

tell_counters()
