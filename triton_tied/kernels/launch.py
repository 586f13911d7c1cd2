"""A problem and a config to one launch: the grid, descriptors, scratch and the current device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import INTERPRETED
from ..geometry import Geometry
from ..memory_format import empty_image, extent, memory_of
from ..packing import Layout
from . import configs
from .centre import centre_kernel
from .configs import Config, ConvConfig, WeightGradConfig, count_boxes
from .conv import conv_kernel
from .precision import InputPrecision, input_precision
from .toolchain import explain
from .weight_grad import weight_grad_kernel

CENTRE_BLOCK = 64  # rows and columns of the tile that a program unpacks of a centre tap
_MAX_OFFSET = 2**31  # the first that 32 bits do not hold
# Triton parses kernels with Python's parser, which on some versions of Python fails in two threads.
_compiling = threading.Lock()


class Convolution(NamedTuple):
    """``alpha * (conv(x, packed) + bias) + residual`` over ``(N, C, H, W)`` of any strides.

    ``centre`` is what :func:`unpack_centre` makes of ``packed``, or None to gather it in the loop;
    ``channels_last`` is the memory format of the output. ``precision`` is that of products of
    float32; None: as PyTorch's setting says when the kernel is launched.
    """

    x: Tensor
    packed: Tensor
    centre: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    layout: Layout
    geometry: Geometry
    alpha: float
    channels_last: bool
    precision: InputPrecision | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, channels, *image = self.x.shape
        return (n, channels, *self.geometry.output_size(image, self.layout.kernel_size))


class WeightGradient(NamedTuple):
    """``alpha`` times the gradient of the packed vector, for the output gradient ``grad``.
    ``precision``: as in :class:`Convolution`."""

    x: Tensor
    grad: Tensor
    layout: Layout
    geometry: Geometry
    alpha: float
    precision: InputPrecision | None = None


def conv(convolution: Convolution, config: ConvConfig) -> Tensor:
    """The output of a convolution.

    Raises:
        ValueError: the config's loader cannot read the images.
        ToolchainError: Triton can compile nothing on this machine.
    """
    return prepared(convolution, config)()


def weight_grad(gradient: WeightGradient, config: WeightGradConfig) -> Tensor:
    """The gradient of the packed vector.

    Deterministic: every split sums its pixels in order, then the splits are summed in order.

    Raises:
        ValueError: the config's loader cannot read the images.
        ToolchainError: Triton can compile nothing on this machine.
    """
    return prepared(gradient, config)()


def prepared(call: Convolution | WeightGradient, config: Config) -> Callable[[], Tensor]:
    """All but the launches of :func:`conv` or :func:`weight_grad`; what is returned may be called
    again, and then writes the same memory anew."""
    if isinstance(call, Convolution):
        return _prepared_conv(call, config)  # type: ignore[arg-type]
    return _prepared_weight_grad(call, config)  # type: ignore[arg-type]


def fault(call: Convolution | WeightGradient, config: Config) -> str | None:
    """Why the config should not be launched, or None; see :meth:`_Call.fault`."""
    if isinstance(call, Convolution):
        y = empty_image(call.output_shape, call.x, call.channels_last, "meta")
        return _conv_call(call, config, y).fault()  # type: ignore[arg-type]
    partial = _empty_partial_sums(call, config, "meta")  # type: ignore[arg-type]
    return _weight_grad_call(call, config, partial).fault()  # type: ignore[arg-type]


def unpack_centre(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The centre tap as ``(groups, C, C)`` of C = channels/groups, in ``dtype``.

    Raises:
        ToolchainError: Triton can compile nothing on this machine.
    """
    c = layout.group_channels
    centre = torch.empty(layout.groups, c, c, dtype=dtype, device=packed.device)
    _centre_call(packed, layout, centre).run()
    return centre


def compile_centre(packed: Tensor, layout: Layout) -> str | None:
    """Compiles :func:`unpack_centre`, and launches nothing; see :meth:`_Call.fault`."""
    c = layout.group_channels
    centre = torch.empty(layout.groups, c, c, dtype=packed.dtype, device="meta")
    return _centre_call(packed, layout, centre).fault()


