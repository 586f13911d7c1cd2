"""The description of a plain call: all that the way from its arguments to a launch depends on.

The long way checks the arguments, and decides between paths, padding modes, memory formats and
configs, all by what the description holds: the tensors' sizes, strides, alignment, dtypes and
devices, the options, autocast, PyTorch's setting for products of float32. What it decided is
remembered under the description as one key, see :func:`.kernel_path.repeat`. Whether a config may
be taken still is asked each time, see :class:`.select.Choice`.

Only a plain call has one, which nobody but the kernels sees; see :func:`.tracing.is_plain_here`.
"""

from __future__ import annotations

import marshal
from typing import Any

from torch import Tensor

from ..kernels.precision import input_precision
from ..packing import PreparedWeight
from ..tracing import autocast_dtype, is_plain, is_plain_here


def key_of(
    dims: int,
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
) -> tuple | None:
    """The description of a call over so many dimensions, or None where it has none: it is not
    plain, or an option is neither number nor string nor a tuple or list of them."""
    if not is_plain_here() or input is None or packed is None:
        return None
    numbers: Any = packed
    prepared = None
    if type(packed) is PreparedWeight:
        numbers, weights = packed.packed, packed.weights
        if weights is None:
            return None
        prepared = (packed.layout, weights.shape, weights.dtype, weights.data_ptr() % 16)
    for tensor in (input, numbers, bias, residual):
        if tensor is not None and not is_plain(tensor):
            return None
    try:
        autocast = autocast_dtype(input.device.type)
        return (
            dims, marshal.dumps(options), prepared,  # bytes tell True from 1, though they are equal
            input.shape, input.stride(), input.dtype, input.device, input.data_ptr() % 16,
            numbers.shape, numbers.stride(), numbers.dtype, numbers.device, numbers.data_ptr() % 16,
            None if bias is None else _place_of(bias),
            None if residual is None else _place_of(residual),
            autocast, input_precision(autocast or input.dtype),
        )  # fmt: skip
    except (ValueError, RuntimeError):  # another kind of object, or without strides
        return None


def may_be_kept(options: tuple[Any, ...]) -> bool:
    """Whether a description holds them in full: numbers and strings. Of others, as NumPy's numbers
    are, it may have the bytes and not the type, which would let wrong ones pass later on."""
    return all(_is_kept_in_full(option) for option in options)


def _is_kept_in_full(option: Any) -> bool:
    if type(option) in (tuple, list):
        return all(type(number) is int for number in option)
    return type(option) in (int, str)


def _place_of(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16
