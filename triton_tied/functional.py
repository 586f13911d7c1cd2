r"""The tied convolutions as functions: arguments are checked here, before anything runs.

.. math:: y = \alpha \, (\mathrm{conv}(x, \mathrm{unpack}(packed)) + b) + \beta r

Mistakes raise what ``F.conv2d`` raises for them, with the offending values.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable
from numbers import Real
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import reference
from .autotune.choices import remembered
from .dispatch import takes_operators
from .geometry import (
    PADDING_MODES,
    Geometry,
    IntOrInts,
    Padding,
    PaddingMode,
    as_integer,
    per_axis,
    resolve,
)
from .memory_format import is_channels_last
from .operators.description import key_of, may_be_kept
from .operators.kernel_path import convolve, repeat
from .packing import (
    Layout,
    PreparedWeight,
    Symmetry,
    check_supported,
    check_symmetry,
    expected_length,
    is_distributed,
    layout_of_length,
)
from .tracing import autocast_dtype, overridable, sizes_of

_Options = ParamSpec("_Options")
_NUMBERS = (int, float)


def tied_conv(
    dims: int,
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    symmetry: Symmetry = "self_adjoint",
    alpha: float | Tensor = 1.0,
    residual: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """``tied_conv2d`` over ``dims`` spatial dimensions: 1, 2 or 3."""
    options = (kernel_size, stride, padding, dilation, groups, padding_mode, symmetry)
    key = key_of(dims, input, packed, bias, residual, options)
    known: Any = None if key is None else remembered(key)
    if known is not None and type(alpha) in _NUMBERS and type(beta) in _NUMBERS:
        return repeat(known, input, packed, bias, residual, float(alpha), float(beta))
    numbers = packed.packed if isinstance(packed, PreparedWeight) else packed
    tensors = {"input": input, "packed": numbers}
    optional = {"bias": bias, "residual": residual}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    function = f"tied_conv{dims}d"
    described = {name: describe(function, name, tensor) for name, tensor in tensors.items()}
    autocast = autocast_dtype(described["input"].device.type)
    # The checks look at descriptions only, so that what passed once need not be checked again.
    is_plain = type(input) is Tensor and not torch.compiler.is_compiling()
    layout, geometry, dtype = (_check_once if is_plain else _check)(
        tuple(described.items()),
        autocast,
        per_axis("kernel_size", kernel_size, dims),
        per_axis("stride", stride, dims),
        padding if isinstance(padding, str) else per_axis("padding", padding, dims),
        per_axis("dilation", dilation, dims),
        check_groups(groups),
        check_symmetry(symmetry),
    )
    if isinstance(packed, PreparedWeight):
        packed.checked(layout)
    check_padding_mode(padding_mode)
    alpha, beta = check_scalar("alpha", alpha), _check_beta(beta)
    channels_last = is_channels_last(dims, input)
    residual = None if residual is None else residual.to(dtype)
    if takes_operators(input.device, dtype, geometry.stride) and not is_distributed(input):
        arguments = (input, packed, bias, layout, geometry, padding_mode)
        if not isinstance(alpha, Tensor):
            key = key if may_be_kept(options) else None
            return convolve(*arguments, alpha, residual, beta, channels_last, dtype, key)
        output = convolve(*arguments, 1.0, None, 1.0, channels_last, dtype)  # they take numbers
        return reference.add_scaled(output, alpha, residual, beta)
    input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    if padding_mode != "zeros":  # first, since F.pad refuses what is too large for the image
        padded, geometry = reference.pad(input, geometry, padding_mode)
        input = padded.to(dtype)  # autocast pads in float32
    weight = reference.dense_weight(packed, layout, dtype, channels_last)
    return reference.convolve(
        input, weight, bias, geometry, layout.groups, "zeros", alpha, residual, beta
    )


def _over(
    dims: int, function: Callable[Concatenate[int, _Options], Tensor], doc: str
) -> Callable[_Options, Tensor]:
    """``function`` over so many dimensions, under a name and with a signature of its own."""

    tied_convnd = overridable(functools.partial(function, dims))
    signature = inspect.signature(function)
    tied_convnd.__module__ = __name__
    tied_convnd.__name__ = tied_convnd.__qualname__ = f"tied_conv{dims}d"
    tied_convnd.__doc__ = doc
    tied_convnd.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    return tied_convnd


tied_conv1d = _over(1, tied_conv, "``tied_conv2d`` over ``(N, C, L)`` or ``(C, L)`` input.")
tied_conv2d = _over(
    2,
    tied_conv,
    """``alpha * (conv2d(input, W) + bias) + beta * residual``: W is the tied weight of ``packed``.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; float64, float32, float16 or bfloat16. The
            output has its memory format.
        packed: ``(packed_size(C, kernel_size, groups, symmetry),)``, of the dtype of ``input``; or
            what ``prepare`` made of it.
        bias: ``(C,)`` or None, of the dtype of ``input``.
        kernel_size, stride, dilation: an int or a sequence of two.
        padding: likewise, or "same" (stride 1 only) or "valid".
        groups: divides C; the tie holds inside each group.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        symmetry: "self_adjoint" (``W[i,j,a,b] = W[j,i,KH-1-a,KW-1-b]``) or "skew_adjoint" (with
            a minus sign). As a linear map the convolution is its own transpose, up to that sign,
            with stride 1, an odd kernel, and zero or circular "same" padding; otherwise only the
            weight is tied.
        alpha: scales the convolution and the bias: a number, or a tensor of no dimension, which
            can have a gradient.
        residual: added at the end; of the shape and dtype of the output, or None.
        beta: a number that scales the residual; of 0 it is not looked at, as ``torch.addmm`` has
            it.

    Returns:
        ``(N, C, H_out, W_out)`` or ``(C, H_out, W_out)``, sizes as in ``F.conv2d``.

    Under autocast all tensors but float64 ones are cast to the autocast dtype, as in ``F.conv2d``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown symmetry or padding mode, a kernel size that is not positive.
        RuntimeError: whatever ``F.conv2d`` refuses; ``packed`` of the wrong length; tensors of
            different dtype or device; NotImplementedError for dtypes and layouts not supported.
    """,
)
tied_conv3d = _over(
    3, tied_conv, "``tied_conv2d`` over ``(N, C, D, H, W)`` or ``(C, D, H, W)`` input."
)
BY_DIMENSIONS = {1: tied_conv1d, 2: tied_conv2d, 3: tied_conv3d}


class Description(NamedTuple):
    """All of a tensor that the checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def describe(function: str, name: str, tensor: Tensor) -> Description:
    """Raises for what no function takes, see :func:`.packing.check_supported`."""
    check_supported(function, name, tensor)
    return Description(sizes_of(tensor), tensor.dtype, tensor.device)


