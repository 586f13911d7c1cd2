"""From a checked call to the operators: padding modes, and one dimension as an image of a row."""

from __future__ import annotations

from dataclasses import replace

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
    from ..autotune import image_copy  # its tables of files are slow to import

    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        tell_counters()
    dims = len(layout.kernel_size)
    circular = padding_mode == "circular" and _keeps_size(layout, geometry)
    if padding_mode != "zeros" and not circular:
        padded, geometry = reference.pad(input, geometry, padding_mode)
        input = padded.to(input.dtype)  # autocast pads in float32
    if circular:
        _check_wraps_once(input, geometry)
    layout, geometry = _as_row_image(layout, geometry)
    images = _with_rows(input, dims)
    output_memory: Memory = "channels_last" if channels_last else "contiguous"
    if image_copy.copying_pays(images, layout, geometry, output_memory):
        images = images.contiguous(memory_format=torch.channels_last)
    numbers, weights = prepare(packed, layout, input.dtype)
    output = apply(
        conv,
        images,
        numbers,
        weights,
        bias,
        None if residual is None else _with_rows(residual, dims),
        layout.kernel_size,
        geometry.flat_padding,
        geometry.dilation,
        layout.groups,
        layout.symmetry,
        circular,
        float(alpha),
        float(beta),
        channels_last,
    )
    if dims == 1:
        output = output.squeeze(2)
    return output if input.dim() == dims + 2 else output.squeeze(0)


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


def _as_row_image(layout: Layout, geometry: Geometry) -> tuple[Layout, Geometry]:
    """One dimension is an image of one row."""
    if len(layout.kernel_size) == 2:
        return layout, geometry
    row = Geometry((1, *geometry.stride), ((0, 0), *geometry.padding), (1, *geometry.dilation))
    return replace(layout, kernel_size=(1, *layout.kernel_size)), row


def _with_rows(tensor: Tensor, dims: int) -> Tensor:
    batched = tensor if tensor.dim() == dims + 2 else tensor.unsqueeze(0)
    return batched if dims == 2 else batched.unsqueeze(2)
