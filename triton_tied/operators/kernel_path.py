"""From a checked call to the operators: padding modes, and one dimension as an image of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.choices import Known, remember
from ..cached_weights import is_open
from ..dispatch import why_reference
from ..geometry import Geometry
from ..kernels.precision import input_precision
from ..kernels.stored_taps import are_matrices
from ..memory_format import Memory
from ..packing import Layout, PreparedWeight
from .autograd_and_vmap import apply, apply_known
from .definitions import conv
from .flops import tell_counters
from .prepare_packed import prepare


def convolve(
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    padding_mode: str,
    alpha: float,
    residual: Tensor | None,
    beta: float,
    channels_last: bool,
    key: tuple | None = None,
) -> Tensor:
    """``alpha * (conv(input, packed) + bias) + beta * residual`` for checked arguments in one
    dtype, but for ``packed`` and ``bias``, which may be of a wider one; one or two spatial
    dimensions, stride 1. What is found out of a plain call is remembered under its key."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch._C._len_torch_dispatch_stack():
        tell_counters()
    batched = input.dim() == len(layout.kernel_size) + 2
    way = _way_of(layout, geometry, padding_mode, batched, channels_last)
    if way.circular:
        _check_wraps_once(input, geometry)
    images = _images_of(input, way)
    from ..autotune import image_copy  # its tables of files are slow to import

    output_memory: Memory = "channels_last" if channels_last else "contiguous"
    copies = image_copy.copying_pays(images, way.layout, way.geometry, output_memory)
    call = Call(way, input.dtype, copies)
    if key is not None and why_reference(input.device, input.dtype) is None:
        reads_packed = _reads_itself(packed, way.layout, input.dtype)
        known = Known(way.layout, way.geometry)
        call = remember(key, Call(way, input.dtype, copies, reads_packed, known))
    return _run(call, images, packed, bias, residual, float(alpha), float(beta))


def repeat(
    call: Call,
    input: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """What :func:`convolve` does, for a plain call whose like it has seen."""
    if input.dtype != call.dtype:
        input = input.to(call.dtype)
    if residual is not None and residual.dtype != call.dtype:
        residual = residual.to(call.dtype)
    images = input if call.way.keeps_images else _images_of(input, call.way)
    return _run(call, images, packed, bias, residual, alpha, beta)


def _run(
    call: Call,
    images: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    beta: float,
) -> Tensor:
    way = call.way
    if call.copies:
        images = images.contiguous(memory_format=torch.channels_last)
    if residual is not None and not way.keeps_shape:
        residual = _with_rows(residual, way)
    if call.reads_packed and not is_open():
        parts: Any = (packed, packed.detach())  # type: ignore[union-attr]
    else:
        parts = prepare(packed, way.layout, call.dtype)
    tensors = (images, *parts, bias, residual)
    options = (*way.options, alpha, beta, way.channels_last)
    if call.known is None:
        output = apply(conv, *tensors, *options)
    else:
        output = apply_known(tensors, options, call.known)
    if way.keeps_shape:
        return output
    output = output.squeeze(2) if way.is_row else output
    return output if way.batched else output.squeeze(0)


class Call(NamedTuple):
    """What a description of a call says of it: how it becomes one of the operator, in which dtype,
    whether the image is copied into channels-last memory first; and of a plain one, whether the
    kernels read ``packed`` itself, and what is known of its launch."""

    way: _Way
    dtype: torch.dtype
    copies: bool
    reads_packed: bool = False
    known: Known | None = None


class _Way(NamedTuple):
    """How a convolution becomes one of images with zeros or a wrapped border around them."""

    pads: str  # the mode of a padded copy, "" where there is none
    padding: list[int]  # of that copy
    circular: bool
    is_row: bool  # one dimension is an image of one row
    batched: bool
    keeps_shape: bool  # batched images are the operator's
    keeps_images: bool  # and nothing is padded
    channels_last: bool  # the output
    layout: Layout
    geometry: Geometry
    options: tuple[Any, ...]  # the operator's, but for scale factors and memory format


def _way_of(
    layout: Layout, geometry: Geometry, padding_mode: str, batched: bool, channels_last: bool
) -> _Way:
    circular = padding_mode == "circular" and _keeps_size(layout, geometry)
    pads = "" if circular or padding_mode == "zeros" else padding_mode
    flat_padding = geometry.flat_padding
    if pads:
        geometry = replace(geometry, padding=((0, 0),) * len(geometry.padding))
    is_row = len(layout.kernel_size) == 1
    if is_row:
        geometry = Geometry(
            (1, *geometry.stride), ((0, 0), *geometry.padding), (1, *geometry.dilation)
        )
        layout = replace(layout, kernel_size=(1, *layout.kernel_size))
    kernel_size, dilation, groups = layout.kernel_size, geometry.dilation, layout.groups
    padding = tuple(geometry.flat_padding)
    options = (kernel_size, padding, dilation, groups, layout.symmetry, circular)
    keeps_shape = batched and not is_row
    return _Way(
        pads, flat_padding, circular, is_row, batched, keeps_shape, keeps_shape and not pads,
        channels_last, layout, geometry, options,
    )  # fmt: skip


def _reads_itself(packed: Tensor | PreparedWeight, layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the kernels read ``packed``, and nothing that is made of it."""
    if isinstance(packed, PreparedWeight) or are_matrices(layout, input_precision(dtype)):
        return False
    return packed.dtype == dtype and packed.is_contiguous()


def _keeps_size(layout: Layout, geometry: Geometry) -> bool:
    """Circular padding makes the convolution a map of the torus onto itself: then its transpose
    is the same map."""
    window = geometry.window(layout.kernel_size)
    pairs = zip(window, geometry.padding, strict=True)
    return all(w % 2 == 1 and before == after == w // 2 for w, (before, after) in pairs)


def _check_wraps_once(input: Tensor, geometry: Geometry) -> None:
    spatial = input.shape[-len(geometry.padding) :]
    if any(before > size for size, (before, _) in zip(spatial, geometry.padding, strict=True)):
        raise RuntimeError(
            f"Padding value causes wrapping around more than once: "
            f"got padding={[before for before, _ in geometry.padding]} for an input of size "
            f"{list(input.shape)}"
        )


def _images_of(input: Tensor, way: _Way) -> Tensor:
    if way.pads:
        padded = F.pad(input, way.padding, mode=way.pads)
        input = padded.to(input.dtype)  # autocast pads in float32
    return _with_rows(input, way)


def _with_rows(tensor: Tensor, way: _Way) -> Tensor:
    tensor = tensor if way.batched else tensor.unsqueeze(0)
    return tensor.unsqueeze(2) if way.is_row else tensor
