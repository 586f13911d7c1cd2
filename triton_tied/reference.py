"""The tied convolutions in plain PyTorch, unpack then ``F.conv``: the definition of right.

    output = alpha * (conv(input, unpack(packed)) + bias) + beta * residual

Every argument is as in ``triton_tied.tied_conv2d``, which checks them; here PyTorch's own checks
apply, and that of the packed vector's length, and a negative padding crops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .geometry import Geometry, IntOrInts, Padding, PaddingMode, per_axis, resolve
from .memory_format import plainly_strided
from .packing import (
    Layout,
    PreparedWeight,
    Symmetry,
    dense_weight,
    expand,
    fold,
    numbers_of,
)
from .tracing import overridable

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLUTION_WEIGHT_GRADS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    padding_mode: str = "zeros",
    alpha: float | Tensor = 1.0,
    residual: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """``alpha * (conv(input, weight) + bias) + beta * residual`` with a dense weight."""
    padding = geometry.symmetric_padding
    if padding_mode != "zeros" or padding is None:
        input, geometry = pad(input, geometry, padding_mode)
        padding = (0,) * len(geometry.stride)
    dims = len(geometry.stride)
    output = _CONVOLUTIONS[dims](
        plainly_strided(dims, input),
        weight,
        bias,
        geometry.stride,
        padding,
        geometry.dilation,
        groups,
    )
    return add_scaled(output, alpha, residual, beta)


def add_scaled(
    output: Tensor, alpha: float | Tensor, residual: Tensor | None, beta: float
) -> Tensor:
    """``alpha * output + beta * residual``; where beta is 0 the residual's values do not matter and
    its gradient is zero, as ``torch.addmm`` has it."""
    if residual is None or beta == 0:
        scaled = output * alpha if isinstance(alpha, Tensor) or alpha != 1.0 else output
        if residual is None:
            return scaled
        return torch.where(torch.ones((), dtype=torch.bool, device=output.device), scaled, residual)
    if isinstance(alpha, Tensor) or beta != 1.0:
        return torch.add(output * alpha, residual, alpha=beta)
    return residual.add(output, alpha=alpha)


def pad(input: Tensor, geometry: Geometry, padding_mode: str) -> tuple[Tensor, Geometry]:
    """A padded (or cropped) copy of the input, and the geometry that is left to the convolution."""
    mode = "constant" if padding_mode == "zeros" else padding_mode
    unpadded = replace(geometry, padding=((0, 0),) * len(geometry.stride))
    return F.pad(input, geometry.flat_padding, mode=mode), unpadded


def weight_grad(
    input: Tensor, grad: Tensor, layout: Layout, geometry: Geometry, alpha: float
) -> Tensor:
    """The gradient of the packed vector in ``alpha * conv(input, expand(packed))``."""
    return fold(dense_weight_grad(input, grad, layout, geometry), layout) * alpha


def dense_weight_grad(input: Tensor, grad: Tensor, layout: Layout, geometry: Geometry) -> Tensor:
    """The gradient of the dense weight in ``conv(input, weight)``."""
    padded, unpadded = pad(input, geometry, "zeros")
    return _CONVOLUTION_WEIGHT_GRADS[len(geometry.stride)](
        padded,
        layout.weight_shape,
        grad,
        unpadded.stride,
        (0,) * len(geometry.stride),
        unpadded.dilation,
        layout.groups,
    )


def _tied_conv(
    dims: int,
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    symmetry: Symmetry = "self_adjoint",
    alpha: float | Tensor = 1.0,
    residual: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    kernel = per_axis("kernel_size", kernel_size, dims)
    layout = Layout(input.shape[-dims - 1], kernel, groups, symmetry)
    geometry = resolve(kernel, stride, padding, dilation)
    if isinstance(packed, PreparedWeight):
        weight = dense_weight(packed.checked(layout), layout, packed.packed.dtype, False)
    else:
        numbers = numbers_of(f"reference.tied_conv{dims}d", packed, layout)
        weight = expand(numbers, layout)
    return convolve(input, weight, bias, geometry, groups, padding_mode, alpha, residual, beta)


@overridable
def tied_conv1d(
    input: Tensor, packed: Tensor | PreparedWeight, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """``triton_tied.tied_conv1d`` in plain PyTorch."""
    return _tied_conv(1, input, packed, bias, **options)


@overridable
def tied_conv2d(
    input: Tensor, packed: Tensor | PreparedWeight, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """``triton_tied.tied_conv2d`` in plain PyTorch."""
    return _tied_conv(2, input, packed, bias, **options)


@overridable
def tied_conv3d(
    input: Tensor, packed: Tensor | PreparedWeight, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """``triton_tied.tied_conv3d`` in plain PyTorch."""
    return _tied_conv(3, input, packed, bias, **options)
