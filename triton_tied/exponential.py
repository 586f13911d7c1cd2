r"""The exponential of a tied convolution, by its power series.

.. math:: \exp(A) x = x + A x + A^2 x / 2! + \dots

It is evaluated from the inside, ``x + A (x + A (x + ...) / 2) / 1``, so that each term is one call
of the convolution, with its ``alpha`` and ``residual``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .argument_checks import check_circular_or_zeros, check_odd
from .functional import BY_DIMENSIONS, compute_dtype
from .geometry import IntOrInts, PaddingMode, as_number, as_positive
from .memory_format import CHANNELS_LAST, is_channels_last
from .packing import (
    Layout,
    PreparedWeight,
    Symmetry,
    check_supported,
    check_symmetry,
    make_layout,
    numbers_of,
)
from .prepare import prepare
from .spectral_norm import spectral_norm
from .tracing import overridable

_MAX_TERMS = 100  # a series of more has lost all digits to cancellation before


def exp_error_bound(norm: float | Tensor, terms: int, symmetry: Symmetry = "self_adjoint") -> float:
    """How far the series of ``tied_exp`` is from ``exp(A)`` at most, in the spectral norm.

    The first power that is left out, ``b = norm^(terms+1) / (terms+1)!``, bounds the error for
    "skew_adjoint", where all eigenvalues are imaginary. For "self_adjoint" the others are bounded
    by a geometric series, ``b / (1 - norm / (terms+2))``: infinity where the norm is not below
    ``terms + 2``. Rounding comes on top: each number of the output is a sum of numbers up to
    ``exp(norm)`` times as large as the input.

    Args:
        norm: of A, or a bound of it.
        terms: how often A is applied.
        symmetry: of A as a linear map.

    Raises:
        TypeError: an argument is not a number.
        ValueError: a negative or infinite norm, terms that are not positive, an unknown symmetry.

    Examples:
        >>> exp_error_bound(1.0, 5, "skew_adjoint")  # 1 / 6!
        0.001388888888888889
    """
    norm, terms = as_number("norm", norm), as_positive("terms", terms)
    left_out = math.prod(norm / power for power in range(1, terms + 2))
    if check_symmetry(symmetry) == "skew_adjoint":
        return left_out
    return left_out / (1 - norm / (terms + 2)) if norm < terms + 2 else math.inf


def exp_terms(norm: float | Tensor, tolerance: float, symmetry: Symmetry = "self_adjoint") -> int:
    """The least number of terms for which ``exp_error_bound`` is at most ``tolerance``.

    Args:
        norm, symmetry: as in ``exp_error_bound``.
        tolerance: relative to the norm of the input.

    Raises:
        TypeError, ValueError: as ``exp_error_bound``; a tolerance that is not positive; more than
            100 terms, since such a series loses all its digits to cancellation.

    Examples:
        >>> exp_terms(1.0, 1e-6, "skew_adjoint")
        9
    """
    norm, tolerance = as_number("norm", norm), _checked_tolerance(tolerance)
    for terms in range(1, _MAX_TERMS + 1):
        if exp_error_bound(norm, terms, symmetry) <= tolerance:
            return terms
    raise ValueError(
        f"expected a norm for which {_MAX_TERMS} terms are enough for tolerance={tolerance}, "
        f"but got norm={norm}: scale the weight down"
    )


@overridable
def tied_exp(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    *,
    kernel_size: IntOrInts,
    terms: int | None = None,
    tolerance: float | None = None,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    symmetry: Symmetry = "self_adjoint",
    recompute: bool = False,
) -> Tensor:
    """``exp(A) input`` where A is the tied convolution of ``packed`` with "same" padding.

    For "skew_adjoint" A the result is orthogonal, for "self_adjoint" A symmetric and positive
    definite, up to ``exp_error_bound(norm of A, terms, symmetry)``. The gradients are those of the
    series as it is evaluated, of any order. The weight is prepared once for all terms.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; with one or three sides likewise.
        packed: as in ``tied_conv2d``.
        kernel_size: a sequence of one to three odd numbers; an int k means ``(k, k)``.
        terms: how often A is applied; the series ends with ``A^terms / terms!``. None takes
            ``exp_terms`` of a bound of the norm, ``spectral_norm(..., "bound")``, whose value is
            read on each call: where it has none, as under ``torch.compile`` and on meta tensors,
            give a number.
        tolerance: for ``terms=None``, the error relative to the input; by default one rounding
            of the dtype.
        dilation, groups, symmetry: as in ``tied_conv2d``.
        padding_mode: "zeros" or "circular", with which A is its own transpose up to the sign.
        recompute: what is kept for the backward. False: the input of each of the convolutions,
            ``terms`` images. True: ``input`` alone, from which the backward computes the others
            again, as ``torch.utils.checkpoint`` does; the gradients are the same. The transforms of
            ``torch.func`` keep all in either case.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: terms or a tolerance that are not positive, a tolerance beside ``terms``, an
            even kernel size, another padding mode; as ``tied_conv2d``.
        RuntimeError: as ``tied_conv2d``; ``terms=None`` where no value can be read.
    """
    layout = _checked_layout(input, packed, kernel_size, groups, symmetry)
    check_circular_or_zeros("tied_exp", padding_mode)
    series = functools.partial(_series, layout, dilation, padding_mode)
    terms = _number_of_terms(input, packed, layout, terms, tolerance)
    # torch.func has no saved tensor hooks, by which the checkpoint works.
    keeps_all = not recompute or torch._C._are_functorch_transforms_active()
    if keeps_all or not torch.is_grad_enabled():
        return series(input, packed, terms)
    return checkpoint(series, input, packed, terms, use_reentrant=False, preserve_rng_state=False)


def _series(
    layout: Layout,
    dilation: IntOrInts,
    padding_mode: PaddingMode,
    input: Tensor,
    packed: Tensor | PreparedWeight,
    terms: int,
) -> Tensor:
    """From the inside: the last power first."""
    dims, sizes = len(layout.kernel_size), (layout.kernel_size, layout.groups, layout.symmetry)
    convolve = BY_DIMENSIONS[dims]
    if not isinstance(packed, PreparedWeight):
        channels_last = is_channels_last(dims, input)
        memory_format = CHANNELS_LAST[dims] if channels_last else torch.contiguous_format
        packed = prepare(packed, layout.channels, *sizes, memory_format=memory_format)
    input = output = input.to(compute_dtype(input))  # once, and not for each residual
    for power in range(terms, 0, -1):
        output = convolve(
            output,
            packed,
            kernel_size=layout.kernel_size,
            padding="same",
            dilation=dilation,
            groups=layout.groups,
            padding_mode=padding_mode,
            symmetry=layout.symmetry,
            alpha=1 / power,
            residual=input,
        )
    return output


def _checked_layout(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    kernel_size: IntOrInts,
    groups: int,
    symmetry: Symmetry,
) -> Layout:
    check_supported("tied_exp", "input", input)
    sides = len(kernel_size) if isinstance(kernel_size, list | tuple) else 2
    if sides not in BY_DIMENSIONS:
        raise ValueError(f"kernel_size should have one to three numbers, got {kernel_size}")
    if input.dim() not in (sides + 1, sides + 2):
        raise RuntimeError(
            f"Expected {sides + 1}D (unbatched) or {sides + 2}D (batched) input to tied_exp with "
            f"kernel_size={kernel_size}, but got input of size: {list(input.shape)}"
        )
    layout = make_layout(input.shape[-sides - 1], kernel_size, groups, symmetry)
    check_odd("tied_exp", layout.kernel_size)
    numbers_of("tied_exp", packed, layout)
    return layout


def _checked_tolerance(tolerance: float) -> float:
    tolerance = as_number("tolerance", tolerance)
    if tolerance == 0:
        raise ValueError("tolerance should be positive, got tolerance=0")
    return tolerance


def _number_of_terms(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    layout: Layout,
    terms: int | None,
    tolerance: float | None,
) -> int:
    """Those given, or as many as the bound of the norm asks for."""
    if terms is not None:
        if tolerance is not None:
            raise ValueError(f"give terms or a tolerance: got terms={terms}, tolerance={tolerance}")
        return as_positive("terms", terms)
    if tolerance is None:
        tolerance = torch.finfo(compute_dtype(input)).eps
    tolerance = _checked_tolerance(tolerance)
    message = (
        "terms=None reads the weight's norm, which has no value under torch.compile, under "
        "torch.vmap of the weight, and on meta tensors: give terms"
    )
    if torch.compiler.is_compiling():
        raise RuntimeError(message)
    with torch.no_grad():
        sizes = layout.channels, layout.kernel_size, layout.groups, layout.symmetry
        norm = spectral_norm(packed, *sizes, method="bound")
    try:
        value = norm.item()
    except RuntimeError as error:
        raise RuntimeError(message) from error
    return exp_terms(value, tolerance, layout.symmetry)
