"""The kernels as opaque PyTorch operators: what they compute, and their shapes.

Each operator is a plain function under a name that the compiler, the exporter and PyTorch's modes
know it by. In eager mode the function is called itself, which takes a third of the time.

On the CPU they compute the reference, unless Triton's interpreter is on. Their derivatives are in
:mod:`.autograd_and_vmap`. Triton is imported when the first kernel is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from .. import reference
from ..autotune import recording
from ..autotune.problem import Centre
from ..dispatch import why_reference
from ..geometry import Geometry
from ..memory_format import empty_image
from ..packing import Layout, check_symmetry, expand, expand_centre


def compute_conv(
    x: Tensor,
    packed: Tensor,
    centre: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    channels_last: bool,
) -> Tensor:
    """``alpha * (conv2d(x, unpack(packed)) + bias) + residual``, stride 1.

    Args:
        x: ``(N, C, H, W)`` of any strides.
        packed: ``(packed_size(C, kernel_size, groups, symmetry),)``.
        centre: what :func:`unpack_centre` makes of ``packed``, or None to gather it on the way. It
            is derived, so the gradient goes to ``packed`` alone.
        bias: ``(C,)`` or None. residual: of the output's shape, or None.
        kernel_size, dilation: two numbers.
        padding: four numbers of any sign, in the order of ``F.pad``: before and after for width,
            then for height.
        circular: wrap the border; only with an odd kernel and padding that keeps the size.
        channels_last: the memory format of the result.
    """
    layout, geometry = _describe(x, kernel_size, padding, dilation, groups, symmetry)
    if circular:
        x, geometry = _wrap(x, geometry)
    if why_reference(x.device, x.dtype):
        way: Centre = "gathered" if centre is None else "unpacked"
        extras = recording.extras_of(bias, residual, channels_last)
        recording.record("conv", layout, geometry, way, x, extras=extras)
    else:
        from ..autotune import select
        from ..kernels import launch

        packed = packed.contiguous()
        bias = None if bias is None else bias.contiguous()
        convolution = launch.Convolution(
            x, packed, centre, bias, residual, layout, geometry, alpha, channels_last
        )
        plan = select.conv_plan(convolution)
        if plan is not None:
            return launch.run(plan, convolution)
    y = reference.convolve(
        x, expand(packed, layout), bias, geometry, groups, "zeros", alpha, residual
    )
    return y.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


conv = custom_op("triton_tied::conv", mutates_args=())(compute_conv)


def compute_weight_grad(
    x: Tensor,
    grad: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
) -> Tensor:
    """The gradient of ``packed`` in :func:`compute_conv`, for the output gradient ``grad``."""
    layout, geometry = _describe(x, kernel_size, padding, dilation, groups, symmetry)
    if circular:
        x, geometry = _wrap(x, geometry)
    if why_reference(x.device, x.dtype):
        recording.record("weight_grad", layout, geometry, "none", x, grad)
    else:
        from ..autotune import select
        from ..kernels import launch

        gradient = launch.WeightGradient(x, grad, layout, geometry, alpha)
        plan = select.weight_grad_plan(gradient)
        if plan is not None:
            return launch.run(plan, gradient)
    return reference.weight_grad(x, grad, layout, geometry, alpha)


weight_grad = custom_op("triton_tied::weight_grad", mutates_args=())(compute_weight_grad)


def compute_centre(packed: Tensor, c: int, groups: int, pairs: int, symmetry: str) -> Tensor:
    """The centre tap ``(groups, c, c)`` of a packed vector with ``c`` channels in each group."""
    layout = Layout(c * groups, (2 * pairs + 1,), groups, check_symmetry(symmetry))
    if why_reference(packed.device, packed.dtype) is None:
        from ..autotune import first_use
        from ..kernels import launch

        packed = packed.contiguous()
        if first_use.unpacks_centre(packed, layout):
            return launch.unpack_centre(packed, layout, packed.dtype)
    return expand_centre(packed, layout).clone()


unpack_centre = custom_op("triton_tied::unpack_centre", mutates_args=())(compute_centre)


def geometry_of(padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The geometry of an operator's arguments: stride 1, padding in the order of ``F.pad``."""
    before_w, after_w, before_h, after_h = padding
    pairs = ((before_h, after_h), (before_w, after_w))
    return Geometry((1, 1), pairs, tuple(dilation))


def _describe(
    x: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
) -> tuple[Layout, Geometry]:
    return _make(x.shape[1], tuple(kernel_size), tuple(padding), tuple(dilation), groups, symmetry)


@lru_cache(maxsize=4096)
def _make(
    channels: int,
    kernel_size: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    symmetry: str,
) -> tuple[Layout, Geometry]:
    return Layout(channels, kernel_size, groups, check_symmetry(symmetry)), geometry_of(
        padding, dilation
    )


def _wrap(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """A copy with a wrapped border, in the memory format of x."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return reference.pad(x, geometry, "circular")
    # F.pad writes contiguous memory: let that be (N, H, W, C).
    volume = x.permute(0, 2, 3, 1).unsqueeze(1)
    wrapped = F.pad(volume, [0, 0, *geometry.flat_padding], mode="circular")
    return wrapped.squeeze(1).permute(0, 3, 1, 2), replace(geometry, padding=((0, 0), (0, 0)))


@conv.register_fake
def _conv_shape(
    x: Tensor,
    packed: Tensor,
    centre: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    channels_last: bool,
) -> Tensor:
    sizes = geometry_of(padding, dilation).output_size(x.shape[2:], kernel_size)
    return empty_image((x.shape[0], x.shape[1], *sizes), x, channels_last)


@weight_grad.register_fake
def _weight_grad_shape(
    x: Tensor,
    grad: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
) -> Tensor:
    layout = Layout(int(x.shape[1]), tuple(kernel_size), groups, check_symmetry(symmetry))
    return x.new_empty(layout.size)


@unpack_centre.register_fake
def _unpack_centre_shape(packed: Tensor, c: int, groups: int, pairs: int, symmetry: str) -> Tensor:
    return packed.new_empty(groups, c, c)
