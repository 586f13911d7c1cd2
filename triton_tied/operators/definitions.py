"""The kernels as opaque PyTorch operators: what they compute, and their shapes.

Each operator is a plain function under a name that the compiler, the exporter and PyTorch's modes
know it by. In eager mode the function is called itself, which takes a third of the time.

On the CPU they compute the reference, unless Triton's interpreter is on. Their derivatives are in
:mod:`.autograd_and_vmap`. Triton is imported when the first kernel is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from .. import reference
from ..dispatch import why_reference
from ..geometry import Geometry
from ..kernels.precision import input_precision
from ..kernels.stored_taps import are_matrices, expand_matrices, stored_taps
from ..memory_format import Memory, empty_image
from ..packing import Layout, check_symmetry, expand

if TYPE_CHECKING:
    from ..autotune.choices import Known
    from ..kernels.base_config import Kernel


def compute_conv(
    x: Tensor,
    packed: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    beta: float,
    channels_last: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """``alpha * (conv2d(x, unpack(packed)) + bias) + beta * residual``, stride 1.

    Args:
        x: ``(N, C, H, W)`` of any strides.
        packed: ``(packed_size(C, kernel_size, groups, symmetry),)``, of any dtype.
        weights: what :func:`read_weights` makes of ``packed``, or None to make it now. It is
            derived, so the gradient goes to ``packed`` alone.
        bias: ``(C,)`` of any dtype, or None. residual: of the output's shape, or None.
        kernel_size, dilation: two numbers.
        padding: four numbers of any sign, in the order of ``F.pad``: before and after for width,
            then for height.
        circular: wrap the border; only with an odd kernel and padding that keeps the size.
        channels_last: the memory format of the result.
        dtype: of the result; None: that of ``x``, in which products are made.
    """
    return compute_known(
        x, packed, weights, bias, residual, kernel_size, padding, dilation, groups, symmetry,
        circular, alpha, beta, channels_last, dtype, None,
    )  # fmt: skip


conv = custom_op("triton_tied::conv", mutates_args=())(compute_conv)


def compute_known(
    x: Tensor,
    packed: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    beta: float,
    channels_last: bool,
    dtype: torch.dtype | None,
    known: Known | None,
) -> Tensor:
    """:func:`compute_conv` for a call of a description of which something is known."""
    if known is None:
        layout, geometry = _describe(x, kernel_size, padding, dilation, groups, symmetry)
    else:
        layout, geometry = known.layout, known.geometry
    if circular:
        x, geometry = _wrap(x, geometry)
    if known is not None or why_reference(x.device, x.dtype) is None:
        select, launch, calls = _kernels()
        weights = weights_for(x.dtype, packed, layout, weights)
        bias = None if bias is None else bias.contiguous()
        convolution = calls.Convolution(
            x, packed, weights, bias, residual, layout, geometry, alpha, beta, channels_last,
            dtype=dtype,
        )  # fmt: skip
        plan = select.conv_plan(convolution, known)
        if plan is not None:
            return launch.run(plan, convolution)
    else:
        output: Memory = "channels_last" if channels_last else "contiguous"
        parameters = (packed if bias is None else bias).dtype
        _record("conv", layout, geometry, [x], output, parameters, dtype)
    weight = expand(packed, layout).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = reference.convolve(x, weight, bias, geometry, groups, "zeros", alpha, residual, beta)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return y.to(dtype or x.dtype, memory_format=memory, copy=True)


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
    dtype: torch.dtype,
    has_bias: bool,
) -> Tensor:
    """The gradient of ``packed`` in :func:`compute_conv`, for the output gradient ``grad``, in
    ``dtype``; with ``has_bias`` followed by that of the bias."""
    return compute_known_gradient(
        x, grad, kernel_size, padding, dilation, groups, symmetry, circular, alpha, dtype, has_bias,
        None,
    )  # fmt: skip


weight_grad = custom_op("triton_tied::weight_grad", mutates_args=())(compute_weight_grad)


def compute_known_gradient(
    x: Tensor,
    grad: Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    dtype: torch.dtype,
    has_bias: bool,
    known: Known | None,
) -> Tensor:
    """:func:`compute_weight_grad`, as :func:`compute_known`."""
    if known is None:
        layout, geometry = _describe(x, kernel_size, padding, dilation, groups, symmetry)
    else:
        layout, geometry = known.layout, known.geometry
    if circular:
        x, geometry = _wrap(x, geometry)
    if known is not None or why_reference(x.device, x.dtype) is None:
        select, launch, calls = _kernels()
        gradient = calls.WeightGradient(x, grad, layout, geometry, alpha, dtype, has_bias)
        plan = select.weight_grad_plan(gradient, known)
        if plan is not None:
            return launch.run(plan, gradient)
    else:
        _record("weight_grad", layout, geometry, [x, grad], "channels_last", None, dtype)
    parts = [reference.weight_grad(x, grad, layout, geometry, alpha)]
    if has_bias:
        parts.append(grad.sum((0, 2, 3)) * alpha)
    return torch.cat(parts).to(dtype)


@cache
def _kernels() -> tuple[Any, Any, Any]:
    """What imports Triton. (An import statement costs more than a call of this.)"""
    from ..autotune import select
    from ..kernels import calls, launch

    return select, launch, calls


def read_weights(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """What the kernels read of a weight for a convolution in ``dtype``: ``packed`` in that dtype,
    or the matrices of its first taps."""
    precision = input_precision(dtype)
    if not are_matrices(layout, precision):
        return packed.to(dtype).contiguous()
    from ..autotune import first_use
    from ..kernels import launch

    stored = stored_taps(layout, precision)
    if first_use.unpacks_matrices(packed, layout, dtype):
        return launch.unpack_matrices(packed.contiguous(), layout, stored, dtype, precision)
    return expand_matrices(packed, layout, stored, dtype, precision)


def weights_for(
    dtype: torch.dtype, packed: Tensor, layout: Layout, weights: Tensor | None
) -> Tensor:
    """The weights that were made before, or made now if there are none, or for another dtype, or if
    PyTorch's setting for products of float32 has changed since."""
    if weights is None or weights.dtype != dtype:
        return read_weights(packed, layout, dtype)
    if dtype != torch.float32:
        return weights
    precision = input_precision(dtype)
    stored = layout.pairs if weights.dim() == 1 else weights.shape[1]
    same = stored == stored_taps(layout, precision) and layout.pairs > 0
    return weights if same else read_weights(packed, layout, dtype)


def _record(
    kernel: Kernel, layout: Layout, geometry: Geometry, images: list[Tensor], output: Memory,
    parameters: torch.dtype | None, written: torch.dtype | None,
) -> None:  # fmt: skip
    """Notes a problem that a GPU would meet, where a block asked for it."""
    from ..autotune import recording  # with all that it needs, slow to import
    from ..autotune.problem import problem_of

    if recording.is_recording():
        recording.record(
            problem_of(kernel, layout, geometry, images, output, None, parameters, written)
        )


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
    weights: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetry: str,
    circular: bool,
    alpha: float,
    beta: float,
    channels_last: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    sizes = geometry_of(padding, dilation).output_size(x.shape[2:], kernel_size)
    return empty_image((x.shape[0], x.shape[1], *sizes), x, channels_last, dtype=dtype)


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
    dtype: torch.dtype,
    has_bias: bool,
) -> Tensor:
    layout = Layout(int(x.shape[1]), tuple(kernel_size), groups, check_symmetry(symmetry))
    return x.new_empty(layout.size + has_bias * layout.channels, dtype=dtype)
