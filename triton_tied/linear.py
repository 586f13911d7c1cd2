"""The 1x1 case without spatial axes: a linear layer whose matrix is symmetric or antisymmetric."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .cached_weights import is_open
from .functional import check_groups, check_types, describe
from .packing import (
    Layout,
    PreparedWeight,
    Symmetry,
    check_symmetry,
    expected_length,
    tied_matrix,
    transposed_matrix,
)
from .tracing import PLAIN_TENSORS, autocast_dtype, is_plain_here, overridable

_MAX_PASSED = 4096  # descriptions that are kept; inputs of ever new sizes must not fill the memory
_passed: dict[tuple, Layout] = {}


@overridable
def tied_linear(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """``x @ W.T + bias``, as ``F.linear``, with a symmetric or antisymmetric matrix W of which
    ``packed`` is the lower triangle: a tied convolution with one tap, on the last axis.

    It is plain PyTorch on every device. A matrix that is applied many times, as in a recurrent net,
    is made once inside a ``cached()`` block.

    Args:
        input: ``(..., C)``; float64, float32, float16 or bfloat16.
        packed: ``(packed_size(C, (1,), groups, symmetry),)``, of the dtype of ``input``; or what
            ``prepare`` made of it.
        bias: ``(C,)`` or None, of the dtype of ``input``.
        groups: divides C; W has so many blocks on its diagonal, each of them tied.
        symmetry: "self_adjoint" (symmetric) or "skew_adjoint" (antisymmetric).

    Returns:
        ``(..., C)``.

    Under autocast all tensors but float64 ones are cast to the autocast dtype, as in ``F.linear``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown symmetry; a weight that was prepared for another convolution.
        RuntimeError: sizes, dtypes or devices that do not fit; NotImplementedError for dtypes and
            layouts not supported.

    Examples:
        >>> packed = torch.randn(packed_size(8, (1,), symmetry="skew_adjoint"))
        >>> y = tied_linear(torch.randn(5, 8), packed, symmetry="skew_adjoint")
    """
    key = _key_of(input, packed, bias, groups, symmetry)
    layout = _passed.get(key) if key else None
    if layout is None:
        layout = _check(input, packed, bias, groups, symmetry)
        _remember(key, layout)
    if key and not isinstance(packed, PreparedWeight) and not is_open():
        transposed = transposed_matrix(packed, layout)
        if transposed is not None and bias is not None and input.dim() == 2:
            return torch.addmm(bias, input, transposed)  # F.linear would transpose it first
        if transposed is not None:
            return F.linear(input, transposed.mT, bias)
    matrix = tied_matrix(packed, layout)
    if layout.groups == 1:
        return F.linear(input, matrix, bias)
    blocks = matrix.view(layout.groups, layout.group_channels, layout.group_channels)
    grouped = input.unflatten(-1, (layout.groups, layout.group_channels))
    output = torch.einsum("...gi,goi->...go", grouped, blocks).flatten(-2)
    return output if bias is None else output + bias.to(output.dtype)


def _key_of(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    groups: int,
    symmetry: Symmetry,
) -> tuple | None:
    """The description of a call: all that its checks look at. None where the call is not plain, its
    options are of unusual types, or its dtypes differ, which autocast may allow."""
    if not (
        is_plain_here()  # first, since the compiler cannot look at the rest
        and type(input) in PLAIN_TENSORS
        and type(packed) in PLAIN_TENSORS
        and (bias is None or type(bias) in PLAIN_TENSORS)
        and type(groups) is int  # True is equal to 1
        and type(symmetry) is str
        and not is_legacy_batchedtensor(packed)
    ):
        return None
    dtype = input.dtype
    if packed.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return None
    try:
        return (
            groups, symmetry, dtype, input.shape, input.device, input.layout,
            packed.shape, packed.device, packed.layout,
            None if bias is None else (bias.shape, bias.device, bias.layout),
        )  # fmt: skip
    except RuntimeError:  # a nested tensor has no shape
        return None


def _remember(key: tuple | None, layout: Layout) -> None:
    """What passed the checks need not be checked again."""
    if key is None:
        return
    if len(_passed) >= _MAX_PASSED:
        _passed.clear()
    _passed[key] = layout


def _check(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    groups: int,
    symmetry: Symmetry,
) -> Layout:
    """All that needs no values."""
    numbers = packed.packed if isinstance(packed, PreparedWeight) else packed
    tensors = {"input": input, "packed": numbers}
    if bias is not None:
        tensors["bias"] = bias
    described = {name: describe("tied_linear", name, tensor) for name, tensor in tensors.items()}
    groups, symmetry = check_groups(groups), check_symmetry(symmetry)
    shape = list(described["input"].shape)
    if not shape:
        raise RuntimeError(
            f"expected input to tied_linear to be of size [..., channels], "
            f"but got input of size {shape}"
        )
    check_types(described, autocast_dtype(input.device.type))
    channels = shape[-1]
    if channels < 1 or channels % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected input{shape} to have a positive number of channels "
            f"divisible by {groups}, but got {channels} channels"
        )
    layout = Layout(channels, (1,), groups, symmetry)
    if isinstance(packed, PreparedWeight):
        packed.checked(layout)
    elif packed.shape != (layout.size,):
        raise RuntimeError(expected_length(layout, packed.shape))
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(
            f"Given weight of size {[channels, layout.group_channels]}, expected bias to be "
            f"1-dimensional with {channels} elements, but got bias of size {list(bias.shape)} "
            f"instead"
        )
    return layout
