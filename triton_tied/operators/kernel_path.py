"""From a checked call to the operators: padding modes, and one dimension as an image of a row."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..geometry import Geometry
from ..memory_format import Memory
from ..packing import Layout, PreparedWeight
from .autograd_and_vmap import apply
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
) -> Tensor:
    """``alpha * (conv(input, packed) + bias) + beta * residual`` for checked arguments in one
    dtype, but for ``packed`` and ``bias``, which may be of a wider one; one or two spatial
    dimensions, stride 1."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        tell_counters()
    way = _way_of(layout, geometry, padding_mode)
    batched = input.dim() == len(layout.kernel_size) + 2
    if way.pads:
        input = reference.pad(input, geometry, padding_mode)[0].to(input.dtype)  # was in float32
    if way.circular:
        _check_wraps_once(input, geometry)
    images = _as_images(input, way.is_row, batched)
    output_memory: Memory = "channels_last" if channels_last else "contiguous"
    if _image_copy().copying_pays(images, way.layout, way.geometry, output_memory):
        images = images.contiguous(memory_format=torch.channels_last)
    numbers, weights = prepare(packed, way.layout, input.dtype)
    output = apply(
        conv,
        images,
        numbers,
        weights,
        bias,
        None if residual is None else _as_images(residual, way.is_row, batched),
        *way.options,
        float(alpha),
        float(beta),
        channels_last,
    )
    if way.is_row:
        output = output.squeeze(2)
    return output if batched else output.squeeze(0)


class _Way(NamedTuple):
    """How a convolution becomes one of images with zeros or a wrapped border around them."""

    pads: bool  # by a copy, before all else
    circular: bool
    is_row: bool  # one dimension is an image of one row
    layout: Layout
    geometry: Geometry
    options: tuple[Any, ...]  # the operator's, but for scale factors and memory format


@functools.lru_cache(maxsize=4096)
def _way_of(layout: Layout, geometry: Geometry, padding_mode: str) -> _Way:
    circular = padding_mode == "circular" and _keeps_size(layout, geometry)
    pads = padding_mode != "zeros" and not circular
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
    return _Way(pads, circular, is_row, layout, geometry, options)


@functools.cache
def _image_copy() -> Any:
    """Its tables of files are slow to import."""
    from ..autotune import image_copy

    return image_copy


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


def _as_images(tensor: Tensor, is_row: bool, batched: bool) -> Tensor:
    tensor = tensor if batched else tensor.unsqueeze(0)
    return tensor.unsqueeze(2) if is_row else tensor