def _check(
    tensors: tuple[tuple[str, Description], ...],
    autocast: torch.dtype | None,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Padding,
    dilation: tuple[int, ...],
    groups: int,
    symmetry: Symmetry,
) -> tuple[Layout, Geometry, torch.dtype]:
    """All checks that need no values. Returns the layout, the geometry and the compute dtype."""
    given = dict(tensors)
    geometry = resolve(kernel, stride, padding, dilation)
    _check_rank(given["input"], len(kernel))
    dtype = check_types(given, autocast)
    layout = _check_channels(given, kernel, groups, symmetry)
    _check_sizes(given, kernel, geometry)
    return layout, geometry, dtype


_check_once = functools.lru_cache(maxsize=4096)(_check)


def _check_rank(input: Description, dims: int) -> None:
    if len(input.shape) not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to "
            f"tied_conv{dims}d, but got input of size: {list(input.shape)}"
        )


def check_types(given: dict[str, Description], autocast: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in; raises unless all tensors have it and are on one device."""
    input = given["input"]
    dtype = _after_autocast(input.dtype, autocast)
    for name, tensor in given.items():
        if tensor.device != input.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but input is on {input.device} "
                f"and {name} is on {tensor.device}"
            )
        if _after_autocast(tensor.dtype, autocast) != dtype:
            raise RuntimeError(
                f"Input type ({input.dtype}) and {name} type ({tensor.dtype}) should be the same"
            )
    return dtype


def _check_channels(
    given: dict[str, Description], kernel: tuple[int, ...], groups: int, symmetry: Symmetry
) -> Layout:
    shape = given["input"].shape
    channels = shape[-len(kernel) - 1]
    if channels < 1 or channels % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected input{list(shape)} to have a positive number "
            f"of channels divisible by {groups}, but got {channels} channels"
        )
    layout = Layout(channels, kernel, groups, symmetry)
    if given["packed"].shape != (layout.size,):
        raise RuntimeError(_wrong_length(shape, given["packed"].shape, layout))
    if "bias" in given and given["bias"].shape != (channels,):
        raise RuntimeError(
            f"Given weight of size {list(layout.weight_shape)}, expected bias to be 1-dimensional "
            f"with {channels} elements, but got bias of size {list(given['bias'].shape)} instead"
        )
    return layout


def _wrong_length(input_shape: torch.Size, packed_shape: torch.Size, layout: Layout) -> str:
    """What packed should have been, and what its length would be right for."""
    expected = expected_length(layout, packed_shape)
    other = layout_of_length(packed_shape[0], layout) if len(packed_shape) == 1 else None
    if other is None:
        return expected
    if other.channels == layout.channels:
        return f"{expected}, the length for symmetry={other.symmetry!r}"
    return (
        f"Given groups={layout.groups}, weight of size {list(other.weight_shape)}, expected "
        f"input{list(input_shape)} to have {other.channels} channels, but got "
        f"{layout.channels} channels instead ({expected})"
    )


def _check_sizes(
    given: dict[str, Description], kernel: tuple[int, ...], geometry: Geometry
) -> None:
    shape = given["input"].shape
    spatial = shape[-len(kernel) :]
    if min(min(pair) for pair in geometry.padding) < 0:
        raise RuntimeError(
            f"negative padding is not supported, got padding={[p for p, _ in geometry.padding]}"
        )
    padded, window = geometry.padded_size(spatial), geometry.window(kernel)
    if min(spatial) < 1 or any(p < w for p, w in zip(padded, window, strict=True)):
        raise RuntimeError(
            f"Calculated padded input size per channel: ({_joined(padded)}). "
            f"Kernel size: ({_joined(window)}). Kernel size can't be greater than actual input "
            f"size, and no side of it can be empty, but got input of size {list(shape)}"
        )
    expected = [*shape[: -len(kernel)], *geometry.output_size(spatial, kernel)]
    if "residual" in given and list(given["residual"].shape) != expected:
        raise RuntimeError(
            f"expected residual of the output's size {expected}, "
            f"but got residual of size {list(given['residual'].shape)}"
        )


def check_groups(groups: int) -> int:
    """Returns ``groups``; raises as ``F.conv2d`` does for what is not a positive int."""
    groups = as_integer("groups", groups)
    if groups < 1:
        raise RuntimeError(f"non-positive groups is not supported, got groups={groups}")
    return groups


def check_padding_mode(padding_mode: str) -> None:
    """Raises ValueError unless ``padding_mode`` is one that ``nn.Conv2d`` knows."""
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode must be one of {set(PADDING_MODES)}, "
            f"but got padding_mode={padding_mode!r}"
        )


def check_scalar(name: str, given: Any) -> float | Tensor:
    """A number, or a tensor of no dimension, to which a gradient goes.

    Raises:
        TypeError: anything else.
    """
    if _is_real_scalar(given):
        return given
    number = _as_number(given)
    if number is None:
        raise TypeError(
            f"{name} must be a real number or a real tensor of no dimension, got {_named(given)}"
        )
    return number


def _is_real_scalar(given: Any) -> bool:
    """Whether it is a tensor of no dimension that holds a real number."""
    if not isinstance(given, Tensor) or given.dim():
        return False
    return not given.is_complex() and given.dtype != torch.bool


def _check_beta(beta: Any) -> float:
    """
    Raises:
        TypeError: no number.
    """
    number = _as_number(beta)
    if number is None:
        raise TypeError(f"beta must be a real number, got {_named(beta)}")
    return number


def _as_number(given: Any) -> float | None:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, Real) and not isinstance(given, bool):  # of NumPy, or a fraction
        return float(given)
    return None


def _named(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of size {list(given.shape)} and dtype {given.dtype}"
    return reprlib.repr(given)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """In which a convolution would compute with the tensor, autocast considered."""
    return _after_autocast(tensor.dtype, autocast_dtype(tensor.device.type))


def _after_autocast(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _joined(sizes: list[int]) -> str:
    return " x ".join(str(size) for size in sizes)
