"""What users build on a tied convolution: its exponential, and an equilibrium that is found by
operator splitting. Each as it is published, as one would write it by hand, and by this package.

A forward is the whole formula, with a weight that is made once for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exponential import tied_exp
from ..functional import tied_conv2d
from ..prepare import prepare
from .peers import PEERS, Averaged, Peer, Tied, random_tied_weight
from .workloads import Workload

Map = Callable[[Tensor], Tensor]
Apply = Callable[..., Tensor]  # of z, and whether W is transposed
Step = Callable[[Tensor, Tensor, bool], Tensor]  # of z, x, and whether W is transposed

# The equilibrium is that of W = (1 - m) I - A^T A + S. Steps of the published length, 1, are for
# weights that were normalised; these shrink all errors for weights of norm 1.
_M, _STEP = 1.0, 0.25


class _Whole(Peer):
    """``repeat`` is the formula with so many terms or steps."""

    in_every_workload = True

    def forward(self, x: Tensor) -> Tensor:
        return self.repeat(x, self.workload.applications)


def power_series(x: Tensor, convolve: Map, terms: int) -> Tensor:
    """The exponential as it is published: three operations a term."""
    result = power = x
    for i in range(1, terms + 1):
        power = convolve(power) / i
        result = result + power
    return result


class PublishedExponential(_Whole, Averaged):
    """Of the half difference of a free filter and its transpose (Singla and Feizi 2021)."""

    name = "published"
    label = "published formula"
    colour = "#1f77b4"

    def repeat(self, x: Tensor, times: int) -> Tensor:
        return power_series(x, functools.partial(self.convolve, weight=self.weight()), times)


class ByHandExponential(_Whole, Averaged):
    """From the inside, with two operations a term."""

    name = "by_hand"
    label = "best by hand"
    colour = "#2ca02c"

    def repeat(self, x: Tensor, times: int) -> Tensor:
        weight, result = self.weight(), x
        for i in range(times, 0, -1):
            result = x.add(self.convolve(result, weight), alpha=1 / i)
        return result


class TiedExponential(_Whole, Tied):
    recompute: ClassVar[bool] = False

    def repeat(self, x: Tensor, times: int) -> Tensor:
        return tied_exp(
            x,
            self.parameters[0],
            kernel_size=self.layout.kernel_size,
            terms=times,
            groups=self.layout.groups,
            padding_mode=self.workload.padding_mode,  # type: ignore[arg-type]
            symmetry=self.layout.symmetry,
            recompute=self.recompute,
        )


class RecomputedExponential(TiedExponential):
    """It keeps its input alone for the backward."""

    name = "tied_recompute"
    label = "triton_tied, recompute"
    colour = "#f4a582"
    recompute = True


class _Splitting(_Whole):
    """``z = relu(W z + x)`` by forward-backward splitting (Winston and Kolter 2020), with a number
    of steps that is fixed, so that all do the same; without the published normalisation of weights.
    """

    def _hold(self, tied: Tensor) -> list[Tensor]:
        """The tied weight and A, which lies below it."""
        tied, a = tied.chunk(2)
        return [*super()._hold(tied), a.contiguous(memory_format=self.memory)]

    def operator(self) -> tuple[Apply, Step]:
        """``W z``, and ``(1 - step) z + step (W z + x)`` of which no gradient is asked."""
        raise NotImplementedError

    def transposed(self, weight: Tensor) -> Tensor:
        """Of a convolution whose border is zeros or wrapped."""
        return weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=self.memory)

    def repeat(self, x: Tensor, times: int) -> Tensor:
        apply, step = self.operator()
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(times):
                z = step(z, x, False).relu_()
        output = F.relu(apply(z) + x)
        return _Implicit.apply(output, functools.partial(_adjoint, apply, step, times))


def _adjoint(apply: Apply, step: Step, times: int, grad: Tensor, active: Tensor) -> Tensor:
    """``W^T u + grad`` where ``u = active * (W^T u + grad)``, by the same steps."""
    u = torch.zeros_like(grad)
    for _ in range(times):
        u = step(u, grad, True).mul_(active)
    return apply(u, True).add_(grad)


class _Implicit(torch.autograd.Function):
    """The output as it is; its gradient is that of the equilibrium, not of the last step."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(output)
        ctx.solve = solve
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return ctx.solve(grad, output > 0), None


