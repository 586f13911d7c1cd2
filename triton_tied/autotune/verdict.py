"""Whether a result is right: within the bound of :mod:`..rounding` of the reference in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference, rounding
from ..kernels.calls import Convolution, WeightGradient
from ..kernels.precision import input_precision
from ..packing import expand, fold

# Of the norms of the error and of the result. A bound for each number is the sum of all roundings,
# and of long sums it explains anything; rounding itself is random, and stays far below this.
_MAX_RELATIVE_ERROR = 0.02
_FOLDS = 64  # more terms than there are splits, whose sums are summed once more


def excess_of(call: Convolution | WeightGradient, result: Tensor) -> float:
    """The largest error over what rounding explains: at most 1 for a right result, NaN if it holds
    one. In float64 on the device of the tensors, so that no setting of PyTorch's matters."""
    if isinstance(call, Convolution):
        truth, scale = _convolve(call), _convolve(call, magnitudes=True)
        terms = call.layout.group_channels * call.layout.taps + 3  # and bias, alpha, residual
    else:
        truth, scale = _weight_grad(call), _weight_grad(call, magnitudes=True)
        terms = 2 * math.prod(call.grad.shape[::2]) * call.grad.shape[3] + _FOLDS
    dtype = result.dtype
    is_tf32 = (call.precision or input_precision(call.x.dtype)) == "tf32"
    operand = rounding.TF32 if is_tf32 else 0.0
    bound = rounding.bound(truth, scale, terms, dtype, operand=operand)
    return max(rounding.worst(result, truth, bound), _relative(result, truth))


def _relative(result: Tensor, truth: Tensor) -> float:
    """The norm of the error over what rounding explains; infinite where the result is no number."""
    error, allowed = (result.double() - truth).norm().item(), truth.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / max(_MAX_RELATIVE_ERROR * allowed, math.ulp(0.0)) if error else 0.0


def _convolve(call: Convolution, magnitudes: bool = False) -> Tensor:
    """The output; or the sums of the magnitudes of its terms."""

    def read(tensor: Tensor) -> Tensor:
        return tensor.double().abs() if magnitudes else tensor.double()

    packed = call.packed.to(call.x.dtype)  # which the kernel reads, under autocast too
    weight = read(expand(packed, call.layout))
    return reference.convolve(
        read(call.x),
        weight,
        None if call.bias is None else read(call.bias),
        call.geometry,
        call.layout.groups,
        alpha=abs(call.alpha) if magnitudes else call.alpha,
        beta=abs(call.beta) if magnitudes else call.beta,
        residual=None if call.residual is None else read(call.residual),
    )


def _weight_grad(call: WeightGradient, magnitudes: bool = False) -> Tensor:
    """The packed gradient and that of the bias; or the sums of the magnitudes of its terms."""
    x, grad, layout, geometry, alpha, *_ = call
    bias_grad = [_bias_grad(call, magnitudes)] if call.has_bias else []
    if not magnitudes:
        packed_grad = reference.weight_grad(x.double(), grad.double(), layout, geometry, alpha)
        return torch.cat([packed_grad, *bias_grad])
    dense = reference.dense_weight_grad(x.double().abs(), grad.double().abs(), layout, geometry)
    # fold subtracts where the weight's sign is negative: undo that
    signs = expand(torch.ones(layout.size, dtype=dense.dtype, device=dense.device), layout)
    return torch.cat([fold(dense * signs, layout) * abs(alpha), *bias_grad])


def _bias_grad(call: WeightGradient, magnitudes: bool) -> Tensor:
    grad = call.grad.double()
    return (grad.abs() if magnitudes else grad).sum((0, 2, 3)) * (
        abs(call.alpha) if magnitudes else call.alpha
    )
