"""The kernels as opaque PyTorch operators, closed under differentiation.

With ``A(p)`` the convolution of the packed vector p and ``G(x, g)`` its packed gradient,

- ``A(p)^T = s A'(p)``, the same operator with padding ``d(K-1) - padding``;
- ``<v, G(x, g)> = <g, A(v) x>``, so the derivatives of G are ``A(v) x`` and ``s A'(v) g``:

two operators, whose autograd formulas name each other, give derivatives of any order. On the CPU
they compute the reference, unless Triton's interpreter is on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import autotune, launch, reference
from .geometry import Geometry, is_channels_last
from .packing import SIGNS, Layout, expand, expand_centre
from .paths import why_reference


@custom_op("triton_tied::conv", mutates_args=())
def conv(
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
        autotune.record(
            "conv", layout, geometry, "unpacked" if centre is not None else "gathered", x
        )
        y = reference.convolve(
            x, expand(packed, layout), bias, geometry, groups, "zeros", alpha, residual
        )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return y.clone(memory_format=memory_format)
    packed = packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments = (
        x, packed, centre, bias, residual, layout, geometry, alpha, channels_last
    )  # fmt: skip
    form = (
        packed.data_ptr() % 16,
        bias is None,
        None if residual is None else residual.stride(),
        channels_last,
    )
    config = autotune.conv_config(
        x, layout, geometry, centre is not None,
        lambda config: launch.conv_call(*arguments, config)[0].fault(), form,
    )  # fmt: skip
    return launch.conv(*arguments, config)


@custom_op("triton_tied::weight_grad", mutates_args=())
def weight_grad(
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
    """The gradient of ``packed`` in :func:`conv` for the output gradient ``grad``, packed."""
    layout, geometry = _describe(x, kernel_size, padding, dilation, groups, symmetry)
    if circular:
        x, geometry = _wrap(x, geometry)
    if why_reference(x.device, x.dtype):
        autotune.record("weight_grad", layout, geometry, "none", x, grad)
        return reference.weight_grad(x, grad, layout, geometry, alpha)
    arguments = (x, grad, layout, geometry, alpha)
    config = autotune.weight_grad_config(
        x, grad, layout, geometry,
        lambda config: launch.weight_grad_call(*arguments, config)[0].fault(),
    )  # fmt: skip
    return launch.weight_grad(*arguments, config)


@custom_op("triton_tied::unpack_centre", mutates_args=())
def unpack_centre(packed: Tensor, c: int, groups: int, pairs: int, symmetry: str) -> Tensor:
    """The centre tap ``(groups, c, c)`` of a packed vector with ``c`` channels in each group."""
    layout = Layout(c * groups, (2 * pairs + 1,), groups, symmetry)
    if why_reference(packed.device, packed.dtype):
        return expand_centre(packed, layout).clone()
    return launch.unpack_centre(packed.contiguous(), layout, packed.dtype)


def _describe(
    x: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
) -> tuple[Layout, Geometry]:
    arguments = (tuple(padding), tuple(dilation), tuple(kernel_size), groups, symmetry)
    return _make(x.shape[1], *arguments)


@lru_cache(maxsize=4096)
def _make(
    channels: int,
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    kernel_size: tuple[int, ...],
    groups: int,
    symmetry: str,
) -> tuple[Layout, Geometry]:
    return Layout(channels, kernel_size, groups, symmetry), _walk(padding, dilation)


def _walk(padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    before_w, after_w, before_h, after_h = padding
    pairs = ((before_h, after_h), (before_w, after_w))
    return Geometry((1, 1), pairs, tuple(dilation))


def _wrap(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """A copy with a wrapped border, in the memory format of x."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return reference.pad(x, geometry, "circular")
    # F.pad writes contiguous memory: let that be (N, H, W, C).
    volume = x.permute(0, 2, 3, 1).unsqueeze(1)
    wrapped = F.pad(volume, [0, 0, *geometry.flat_padding], mode="circular")
    return wrapped.squeeze(1).permute(0, 3, 1, 2), replace(geometry, padding=((0, 0), (0, 0)))


# ---- what is known without running: shapes, strides, operations


@conv.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    kernel_size, padding, dilation, _, _, _, _, channels_last = arguments[4:]
    sizes = _walk(padding, dilation).output_size(x.shape[2:], kernel_size)
    return launch.empty_image((x.shape[0], x.shape[1], *sizes), x, channels_last)


@weight_grad.register_fake
def _(x: Tensor, grad: Tensor, kernel_size: Sequence[int], *arguments: Any) -> Tensor:
    _, _, groups, symmetry, _, _ = arguments
    return x.new_empty(Layout(int(x.shape[1]), tuple(kernel_size), groups, symmetry).size)


@unpack_centre.register_fake
def _(packed: Tensor, c: int, groups: int, pairs: int, symmetry: str) -> Tensor:
    return packed.new_empty(groups, c, c)


def _flops(output_shape: Sequence[int], kernel_size: Sequence[int], groups: int) -> int:
    """A product and a sum for each output pixel, tap and pair of channels."""
    channels = output_shape[1]
    return 2 * math.prod(output_shape) * math.prod(kernel_size) * channels // groups


@register_flop_formula(torch.ops.triton_tied.conv)
def _(*arguments: Any, out_shape: Sequence[int], **_: Any) -> int:
    kernel_size, _, _, groups = arguments[5:9]
    return _flops(out_shape, kernel_size, groups)


