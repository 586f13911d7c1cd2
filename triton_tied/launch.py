"""A problem and a config to one launch: the grid, descriptors, scratch and the current device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from .paths import INTERPRETED

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
    call, y = conv_call(
        x, packed, centre, bias, residual, layout, geometry, alpha, channels_last, config
    )
    if y.numel():
        call.run()
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
    if grad.numel() == 0 or layout.size == 0:
        return x.new_zeros(layout.size)
    call, partial = weight_grad_call(x, grad, layout, geometry, alpha, config)
    call.run()
    return partial[0] if len(partial) == 1 else partial.sum(0).to(x.dtype)


def unpack_centre(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The centre tap as ``(groups, C, C)`` of C = channels/groups, in ``dtype``."""
    c = layout.group_channels
    centre = torch.empty(layout.groups, c, c, dtype=dtype, device=packed.device)
    constants = {
        "CHANNELS": c,
        "GROUPS": layout.groups,
        "SIGN": layout.sign,
        "PAIRS": layout.pairs,
        "BLOCK_N": _CENTRE_BLOCK,
        "BLOCK_K": _CENTRE_BLOCK,
    }
    programs = layout.groups * triton.cdiv(c, _CENTRE_BLOCK) ** 2
    Call(centre_kernel, programs, (packed, centre), constants, packed).run()
    return centre


class Call(NamedTuple):
    """A kernel, the number of its programs, its arguments, and a tensor of its device."""

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    place: Tensor

    def run(self) -> None:
        with self._on_device():
            self.kernel[(self.programs,)](*self.arguments, **self.constants)

    def fault(self) -> str | None:
        """Compiles, and launches nothing. Returns why this GPU cannot run what came of it, or
        should not, since registers spill; None where all is well, or interpreted.

        Whether a config spills hangs on all that it is compiled for, so that a list of configs
        that were compiled for some problems cannot promise it for others.
        """
        if INTERPRETED:
            return None
        try:
            with self._on_device():
                grid = (self.programs,)
                compiled = self.kernel.warmup(*self.arguments, grid=grid, **self.constants)
                compiled._init_handles()  # loads it, which tells what it needs
        except Exception as error:  # a compiler has many ways to fail, none of them ours
            return f"{type(error).__name__}: {error}"
        spilled = 4 * compiled.n_spills
        return f"spills {spilled} bytes of registers" if spilled else None

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.place.device) if self.place.is_cuda else _ANY_DEVICE


_ANY_DEVICE = contextlib.nullcontext()


def conv_call(
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
) -> tuple[Call, Tensor]:
    """The call of :func:`conv`, and the output that it writes."""
    n, channels, *image = x.shape
    sizes = geometry.output_size(image, layout.kernel_size)
    y = empty_image((n, channels, *sizes), x, channels_last)
    (before_h, _), (before_w, _) = geometry.padding
    boxes = _count_boxes((n, *sizes), config.box)
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    loader, sources = _sources(layout, config, x)
    constants = _constants(layout, geometry, config, loader, x, y, residual)
    strides = _strides(constants["DENSE"], x, y if residual is None else residual, y)
    arguments = (
        *sources, packed, centre, bias, residual, y,
        n, *image, *sizes, *strides, before_h, before_w, alpha,
    )  # fmt: skip
    constants["ROLES"] = config.roles
    return Call(conv_kernel, boxes * blocks * layout.groups, arguments, constants, x), y


def weight_grad_call(
    x: Tensor,
    grad: Tensor,
    layout: Layout,
    geometry: Geometry,
    alpha: float,
    config: WeightGradConfig,
) -> tuple[Call, Tensor]:
    """The call of :func:`weight_grad`, and the sums of its splits that it writes:
    ``(splits, packed)``."""
    n, _, *sizes = grad.shape
    boxes = _count_boxes((n, *sizes), config.box)
    splits = min(config.splits, boxes)
    dtype = x.dtype if splits == 1 else torch.float32
    partial = torch.empty(splits, layout.size, dtype=dtype, device=x.device)
    (before_h, _), (before_w, _) = geometry.padding
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    programs = (layout.taps + 1) // 2 * tiles * layout.groups * splits
    loader, sources = _sources(layout, config, x, grad)
    constants = _constants(layout, geometry, config, loader, x, grad)
    strides = _strides(constants["DENSE"], x, grad)
    arguments = (
        *sources, partial,
        n, *x.shape[2:], *sizes,
        *strides, layout.size, before_h, before_w, splits, alpha,
    )  # fmt: skip
    constants["MASKED"] = any(
        size % side for size, side in zip((n, *sizes), config.box, strict=True)
    )
    return Call(weight_grad_kernel, programs, arguments, constants, x), partial


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


def _strides(dense: bool, *images: Tensor) -> list[int]:
    """Four for each image. Of dense ones the kernel knows them; any number serves that is the same
    for all images, so that none makes code anew."""
    return [1 if dense else stride for image in images for stride in image.stride()]


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
