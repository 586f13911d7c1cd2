"""The ways to run a tied convolution, and the bars above and below them.

A peer is made from one tied dense weight, keeps what its users would keep, and computes the same
convolution. Its tensors have the memory format of the images, as ``module.to(memory_format=...)``
gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import dispatch, functional, reference
from ..cached_weights import cached
from ..check import CONVOLUTIONS
from ..packing import Layout, pack, packed_size, unpack
from .workloads import FORMATS, Format, Workload

# Steps of Python, each of them an operator, that anybody would wait for.
_MAX_STEPS = 64**2


class Peer:
    """A way to hold, make and apply a tied weight.

    Attributes:
        name: what results call it. label, colour: the same in tables and pictures for people; greys
            have no tie, and one colour stands out.
        in_every_workload: not only in those of the headline. in_sweeps: where one size grows.
        ties: whether its weight stays tied in training.
        same: whether it computes the same convolution as the others.
        whole: whether only forwards, and backwards of everything, are its own.
        searches: whether cuDNN may search for its best algorithm.
        parameters: the leaves that an optimizer would hold.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    colour: ClassVar[str]
    in_every_workload: ClassVar[bool] = False
    in_sweeps: ClassVar[bool] = False
    ties: ClassVar[bool] = True
    same: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    def __init__(self, workload: Workload, tied: Tensor, memory: Format) -> None:
        self.workload = workload
        self.layout = workload.layout
        self.memory = FORMATS[memory]
        self.parameters = [part.detach().requires_grad_() for part in self._hold(tied)]
        self.kept: Tensor | None = None

    @classmethod
    def why_not(cls, workload: Workload, device: torch.device) -> str | None:
        """Why it cannot take part, or None."""
        return None

    def _hold(self, tied: Tensor) -> list[Tensor]:
        """What is learned, for a weight that is tied already."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The dense weight, made from the parameters; differentiable."""
        raise NotImplementedError

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return _convolve(x, weight, self.workload)

    def forward(self, x: Tensor) -> Tensor:
        """One convolution with a weight made for it."""
        return self.convolve(x, self.weight())

    def repeat(self, x: Tensor, times: int) -> Tensor:
        """Convolutions one after another with a weight that is made once."""
        weight = self.weight()
        for _ in range(times):
            x = self.convolve(x, weight)
        return x

    def keep(self) -> None:
        """Makes the weight once for all calls of :meth:`infer`."""
        self.kept = self.weight()

    def infer(self, x: Tensor) -> Tensor:
        """One convolution with the weight that was kept."""
        assert self.kept is not None
        return self.convolve(x, self.kept)


class Dense(Peer):
    """``F.conv2d`` with a free weight: no tie at all."""

    name = "dense"
    label = "dense"
    colour = "#555555"
    in_every_workload = True
    ties = False

    def _hold(self, tied: Tensor) -> list[Tensor]:
        return [tied.contiguous()]

    def weight(self) -> Tensor:
        return self.parameters[0]


class DenseChannelsLast(Dense):
    """The same, its weight in channels-last memory."""

    name = "dense_channels_last"
    label = "dense, channels-last weight"
    colour = "#999999"
    in_sweeps = True

    @classmethod
    def why_not(cls, workload: Workload, device: torch.device) -> str | None:
        return None if len(workload.image) == 2 else "memory of one dimension has no such format"

    def _hold(self, tied: Tensor) -> list[Tensor]:
        return [tied.contiguous(memory_format=torch.channels_last)]


class Averaged(Peer):
    """``(W0 + flip(W0)^T) / 2``, from parameters that are redundant by half."""

    name = "averaged"
    label = "averaged"
    colour = "#1f77b4"
    in_every_workload = True
    in_sweeps = True

    def _hold(self, tied: Tensor) -> list[Tensor]:
        noise = torch.randn_like(tied) * tied.std()  # what averaging must take out again
        free = tied + noise - _average(noise, self.layout)
        return [free.contiguous(memory_format=self.memory)]

    def weight(self) -> Tensor:
        return _average(self.parameters[0], self.layout)


