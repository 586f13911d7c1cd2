"""The operators' derivatives: they are closed under differentiation.

With ``A(p)`` the convolution of the packed vector p and ``G(x, g)`` its packed gradient,

- ``A(p)^T = s A'(p)``, the same operator with padding ``d(K-1) - padding``;
- ``<v, G(x, g)> = <g, A(v) x>``, so the derivatives of G are ``A(v) x`` and ``s A'(v) g``:

two operators, whose autograd formulas name each other, give derivatives of any order. Both are
linear in each factor, so in forward mode a tangent is one call of the same operator for each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from ..autotune.choices import Known, remember, remembered
from ..kernels.precision import input_precision
from ..memory_format import is_channels_last, memory_of
from ..packing import SIGNS
from ..tracing import is_plain, is_plain_here
from .definitions import (
    compute_known,
    compute_known_gradient,
    conv,
    geometry_of,
    weight_grad,
)

_TENSORS: dict[Callable, int] = {conv: 5, weight_grad: 2}  # so many first arguments, or None


def apply(operator: Callable, *arguments: Any) -> Tensor:
    """The operator; as an autograd.Function where a ``torch.func`` transform or forward mode asks
    for more than the reverse mode that an operator can register (not for the compiler, which can
    trace no such Function: it gets the reference there); and without PyTorch's dispatcher, which is
    slow to call, where nobody listens to it."""
    if torch._C._are_functorch_transforms_active() or _have_tangents(arguments):
        return _FUNCTIONS[operator].apply(*arguments)
    tensors, options = arguments[: _TENSORS[operator]], arguments[_TENSORS[operator] :]
    if _somebody_listens() or not all(t is None or is_plain(t) for t in tensors):
        return operator(*arguments)
    return (apply_known if operator is conv else _apply_known_gradient)(tensors, options, None)


def apply_known(
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    known: Known | None,
    image: Tensor | None = None,
) -> Tensor:
    """The convolution in a plain call, of which something may be known. ``image``: of another
    dtype, of which the first tensor is a copy: its gradient is written in that dtype at once."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return TiedConv.apply(*tensors, image, options, known)
    arguments: tuple[Any, ...] = (*tensors, *options, known)
    return compute_known(*arguments)


def _apply_known_gradient(
    tensors: tuple[Tensor, ...], options: tuple[Any, ...], known: Known | None
) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return TiedConvWeightGrad.apply(*tensors, options, known)
    arguments: tuple[Any, ...] = (*tensors, *options, known)
    return compute_known_gradient(*arguments)


def _somebody_listens() -> bool:
    """To the dispatcher: the compiler, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
    )


def _have_tangents(arguments: tuple) -> bool:
    """Whether one of them is a dual tensor: an operator would drop its tangent without a word."""
    if forward_ad._current_level < 0:
        return False
    if not torch._C._is_fwd_grad_enabled():  # inside of the forward or the jvp of a Function
        return False
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


# ---- reverse mode


def _adjoint(
    grad: Tensor,
    packed: Tensor,
    weights: Tensor | None,
    options: Sequence[Any],
    channels_last: bool,
    dtype: torch.dtype | None,
    known: Known | None = None,
) -> Tensor:
    """The transposed convolution of ``grad``."""
    kernel_size, padding, dilation, groups, symmetry, circular, alpha = options
    if known is not None:
        padding = known.geometry.flat_padding
    elif not circular:  # a wrapped border stays as it is
        padding = geometry_of(padding, dilation).transposed(kernel_size).flat_padding
    tensors = (grad, packed, weights, None, None)
    options = (
        kernel_size, padding, dilation, groups, symmetry, circular, SIGNS[symmetry] * alpha, 1.0,
        channels_last, dtype,
    )  # fmt: skip
    if known is None:
        return apply(conv, *tensors, *options)
    return apply_known(tensors, options, known)


def _as_in_memory(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of x, in which the kernels read both."""
    if torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(grad):
        return grad  # of several images no memory is known
    memory = memory_of(x)
    if memory == "channels_last":
        return grad.contiguous(memory_format=torch.channels_last)
    return grad.contiguous() if memory == "contiguous" else grad


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)  # a tangent that is not there needs no convolution of zeros


