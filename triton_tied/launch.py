"""A problem and a config to one launch: the grid, descriptors, scratch and the current device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .configs import ConvConfig, WeightGradConfig
from .geometry import Geometry, memory_of
from .kernels.conv import conv_kernel
from .kernels.unpack import centre_kernel
from .kernels.weight_grad import weight_grad_kernel
from .packing import Layout

_CENTRE_BLOCK = 64


def conv(
    x: Tensor,
    packed: Tensor,
    centre: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    alpha: float,
    channels_last: bool,
    config: ConvConfig,
) -> Tensor:
    """``alpha * (conv(x, packed) + bias) + residual`` over ``(N, C, H, W)`` of any strides.

    ``centre`` is what :func:`unpack_centre` makes of ``packed``, or None to gather it in the loop.
    """
    n, channels, *image = x.shape
    sizes = geometry.output_size(image, layout.kernel_size)
    y = empty_image((n, channels, *sizes), x, channels_last)
    if y.numel() == 0:
        return y
    (before_h, _), (before_w, _) = geometry.padding
    boxes = _count_boxes((n, *sizes), config.box)
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    residual_strides = (y if residual is None else residual).stride()
    loader, sources = _sources(layout, config, x)
    with _on_device(x):
        conv_kernel[(boxes * blocks * layout.groups,)](
            *sources, packed, centre, bias, residual, y,
            n, *image, *sizes,
            *x.stride(), *residual_strides, *y.stride(),
            before_h, before_w, alpha,
            **_constants(layout, geometry, config, loader, x, y, residual),
            ROLES=config.roles,
        )  # fmt: skip
    return y


def weight_grad(
    x: Tensor,
    grad: Tensor,
    layout: Layout,
    geometry: Geometry,
    alpha: float,
    config: WeightGradConfig,
) -> Tensor:
    """``alpha`` times the gradient of the packed vector, for the output gradient ``grad``.

    Deterministic: every split sums its pixels in order, then the splits are summed in order.
    """
    n, _, *image = x.shape
    sizes = tuple(grad.shape[2:])
    if grad.numel() == 0 or layout.size == 0:
        return x.new_zeros(layout.size)
    boxes = _count_boxes((n, *sizes), config.box)
    splits = min(config.splits, boxes)
    dtype = x.dtype if splits == 1 else torch.float32
    partial = torch.empty(splits, layout.size, dtype=dtype, device=x.device)
    (before_h, _), (before_w, _) = geometry.padding
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    masked = any(size % side for size, side in zip((n, *sizes), config.box, strict=True))
    loader, sources = _sources(layout, config, x, grad)
    with _on_device(x):
        weight_grad_kernel[((layout.taps + 1) // 2 * tiles * layout.groups * splits,)](
            *sources, partial,
            n, *image, *sizes,
            *x.stride(), *grad.stride(), layout.size,
            before_h, before_w, splits, alpha,
            **_constants(layout, geometry, config, loader, x, grad),
            MASKED=masked,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(x.dtype)


def unpack_centre(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The centre tap as ``(groups, C, C)`` of C = channels/groups, in ``dtype``."""
    c = layout.group_channels
    centre = torch.empty(layout.groups, c, c, dtype=dtype, device=packed.device)
    with _on_device(packed):
        centre_kernel[(layout.groups * triton.cdiv(c, _CENTRE_BLOCK) ** 2,)](
            packed,
            centre,
            CHANNELS=c,
            GROUPS=layout.groups,
            SIGN=layout.sign,
            PAIRS=layout.pairs,
            BLOCK_N=_CENTRE_BLOCK,
            BLOCK_K=_CENTRE_BLOCK,
        )
    return centre


def extent(tensor: Tensor) -> int:
    """One more than the offset of the last element."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sides) + 1


def input_precision(dtype: torch.dtype) -> str:
    """float32 follows PyTorch's own setting for convolutions."""
    allowed = dtype == torch.float32 and torch.version.hip is None
    tf32 = allowed and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def empty_image(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    """Memory for a result of ``shape``, of the dtype and on the device of ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def why_no_descriptor(
    layout: Layout, config: ConvConfig | WeightGradConfig, *images: Tensor
) -> str | None:
    """What bulk copies ask of the images that are read and do not get, or None."""
    memory = memory_of(*images)
    inner = math.gcd(*(x.shape[3 if memory == "contiguous" else 1] for x in images))
    aligned = not any(x.data_ptr() % 16 for x in images)
    return configs.why_no_descriptor(
        config,
        memory,
        inner,
        images[0].element_size(),
        aligned,
        layout.groups,
        layout.group_channels,
    )


def _sources(
    layout: Layout, config: ConvConfig | WeightGradConfig, *images: Tensor
) -> tuple[str, list[Tensor | TensorDescriptor]]:
    """The kernel's loader, and what it reads each of the images through.

    Raises:
        ValueError: the config's loader cannot read them.
    """
    if config.loader == "pointer":
        return "pointer", list(images)
    reason = why_no_descriptor(layout, config, *images)
    if reason:
        sizes = ", ".join(str(list(x.shape)) for x in images)
        raise ValueError(f"{config} cannot read an image of size {sizes}: {reason}")
    if memory_of(*images) == "contiguous":
        return "planar_descriptor", [_planar_descriptor(x, config) for x in images]
    return "channels_last_descriptor", [_channels_last_descriptor(x, config) for x in images]


def _channels_last_descriptor(x: Tensor, config: ConvConfig | WeightGradConfig) -> TensorDescriptor:
    n, c, h, w = x.shape
    return TensorDescriptor(
        x, [n, h, w, c], [h * w * c, w * c, c, 1], [*config.box, config.BLOCK_K]
    )


def _planar_descriptor(x: Tensor, config: ConvConfig | WeightGradConfig) -> TensorDescriptor:
    n, c, h, w = x.shape
    images, rows, columns = config.box
    return TensorDescriptor(
        x, [n, c, h, w], [c * h * w, h * w, w, 1], [images, config.BLOCK_K, rows, columns]
    )


def _constants(
    layout: Layout,
    geometry: Geometry,
    config: ConvConfig | WeightGradConfig,
    loader: str,
    *images: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels compile for. ``images``: all that are read or written."""
    given = [image for image in images if image is not None]
    return {
        "CHANNELS": layout.group_channels,
        "GROUPS": layout.groups,
        "SIGN": layout.sign,
        "KERNEL_H": layout.kernel_size[0],
        "KERNEL_W": layout.kernel_size[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "LOADER": loader,
        "ACCUMULATORS": config.accumulators,
        "INPUT_PRECISION": input_precision(given[0].dtype),
        "DENSE": memory_of(*given) == "channels_last",
        "WIDE": layout.size >= 2**31 or any(extent(image) >= 2**31 for image in given),
        "BLOCK_I": config.box[0],
        "BLOCK_H": config.box[1],
        "BLOCK_W": config.box[2],
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        **configs.compile_options(config, on_nvidia=torch.version.hip is None),
    }


def _count_boxes(sizes: Sequence[int], box: Sequence[int]) -> int:
    return math.prod(triton.cdiv(size, side) for size, side in zip(sizes, box, strict=True))


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