class Assembled(Peer):
    """Channel pair by channel pair, in a Python loop, from minimal parameters: one kernel for each
    pair of channels, whose other half is that kernel turned by 180 degrees, and half a kernel for
    each channel with itself. Kernels are stacked at the end, since writing each into a dense
    weight would cost a copy of the weight a kernel in the backward."""

    name = "assembled"
    label = "assembled"
    colour = "#9467bd"

    @classmethod
    def why_not(cls, workload: Workload, device: torch.device) -> str | None:
        layout = workload.layout
        steps = layout.groups * layout.group_channels**2
        return f"{steps} steps of Python" if steps > _MAX_STEPS else None

    def _hold(self, tied: Tensor) -> list[Tensor]:
        blocks = tied.unflatten(0, (self.layout.groups, -1)).flatten(3)
        above = [group[i, j] for group in blocks for i, j in self._above()]
        free = (self.layout.taps + self.layout.sign) // 2 if self._odd else self.layout.pairs
        own = blocks.diagonal(dim1=1, dim2=2)[:, :free].transpose(1, 2).flatten(0, 1)
        return [own, torch.stack(above)] if above else [own]

    def weight(self) -> Tensor:
        own, *above = self.parameters
        c, halves = self.layout.group_channels, iter(own)
        kernels = iter(above[0] if above else ())
        groups = [self._group(kernels, halves) for _ in range(self.layout.groups)]
        weight = torch.stack([kernel for group in groups for row in group for kernel in row])
        return weight.view(self.layout.channels, c, *self.layout.kernel_size)

    def _group(self, kernels: Iterator[Tensor], halves: Iterator[Tensor]) -> list[list[Tensor]]:
        c, sign = self.layout.group_channels, self.layout.sign
        rows = [[self._turned_onto_itself(next(halves))] * c for _ in range(c)]
        for i, j in self._above():
            kernel = next(kernels)
            turned = kernel.flip(0)
            rows[i][j], rows[j][i] = kernel, turned if sign > 0 else -turned
        return rows

    def _turned_onto_itself(self, half: Tensor) -> Tensor:
        pairs, sign = self.layout.pairs, self.layout.sign
        parts = [half, sign * half[:pairs].flip(0)]
        if self._odd and sign < 0:
            parts.insert(1, half.new_zeros(1))
        return torch.cat(parts)

    def _above(self) -> Iterator[tuple[int, int]]:
        c = self.layout.group_channels
        return ((i, j) for i in range(c) for j in range(i + 1, c))

    @property
    def _odd(self) -> bool:
        return self.layout.taps % 2 == 1


class Gathered(Peer):
    """One index table: ``packed[index]``, and a table of signs where there are any."""

    name = "gathered"
    label = "gathered"
    colour = "#2ca02c"
    in_every_workload = True

    def _hold(self, tied: Tensor) -> list[Tensor]:
        layout = self.layout
        size = packed_size(layout.channels, layout.kernel_size, layout.groups, layout.symmetry)
        # Unpacking one number for each place gives the tables, whatever the packed order is.
        places = torch.arange(1, size + 1, dtype=torch.float64, device=tied.device)
        table = _unpack(places, layout).contiguous(memory_format=self.memory)
        self.index = table.abs().long().sub(1).clamp(min=0)
        self.signs = table.sign().to(tied.dtype) if layout.sign < 0 else None
        return [pack(tied, layout.groups, layout.symmetry)]

    def weight(self) -> Tensor:
        weight = self.parameters[0][self.index]
        return weight if self.signs is None else weight * self.signs


class Parametrized(Averaged):
    """The averaging as a ``torch.nn.utils.parametrize`` of an ``nn.Conv``."""

    name = "parametrized"
    label = "parametrized"
    colour = "#7fb3d9"
    in_every_workload = False
    in_sweeps = False

    def _hold(self, tied: Tensor) -> list[Tensor]:
        (free,) = super()._hold(tied)
        layout, workload = self.layout, self.workload
        dense = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(workload.image) - 1]
        self.module = nn.utils.skip_init(
            dense,
            layout.channels,
            layout.channels,
            layout.kernel_size,
            padding=workload.kernel // 2,
            groups=layout.groups,
            bias=False,
            padding_mode=workload.padding_mode,
            device=tied.device,
            dtype=tied.dtype,
        )
        self.module.weight = nn.Parameter(free)
        parametrize.register_parametrization(self.module, "weight", _Average(layout))
        return []

    def __init__(self, workload: Workload, tied: Tensor, memory: Format) -> None:
        super().__init__(workload, tied, memory)
        self.parameters = list(self.module.parameters())

    def weight(self) -> Tensor:
        return self.module.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class _Average(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, free: Tensor) -> Tensor:
        return _average(free, self.layout)


class _Compiled(Peer):
    """A peer whose forward, and whose weight where only that is asked for, is compiled."""

    whole = True
    inner: ClassVar[type[Peer]]

    def __init__(self, workload: Workload, tied: Tensor, memory: Format) -> None:
        plain = self.inner(workload, tied, memory)
        self.workload, self.parameters = workload, plain.parameters
        self._weight = torch.compile(plain.weight, dynamic=False)
        self._forward = torch.compile(plain.forward, dynamic=False)

    def weight(self) -> Tensor:
        return self._weight()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)