class _Call(NamedTuple):
    """A kernel, the number of its programs, its arguments, and where it runs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        """
        Raises:
            ToolchainError: Triton can compile nothing on this machine.
        """
        try:
            with self._on_device():
                self.kernel[(self.programs,)](**self.arguments)
        except Exception as error:
            broken = explain(error)
            if broken:
                raise broken from error
            raise

    def fault(self) -> str | None:
        """Compiles, and launches nothing. Returns why this GPU cannot run what came of it, or
        should not, since registers spill; None where all is well, or interpreted.

        Whether a config spills hangs on all that it is compiled for, so that a list of configs
        that were compiled for some problems cannot promise it for others.

        Raises:
            ToolchainError: Triton can compile nothing on this machine.
        """
        if INTERPRETED:
            return None
        try:
            with _compiling, self._on_device():
                compiled = self.kernel.warmup(grid=(self.programs,), **self.arguments)
                compiled._init_handles()  # loads it, which tells what it needs
        except Exception as error:  # a compiler has many ways to fail, none of them ours
            broken = explain(error)
            if broken:
                raise broken from error
            return f"{type(error).__name__}: {error}"
        spilled = 4 * compiled.n_spills
        return f"spills {spilled} bytes of registers" if spilled else None

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else _ANY_DEVICE


_ANY_DEVICE = contextlib.nullcontext()


def _prepared_conv(convolution: Convolution, config: ConvConfig) -> Callable[[], Tensor]:
    x, last = convolution.x, convolution.channels_last
    y = empty_image(convolution.output_shape, x, last)
    call = _conv_call(convolution, config, y)

    def run() -> Tensor:
        if y.numel():
            call.run()
        return y

    return run


def _prepared_weight_grad(
    gradient: WeightGradient, config: WeightGradConfig
) -> Callable[[], Tensor]:
    x, size = gradient.x, gradient.layout.size
    if gradient.grad.numel() == 0 or size == 0:
        return lambda: x.new_zeros(size)
    partial = _empty_partial_sums(gradient, config, x.device)
    call = _weight_grad_call(gradient, config, partial)

    def run() -> Tensor:
        call.run()
        return partial[0] if len(partial) == 1 else partial.sum(0).to(x.dtype)

    return run


def _centre_call(packed: Tensor, layout: Layout, centre: Tensor) -> _Call:
    arguments = {
        "packed": packed,
        "centre": centre,
        "CHANNELS": layout.group_channels,
        "GROUPS": layout.groups,
        "SIGN": layout.sign,
        "PAIRS": layout.pairs,
        "BLOCK_N": CENTRE_BLOCK,
        "BLOCK_K": CENTRE_BLOCK,
    }
    programs = layout.groups * triton.cdiv(layout.group_channels, CENTRE_BLOCK) ** 2
    return _Call(centre_kernel, programs, arguments, packed.device)


def _conv_call(convolution: Convolution, config: ConvConfig, y: Tensor) -> _Call:
    x, packed, centre, bias, residual, layout, geometry, alpha, _, precision = convolution
    n, _, h, w = x.shape
    *_, out_h, out_w = y.shape
    (padding_h, _), (padding_w, _) = geometry.padding
    (source,) = _sources(config, layout, x)
    constants = _constants(config, layout, geometry, precision, x, y, residual)
    arguments = {
        "x": source, "packed": packed, "centre": centre, "bias": bias, "residual": residual, "y": y,
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, r=y if residual is None else residual, y=y),
        "padding_h": padding_h, "padding_w": padding_w, "alpha": alpha,
        **constants,
    }  # fmt: skip
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    boxes = count_boxes((n, out_h, out_w), config)
    return _Call(conv_kernel, boxes * blocks * layout.groups, arguments, x.device)


def _weight_grad_call(gradient: WeightGradient, config: WeightGradConfig, partial: Tensor) -> _Call:
    x, grad, layout, geometry, alpha, precision = gradient
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    (padding_h, _), (padding_w, _) = geometry.padding
    x_source, grad_source = _sources(config, layout, x, grad)
    constants = _constants(config, layout, geometry, precision, x, grad)
    splits, size = partial.shape
    arguments = {
        "x": x_source, "grad": grad_source, "partial": partial,
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, g=grad), "stride_partial": size,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits, "alpha": alpha,
        **constants,
    }  # fmt: skip
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    programs = (layout.taps + 1) // 2 * tiles * layout.groups * splits
    return _Call(weight_grad_kernel, programs, arguments, x.device)


def _empty_partial_sums(
    gradient: WeightGradient, config: WeightGradConfig, device: torch.device | str
) -> Tensor:
    """Memory for the sum of each split, ``(splits, packed)``: a single one is the result itself."""
    splits = min(config.splits, count_boxes(_sides(gradient.grad), config))
    dtype = gradient.x.dtype if splits == 1 else torch.float32
    return torch.empty(splits, gradient.layout.size, dtype=dtype, device=device)


def _sides(image: Tensor) -> tuple[int, int, int]:
    n, _, h, w = image.shape
    return n, h, w


def why_unreadable(layout: Layout, config: Config, *images: Tensor) -> str | None:
    """What the config's loader asks of the images that are read and does not get, or None."""
    memory = memory_of(*images)
    return configs.why_unreadable(
        config,
        memory,
        math.gcd(*(x.shape[3 if memory == "contiguous" else 1] for x in images)),
        images[0].element_size(),
        not any(x.data_ptr() % 16 for x in images),
        layout.groups,
        layout.group_channels,
    )


