"""Outputs and gradients on this machine's devices, held against float64 ``F.conv{1,2,3}d``.

Nothing here knows the packed layout: tied weights are made, and weight gradients compared, as dense
ones. With ``G`` the gradient of a free dense weight, that of the tied one, unpacked, is
``G + s * flip(G)^T``, and ``G`` alone on the diagonal of the centre tap.

Each problem is held to the bound of :mod:`.rounding`. That an error is at most twice that of dense
``F.conv`` in the same dtype is asked of all problems together: for one of them, dense may be exact
by luck. Products of float32 are float32 here, whatever PyTorch's setting; on a GPU those of TF32
have rows of their own, held to their bound alone, since PyTorch may multiply in float32 after all.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, memory_format, packing, rounding

CHECKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Case:
    """One problem: input ``(N, C, *spatial)`` and the options of the convolution."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    padding: int | str = 0
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    symmetry: packing.Symmetry = "self_adjoint"
    channels_last: bool = False

    def __str__(self) -> str:
        times = "x".join
        text = f"{times(map(str, self.shape))} k{times(map(str, self.kernel_size))} p{self.padding}"
        for letter, value in (("s", self.stride), ("d", self.dilation), ("g", self.groups)):
            text += f" {letter}{value}" if value != 1 else ""
        text += " skew" if self.symmetry == "skew_adjoint" else ""
        return text + (" channels-last" if self.channels_last else "")

    @property
    def options(self) -> dict:
        names = ("padding", "stride", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


CASES = [
    Case((2, 64, 16, 16), (3, 3), "same"),
    Case((2, 64, 16, 16), (3, 3), "same", symmetry="skew_adjoint", channels_last=True),
    Case((3, 13, 29, 7), (3, 3), 1, channels_last=True),
    Case((1, 50, 13, 13), (5, 5), 2, symmetry="skew_adjoint"),
    Case((2, 128, 4, 4), (1, 1)),
    Case((2, 16, 12, 12), (2, 2), "same"),
    Case((2, 16, 9, 14), (1, 7), "same", symmetry="skew_adjoint"),
    Case((2, 8, 5, 5), (9, 9), 4),
    Case((2, 24, 15, 15), (3, 3), 4, dilation=2),
    Case((2, 24, 15, 15), (3, 3), 1, stride=2, symmetry="skew_adjoint"),
    Case((2, 30, 10, 10), (3, 3), 1, groups=3),
    Case((2, 32, 10, 10), (3, 3), 1, groups=32, symmetry="skew_adjoint"),
    Case((4, 32, 100), (9,), "same"),
    Case((2, 12, 6, 7, 8), (3, 3, 3), 1, symmetry="skew_adjoint"),
]


class Errors(NamedTuple):
    """One number for each result."""

    output: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Row:
    """One problem in one arithmetic.

    Args:
        arithmetic: the name of the dtype, or "tf32".
        worst: the largest errors over their bounds.
        tied, dense: mean squares of the errors over the magnitudes of their terms.
    """

    case: Case
    arithmetic: str
    device: torch.device
    worst: Errors
    tied: Errors
    dense: Errors
    exactly_tied: bool

    @property
    def passed(self) -> bool:
        # NaN compares as false, so it fails
        return self.exactly_tied and all(ratio <= 1 for ratio in self.worst)


@dataclass(frozen=True)
class Comparison:
    """Root mean square errors over all problems in one arithmetic, over those of dense."""

    arithmetic: str
    device: torch.device
    ratio: Errors

    @property
    def passed(self) -> bool:
        return all(ratio <= 2 for ratio in self.ratio)


def check(device: torch.device, cases: list[Case] = CASES) -> Iterator[Row]:
    """One row for each case and arithmetic, on fresh random data."""
    for case in cases:
        for dtype in CHECKED_DTYPES:
            with warnings.catch_warnings():  # F.conv2d copies its input here, as it says; let it
                warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
                yield check_case(case, dtype, device)
                if dtype == torch.float32 and device.type == "cuda" and not torch.version.hip:
                    yield check_case(case, dtype, device, tf32=True)


def compare(rows: list[Row]) -> list[Comparison]:
    """Each device and arithmetic but TF32 over all of its rows."""
    kinds = dict.fromkeys((row.device, row.arithmetic) for row in rows)
    return [
        Comparison(
            arithmetic,
            device,
            _ratio([row for row in rows if (row.device, row.arithmetic) == (device, arithmetic)]),
        )
        for device, arithmetic in kinds
        if arithmetic != "tf32"
    ]


def _ratio(rows: list[Row]) -> Errors:
    tied = [sum(errors) for errors in zip(*(row.tied for row in rows), strict=True)]
    dense = [sum(errors) for errors in zip(*(row.dense for row in rows), strict=True)]
    pairs = zip(tied, dense, strict=True)
    return Errors(*(math.sqrt(t / d) if d else (math.inf if t else 1.0) for t, d in pairs))


def check_case(case: Case, dtype: torch.dtype, device: torch.device, tf32: bool = False) -> Row:
    """One problem on fresh random data; ``tf32``: with products in TF32, on a GPU."""
    dims, channels = len(case.kernel_size), case.shape[1]
    input, weight, bias = _draw(case, dtype, device)
    convolve = CONVOLUTIONS[dims]

    def dense(x: Tensor, w: Tensor, bias: Tensor = bias) -> Tensor:
        return convolve(x, w, bias.to(x.dtype), **case.options)

    def tied(x: Tensor, packed: Tensor) -> Tensor:
        function = getattr(functional, f"tied_conv{dims}d")
        return function(
            x, packed, bias, kernel_size=case.kernel_size, symmetry=case.symmetry, **case.options
        )

    def unpack(packed: Tensor) -> Tensor:
        return packing.unpack(packed, channels, case.kernel_size, case.groups, case.symmetry)

    packed = packing.pack(weight, case.groups, case.symmetry)
    grad = torch.randn_like(dense(input, weight))
    data = [tensor.double() for tensor in (input, weight, grad)]
    *wanted, free_gradient = _run(dense, *data)
    magnitudes = [tensor.abs() for tensor in data]
    *scales, free_scale = _run(lambda x, w: dense(x, w, bias.abs()), *magnitudes)
    with _products_of(device, tf32):
        baseline = _run(dense, input, weight, grad)
        output, dx, dpacked = _run(tied, input, packed, grad)

    unsigned = replace(case, symmetry="self_adjoint")
    wanted.append(_tied_gradient(free_gradient, case))
    scales.append(_tied_gradient(free_scale, unsigned))
    products, pixels = weight[0].numel(), grad.numel() // channels
    terms = products + 1, products, 2 * pixels
    folded = _tied_gradient(free_gradient.abs(), unsigned)
    rounded: list[Tensor | float] = [0.0, 0.0, folded]  # a dense gradient, before it is folded
    operand = rounding.TF32 if tf32 else 0.0
    allowed = [
        rounding.bound(truth, scale, n, dtype, more, operand)
        for truth, scale, n, more in zip(wanted, scales, terms, rounded, strict=True)
    ]
    found = output, dx, unpack(dpacked.double())
    baseline = *baseline[:2], _tied_gradient(baseline[2], case)
    return Row(
        case,
        "tf32" if tf32 else str(dtype).removeprefix("torch."),
        device,
        Errors(*map(rounding.worst, found, wanted, allowed)),
        Errors(*map(_mean_square, found, wanted, scales)),
        Errors(*map(_mean_square, baseline, wanted, scales)),
        torch.equal(unpack(packed), weight),
    )


def _draw(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """An image, a tied dense weight and a bias."""
    dims, channels = len(case.kernel_size), case.shape[1]
    shape = (channels, channels // case.groups, *case.kernel_size)
    free = torch.randn(shape, dtype=torch.float64, device=device)
    weight = ((free + _mirror(free, case)) / 2).to(dtype)
    input = torch.randn(case.shape, device=device).to(dtype)
    if case.channels_last:
        input = input.contiguous(memory_format=memory_format.CHANNELS_LAST[dims])
    return input, weight, torch.randn(channels, device=device).to(dtype)


@contextlib.contextmanager
def _products_of(device: torch.device, tf32: bool) -> Iterator[None]:
    """Inside, products of float32 on a GPU are what is said, not what PyTorch's setting says."""
    if device.type != "cuda":
        yield
        return
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _run(function: Callable, x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    output = function(x, w)
    return (output.detach(), *torch.autograd.grad(output, (x, w), grad))


def _mirror(dense: Tensor, case: Case) -> Tensor:
    """``s * flip(W)^T`` inside each group."""
    grouped = dense.unflatten(0, (case.groups, -1)).flip(tuple(range(3, dense.dim() + 1)))
    return packing.SIGNS[case.symmetry] * grouped.transpose(1, 2).flatten(0, 1)


def _tied_gradient(gradient: Tensor, case: Case) -> Tensor:
    both = gradient + _mirror(gradient, case)
    if all(k % 2 for k in case.kernel_size):
        centre = [k // 2 for k in case.kernel_size]
        diagonal = both.unflatten(0, (case.groups, -1))[(..., *centre)].diagonal(dim1=1, dim2=2)
        diagonal /= 2
    return both


def _mean_square(actual: Tensor, truth: Tensor, scale: Tensor) -> float:
    """Of the errors over the magnitudes of their terms; what has no terms is left away."""
    seen = scale > 0
    return ((actual.double() - truth)[seen] / scale[seen]).square().mean().item()
