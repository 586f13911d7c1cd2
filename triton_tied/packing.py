r"""The algebra of tied weights: which numbers are free, where they lie, and the maps both ways.

A weight of ``T = KH*KW`` taps, numbered row-major, is tied when ``W_t = s * W_{T-1-t}^T`` for the
``C x C`` matrix ``W_t`` of every tap, with ``s = +1`` (self-adjoint) or ``s = -1`` (skew-adjoint):

.. math:: W[i, j, a, b] = s \, W[j, i, K_H - 1 - a, K_W - 1 - b]

Tap ``T-1-t`` is the opposite tap of ``t``. The free numbers, and so the packed vector, are:

- the first ``T // 2`` taps, dense ``C x C`` matrices: the *pairs*;
- for odd ``T`` the *centre*, its own opposite: the lower triangle of a symmetric or antisymmetric
  matrix, with the diagonal if ``s = +1`` and without it if ``s = -1``.

``packed = [pairs: group, tap, out, in | centre: group, lower triangle by rows]``, where ``C``
stands for ``channels // groups``. This order is known here and in the kernels' files alone. (So
``torch.cat`` of the packed vectors of several weights has the length of a grouped weight's, and is
not it: stack dense weights and pack the stack.)
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from .cached_weights import derived_from, is_caching
from .geometry import as_integer
from .memory_format import CHANNELS_LAST
from .tracing import PLAIN_TENSORS, overridable, untraced

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Symmetry = Literal["self_adjoint", "skew_adjoint"]
SIGNS = {"self_adjoint": 1, "skew_adjoint": -1}
# Numbers of a dense weight, and of its centre, that a table places: it takes 4 bytes for each.
_MAX_GATHERED = _MAX_GATHERED_CENTRE = 2**18
_MAX_CHANNELS_AT_ONCE = 256  # of a matrix that is gathered with few operations, by wider tables
_BLOCK = 128  # rows and columns that a CPU mirrors at once
_MAX_TABLE_BYTES = 2**24  # of all tables together
_tables: dict[tuple, Tensor] = {}  # the one used last stands last


@dataclass(frozen=True)
class Layout:
    """The shape of a tied weight and of its packed vector.

    Args:
        channels: input and output channels of the convolution.
        kernel_size: one number for each spatial dimension.
        groups: the tie holds inside each group.
        symmetry: "self_adjoint" or "skew_adjoint".

    Raises:
        ValueError: a size is not positive, groups do not divide channels, or an unknown symmetry.
    """

    channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1
    symmetry: Symmetry = "self_adjoint"

    def __post_init__(self) -> None:
        for name in ("channels", "kernel_size", "groups"):
            value = getattr(self, name)
            if not value or min(value if name == "kernel_size" else (value,)) < 1:
                raise ValueError(f"{name} should be positive, got {value}")
        if self.channels % self.groups:
            raise ValueError(
                f"channels should be divisible by groups, "
                f"got channels={self.channels}, groups={self.groups}"
            )
        check_symmetry(self.symmetry)

    @property
    def sign(self) -> int:
        return SIGNS[self.symmetry]

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def pairs(self) -> int:
        return self.taps // 2

    @property
    def triangle_size(self) -> int:
        """Free numbers in the centre of one group: 0 where there is no centre tap."""
        c = self.group_channels
        return c * (c + self.sign) // 2 if self.taps % 2 else 0

    @property
    def size(self) -> int:
        return sum(self.part_sizes)

    @property
    def part_sizes(self) -> tuple[int, int]:
        return math.prod(self.pairs_shape), self.groups * self.triangle_size

    @property
    def pairs_shape(self) -> tuple[int, int, int, int]:
        return self.groups, self.pairs, self.group_channels, self.group_channels

    @property
    def channels_last_shape(self) -> tuple[int, ...]:
        return (self.channels, *self.kernel_size, self.group_channels)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels, self.group_channels, *self.kernel_size)

    def flops(self, pixels: int) -> int:
        """Of a convolution, or of its weight gradient, with so many output pixels: a product and a
        sum for each pixel, tap and pair of channels."""
        return 2 * pixels * self.channels * self.group_channels * self.taps

    def __str__(self) -> str:
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, "
            f"groups={self.groups}, symmetry={self.symmetry!r}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class PreparedWeight:
    """What ``triton_tied.prepare`` makes: the weight of one packed vector, ready to be applied.

    Attributes:
        layout: of ``packed``.
        packed: the free numbers, in the dtype of the convolutions.
        dense: the dense weight; None where the kernels serve, which do without.
        channels_last: whether it lies in memory so, or contiguous.
        weights: what the kernels read of it, or None. No gradient goes through it.
    """

    layout: Layout
    packed: Tensor
    dense: Tensor | None = None
    channels_last: bool = False
    weights: Tensor | None = None

    def checked(self, layout: Layout) -> PreparedWeight:
        """Itself; raises ValueError where the convolution is another than it was prepared for."""
        if self.layout != layout:
            raise ValueError(f"expected a weight prepared for {layout}, but got one for {self}")
        return self

    def __repr__(self) -> str:
        return f"PreparedWeight({self.layout}, dtype={self.packed.dtype})"


def make_layout(
    channels: int, kernel_size: int | Sequence[int], groups: int, symmetry: Symmetry
) -> Layout:
    """The layout of arguments as users give them; an int ``kernel_size`` k means ``(k, k)``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: as :class:`Layout`.
    """
    many = isinstance(kernel_size, list | tuple)
    kernel = tuple(kernel_size) if many else (kernel_size,) * 2  # type: ignore[arg-type]
    return Layout(
        as_integer("channels", channels),
        tuple(as_integer("kernel_size", k, kernel_size) for k in kernel),
        as_integer("groups", groups),
        symmetry,
    )


def expected_length(layout: Layout, packed_shape: Sequence[int], name: str = "packed") -> str:
    """What packed should have been."""
    return (
        f"expected {name} to be 1-dimensional with {layout.size} elements for {layout}, "
        f"but got {name} of size {list(packed_shape)}"
    )


def layout_of_length(size: int, like: Layout) -> Layout | None:
    """One whose packed vector has ``size`` numbers: of the same kernel and groups, if possible of
    the same symmetry, else of the other."""
    groups, kernel = like.groups, like.kernel_size
    end = int((size * 2 * groups) ** 0.5) // groups + 2  # 2 sizes >= C*C / groups
    for symmetry in sorted(get_args(Symmetry), key=lambda name: name != like.symmetry):
        for group_channels in range(1, end):
            layout = Layout(group_channels * groups, kernel, groups, symmetry)
            if layout.size == size:
                return layout
    return None


def check_supported(function: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for what is no tensor, NotImplementedError for what is not supported."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{function}(): argument {name!r} must be Tensor, not {type(tensor).__name__}"
        )
    if (
        tensor.dtype not in SUPPORTED_DTYPES
        or tensor.layout is not torch.strided
        or tensor.is_nested
    ):
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise NotImplementedError(
            f"{function} is not implemented for {name} of dtype {tensor.dtype} and layout {kind}: "
            f"expected strided float64, float32, float16 or bfloat16"
        )


def single_or_wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, in which sums round, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_symmetry(symmetry: str) -> Symmetry:
    """Returns ``symmetry``; raises ValueError unless ``symmetry`` is one of the two known."""
    if not isinstance(symmetry, str) or symmetry not in SIGNS:
        raise ValueError(f"symmetry must be one of {set(SIGNS)}, but got symmetry={symmetry!r}")
    return cast(Symmetry, symmetry)


def packed_size(
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> int:
    """How many free numbers a tied weight has.

    Args:
        channels: input and output channels.
        kernel_size: a sequence with one number for each spatial dimension; an int ``k`` means the
            two-dimensional ``(k, k)``.
        groups: the tie holds inside each group.
        symmetry: "self_adjoint" or "skew_adjoint".

    Returns:
        ``groups * (T//2 * C*C + (T%2) * C*(C+s)/2)`` with ``C = channels/groups`` and ``T`` taps.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive, groups do not divide channels, or an unknown symmetry.

    Examples:
        >>> packed_size(64, 3), packed_size(64, 3, symmetry="skew_adjoint")
        (18464, 18400)
    """
    return make_layout(channels, kernel_size, groups, symmetry).size


@overridable
def unpack(
    packed: Tensor | PreparedWeight,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The dense weight that a packed vector stands for, tied to the last bit. Differentiable.

    Args:
        packed: ``(packed_size(...),)``, any floating dtype; or what ``prepare`` made of it.
        channels, kernel_size, groups, symmetry: as in ``packed_size``.
        memory_format: of the result; ``torch.channels_last`` (2-D) or ``channels_last_3d`` (3-D)
            costs no more than contiguous: the weight is written once, in this order.

    Returns:
        ``(channels, channels // groups, *kernel_size)`` of the dtype and device of ``packed``. Of a
        prepared weight, and inside a ``cached()`` block, its memory is shared: clone it before
        writing to it.

    Raises:
        TypeError, ValueError: as ``packed_size``; ``packed`` not of the right length; a
            memory format that the kernel's number of dimensions does not have.
        NotImplementedError: a dtype or tensor layout that is not supported.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    channels_last = wants_channels_last(layout, memory_format)
    numbers = numbers_of("unpack", packed, layout)
    weight = dense_weight(packed, layout, numbers.dtype, channels_last)
    shared = isinstance(packed, PreparedWeight) or is_caching(packed)
    return weight.view_as(weight) if shared else weight  # so that hooks are the caller's own


def numbers_of(function: str, packed: Tensor | PreparedWeight, layout: Layout) -> Tensor:
    """The packed vector of ``layout``, prepared or not; raises as :func:`unpack`."""
    if isinstance(packed, PreparedWeight):
        return packed.checked(layout).packed
    check_packed(function, "packed", packed, layout)
    return packed


def check_packed(function: str, name: str, packed: Tensor, layout: Layout) -> None:
    """Raises as :func:`unpack` unless ``packed`` is a packed vector of ``layout``."""
    check_supported(function, name, packed)
    if packed.shape != (layout.size,):
        raise ValueError(expected_length(layout, packed.shape, name))


def wants_channels_last(layout: Layout, memory_format: torch.memory_format) -> bool:
    """Whether a dense weight is asked for in channels-last; raises as :func:`unpack`."""
    known = (torch.contiguous_format, CHANNELS_LAST.get(len(layout.kernel_size)))
    if memory_format not in known:
        raise ValueError(
            f"memory_format should be one of {[str(f) for f in known if f]} "
            f"for kernel_size={layout.kernel_size}, got {memory_format}"
        )
    return memory_format is not torch.contiguous_format


def dense_weight(
    packed: Tensor | PreparedWeight, layout: Layout, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """:func:`unpack` for checked arguments, in a dtype of the caller's. It is made once where it is
    prepared, or inside a ``cached()`` block."""
    if isinstance(packed, PreparedWeight):
        if packed.dense is None:
            return expand(packed.packed.to(dtype), layout, channels_last)
        dense = packed.dense.to(dtype)
        if packed.channels_last == channels_last:
            return dense
        return _as_weight(_in_memory_order(dense, channels_last), layout, channels_last)
    return derived_from(
        packed,
        (layout, dtype, channels_last),
        lambda: (expand(packed.to(dtype), layout, channels_last),),
    )[0]


def tied_matrix(packed: Tensor | PreparedWeight, layout: Layout) -> Tensor:
    """The dense weight of a kernel of one tap without that, ``(channels, channels // groups)``.

    A small one that is not kept is left to PyTorch's own autograd: a function of ours takes more
    time than the rest of it.
    """
    if isinstance(packed, PreparedWeight):
        return dense_weight(packed, layout, packed.packed.dtype, False).flatten(1)
    c = layout.group_channels
    small = layout.channels * c <= _MAX_GATHERED
    if not small or is_caching(packed) or is_distributed(packed):
        return dense_weight(packed, layout, packed.dtype, False).flatten(1)
    return _gather(packed, layout, False).view(layout.channels, c)


def transposed_matrix(packed: Tensor, layout: Layout) -> Tensor | None:
    """The transpose of :func:`tied_matrix` in as few operations as can be, for a plain vector of
    which nothing is kept. None where it has none: with groups, for one channel or many, and for
    s = -1 in a half type."""
    c, sign = layout.channels, layout.sign
    if not 1 < c <= _MAX_CHANNELS_AT_ONCE or layout.groups > 1:
        return None
    if sign < 0 and packed.dtype in (torch.float16, torch.bfloat16):
        return None
    places, signs = _matrix_tables(packed.device, packed.dtype, c, sign)
    matrix = packed.index_select(0, places).view(c, c)
    if signs is None:
        return matrix
    # A number that is infinite times 0 is not 0, so that the diagonal is set. Its gradient is zero
    # by the 0 among the signs, unless that overflows.
    if torch.is_grad_enabled() and packed.requires_grad:
        matrix = matrix * signs
        matrix.detach().fill_diagonal_(0)
    else:
        matrix.mul_(signs).fill_diagonal_(0)
    return matrix


@overridable
def pack(weight: Tensor, groups: int = 1, symmetry: Symmetry = "self_adjoint") -> Tensor:
    """The packed vector of the tied weight nearest to ``weight``. Differentiable.

    The orthogonal projection ``(W + s * flip(W)^T) / 2``, rounded once: exact where the weight is
    already tied.

    Args:
        weight: ``(channels, channels // groups, *kernel_size)``, any floating dtype.
        groups: the tie holds inside each group.
        symmetry: "self_adjoint" or "skew_adjoint".

    Returns:
        ``(packed_size(...),)`` of the dtype and device of ``weight``. Packed vectors of one layout
        may be added and scaled. ``torch.cat`` does not join them to those of a grouped weight:
        pack ``torch.cat`` of the dense weights, with ``groups``.

    Raises:
        TypeError, ValueError: as ``packed_size``; ``weight`` not square, or without a kernel.
        NotImplementedError: a dtype or tensor layout that is not supported.
    """
    check_supported("pack", "weight", weight)
    groups = as_integer("groups", groups)
    if weight.dim() < 3 or groups < 1 or weight.shape[0] != weight.shape[1] * groups:
        raise ValueError(
            f"expected weight of size [channels, channels / groups, *kernel_size] with "
            f"groups={groups}, but got weight of size {list(weight.shape)}"
        )
    layout = Layout(weight.shape[0], tuple(weight.shape[2:]), groups, symmetry)
    # A sum of two numbers is halved without rounding, unless it overflows; then each number is. So
    # no wider dtype is needed, which not every device has, but for half types, whose sums round.
    taps = _tap_matrices(weight.to(single_or_wider(weight.dtype)), layout)
    opposite = layout.sign * taps.flip(1).mT
    twice = taps + opposite
    nearest = torch.where(twice.isinf(), taps / 2 + opposite / 2, twice / 2).to(weight.dtype)
    return _join(nearest, nearest[:, layout.pairs] if layout.taps % 2 else None, layout)


def expand(packed: Tensor, layout: Layout, channels_last: bool = False) -> Tensor:
    """:func:`unpack` for checked arguments.

    A small weight is bound by the number of operations: it is gathered in one, by a table. A large
    one is bound by memory traffic: each number is written once, and in the backward read once.
    """
    if is_distributed(packed):
        return _expand_everywhere(packed, layout, channels_last)
    tracked = torch.is_grad_enabled() and packed.requires_grad
    if not tracked or _is_transformed(packed) or torch.jit.is_tracing():
        return _expand_plainly(packed, layout, channels_last)
    return _ExpandFunction.apply(packed, layout, channels_last)


def fold(dense: Tensor, layout: Layout, channels_last: bool = False) -> Tensor:
    """The transpose of :func:`expand`, so its gradient: both places of a number are summed."""
    if _is_transformed(dense):
        return _fold_plainly(dense, layout)
    return _FoldFunction.apply(dense, layout, channels_last)


class _ExpandFunction(torch.autograd.Function):
    """packed -> W. Linear: the derivative of each of the two maps is the other.

    Nothing is saved for the backward, so that it can run again: one weight may serve several.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        return _expand_plainly(packed, *arguments).detach()  # no view, so that it may be written to

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return fold(grad, *ctx.arguments), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return expand(tangent, *ctx.arguments)


class _FoldFunction(torch.autograd.Function):
    """dW -> dpacked."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        if _is_small(arguments[0]):
            return _fold_by_table(dense, *arguments)
        return _fold_into_parts(dense, arguments[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return expand(grad, *ctx.arguments), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return fold(tangent, *ctx.arguments)


def _is_transformed(tensor: Tensor) -> bool:
    """Under torch.compile, torch.func, torch.jit.trace or batched gradients, which take plain
    operations only."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def _is_small(layout: Layout) -> bool:
    return math.prod(layout.weight_shape) <= _MAX_GATHERED


def _expand_plainly(packed: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    by = _expand_by_table if _is_small(layout) else _expand_by_stacking
    return by(packed, layout, channels_last)


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as a parameter of ``fully_shard`` is outside of the forward."""
    if type(tensor) in PLAIN_TENSORS:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # slow to import
    return module is not None and isinstance(tensor, module.DTensor)


def _expand_everywhere(packed: Any, layout: Layout, channels_last: bool) -> Tensor:
    """The whole weight on every rank: of a part of ``packed`` no part of it can be made."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * packed.device_mesh.ndim
    whole = packed.redistribute(placements=everywhere).to_local()
    weight = expand(whole, layout, channels_last)
    return DTensor.from_local(weight, packed.device_mesh, everywhere, run_check=False)


def _expand_by_table(packed: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    return _as_weight(_gather(packed, layout, channels_last), layout, channels_last)


def _gather(packed: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    """The numbers of the dense weight in memory order."""
    source = packed
    if layout.sign < 0:
        source = torch.cat([packed, packed.neg(), packed.new_zeros(1)])
    return source.index_select(0, _table(packed, _build_gather_index, layout, channels_last))


def _fold_by_table(dense: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    index = _table(dense, _build_gather_index, layout, channels_last)
    flat = _in_memory_order(dense, channels_last)
    if layout.sign > 0:
        return dense.new_zeros(layout.size).index_add_(0, index, flat)
    both = dense.new_zeros(2 * layout.size + 1).index_add_(0, index, flat)
    return both[: layout.size] - both[layout.size : -1]


def _expand_by_stacking(packed: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    pairs, triangle = split_parts(packed, layout)
    # ONNX knows transpose, but not mT.
    opposite = (pairs if layout.sign > 0 else pairs.neg()).transpose(2, 3)
    centre = [_expand_centre(triangle, layout)] if layout.taps % 2 else []
    taps = [*pairs.unbind(1), *centre, *opposite.unbind(1)[::-1]]  # each (group, out, in)
    # One pass writes W in the memory order of the convolution: [out, tap, in] or [out, in, tap].
    return _as_weight(torch.stack(taps, 2 if channels_last else 3), layout, channels_last)


def _expand_centre(triangle: Tensor, layout: Layout) -> Tensor:
    """``(group, triangle)`` -> the full centre ``(group, out, in)``."""
    c, sign = layout.group_channels, layout.sign
    if _goes_without_table(triangle, c):
        mask = torch.ones(c, c, dtype=torch.bool, device=triangle.device).tril_(min(sign, 0))
        centre = triangle.new_zeros(layout.groups, c, c).masked_scatter_(mask, triangle)
        for rows, columns in _lower_blocks(centre):
            lower = centre[:, rows, columns]
            if rows == columns:
                lower.add_(lower.tril(-1).mT, alpha=sign)
            else:
                centre[:, columns, rows] = lower.mT if sign > 0 else lower.mT.neg()
        return centre
    source = triangle
    if sign < 0:
        zero = triangle.new_zeros(layout.groups, 1)
        source = torch.cat([triangle, triangle.neg(), zero], 1)
    index = _table(triangle, _build_centre_index, c, sign)
    return source.index_select(1, index).view(layout.groups, c, c)


def triangle_of(centre: Tensor, layout: Layout) -> Tensor:
    """The full centre ``(group, out, in)`` -> ``(group, triangle)``."""
    c, sign = layout.group_channels, layout.sign
    if _goes_without_table(centre, c):
        lengths = [row + (sign > 0) for row in range(c)]
        return torch.cat([row[:, :n] for row, n in zip(centre.unbind(1), lengths, strict=True)], 1)
    index = _table(centre, _build_triangle_index, c, sign)
    return centre.reshape(layout.groups, -1).index_select(1, index)


def _goes_without_table(centre: Tensor, c: int) -> bool:
    """Tables of a large centre would take three times its memory."""
    return c * c > _MAX_GATHERED_CENTRE and not _is_transformed(centre)


def _lower_blocks(centre: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks on and below the diagonal. On a CPU they are so small that its
    cache holds one and its mirror image, since a large matrix is slow to transpose at once."""
    size = centre.shape[-1]
    step = _BLOCK if centre.device.type == "cpu" else size
    ranges = [slice(start, start + step) for start in range(0, size, step)]
    return [(rows, columns) for i, rows in enumerate(ranges) for columns in ranges[: i + 1]]


def _fold_plainly(dense: Tensor, layout: Layout) -> Tensor:
    taps = _tap_matrices(dense, layout)
    both = taps + layout.sign * taps.flip(1).mT
    return _join(both, _fold_centre(taps, layout), layout)


def _fold_centre(taps: Tensor, layout: Layout) -> Tensor | None:
    """``G + s * G^T`` for the strict lower triangle, G for the diagonal, which has one place."""
    if layout.taps % 2 == 0:
        return None
    centre = taps.select(1, layout.pairs)
    if _goes_without_table(centre, layout.group_channels):
        both = torch.empty_like(centre, memory_format=torch.contiguous_format)
        for rows, columns in _lower_blocks(centre):  # no other is read
            lower, upper = centre[:, rows, columns], centre[:, columns, rows]
            torch.add(lower, upper.mT, alpha=layout.sign, out=both[:, rows, columns])
    else:
        both = torch.add(centre, centre.mT, alpha=layout.sign)
    both.diagonal(dim1=1, dim2=2).copy_(centre.diagonal(dim1=1, dim2=2))
    return both


def _join(taps: Tensor, centre: Tensor | None, layout: Layout) -> Tensor:
    """``(group, tap, out, in)`` and the ``(group, out, in)`` of the centre -> packed."""
    pairs = taps[:, : layout.pairs].reshape(-1)
    if centre is None:
        return pairs
    return torch.cat([pairs, triangle_of(centre, layout).reshape(-1)])


def split_parts(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``packed`` as views: pairs ``(group, tap, out, in)`` and centre ``(group, triangle)``."""
    size, rest = layout.part_sizes
    pairs, triangle = packed.narrow(0, 0, size), packed.narrow(0, size, rest)
    return pairs.view(layout.pairs_shape), triangle.view(layout.groups, layout.triangle_size)


def diagonal_places(layout: Layout, device: torch.device) -> Tensor:
    """Where in ``packed`` the diagonals of the centres lie: these numbers have one place in the
    dense weight, all others two. None is there for s = -1 and without a centre."""
    has_diagonal = layout.triangle_size and layout.sign > 0
    row = torch.arange(layout.group_channels if has_diagonal else 0, device=device)
    group = torch.arange(layout.groups, device=device)
    first = layout.part_sizes[0] + group * layout.triangle_size
    return (first[:, None] + row * (row + 3) // 2).flatten()


def _tap_matrices(dense: Tensor, layout: Layout) -> Tensor:
    """The dense weight as ``(group, tap, out, in)``: a view where its memory allows."""
    c = layout.group_channels
    return dense.reshape(layout.groups, c, c, layout.taps).movedim(3, 1)


def _in_memory_order(dense: Tensor, channels_last: bool) -> Tensor:
    """The numbers of the dense weight as they lie in memory of the one or the other order."""
    return (dense.movedim(1, -1) if channels_last else dense).reshape(-1)


def _as_weight(numbers: Tensor, layout: Layout, channels_last: bool) -> Tensor:
    """Numbers in memory order, seen as the dense weight."""
    if channels_last:
        return numbers.view(layout.channels_last_shape).movedim(-1, 1)
    return numbers.view(layout.weight_shape)


def _fold_into_parts(dense: Tensor, layout: Layout) -> Tensor:
    """:func:`_fold_plainly` with each part written once, in its place."""
    taps = _tap_matrices(dense, layout)
    packed = dense.new_empty(layout.size)
    pairs, triangle = split_parts(packed, layout)
    if layout.pairs:
        opposite = taps.mT.unbind(1)[layout.taps - layout.pairs :]
        torch.stack(opposite[::-1], 1, out=pairs)
        torch.add(taps.narrow(1, 0, layout.pairs), pairs, alpha=layout.sign, out=pairs)
    centre = _fold_centre(taps, layout)
    if centre is not None:
        triangle.copy_(triangle_of(centre, layout))
    return packed


def _table(like: Tensor, build: Callable[..., Tensor], *key: Any) -> Tensor:
    """``build(device, *key)``, kept for the next call."""
    place = (build, like.device, *key)
    if torch.jit.is_tracing():
        with untraced():  # a constant of the graph
            return build(*place[1:])
    # One that is made for a fake or traced tensor must not outlive that, nor a real one meet them.
    plain = type(like) in PLAIN_TENSORS and not _is_transformed(like)
    once = not like.is_floating_point()  # it serves to build a table
    if once or not plain or torch._C._len_torch_dispatch_stack():
        return build(*place[1:])
    table = _tables.pop(place, None)
    if table is not None:
        _tables[place] = table
        return table
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        table = _tables[place] = build(*place[1:])
    excess = sum(kept.nbytes for kept in list(_tables.values())) - _MAX_TABLE_BYTES
    for oldest in list(_tables):
        if excess <= 0:
            break
        dropped = _tables.pop(oldest, None)
        excess -= 0 if dropped is None else dropped.nbytes
    return table


def _build_centre_index(device: torch.device, c: int, sign: int) -> Tensor:
    """For each entry of the centre, row-major, its place in ``triangle`` (s = +1) or in
    ``[triangle, -triangle, 0]`` (s = -1)."""
    row = torch.arange(c, dtype=torch.int32, device=device)
    low, high = torch.minimum(row[:, None], row), torch.maximum(row[:, None], row)
    index = high * (high + sign) // 2 + low
    if sign < 0:
        size = c * (c - 1) // 2
        index = torch.where(row[:, None] < row, index + size, index)
        index = torch.where(row[:, None] == row, 2 * size, index)
    return index.flatten()


@functools.lru_cache(maxsize=16)  # of at most 512 KiB each
def _matrix_tables(
    device: torch.device, dtype: torch.dtype, c: int, sign: int
) -> tuple[Tensor, Tensor | None]:
    """For each number of W^T, where W has one tap, its place in ``packed`` and, for s = -1, its
    sign. On the diagonal these are the place of a neighbour and 0. For plain calls alone, see
    :func:`_table`."""
    with torch.inference_mode(False):
        row = torch.arange(c, dtype=torch.int32, device=device)
        low, high = torch.minimum(row[:, None], row), torch.maximum(row[:, None], row)
        if sign > 0:
            return (high * (high + 1) // 2 + low).flatten(), None
        neighbour = torch.minimum(low, high - 1).clamp_(min=0)
        signs = torch.sign(row - row[:, None]).to(dtype)
        return (high * (high - 1) // 2 + neighbour).flatten(), signs


def _build_triangle_index(device: torch.device, c: int, sign: int) -> Tensor:
    """For each number of ``triangle`` its place in the centre, row-major."""
    row, column = torch.tril_indices(c, c, min(sign, 0), dtype=torch.int32, device=device)
    return row * c + column


def _build_gather_index(device: torch.device, layout: Layout, channels_last: bool) -> Tensor:
    """For each dense number, in memory order, its place in ``packed`` (s = +1) or in
    ``[packed, -packed, 0]`` (s = -1): what becomes of the packed vector 1, 2, 3, ..."""
    packed = torch.arange(1, layout.size + 1, dtype=torch.int32, device=device)
    dense = _expand_by_stacking(packed, layout, channels_last)
    signed = _in_memory_order(dense, channels_last)
    place = torch.where(signed < 0, layout.size - signed, signed) - 1
    return place.masked_fill_(signed == 0, 2 * layout.size)
