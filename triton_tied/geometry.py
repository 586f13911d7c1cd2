"""How a convolution walks over its input: stride, padding and dilation, one entry for each axis."""

from __future__ import annotations

import contextlib
import math
import operator
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)

IntOrInts = int | Sequence[int]
Padding = int | Sequence[int] | Literal["same", "valid"]


@dataclass(frozen=True)
class Geometry:
    """Stride, dilation and padding with ints, strings and defaults resolved.

    ``padding`` holds (before, after) for each axis. Either may be negative, which crops: with
    stride 1 the input gradient of padding p is the same convolution with padding d(K-1) - p.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def symmetric_padding(self) -> tuple[int, ...] | None:
        """One number an axis where ``F.conv2d`` can express the padding itself, else None."""
        if all(before == after >= 0 for before, after in self.padding):
            return tuple(before for before, _ in self.padding)
        return None

    @property
    def flat_padding(self) -> list[int]:
        """The order of ``F.pad``: last axis first."""
        return [amount for pair in reversed(self.padding) for amount in pair]

    def padded_size(self, spatial: Sequence[int]) -> list[int]:
        return [size + sum(pair) for size, pair in zip(spatial, self.padding, strict=True)]

    def window(self, kernel_size: Sequence[int]) -> list[int]:
        """The extent of the dilated kernel: d(K-1) + 1."""
        return [d * (k - 1) + 1 for k, d in zip(kernel_size, self.dilation, strict=True)]

    def transposed(self, kernel_size: Sequence[int]) -> Geometry:
        """That of the input gradient, for stride 1: padding d(K-1) - p of any sign."""
        sides = zip(self.window(kernel_size), self.padding, strict=True)
        padding = tuple((w - 1 - before, w - 1 - after) for w, (before, after) in sides)
        return replace(self, padding=padding)

    def output_size(self, spatial: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
        sizes = zip(self.padded_size(spatial), self.window(kernel_size), self.stride, strict=True)
        return [(padded - window) // stride + 1 for padded, window, stride in sizes]


def resolve(
    kernel_size: tuple[int, ...], stride: IntOrInts, padding: Padding, dilation: IntOrInts
) -> Geometry:
    """The geometry of arguments as ``F.conv2d`` takes them: ints, sequences, "same", "valid".

    Raises:
        TypeError: a number that is not an integer.
        RuntimeError: a sequence of another length, a non-positive stride or dilation, an unknown
            padding string, or "same" with a stride.
    """
    dims = len(kernel_size)
    strides = per_axis("stride", stride, dims)
    dilations = per_axis("dilation", dilation, dims)
    for name, values in (("stride", strides), ("dilation", dilations)):
        if min(values) < 1:
            raise RuntimeError(f"non-positive {name} is not supported, got {name}={list(values)}")
    if isinstance(padding, str):
        pairs = _named_padding(padding, kernel_size, strides, dilations)
    else:
        pairs = tuple((p, p) for p in per_axis("padding", padding, dims))
    return Geometry(strides, pairs, dilations)


def per_axis(name: str, value: IntOrInts, dims: int) -> tuple[int, ...]:
    """An int, or a list or tuple of one int or of ``dims`` ints, as a tuple of ``dims``."""
    if type(value) is int:
        return (value,) * dims
    if not isinstance(value, list | tuple):
        return (as_integer(name, value),) * dims
    if len(value) not in (1, dims):
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {dims} values to match "
            f"the convolution dimensions, but got {name}={list(value)}"
        )
    values = tuple(as_integer(name, v, value) for v in value)
    return values if len(values) == dims else values * dims


def as_integer(name: str, value: Any, shown: Any = None) -> int:
    """``value`` as an int, if it is one or, as NumPy's integers are, an equal of one.

    Raises:
        TypeError: it is not, or it is a bool; worded with ``shown``, if given, as the argument.
    """
    if type(value) is int:
        return value
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    shown = value if shown is None else shown
    raise TypeError(f"{name} must be an int or a sequence of ints, but got {shown!r}")


def as_positive(name: str, value: Any) -> int:
    """``value`` as an int of at least one.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less.
    """
    try:
        number = as_integer(name, value)
    except TypeError:
        raise TypeError(f"{name} must be an int, but got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} should be positive, got {name}={number}")
    return number


def as_number(name: str, value: Any) -> float:
    """``value`` as a float, if it is a finite number that is not negative: a real one, or a tensor
    of one element.

    Raises:
        TypeError: it is no number, or a bool.
        ValueError: it is negative, infinite or not a number.
    """
    try:
        plain = value.item() if hasattr(value, "item") else value
        number = None if isinstance(plain, bool | str) else float(plain)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be a number, but got {reprlib.repr(value)}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, but got {name}={number}")
    return number


def _named_padding(
    padding: str, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel_size)
    if padding != "same":
        raise RuntimeError(
            f"Invalid padding string: {padding!r}, should be one of {{'valid', 'same'}}"
        )
    if max(stride) > 1:
        raise RuntimeError(
            f"padding='same' is not supported for strided convolutions, got stride={list(stride)}"
        )
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)  # the odd one goes after, as in F.conv2d
