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

from .configs import ConvConfig, WeightGradConfig
from .geometry import Geometry
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
    with _on_device(x):
        conv_kernel[(boxes * blocks * layout.groups,)](
            _source(x, layout, config),
            packed, centre, bias, residual, y,
            n, *image, *sizes,
            *x.stride(), *residual_strides, *y.stride(),
            before_h, before_w, alpha,
            **_constants(layout, geometry, config, x, packed, y, residual),
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
    with _on_device(x):
        weight_grad_kernel[((layout.taps + 1) // 2 * tiles * layout.groups * splits,)](
            _source(x, layout, config),
            _source(grad, layout, config),
            partial,
            n, *image, *sizes,
            *x.stride(), *grad.stride(), layout.size,
            before_h, before_w, alpha,
            **_constants(layout, geometry, config, x, grad),
            MASKED=masked, SPLITS=splits,
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


def empty_image(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    """Memory for a result of ``shape``, of the dtype and on the device of ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _source(
    x: Tensor, layout: Layout, config: ConvConfig | WeightGradConfig
) -> Tensor | TensorDescriptor:
    """What the kernel reads pixels through."""
    if config.loader == "pointer":
        return x
    reason = why_no_descriptor(x, layout, config)
    if reason:
        raise ValueError(f"{config} cannot read an image of size {list(x.shape)}: {reason}")
    n, c, h, w = x.shape
    images, rows, columns = config.box
    if _is_planar(x):
        box = [images, config.BLOCK_K, rows, columns]
        return TensorDescriptor(x, [n, c, h, w], [c * h * w, h * w, w, 1], box)
    box = [images, rows, columns, config.BLOCK_K]
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], box)


def why_no_descriptor(
    x: Tensor, layout: Layout, config: ConvConfig | WeightGradConfig
) -> str | None:
    """What bulk copies ask of the image and do not get, or None."""
    planar = _is_planar(x)
    if not planar and not x.is_contiguous(memory_format=torch.channels_last):
        return f"it is contiguous in neither memory format, its strides are {x.stride()}"
    if planar and config.box[0] > 1:
        return f"a box of {config.box[0]} images needs channels-last memory"
    if x.shape[3 if planar else 1] * x.element_size() % 16 or x.data_ptr() % 16:
        return f"its {'rows' if planar else 'pixels'} are not aligned to 16 bytes"
    if layout.groups > 1 and layout.group_channels % config.BLOCK_K:
        return (
            f"a block of {config.BLOCK_K} channels would reach beyond the "
            f"{layout.group_channels} of a group"
        )
    if isinstance(config, WeightGradConfig) and config.BLOCK_N != config.BLOCK_K:
        return "one box serves both blocks of channels, so BLOCK_N must equal BLOCK_K"
    return None


def _is_planar(x: Tensor) -> bool:
    """(N, C, H, W) memory; an image that is both this and channels-last counts as the latter."""
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


def _loader(x: Tensor, config: ConvConfig | WeightGradConfig) -> str:
    if config.loader == "pointer":
        return "pointer"
    return "planar_descriptor" if _is_planar(x) else "channels_last_descriptor"


def _constants(
    layout: Layout,
    geometry: Geometry,
    config: ConvConfig | WeightGradConfig,
    x: Tensor,
    *others: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels compile for."""
    tensors = [x, *(t for t in others if t is not None)]
    return {
        "CHANNELS": layout.group_channels,
        "GROUPS": layout.groups,
        "SIGN": layout.sign,
        "KERNEL_H": layout.kernel_size[0],
        "KERNEL_W": layout.kernel_size[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "LOADER": _loader(x, config),
        "ACCUMULATORS": config.accumulators,
        "INPUT_PRECISION": _input_precision(x.dtype),
        "WIDE": any(_extent(tensor) >= 2**31 for tensor in tensors),
        "BLOCK_I": config.box[0],
        "BLOCK_H": config.box[1],
        "BLOCK_W": config.box[2],
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _extent(tensor: Tensor) -> int:
    """One more than the offset of the last element."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sides) + 1


def _input_precision(dtype: torch.dtype) -> str:
    """float32 follows PyTorch's own setting for convolutions."""
    allowed = dtype == torch.float32 and torch.version.hip is None
    tf32 = allowed and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def _count_boxes(sizes: Sequence[int], box: Sequence[int]) -> int:
    return math.prod(triton.cdiv(size, side) for size, side in zip(sizes, box, strict=True))


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