def _sources(
    config: Config, layout: Layout, *images: Tensor
) -> list[Tensor] | list[TensorDescriptor]:
    """What the kernel reads each of the images through.

    Raises:
        ValueError: the config's loader cannot read them.
    """
    reason = why_unreadable(layout, config, *images)
    if reason:
        sizes = ", ".join(str(list(x.shape)) for x in images)
        raise ValueError(f"{config} cannot read an image of size {sizes}: {reason}")
    if config.loader == "pointer":
        return list(images)
    return [_descriptor(config, x) for x in images]


def _descriptor(config: Config, x: Tensor) -> TensorDescriptor:
    """Of memory without gaps in its format, with a box of pixels and channels."""
    n, c, h, w = x.shape
    sizes, block = {"n": n, "c": c, "h": h, "w": w}, {"c": config.BLOCK_K}
    block |= dict(zip("nhw", config.box, strict=True))
    if config.loader == "channels_last_descriptor":
        axes, strides = "nhwc", {"n": h * w * c, "h": w * c, "w": c, "c": 1}
    else:  # see load_pixels
        axes = "nhcw" if block["h"] == 1 else "nchw"
        strides = {"n": c * h * w, "c": h * w, "h": w, "w": 1}
    return TensorDescriptor(x, *([of[axis] for axis in axes] for of in (sizes, strides, block)))


def _strides(dense: bool, **images: Tensor) -> dict[str, int]:
    """Four for each image. Of dense ones the kernel knows them; any number serves that is the same
    for all images, so that none makes code anew."""
    return {
        f"stride_{name}{axis}": 1 if dense else stride
        for name, image in images.items()
        for axis, stride in zip("nchw", image.stride(), strict=True)
    }


def _constants(
    config: Config,
    layout: Layout,
    geometry: Geometry,
    precision: InputPrecision | None,
    *images: Tensor | None,
) -> dict[str, Any]:
    """What the kernel is compiled for. ``images``: all that are read or written, the input first,
    then the output or its gradient."""
    given = [image for image in images if image is not None]
    sides = zip(_sides(given[1]), config.box, strict=True)
    return {
        **configs.constants(
            config,
            channels=layout.group_channels,
            groups=layout.groups,
            sign=layout.sign,
            kernel_size=layout.kernel_size,
            dilation=geometry.dilation,
            input_precision=precision or input_precision(given[0].dtype),
            dense=memory_of(*given) == "channels_last",
            wide=max(layout.size, *map(extent, given)) >= _MAX_OFFSET,
            masked=any(size % side for size, side in sides),
        ),
        **configs.compile_options(config, on_nvidia=torch.version.hip is None),
    }
