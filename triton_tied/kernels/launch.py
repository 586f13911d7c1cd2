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
    """The output of a convolution; raises as :func:`make_plan` and :func:`run`."""
    return run(make_plan(convolution, config), convolution)


def weight_grad(gradient: WeightGradient, config: WeightGradConfig) -> Tensor:
    """The gradient of the packed vector; raises as :func:`make_plan` and :func:`run`.

    Deterministic: every split sums its pixels in order, then the splits are summed in order.
    """
    return run(make_plan(gradient, config), gradient)


class Plan(NamedTuple):
    """A config made ready for all calls of one description: what is left are the tensors themselves
    and alpha.

    ``descriptors``: of the images that are read through one, sizes, strides and box. ``output``: on
    the meta device, what is written.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    descriptors: dict[str, tuple[list[int], list[int], list[int]]]
    output: Tensor
    config: Config


def make_plan(call: Convolution | WeightGradient, config: Config) -> Plan:
    """
    Raises:
        ValueError: the config's loader cannot read the images.
    """
    if isinstance(call, Convolution):
        return _plan_conv(call, config)  # type: ignore[arg-type]
    return _plan_weight_grad(call, config)  # type: ignore[arg-type]


def run(plan: Plan, call: Convolution | WeightGradient) -> Tensor:
    """The result of a call of the plan's description.

    Raises:
        ToolchainError: Triton can compile nothing on this machine.
    """
    return prepared(plan, call)()


def prepared(plan: Plan, call: Convolution | WeightGradient) -> Callable[[], Tensor]:
    """All but the launches; what is returned may be called again, and then writes the same memory
    anew."""
    like = plan.output
    output = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=call.x.device)
    bound = _bind(plan, call, output)

    def launch() -> Tensor:
        if bound.programs:
            bound.run()
        if isinstance(call, Convolution):
            return output
        return output[0] if len(output) == 1 else output.sum(0).to(call.x.dtype)

    return launch


def fault(call: Convolution | WeightGradient, config: Config) -> str | None:
    """Why the config should not be launched, or None; see :meth:`_Call.fault`."""
    plan = make_plan(call, config)
    return _bind(plan, call, plan.output).fault()


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
            with _compiling, self._on_device():  # what was not compiled is compiled here
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


def _bind(plan: Plan, call: Convolution | WeightGradient, output: Tensor) -> _Call:
    arguments = {**plan.arguments, "alpha": call.alpha, "x": call.x}
    if isinstance(call, Convolution):
        arguments |= {
            "packed": call.packed,
            "centre": call.centre,
            "bias": call.bias,
            "residual": call.residual,
            "y": output,
        }
    else:
        arguments |= {"grad": call.grad, "partial": output}
    for name, description in plan.descriptors.items():
        arguments[name] = TensorDescriptor(arguments[name], *description)
    return _Call(plan.kernel, plan.programs, arguments, call.x.device)


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


def _plan_conv(convolution: Convolution, config: ConvConfig) -> Plan:
    x, *_, residual, layout, geometry, _, channels_last, precision = convolution
    y = empty_image(convolution.output_shape, x, channels_last, "meta")
    n, _, h, w = x.shape
    *_, out_h, out_w = y.shape
    (padding_h, _), (padding_w, _) = geometry.padding
    descriptors = _descriptors(config, layout, x=x)
    constants = _constants(config, layout, geometry, precision, x, y, residual)
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, r=y if residual is None else residual, y=y),
        "padding_h": padding_h, "padding_w": padding_w, **constants,
    }  # fmt: skip
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    programs = count_boxes((n, out_h, out_w), config) * blocks * layout.groups
    return Plan(conv_kernel, programs, arguments, descriptors, y, config)


def _plan_weight_grad(gradient: WeightGradient, config: WeightGradConfig) -> Plan:
    x, grad, layout, geometry, _, precision = gradient
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    (padding_h, _), (padding_w, _) = geometry.padding
    # The sum of each split: a single one is the result itself.
    splits = min(config.splits, count_boxes((n, out_h, out_w), config))
    dtype = x.dtype if splits == 1 else torch.float32
    partial = torch.empty(splits, layout.size, dtype=dtype, device="meta")
    descriptors = _descriptors(config, layout, x=x, grad=grad)
    constants = _constants(config, layout, geometry, precision, x, grad)
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, g=grad), "stride_partial": layout.size,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits, **constants,
    }  # fmt: skip
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    programs = (layout.taps + 1) // 2 * tiles * layout.groups * splits if layout.size else 0
    return Plan(weight_grad_kernel, programs, arguments, descriptors, partial, config)


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


def _descriptors(
    config: Config, layout: Layout, **images: Tensor
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """How each of the images is read, but by pointers.

    Raises:
        ValueError: the config's loader cannot read them.
    """
    reason = why_unreadable(layout, config, *images.values())
    if reason:
        sizes = ", ".join(str(list(x.shape)) for x in images.values())
        raise ValueError(f"{config} cannot read an image of size {sizes}: {reason}")
    if config.loader == "pointer":
        return {}
    return {name: _describe(config, *x.shape) for name, x in images.items()}


def _describe(
    config: Config, n: int, c: int, h: int, w: int
) -> tuple[list[int], list[int], list[int]]:
    """Sizes and strides of memory without gaps in its format, and a box of pixels and channels."""
    sizes, block = {"n": n, "c": c, "h": h, "w": w}, {"c": config.BLOCK_K}
    block |= dict(zip("nhw", config.box, strict=True))
    if config.loader == "channels_last_descriptor":
        axes, strides = "nhwc", {"n": h * w * c, "h": w * c, "w": c, "c": 1}
    else:  # see load_pixels
        axes = "nhcw" if block["h"] == 1 else "nchw"
        strides = {"n": c * h * w, "c": h * w, "h": w, "w": 1}
    return tuple([of[axis] for axis in axes] for of in (sizes, strides, block))  # type: ignore[return-value]


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