@register_flop_formula(torch.ops.triton_tied.weight_grad)
def _(*arguments: Any, **_: Any) -> int:
    _, grad_shape, kernel_size, _, _, groups = arguments[:6]
    return _flops(grad_shape, kernel_size, groups)


# ---- derivatives, of any order


def _adjoint(
    x: Tensor, grad: Tensor, packed: Tensor, centre: Tensor | None, options: Sequence[Any]
) -> Tensor:
    """The transposed convolution of ``grad``, in the memory format of x."""
    kernel_size, padding, dilation, groups, symmetry, circular, alpha = options
    if not circular:  # a wrapped border stays as it is
        padding = _walk(padding, dilation).transposed(kernel_size).flat_padding
    return apply(
        conv, grad, packed, centre, None, None, kernel_size, padding, dilation, groups, symmetry,
        circular, SIGNS[symmetry] * alpha, is_channels_last(2, x),
    )  # fmt: skip


def _keep_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, centre, _, _, *options, _ = inputs
    ctx.save_for_backward(x, packed, centre)
    ctx.options = options


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, packed, centre = ctx.saved_tensors
    needs_x, needs_packed, _, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    alpha = ctx.options[-1]
    return (
        _adjoint(x, grad, packed, centre, ctx.options) if needs_x else None,
        apply(weight_grad, x, grad, *ctx.options) if needs_packed else None,
        None,
        grad.sum((0, 2, 3)) * alpha if needs_bias else None,
        grad if needs_residual else None,
        *(None,) * 8,
    )


def _keep_weight_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, grad, *options = inputs
    ctx.save_for_backward(x, grad)
    ctx.options = options


def _weight_grad_backward(ctx: Any, direction: Tensor) -> tuple:
    x, grad = ctx.saved_tensors
    needs_x, needs_grad, *_ = ctx.needs_input_grad
    along_x = along_grad = None
    if needs_x:
        along_x = _adjoint(x, grad, direction, None, ctx.options)
    if needs_grad:
        channels_last = is_channels_last(2, grad)
        along_grad = apply(conv, x, direction, None, None, None, *ctx.options, channels_last)
    return along_x, along_grad, *(None,) * 7


conv.register_autograd(_conv_backward, setup_context=_keep_conv)
weight_grad.register_autograd(_weight_grad_backward, setup_context=_keep_weight_grad)


# ---- vmap: over images it is a larger batch, over weights one call after another


def _vmap_conv(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    x, packed, centre, bias, residual, *options = arguments
    if any(dim is not None for dim in in_dims[1:4]) or in_dims[0] is None:
        return _one_by_one(conv, info, in_dims, arguments)
    x = x.movedim(in_dims[0], 0)
    batch = x.shape[:2]
    if residual is not None:
        residual = _expand_batch(residual, in_dims[4], batch[0]).flatten(0, 1)
    y = apply(conv, x.flatten(0, 1), packed, centre, bias, residual, *options)
    return y.unflatten(0, batch), 0


def _vmap_weight_grad(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    return _one_by_one(weight_grad, info, in_dims, arguments)


def _one_by_one(
    operator: Callable, info: Any, in_dims: tuple, arguments: tuple
) -> tuple[Tensor, int]:
    def slice_of(i: int) -> list:
        pairs = zip(arguments, in_dims, strict=True)
        return [a if not isinstance(a, Tensor) or d is None else a.select(d, i) for a, d in pairs]

    return torch.stack([apply(operator, *slice_of(i)) for i in range(info.batch_size)]), 0


def _expand_batch(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


conv.register_vmap(_vmap_conv)
weight_grad.register_vmap(_vmap_weight_grad)


# ---- torch.func: it takes no operator's registered formula, only an autograd.Function


def refuse_forward_mode(ctx: Any = None, *_: Any) -> Any:
    """An opaque operator would drop a tangent without a word."""
    raise NotImplementedError(
        "forward-mode automatic differentiation is not implemented for the kernels; "
        "triton_tied.reference has it, on every device"
    )


class _Conv(torch.autograd.Function):
    forward = staticmethod(lambda *arguments: conv(*arguments))
    setup_context = staticmethod(_keep_conv)
    backward = staticmethod(_conv_backward)
    jvp = staticmethod(refuse_forward_mode)
    vmap = staticmethod(_vmap_conv)


class _WeightGrad(torch.autograd.Function):
    forward = staticmethod(lambda *arguments: weight_grad(*arguments))
    setup_context = staticmethod(_keep_weight_grad)
    backward = staticmethod(_weight_grad_backward)
    jvp = staticmethod(refuse_forward_mode)
    vmap = staticmethod(_vmap_weight_grad)


_FUNCTIONS: dict[Callable, type[torch.autograd.Function]] = {conv: _Conv, weight_grad: _WeightGrad}


def apply(operator: Callable, *arguments: Any) -> Tensor:
    """The operator, in the form that a ``torch.func`` transform takes where one is active."""
    if torch._C._are_functorch_transforms_active():
        return _apply_function(operator, *arguments)
    return operator(*arguments)


@torch.compiler.disable(reason="the compiler cannot trace an autograd.Function of this operator")
def _apply_function(operator: Callable, *arguments: Any) -> Tensor:
    return _FUNCTIONS[operator].apply(*arguments)
