r"""How far from float64 a correct result may be: a bound by derivation, and not by comparison.

A result is a sum of n products, computed in float32 (or float64) and rounded to its dtype. With
``scale`` the sum of the products' magnitudes and u the unit roundoff, it is off by at most

.. math:: \gamma_n \, scale + u' |truth|, \qquad \gamma_n = n u / (1 - n u),

in whatever order it is summed (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1); u' is the dtype's unit roundoff, or 0 for a dtype that sums itself.

The tests have a bound of their own, written apart from this one: were they to share it, a mistake
in it would blind both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TF32 = 2.0**-10  # of an operand whose mantissa is cut, as the kernels cut it; rounding halves it


def bound(
    truth: Tensor,
    scale: Tensor,
    terms: int,
    dtype: torch.dtype,
    rounded: Tensor | float = 0.0,
    operand: float = 0.0,
) -> Tensor:
    """For each number of a result that is computed in ``dtype`` on the device of ``truth``.

    Args:
        truth, scale: the result and the sums of its terms' magnitudes, in float64.
        terms: how many there are in a sum, at most.
        rounded: the magnitudes of all else that is rounded to the dtype on the way, summed.
        operand: how far off an operand of a product may be, relative to it: :data:`TF32` or 0.
    """
    u, lost = _accumulation(dtype, truth.device)
    sums = _gamma(terms, u)
    operands = _gamma(2, operand)
    relative = operands + sums * (1 + operands) + _gamma(terms, 2.0**-53)  # the truth's own
    error = relative * scale + 4 * terms * lost
    if dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        # A rounding is off by u' of the value or of the smallest normal; there are three at most,
        # and each makes what was there before larger by 1 + u'.
        error = error + info.eps / 2 * (truth.abs() + rounded + 3 * info.tiny)
        error = error * (1 + info.eps / 2) ** 3
    return error


def worst(actual: Tensor, truth: Tensor, allowed: Tensor) -> float:
    """The largest error over its bound: at most 1 for a correct result; NaN if there is one."""
    if not actual.numel():
        return 0.0
    return ((actual.double() - truth).abs() / allowed).max().item()


def _accumulation(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The unit roundoff of sums, and what they may lose where they underflow.

    Tensor cores cut each product of a block, and the sum so far, to the precision of the largest
    (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, 2021), which is up
    to 2^-22 for each product. On a CPU without oneDNN's half-precision convolutions PyTorch's own
    loops round sums to the dtype.
    """
    info, single = torch.finfo(dtype), torch.finfo(torch.float32).tiny
    if dtype == torch.float64:
        return 2.0**-53, info.tiny
    if device.type != "cpu":
        return 2.0**-22, single
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype in names and not _has_onednn(names[dtype]):
        return info.eps / 2, max(info.eps * info.tiny, single)
    return 2.0**-24, single


def _has_onednn(name: str) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def _gamma(terms: float, u: float) -> float:
    """Infinite where the sums are too long for a bound to mean anything."""
    return terms * u / (1 - terms * u) if terms * u < 1 else math.inf