def _keep_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, weights, bias, _residual, *options, beta, channels_last, _dtype = inputs
    _keep(ctx, x, packed)
    # Not saved with them: a checkpoint may compute anew without it, and wants to save as many.
    ctx.weights = weights
    ctx.image_dtype = None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options, ctx.beta, ctx.channels_last, ctx.shape = options, beta, channels_last, output.shape


def _conv_backward(
    ctx: Any, grad: Tensor | None, known: tuple[Known, Known] | None = None
) -> tuple:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    x, packed = ctx.saved_tensors
    needs_x, needs_packed, _, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    alpha = ctx.options[-1]
    no_gradients = (None,) * (len(ctx.options) + 3)  # of the options, beta, memory format, dtype
    images = _as_in_memory(x, grad.to(x.dtype)) if needs_x or needs_packed else grad
    along_x = along_packed = along_bias = None
    if needs_x:  # in the format of the output: x may be a copy of the caller's image
        along_x = _adjoint(
            images, packed, ctx.weights, ctx.options, ctx.channels_last, ctx.image_dtype,
            known and known[0],
        )  # fmt: skip
    if needs_packed:  # in the dtype of packed, which may be wider than that of x
        with_bias = needs_bias and ctx.bias_dtype == packed.dtype
        options = (*ctx.options, packed.dtype, with_bias)
        if known is None:
            both = apply(weight_grad, x, images, *options)
        else:
            both = _apply_known_gradient((x, images), options, known[1])
        along_packed, along_bias = _split(both, packed)
    if needs_bias and along_bias is None:
        along_bias = images.sum((0, 2, 3), dtype=ctx.bias_dtype)
        along_bias = along_bias if alpha == 1 else along_bias * alpha
    along_residual = None
    if needs_residual:
        along_residual = grad if ctx.beta == 1 else grad * ctx.beta
    return along_x, along_packed, None, along_bias, along_residual, *no_gradients


