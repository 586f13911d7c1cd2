"""What can be done with packed vectors so that the weight stays tied, without making it dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import check_scalar
from .packing import (
    Layout,
    Symmetry,
    check_packed,
    check_supported,
    diagonal_places,
    make_layout,
    single_or_wider,
    split_parts,
    triangle_of,
)
from .tracing import overridable


@overridable
def inner(
    p: Tensor,
    q: Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """The Frobenius inner product of two dense weights, ``sum(V * W)``, from their packed vectors.

    That is ``sum(places * p * q)``, where a free number has two places in the dense weight, and one
    on the centre's diagonal. Differentiable.

    Args:
        p, q: ``(packed_size(...),)`` of one dtype. Half types are summed in float32.
        channels, kernel_size, groups, symmetry: as in ``unpack``.

    Returns:
        A tensor of no dimension.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``.
        RuntimeError: p and q of different dtype or device.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    check_packed("inner", "p", p, layout)
    check_packed("inner", "q", q, layout)
    _check_alike("p", p, "q", q)
    wide = single_or_wider(p.dtype)
    return (_places(p, layout) * p.to(wide) * q.to(wide)).sum().to(p.dtype)


@overridable
def norm(
    packed: Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """The Frobenius norm of the dense weight, from its packed vector: the root of ``inner`` with
    itself. (It is sqrt(2) times that of ``packed`` where there is no diagonal: for "skew_adjoint",
    and for even kernels.) Differentiable; at zero the gradient is zero.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``. Half types are summed in
            float32.

    Returns:
        A tensor of no dimension.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    check_packed("norm", "packed", packed, layout)
    scaled = packed.to(single_or_wider(packed.dtype)) * _places(packed, layout).sqrt()
    return torch.linalg.vector_norm(scaled).to(packed.dtype)


@overridable
def scale_channels(
    packed: Tensor,
    factors: Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """The packed vector of ``D W D``: each channel scaled, as an input and as an output, so that
    ``W[i,j,a,b]`` becomes ``d[i] * W[i,j,a,b] * d[j]``.

    Scaling the outputs alone, or the inputs alone, would break the tie. Differentiable.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``.
        factors: d, ``(channels,)``, of the dtype of ``packed``.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; ``factors`` of another size.
        RuntimeError: ``packed`` and ``factors`` of different dtype or device.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    _check_factors("scale_channels", packed, factors, layout, layout.channels, "channels")
    wide = factors.to(single_or_wider(factors.dtype))  # in a half type d * d could underflow
    d = wide.view(layout.groups, layout.group_channels)
    return _scale(packed, d[:, :, None] * d[:, None, :], layout)


@overridable
def scale_groups(
    packed: Tensor,
    factors: Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """The packed vector of a weight whose groups are scaled, each by its factor. Differentiable.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``.
        factors: ``(groups,)``, of the dtype of ``packed``.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; ``factors`` of another size.
        RuntimeError: ``packed`` and ``factors`` of different dtype or device.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    _check_factors("scale_groups", packed, factors, layout, layout.groups, "groups")
    size = layout.group_channels
    return _scale(packed, factors[:, None, None].expand(-1, size, size), layout)


@overridable
def shift_diagonal(
    packed: Tensor,
    gamma: float | Tensor,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
) -> Tensor:
    """The packed vector of a weight with ``gamma * I`` added to its centre tap: with "same"
    padding the convolution of x becomes ``conv(x) + gamma * x``. Differentiable.

    Args:
        packed, channels, kernel_size, groups: as in ``unpack``; the kernel is odd along each axis.
        gamma: a number, or a tensor of no dimension, which can have a gradient.
        symmetry: "self_adjoint". The diagonal of a skew-adjoint centre is zero: there
            ``residual=x, beta=gamma`` of ``tied_conv2d`` adds ``gamma * x`` in the same launch.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; an even kernel; a skew-adjoint
            weight; a gamma that is no number.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    check_packed("shift_diagonal", "packed", packed, layout)
    gamma = check_scalar("gamma", gamma)
    if layout.sign < 0:
        raise ValueError(
            "the centre of a skew-adjoint weight has a zero diagonal, so that nothing can be added "
            "to it. To add gamma * x to the convolution of x in the same launch, pass residual=x, "
            "beta=gamma to tied_conv1d, tied_conv2d or tied_conv3d"
        )
    if layout.taps % 2 == 0:
        raise ValueError(
            f"only a kernel that is odd along each axis has a centre tap, "
            f"got kernel_size={layout.kernel_size}"
        )
    places = diagonal_places(layout, packed.device)
    shift = torch.as_tensor(gamma, dtype=packed.dtype, device=packed.device)
    return packed.index_add(0, places, shift.expand(places.shape))


def _places(packed: Tensor, layout: Layout) -> Tensor:
    """In how many places of the dense weight each free number stands."""
    twice = packed.new_full(packed.shape, 2, dtype=single_or_wider(packed.dtype))
    return twice.index_fill(0, diagonal_places(layout, packed.device), 1)


def _scale(packed: Tensor, by: Tensor, layout: Layout) -> Tensor:
    """Every tap multiplied, entry by entry, by a symmetric matrix for each group."""
    pairs, triangle = split_parts(packed, layout)
    scaled = (pairs * by[:, None]).flatten()
    if layout.triangle_size:
        scaled = torch.cat([scaled, (triangle * triangle_of(by, layout)).flatten()])
    return scaled.to(packed.dtype)


def _check_factors(
    function: str, packed: Tensor, factors: Tensor, layout: Layout, size: int, what: str
) -> None:
    check_packed(function, "packed", packed, layout)
    check_supported(function, "factors", factors)
    if factors.shape != (size,):
        raise ValueError(
            f"expected factors to be 1-dimensional with {size} elements, one for each of the "
            f"{what}, but got factors of size {list(factors.shape)}"
        )
    _check_alike("packed", packed, "factors", factors)


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {tensor.device} "
            f"and {other_name} is on {other.device}"
        )
    if tensor.dtype != other.dtype:
        raise RuntimeError(
            f"{name} type ({tensor.dtype}) and {other_name} type ({other.dtype}) should be the same"
        )
