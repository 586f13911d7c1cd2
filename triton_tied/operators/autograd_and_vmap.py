"""The operators' derivatives: they are closed under differentiation.

With ``A(p)`` the convolution of the packed vector p and ``G(x, g)`` its packed gradient,

- ``A(p)^T = s A'(p)``, the same operator with padding ``d(K-1) - padding``;
- ``<v, G(x, g)> = <g, A(v) x>``, so the derivatives of G are ``A(v) x`` and ``s A'(v) g``:

two operators, whose autograd formulas name each other, give derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory_format import is_channels_last
from ..packing import SIGNS
from .definitions import conv, geometry_of, weight_grad

_untraced: Callable[..., Tensor] | None = None


def apply(operator: Callable, *arguments: Any) -> Tensor:
    """The operator, in the form that a ``torch.func`` transform takes where one is active."""
    if torch._C._are_functorch_transforms_active():
        return _outside_the_compiler()(operator, *arguments)
    return operator(*arguments)


def _outside_the_compiler() -> Callable[..., Tensor]:
    """:func:`_apply_function`, not traced. Made on first use, since that imports the compiler."""
    global _untraced
    if _untraced is None:
        reason = "the compiler cannot trace an autograd.Function of this operator"
        _untraced = torch.compiler.disable(_apply_function, reason=reason)
    return _untraced


def _apply_function(operator: Callable, *arguments: Any) -> Tensor:
    return _FUNCTIONS[operator].apply(*arguments)


def refuse_forward_mode(ctx: Any = None, *_: Any) -> Any:
    """An opaque operator would drop a tangent without a word."""
    raise NotImplementedError(
        "forward-mode automatic differentiation is not implemented for the kernels; "
        "triton_tied.reference has it, on every device"
    )


# ---- reverse mode


def _adjoint(
    x: Tensor, grad: Tensor, packed: Tensor, centre: Tensor | None, options: Sequence[Any]
) -> Tensor:
    """The transposed convolution of ``grad``, in the memory format of x."""
    kernel_size, padding, dilation, groups, symmetry, circular, alpha = options
    if not circular:  # a wrapped border stays as it is
        padding = geometry_of(padding, dilation).transposed(kernel_size).flat_padding
    return apply(
        conv, grad, packed, centre, None, None, kernel_size, padding, dilation, groups, symmetry,
        circular, SIGNS[symmetry] * alpha, is_channels_last(2, x),
    )  # fmt: skip


def _keep_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, centre, _bias, _residual, *options, _channels_last = inputs
    ctx.save_for_backward(x, packed, centre)
    ctx.options = options


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, packed, centre = ctx.saved_tensors
    needs_x, needs_packed, _, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    alpha = ctx.options[-1]
    no_gradients = (None,) * (len(ctx.options) + 1)  # of the options and the memory format
    return (
        _adjoint(x, grad, packed, centre, ctx.options) if needs_x else None,
        apply(weight_grad, x, grad, *ctx.options) if needs_packed else None,
        None,
        grad.sum((0, 2, 3)) * alpha if needs_bias else None,
        grad if needs_residual else None,
        *no_gradients,
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
    return along_x, along_grad, *(None,) * len(ctx.options)


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


conv.register_autograd(_conv_backward, setup_context=_keep_conv)
weight_grad.register_autograd(_weight_grad_backward, setup_context=_keep_weight_grad)
conv.register_vmap(_vmap_conv)
weight_grad.register_vmap(_vmap_weight_grad)


# ---- torch.func: it takes no operator's registered formula, only an autograd.Function


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
