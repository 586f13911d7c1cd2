"""The largest singular value of a tied convolution, seen as a linear map of images.

With W_t the matrix of tap t, the convolution multiplies each frequency w of an image by ``F(w)``,
the sum over t of ``W_t exp(i <w, t>)``. On a torus (circular padding that keeps the size) the
frequencies are those of the image's size. Of an infinite image they are all w, and a convolution
with zero padding of any width and any stride is a part of that map, so that its norm is at most the
supremum of ``|F(w)|``. (Reflect and replicate padding show a pixel several times, and no bound here
holds for them.)

The tie says that ``F(w)``, with the middle of the kernel as its origin, is Hermitian for s = +1 and
skew-Hermitian for s = -1, so its singular values are the magnitudes of its eigenvalues.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from .functional import BY_DIMENSIONS, check_padding_mode
from .geometry import Geometry, IntOrInts, PaddingMode, as_integer, per_axis, resolve
from .packing import (
    Layout,
    PreparedWeight,
    Symmetry,
    check_supported,
    dense_weight,
    make_layout,
    numbers_of,
    single_or_wider,
)
from .prepare import prepare
from .tracing import overridable

Method = Literal["bound", "circular"]


@overridable
def spectral_norm(
    packed: Tensor | PreparedWeight,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
    method: Method = "bound",
    *,
    image_size: IntOrInts | None = None,
    dilation: IntOrInts = 1,
) -> Tensor:
    """The spectral norm of the convolution: an upper bound of it, or its exact value on a torus.

    **"bound"** is an upper bound for images of every size, zero padding of any width, circular
    padding that keeps the size, every stride and dilation. It is the least norm of the matrices
    into which the weight can be reshaped, times the root of the number of taps,

        |A| <= sqrt(KH * KW) * min(|T|, |R|),    T[i, (j,a,b)] = R[(i,a), (j,b)] = W[i,j,a,b]

    (Singla and Feizi, Fantastic Four: differentiable bounds on singular values of convolution
    layers, ICLR 2021). They have two more matrices, with rows and columns the other way round; of a
    tied weight those are the transposes of the two, up to the sign and the order of the taps, and
    have the same norms. In one dimension T is alone, in three there are four matrices. R has C * KH
    rows, and with many channels its decomposition takes long.

    **"circular"** is the exact norm with circular padding that keeps an image of ``image_size``,
    the largest ``|F(w)|`` of its frequencies w, where W_t is the matrix of tap t and

        F(w) = sum over t of W_t exp(i <w, t>)

    (Sedghi, Gupta and Long, The singular values of convolutional layers, ICLR 2019). It is also an
    upper bound, and a tight one, for zero "same" padding and images that are smaller along each
    axis by ``dilation * (kernel_size // 2)`` or more.

    There is a third way, ``power_iteration``, apart from these: it is an estimate from below, and
    carries a vector from call to call.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``. With groups it is the
            largest of the groups' norms.
        method: "bound" or "circular".
        image_size: for "circular", an int or one for each axis.
        dilation: likewise; "bound" does not depend on it.

    Returns:
        A tensor of no dimension, of the dtype of ``packed``; half types are computed in float32,
        under autocast too. Differentiable, with a gradient of zero at zero. (A second derivative is
        there where the largest singular value is simple.)

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; an unknown method; an image size
            that is not positive, is missing, or is given for "bound".
        RuntimeError: an image size or a dilation of another number of axes, or a dilation that is
            not positive.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"method must be one of {set(get_args(Method))}, but got method={method!r}"
        )
    layout = make_layout(channels, kernel_size, groups, symmetry)
    numbers = numbers_of("spectral_norm", packed, layout)
    dilations = _check_dilation(dilation, layout)
    if (image_size is None) != (method == "bound"):
        raise ValueError(
            f"image_size goes with method='circular' alone, "
            f"but got method={method!r} and image_size={image_size!r}"
        )
    sizes = None if image_size is None else _check_image_size(image_size, layout)
    weight = dense_weight(packed, layout, single_or_wider(numbers.dtype), False)
    c = layout.group_channels
    grouped = weight.reshape(layout.groups, c, c, *layout.kernel_size)
    with without_autocast(weight.device):
        if sizes is None:
            norm = _reshaping_bound(grouped)
        else:
            norm = _norm_on_a_torus(grouped, layout.sign, sizes, dilations)
    return norm.to(numbers.dtype)