def _split(both: Tensor, packed: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients, or directions, of packed and of a bias that may follow it."""
    size = packed.shape[0]
    rest = both.shape[0] - size
    return (both.narrow(0, 0, size), both.narrow(0, size, rest)) if rest else (both, None)


def _keep_weight_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, grad, *options, dtype, has_bias = inputs
    _keep(ctx, x, grad)
    ctx.options, ctx.dtype, ctx.bias_channels = options, dtype, has_bias * x.shape[1]


def _weight_grad_backward(ctx: Any, direction: Tensor | None) -> tuple:
    if direction is None:
        return (None,) * len(ctx.needs_input_grad)
    x, grad = ctx.saved_tensors
    needs_x, needs_grad, *_ = ctx.needs_input_grad
    along_x = along_grad = None
    packed, bias = direction, None
    if ctx.bias_channels:
        packed, bias = direction.split([direction.shape[0] - ctx.bias_channels, ctx.bias_channels])
    if needs_x:
        along_x = _adjoint(grad, packed, None, ctx.options, is_channels_last(2, x), None)
    if needs_grad:
        channels_last = is_channels_last(2, grad)
        options = (*ctx.options, 1.0, channels_last, None)
        along_grad = apply(conv, x, packed, None, bias, None, *options)
    return along_x, along_grad, *(None,) * (len(ctx.options) + 2)


# ---- vmap: over images it is a larger batch, over weights one call after another


def _vmap_conv(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    x, packed, weights, bias, residual, *options = arguments
    if any(dim is not None for dim in in_dims[1:4]) or in_dims[0] is None:
        return _one_by_one(conv, info, in_dims, arguments)
    x = x.movedim(in_dims[0], 0)
    batch = x.shape[:2]
    if residual is not None:
        residual = _expand_batch(residual, in_dims[4], batch[0]).flatten(0, 1)
    y = apply(conv, x.flatten(0, 1), packed, weights, bias, residual, *options)
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


# ---- forward mode: both operators are linear in each of their two factors


def _conv_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    along_x, along_packed, _, along_bias, along_residual, *_ = tangents
    arguments = (None, None, *ctx.options, 1.0, ctx.channels_last, None)  # no bias, no residual
    terms = []
    with _outer_tangents(ctx) as (x, packed):
        if along_x is not None:
            terms.append(apply(conv, along_x, packed, ctx.weights, *arguments))
        if along_packed is not None:
            terms.append(apply(conv, x, along_packed, None, *arguments))
        if along_bias is not None:
            alpha = ctx.options[-1]
            terms.append((along_bias * alpha).view(-1, 1, 1).expand(ctx.shape))
        if along_residual is not None:
            terms.append(ctx.beta * along_residual)
        return functools.reduce(torch.add, terms)


def _weight_grad_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    along_x, along_grad, *_ = tangents
    terms = []
    with _outer_tangents(ctx) as (x, grad):
        if along_x is not None:  # the bias does not see x
            along = apply(weight_grad, along_x, grad, *ctx.options, ctx.dtype, False)
            terms.append(F.pad(along, [0, ctx.bias_channels]))
        if along_grad is not None:
            has_bias = ctx.bias_channels > 0
            terms.append(apply(weight_grad, x, along_grad, *ctx.options, ctx.dtype, has_bias))
        return functools.reduce(torch.add, terms)


@contextlib.contextmanager
def _outer_tangents(ctx: Any) -> Iterator[Sequence[Any]]:
    """The saved tensors, with the tangents of outer levels where ``torch.func.jvp`` is nested.

    PyTorch turns forward mode off while it calls a Function's jvp, for all levels. On again, the
    saved tensors must not bring in the tangent of this level once more.
    """
    if not torch._C._are_functorch_transforms_active():
        yield ctx.saved_tensors
        return
    with forward_ad._set_fwd_grad_enabled(True):
        yield [t if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]


# ---- torch.func: it takes no operator's registered formula, only an autograd.Function


class _Conv(torch.autograd.Function):
    forward = staticmethod(lambda *arguments: conv(*arguments))
    setup_context = staticmethod(_keep_conv)
    backward = staticmethod(_conv_backward)
    jvp = staticmethod(_conv_jvp)
    vmap = staticmethod(_vmap_conv)


class _WeightGrad(torch.autograd.Function):
    forward = staticmethod(lambda *arguments: weight_grad(*arguments))
    setup_context = staticmethod(_keep_weight_grad)
    backward = staticmethod(_weight_grad_backward)
    jvp = staticmethod(_weight_grad_jvp)
    vmap = staticmethod(_vmap_weight_grad)


_FUNCTIONS: dict[Callable, type[torch.autograd.Function]] = {conv: _Conv, weight_grad: _WeightGrad}


# ---- eager mode: the same without the operator. (With a setup_context of its own each call of a
# Function would bind its arguments anew by inspect.signature.)


class TiedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, image, options, known = inputs
        arguments: tuple[Any, ...] = (*tensors, *options, known)
        if known is None and _somebody_listens():
            output = conv(*arguments[:-1])
        else:
            output = compute_known(*arguments)
        _keep_conv(ctx, arguments[:-1], output)
        ctx.known = known
        if image is not None:
            ctx.image_dtype = image.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        known = None
        if ctx.known is not None and grad is not None and is_plain(grad) and is_plain_here():
            known = _known_backward(ctx, grad)
        along_x, *others = _conv_backward(ctx, grad, known)[:5]
        if ctx.image_dtype is None:
            return along_x, *others, None, None, None
        return None, *others, along_x, None, None


def _known_backward(ctx: Any, grad: Tensor) -> tuple[Known, Known]:
    """What is known of the two launches of the backward, for gradients of a description."""
    place = (grad.shape, grad.stride(), grad.data_ptr() % 16)
    precision = input_precision(grad.dtype)
    key = (ctx.known, *place, precision, ctx.image_dtype, ctx.needs_input_grad[3])
    found: Any = remembered(key)
    if found is None:
        layout, geometry = ctx.known.layout, ctx.known.geometry
        *_, circular, _ = ctx.options  # a wrapped border stays as it is
        transposed = geometry if circular else geometry.transposed(layout.kernel_size)
        found = remember(key, (Known(layout, transposed), Known(layout, geometry)))
    return found


class TiedConvWeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, options, known = inputs
        arguments: tuple[Any, ...] = (*tensors, *options, known)
        output = compute_known_gradient(*arguments)
        _keep_weight_grad(ctx, arguments[:-1], output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return *_weight_grad_backward(ctx, grad)[:2], None, None
