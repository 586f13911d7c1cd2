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
from ..tracing import is_transformed_here
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
    dtype: torch.dtype,
    key: tuple | None = None,
) -> Tensor:
    """``alpha * (conv(input, packed) + bias) + beta * residual`` in ``dtype``, which is that of
    ``residual``, for checked arguments; one or two spatial dimensions, stride 1. What is found out
    of a plain call is remembered under its key."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch._C._len_torch_dispatch_stack():
        tell_counters()
    call = _call_of(input, layout, geometry, padding_mode, channels_last, dtype)
    if call.circular:
        _check_wraps_once(input, geometry)
    images = _images_of(input, call)
    from ..autotune import image_copy  # its tables of files are slow to import

    output_memory: Memory = "channels_last" if channels_last else "contiguous"
    like = images if images.dtype == dtype else torch.empty_like(images, dtype=dtype)
    copies = image_copy.copying_pays(
        like, call.layout, call.geometry, output_memory, may_copy_output=residual is None
    )
    call = call._replace(copies=copies)
    if key is not None and why_reference(input.device, dtype) is None:
        reads_packed = _reads_itself(packed, call.layout, call.dtype)
        known = Known(call.layout, call.geometry)
        call = remember(key, call._replace(reads_packed=reads_packed, known=known))
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
    if residual is not None and residual.dtype != call.dtype:
        residual = residual.to(call.dtype)
    return _run(call, _images_of(input, call), packed, bias, residual, alpha, beta)


def _run(
    call: Call,
    images: Tensor,
    packed: Tensor | PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    beta: float,
) -> Tensor:
    x, image = _as_read(images, call), None
    if x.dtype != images.dtype and images.requires_grad and not is_transformed_here():
        image = images
    if residual is not None:
        residual = _with_rows(residual, call)
    if call.reads_packed and not is_open():
        parts: Any = (packed, packed.detach())  # type: ignore[union-attr]
    else:
        parts = prepare(packed, call.layout, call.dtype)
    tensors = (x, *parts, bias, residual)
    options = (*call.options, alpha, beta, call.channels_last, None)
    if call.known is None and image is None:
        output = apply(conv, *tensors, *options)
    else:
        output = apply_known(tensors, options, call.known, image)
    output = output.squeeze(2) if call.is_row else output
    return output if call.batched else output.squeeze(0)


class Call(NamedTuple):
    """What a description says of its calls: how they become the operator's, on images with zeros or
    a wrapped border around them. ``known``: what is known of the launches of plain ones."""

    pads: str  # the mode of a padded copy, "" where there is none
    padding: list[int]  # of that copy
    circular: bool
    is_row: bool  # one dimension is an image of one row
    batched: bool
    channels_last: bool  # the output
    dtype: torch.dtype
    layout: Layout
    geometry: Geometry
    options: tuple[Any, ...]  # the operator's, but for scale factors and memory format
    copies: bool = False  # the image into channels-last memory
    reads_packed: bool = False  # itself, and nothing that is made of it
    known: Known | None = None


def _call_of(
    input: Tensor,
    layout: Layout,
    geometry: Geometry,
    padding_mode: str,
    channels_last: bool,
    dtype: torch.dtype,
) -> Call:
    circular = padding_mode == "circular" and _keeps_size(layout, geometry)
    pads = "" if circular or padding_mode == "zeros" else padding_mode
    flat_padding = geometry.flat_padding
    if pads:
        geometry = replace(geometry, padding=((0, 0),) * len(geometry.padding))
    batched = input.dim() == len(layout.kernel_size) + 2
    is_row = len(layout.kernel_size) == 1
    if is_row:
        geometry = Geometry(
            (1, *geometry.stride), ((0, 0), *geometry.padding), (1, *geometry.dilation)
        )
        layout = replace(layout, kernel_size=(1, *layout.kernel_size))
    padding = tuple(geometry.flat_padding)
    options = (
        layout.kernel_size, padding, geometry.dilation, layout.groups, layout.symmetry, circular
    )  # fmt: skip
    return Call(
        pads, flat_padding, circular, is_row, batched, channels_last, dtype, layout, geometry,
        options,
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


def _images_of(input: Tensor, call: Call) -> Tensor:
    if call.pads:
        padded = F.pad(input.to(call.dtype), call.padding, mode=call.pads)
        input = padded.to(call.dtype)  # autocast pads in float32
    return _with_rows(input, call)


def _as_read(images: Tensor, call: Call) -> Tensor:
    """In the dtype and the memory that the kernels read: one copy at most."""
    if not call.copies:
        return images if images.dtype == call.dtype else images.to(call.dtype)
    if images.dtype == call.dtype:
        return images.contiguous(memory_format=torch.channels_last)
    return images.to(call.dtype, memory_format=torch.channels_last)


def _with_rows(tensor: Tensor, call: Call) -> Tensor:
    tensor = tensor if call.batched else tensor.unsqueeze(0)
    return tensor.unsqueeze(2) if call.is_row else tensor