class CompiledAveraged(_Compiled):
    """``torch.compile`` of :class:`Averaged`."""

    name = "compiled_averaged"
    label = "averaged, compiled"
    colour = "#0b3d66"
    inner = Averaged


class CompiledGathered(_Compiled):
    """``torch.compile`` of :class:`Gathered`."""

    name = "compiled_gathered"
    label = "gathered, compiled"
    colour = "#145214"
    inner = Gathered


class Tied(Peer):
    """This package. Where kernels serve it there is no dense weight; its build is what they
    prepare. cuDNN's flag would make it tune at once: it is tuned before, within a time limit."""

    name = "tied"
    label = "triton_tied"
    colour = "#e8460a"
    in_every_workload = True
    in_sweeps = True
    searches = False

    def _hold(self, tied: Tensor) -> list[Tensor]:
        return [pack(tied, self.layout.groups, self.layout.symmetry)]

    def weight(self) -> Tensor:
        packed, dtype = self.parameters[0], self.parameters[0].dtype
        if not dispatch.takes_operators(packed.device, dtype, (1,) * len(self.workload.image)):
            channels_last = self.memory is torch.channels_last
            return reference.dense_weight(packed, self.layout, dtype, channels_last)
        from ..operators.prepare_packed import prepare

        _, weights = prepare(packed, self.workload.problem.layout, dtype)
        return packed if weights is None else weights

    def forward(self, x: Tensor) -> Tensor:
        function = getattr(functional, f"tied_conv{len(self.workload.image)}d")
        return function(
            x,
            self.parameters[0],
            kernel_size=self.layout.kernel_size,
            padding=self.workload.kernel // 2,
            groups=self.layout.groups,
            padding_mode=self.workload.padding_mode,
            symmetry=self.layout.symmetry,
        )

    def repeat(self, x: Tensor, times: int) -> Tensor:
        with cached():
            for _ in range(times):
                x = self.forward(x)
        return x

    def keep(self) -> None:
        """Inference runs inside ``tt.cached()``, which keeps it."""

    def infer(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Copied(Peer):
    """The floor of whatever makes a dense weight: plain copies of half as many numbers, with the
    tie's traffic but nothing to transpose. Another convolution than the others'."""

    name = "copied"
    label = "copied (floor)"
    colour = "#c7a76c"
    in_every_workload = True
    ties = False
    same = False

    @classmethod
    def why_not(cls, workload: Workload, device: torch.device) -> str | None:
        return "an odd number of channels has no half" if workload.channels % 2 else None

    def _hold(self, tied: Tensor) -> list[Tensor]:
        half = tied[: self.layout.channels // 2]
        return [half.clone(memory_format=self.memory)]

    def weight(self) -> Tensor:
        return torch.cat([self.parameters[0], self.parameters[0]])


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Dense,
        DenseChannelsLast,
        Averaged,
        Parametrized,
        CompiledAveraged,
        Gathered,
        CompiledGathered,
        Assembled,
        Copied,
        Tied,
    )
}
DENSE = tuple(name for name, peer in PEERS.items() if issubclass(peer, Dense))
TIED_PEERS = tuple(name for name, peer in PEERS.items() if peer.ties and peer is not Tied)


def random_tied_weight(workload: Workload, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh values whose convolution keeps about the size of what it is applied to again and
    again: the eigenvalues of a symmetric random matrix reach twice its entries' deviation times
    the root of its size."""
    layout = workload.layout
    deviation = 0.5 / (layout.group_channels * layout.taps) ** 0.5
    packed = torch.randn(layout.size, dtype=torch.float64, device=device) * deviation
    return _unpack(packed.to(dtype), layout)


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    return unpack(packed, layout.channels, layout.kernel_size, layout.groups, layout.symmetry)


def _average(free: Tensor, layout: Layout) -> Tensor:
    """``(W0 + s * flip(W0)^T) / 2``, inside each group."""
    turned = free.flip(tuple(range(2, free.dim())))
    if layout.groups == 1:
        turned = turned.transpose(0, 1)
    else:
        turned = turned.unflatten(0, (layout.groups, -1)).transpose(1, 2).flatten(0, 1)
    return (free + turned) / 2 if layout.sign > 0 else (free - turned) / 2


def _convolve(x: Tensor, weight: Tensor, workload: Workload) -> Tensor:
    padding, dims = workload.kernel // 2, len(workload.image)
    if workload.padding_mode != "zeros" and padding:
        x, padding = F.pad(x, [padding] * (2 * dims), workload.padding_mode), 0
    return CONVOLUTIONS[dims](x, weight, padding=padding, groups=workload.groups)
