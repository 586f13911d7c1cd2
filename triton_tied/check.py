"""Outputs and gradients on this machine's devices, held against float64 ``F.conv{1,2,3}d``.

Nothing here knows the packed layout: tied weights are made, and weight gradients compared, as dense
ones. With ``G`` the gradient of a free dense weight, that of the tied one, unpacked, is
``G + s * flip(G)^T``, and ``G`` alone on the diagonal of the centre tap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, memory_format, packing

# What an error is always allowed to be: a few roundings, where F.conv itself happens to be exact.
FLOORS = {torch.float32: 2e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}
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
    """Relative errors in norm against float64."""

    output: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Row:
    case: Case
    dtype: torch.dtype
    device: torch.device
    tied: Errors
    dense: Errors
    exactly_tied: bool

    @property
    def passed(self) -> bool:
        allowed = [max(2 * error, FLOORS[self.dtype]) for error in self.dense]
        # NaN compares as false, so it fails
        return self.exactly_tied and all(e <= a for e, a in zip(self.tied, allowed, strict=True))


def check(device: torch.device, cases: list[Case] = CASES) -> Iterator[Row]:
    """One row for each case and dtype, on fresh random data."""
    for case in cases:
        for dtype in FLOORS:
            with warnings.catch_warnings():  # F.conv2d copies its input here, as it says; let it
                warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
                row = _check_case(case, dtype, device)
            yield row


def _check_case(case: Case, dtype: torch.dtype, device: torch.device) -> Row:
    dims, channels = len(case.kernel_size), case.shape[1]
    shape = (channels, channels // case.groups, *case.kernel_size)
    free = torch.randn(shape, dtype=torch.float64, device=device)
    weight = ((free + _mirror(free, case)) / 2).to(dtype)
    input = torch.randn(case.shape, device=device).to(dtype)
    if case.channels_last:
        input = input.contiguous(memory_format=memory_format.CHANNELS_LAST[dims])
    bias = torch.randn(channels, device=device).to(dtype)
    convolve = CONVOLUTIONS[dims]

    def dense(x: Tensor, w: Tensor) -> Tensor:
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
    truth = _run(dense, input.double(), weight.double(), grad.double())
    baseline = _run(dense, input, weight, grad)
    output, dx, dpacked = _run(tied, input, packed, grad)
    wanted = (*truth[:2], _tied_gradient(truth[2], case))
    return Row(
        case,
        dtype,
        device,
        _errors((output, dx, unpack(dpacked.double())), wanted),
        _errors((*baseline[:2], _tied_gradient(baseline[2].double(), case)), wanted),
        torch.equal(unpack(packed), weight),
    )


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


def _errors(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> Errors:
    pairs = zip(actual, truth, strict=True)
    return Errors(*(((a.double() - t).norm() / t.norm()).item() for a, t in pairs))