@overridable
def power_iteration(
    packed: Tensor | PreparedWeight,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
    *,
    image_size: IntOrInts,
    padding_mode: PaddingMode = "zeros",
    dilation: IntOrInts = 1,
    vector: Tensor | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> tuple[Tensor, Tensor]:
    """An estimate from below of the spectral norm for one size of images, by power iteration.

    With "same" padding and an odd kernel the convolution A is its own transpose, up to the sign, so
    that each step is one convolution and no transpose is needed:

        v <- A v / |A v|,    |A v| <= |A|

    The estimate grows from step to step. How fast depends on the gap between the largest singular
    values; how far it still is from the norm is not known. For a bound see ``spectral_norm``.

    In training, hand the vector of the last call to the next: weights that move little need few
    steps, and ``tolerance=0, max_steps=1`` waits for no result of the device.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``; the kernel is odd along
            each axis.
        image_size: an int or one for each axis.
        padding_mode: "zeros" or "circular"; the padding is "same".
        dilation: an int or one for each axis.
        vector: an image ``(channels, *image_size)`` to begin with, not of zeros, of the dtype of
            ``packed``, or float32 for half types; None for a random one.
        tolerance: stops when a step has raised the estimate by no more than this share of it. 0
            takes ``max_steps`` steps.
        max_steps: at most so many, with a warning if the tolerance was not reached.

    Returns:
        The estimate, a tensor of no dimension, and the vector, of norm one, for the next call. The
        gradient of the estimate takes the vector as a constant: it is that of the norm once the
        iteration has converged. (A second derivative would not be right.)

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; an even kernel, an unknown
            padding mode, a negative tolerance, fewer steps than one, a vector of another size.
        RuntimeError: a vector of another dtype or device; otherwise as ``spectral_norm``.
    """
    layout = make_layout(channels, kernel_size, groups, symmetry)
    numbers = numbers_of("power_iteration", packed, layout)
    sizes = _check_image_size(image_size, layout)
    dilations = _check_dilation(dilation, layout)
    check_padding_mode(padding_mode)
    same = resolve(layout.kernel_size, 1, "same", dilations)
    check_own_transpose(layout.kernel_size, same, padding_mode)
    max_steps = _check_steps(tolerance, max_steps)
    dtype = numbers.dtype if isinstance(packed, PreparedWeight) else single_or_wider(numbers.dtype)
    if vector is None:
        vector = torch.randn(channels, *sizes, dtype=dtype, device=numbers.device)
    else:
        _check_vector(vector, (channels, *sizes), dtype, numbers.device)
    if not isinstance(packed, PreparedWeight):
        packed = prepare(packed, channels, layout.kernel_size, groups, symmetry, dtype=dtype)
    apply = functools.partial(
        BY_DIMENSIONS[len(layout.kernel_size)],
        packed=packed,
        kernel_size=layout.kernel_size,
        padding="same",
        padding_mode=padding_mode,
        dilation=dilations,
        groups=groups,
        symmetry=symmetry,
    )
    with without_autocast(numbers.device):
        estimate, vector = _iterate(apply, vector, tolerance, max_steps)
    return estimate.to(numbers.dtype), vector


def check_bounded(
    kernel_size: tuple[int, ...], geometry: Geometry, padding_mode: PaddingMode
) -> None:
    """Raises ValueError unless the norm of the convolution is at most that of the infinite map:
    each pixel must be shown once."""
    shown_once = all(
        window > before + after
        for window, (before, after) in zip(
            geometry.window(kernel_size), geometry.padding, strict=True
        )
    )
    if padding_mode == "zeros" or (padding_mode == "circular" and shown_once):
        return
    raise ValueError(
        f"there is a bound of the spectral norm for zero padding, and for circular padding that "
        f"keeps the size, but none for padding_mode={padding_mode!r} with "
        f"padding={geometry.padding} (before and after)"
    )


def check_own_transpose(
    kernel_size: tuple[int, ...], geometry: Geometry, padding_mode: PaddingMode
) -> None:
    """Raises ValueError unless the convolution, as a linear map, is its own transpose up to s."""
    same = resolve(kernel_size, 1, "same", geometry.dilation)
    if (
        all(k % 2 for k in kernel_size)
        and geometry == same
        and padding_mode in ("zeros", "circular")
    ):
        return
    raise ValueError(
        f"power_iteration needs a convolution that is its own transpose up to the sign: an odd "
        f"kernel, stride 1, and zero or circular padding that keeps the size, but got "
        f"kernel_size={kernel_size}, stride={geometry.stride}, "
        f"padding={geometry.padding} (before and after), padding_mode={padding_mode!r}"
    )


def _iterate(
    apply: Callable[[Tensor], Tensor], vector: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        vector = vector / torch.linalg.vector_norm(vector)
        last = 0.0
        for _ in range(max_steps - 1):
            estimate, vector = _step(apply, vector)
            if tolerance:
                now = estimate.item()
                if now - last <= tolerance * now:
                    break
                last = now
        else:
            if tolerance:
                warnings.warn(
                    f"power_iteration: after max_steps={max_steps} the estimate still grew by more "
                    f"than tolerance={tolerance} a step",
                    stacklevel=4,
                )
    return _step(apply, vector)  # the last one alone has a gradient


def _step(apply: Callable[[Tensor], Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of the vector's image, and that image with norm one."""
    image = apply(vector)
    norm = torch.linalg.vector_norm(image)
    turned = image.detach() / norm.detach()
    return norm, torch.where(norm.detach() > 0, turned, vector)  # a weight of zeros turns nothing


def _reshaping_bound(grouped: Tensor) -> Tensor:
    """Of a weight ``(group, out, in, *kernel)``."""
    norms = torch.stack([_largest_singular_values(m) for m in _reshaped(grouped)])
    return math.sqrt(math.prod(grouped.shape[3:])) * norms.amin(0).amax()


def _reshaped(grouped: Tensor) -> Iterator[Tensor]:
    """``(group, out, in, *kernel)`` as matrices: some axes of the kernel go with the rows, the
    others with the columns. Since W is tied, each choice has the norm of the opposite one."""
    g, c = grouped.shape[:2]
    long = [axis for axis in range(3, grouped.dim()) if grouped.shape[axis] > 1]
    short = [axis for axis in range(3, grouped.dim()) if grouped.shape[axis] == 1]
    for with_rows in itertools.product((False, True), repeat=max(len(long) - 1, 0)):
        rows = [axis for axis, chosen in zip(long[1:], with_rows, strict=True) if chosen]
        columns = [axis for axis in long if axis not in rows]
        matrix = grouped.permute(0, 1, *rows, 2, *columns, *short)
        yield matrix.reshape(g, c * math.prod([grouped.shape[axis] for axis in rows]), -1)


def _largest_singular_values(matrices: Tensor) -> Tensor:
    """Of each matrix the largest, from the eigenvalues of the smaller of ``M M^T`` and ``M^T M``:
    that squares the numbers, which costs the largest no accuracy, and is several times as fast."""
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    largest = matrices.detach().abs().amax()
    unit = torch.where(largest > 0, largest, 1)  # the squares of very small numbers are zero
    matrices = matrices / unit
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT)[..., -1]
    positive = squares > 0  # the root has no derivative at zero, where 0 is a subgradient
    return unit * torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _norm_on_a_torus(
    grouped: Tensor, sign: int, sizes: tuple[int, ...], dilations: tuple[int, ...]
) -> Tensor:
    """Of a weight ``(group, out, in, *kernel)``. Its Fourier transform is taken one axis after the
    other, each a small matrix product: a kernel has few taps. Real weights have the same norm at w
    and -w, so half of the last axis will do."""
    symbols = torch.complex(grouped, torch.zeros_like(grouped))
    for axis, (size, dilation) in enumerate(zip(sizes, dilations, strict=True)):
        taps = symbols.shape[3]
        count = size // 2 + 1 if axis == len(sizes) - 1 else size
        frequency = torch.arange(count, dtype=torch.float64) * (2 * math.pi / size)
        place = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) * dilation
        waves = torch.exp(1j * place[:, None] * frequency).to(symbols)
        symbols = torch.tensordot(symbols, waves, dims=([3], [0]))  # its axis is now the last
    matrices = symbols.movedim((1, 2), (-2, -1))
    hermitian = matrices if sign > 0 else 1j * matrices
    return torch.linalg.eigvalsh(hermitian).abs().amax()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In a half type neither a bound would be one, nor an estimate come from below."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_image_size(image_size: IntOrInts, layout: Layout) -> tuple[int, ...]:
    sizes = per_axis("image_size", image_size, len(layout.kernel_size))
    if min(sizes) < 1:
        raise ValueError(f"image_size should be positive, got {image_size}")
    return sizes


def _check_dilation(dilation: IntOrInts, layout: Layout) -> tuple[int, ...]:
    return resolve(layout.kernel_size, 1, 0, dilation).dilation


def _check_steps(tolerance: float, max_steps: int) -> int:
    if not isinstance(tolerance, Real) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance must be a real number, got {tolerance!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance should not be negative, got {tolerance}")
    steps = as_integer("max_steps", max_steps)
    if steps < 1:
        raise ValueError(f"max_steps should be positive, got {max_steps}")
    return steps


def _check_vector(
    vector: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_supported("power_iteration", "vector", vector)
    if vector.shape != shape:
        raise ValueError(
            f"expected vector of size {list(shape)}, but got vector of size {list(vector.shape)}"
        )
    if vector.dtype != dtype or vector.device != device:
        raise RuntimeError(
            f"expected vector of {dtype} on {device}, but got vector of {vector.dtype} on "
            f"{vector.device}"
        )