class PublishedSplitting(_Splitting, Averaged):
    """From free weights A and B, ``S = B - B^T``: four convolutions for each W."""

    name = "published"
    label = "published formula"
    colour = "#1f77b4"

    def _hold(self, tied: Tensor) -> list[Tensor]:
        free, a = super()._hold(tied)
        return [free / 2, a]

    def operator(self) -> tuple[Apply, Step]:
        b, a = self.parameters
        b_transposed, a_transposed = self.transposed(b), self.transposed(a)

        def apply(z: Tensor, transposed: bool = False) -> Tensor:
            gram = self.convolve(self.convolve(z, a), a_transposed)
            skew = self.convolve(z, b) - self.convolve(z, b_transposed)
            return (1 - _M) * z - gram + (-skew if transposed else skew)

        def step(z: Tensor, x: Tensor, transposed: bool) -> Tensor:
            return (1 - _STEP) * z + _STEP * (apply(z, transposed) + x)

        return apply, step


class ByHandSplitting(_Splitting, Averaged):
    """S is made once, so that W takes three convolutions; in the steps everything that is linear
    in z is folded into their weights, and the border is wrapped once for two."""

    name = "by_hand"
    label = "best by hand"
    colour = "#2ca02c"

    def weight(self) -> Tensor:
        return super().weight().contiguous(memory_format=self.memory)

    def operator(self) -> tuple[Apply, Step]:
        skew, a = self.weight(), self.parameters[1]
        a_transposed = self.transposed(a)
        with torch.no_grad():
            identity = nn.init.dirac_(torch.empty_like(skew)).mul_(1 - _STEP * _M)
            folded = [identity + _STEP * skew, identity - _STEP * skew]
            scaled = _STEP * a_transposed

        def apply(z: Tensor, transposed: bool = False) -> Tensor:
            padded = self.padded(z)
            gram = self.convolve(F.conv2d(padded, a), a_transposed)
            moved = F.conv2d(padded, skew)
            result = -moved - gram if transposed else moved - gram
            return result if _M == 1 else result + (1 - _M) * z

        def step(z: Tensor, x: Tensor, transposed: bool) -> Tensor:
            padded = self.padded(z)
            gram = self.convolve(F.conv2d(padded, a), scaled)
            return F.conv2d(padded, folded[transposed]).sub_(gram).add_(x, alpha=_STEP)

        return apply, step

    def padded(self, z: Tensor) -> Tensor:
        return F.pad(z, [self.workload.kernel // 2] * 4, self.workload.padding_mode)


class TiedSplitting(_Splitting, Tied):
    """S is a tied convolution, to whose end the sum belongs."""

    def operator(self) -> tuple[Apply, Step]:
        packed, a = self.parameters
        a_transposed = self.transposed(a)
        sizes = self.layout.kernel_size, self.layout.groups, self.layout.symmetry
        prepared = prepare(packed, self.layout.channels, *sizes, memory_format=self.memory)
        tied = functools.partial(
            tied_conv2d,
            packed=prepared,
            kernel_size=self.layout.kernel_size,
            padding="same",
            padding_mode=self.workload.padding_mode,  # type: ignore[arg-type]
            symmetry=self.layout.symmetry,
        )

        def gram(z: Tensor) -> Tensor:
            return self.convolve(self.convolve(z, a), a_transposed)

        def apply(z: Tensor, transposed: bool = False) -> Tensor:
            rest = gram(z) if _M == 1 else gram(z) - (1 - _M) * z
            return tied(z, alpha=-1.0 if transposed else 1.0, residual=rest, beta=-1.0)

        def step(z: Tensor, x: Tensor, transposed: bool) -> Tensor:
            rest = torch.sub(x, gram(z)).add_(z, alpha=1 / _STEP - _M)
            return tied(z, alpha=-_STEP if transposed else _STEP, residual=rest, beta=_STEP)

        return apply, step


PEERS_OF: dict[str, dict[str, type[Peer]]] = {
    family: {peer.name: peer for peer in peers}
    for family, peers in {
        "soc-exponential": (
            PublishedExponential,
            ByHandExponential,
            TiedExponential,
            RecomputedExponential,
        ),
        "mondeq-splitting": (PublishedSplitting, ByHandSplitting, TiedSplitting),
    }.items()
}
OTHERS = ("published", "by_hand")  # those that are not this package
FORMULA_PEERS = {peer.name: peer.label for peers in PEERS_OF.values() for peer in peers.values()}


def peers_of(workload: Workload) -> dict[str, type[Peer]]:
    """All that compute what this workload asks for, by name."""
    return PEERS_OF.get(workload.family, PEERS)


def random_weight(workload: Workload, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What its peers are made of: a tied weight, and for the splitting A below it."""
    tied = random_tied_weight(workload, dtype, device)
    if workload.family != "mondeq-splitting":
        return tied
    return torch.cat([tied, torch.randn_like(tied) * (0.5 / tied[0].numel() ** 0.5)])
