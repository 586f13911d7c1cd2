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

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..kernels.precision import input_precision
from ..packing import PreparedWeight
from ..tracing import autocast_dtype, is_plain_here

_PLAIN = (Tensor, torch.nn.Parameter)


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
    if not is_plain_here():
        return None
    prepared: Any = None
    if type(packed) is PreparedWeight:
        prepared, packed = packed, packed.packed
        if prepared.weights is None:
            return None
        prepared = (prepared.layout, prepared.weights.shape, prepared.weights.data_ptr() % 16)
    key: list[Any] = [dims, prepared]
    try:
        key.append(marshal.dumps(options))  # which tells True from 1, though they are equal
        for tensor in (input, packed, bias, residual):
            if tensor is None:
                key.append(None)
            elif type(tensor) in _PLAIN and not is_legacy_batchedtensor(tensor):
                key += tensor.shape, tensor.stride(), tensor.dtype, tensor.device
                key.append(tensor.data_ptr() % 16)
            else:
                return None
        dtype = autocast_dtype(input.device.type)
    except (ValueError, RuntimeError):  # another kind of object; a tensor without strides
        return None
    key += dtype, input_precision(dtype or input.dtype)
    return tuple(key)
