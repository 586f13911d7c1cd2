"""A problem and a config to launches: grids, descriptors, strides, scratch; no tensor is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import Geometry
from ..memory_format import empty_image, extent, memory_of
from ..packing import Layout
from . import configs
from .configs import Config, ConvConfig, WeightGradConfig, count_boxes
from .conv import conv_kernel
from .precision import InputPrecision, input_precision, rounds_operands
from .stored_taps import most_splits
from .sum_splits import sum_splits_kernel
from .weight_grad import weight_grad_kernel

_MAX_OFFSET = 2**31  # the first that 32 bits do not hold
_SUM_TILE = (32, 64)  # pixels and channels that a program sums
_SUM_VECTOR = (1, 1024)  # and of a vector


class Convolution(NamedTuple):
    """``alpha * (conv(x, packed) + bias) + beta * residual`` over ``(N, C, H, W)`` of any strides.

    ``weights`` is what is read of the weight: what :func:`.launch.unpack_matrices` makes of
    ``packed``, or ``packed`` itself in the dtype of ``x``. ``channels_last`` is the memory format
    of the output, ``dtype`` its dtype; None: that of ``x``. ``precision`` is that of products of
    float32; None: as PyTorch's setting says when the kernel is launched.
    """

    x: Tensor
    packed: Tensor
    weights: Tensor
    bias: Tensor | None
    residual: Tensor | None
    layout: Layout
    geometry: Geometry
    alpha: float
    beta: float
    channels_last: bool
    precision: InputPrecision | None = None
    dtype: torch.dtype | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, channels, *image = self.x.shape
        return (n, channels, *self.geometry.output_size(image, self.layout.kernel_size))

    @property
    def stored(self) -> int:
        """How many taps of ``weights`` are matrices."""
        return self.layout.pairs if self.weights.dim() == 1 else self.weights.shape[1]


class WeightGradient(NamedTuple):
    """``alpha`` times the gradient of the packed vector, for the output gradient ``grad``, in
    ``dtype``; with ``has_bias`` followed by that of a bias. ``precision``: as in
    :class:`Convolution`."""

    x: Tensor
    grad: Tensor
    layout: Layout
    geometry: Geometry
    alpha: float
    dtype: torch.dtype
    has_bias: bool
    precision: InputPrecision | None = None

    @property
    def bias_channels(self) -> int:
        return self.layout.channels if self.has_bias else 0


@dataclass(eq=False, slots=True)
class Launch:
    """A kernel, the number of its programs, and what stays the same from call to call: of its
    arguments ``numbers``, which follow the tensors, and ``constants``, which follow the scale
    factors; how it is compiled, and what came of it when it was launched first."""

    kernel: Any
    programs: int
    numbers: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any = None


class Description(NamedTuple):
    """An argument that is a tensor's descriptor, by their places among the tensors, and all fields
    of it but the tensor."""

    argument: int
    tensor: int
    fields: dict[str, Any]


class Written(NamedTuple):
    """What a launch writes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device | str) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


class Plan(NamedTuple):
    """A config made ready for all calls of one description: what is left are the tensors themselves
    and scale factors.

    ``output``: what comes out, and ``partial``: what the splits write that ``sum`` reads, or None.
    """

    main: Launch
    sum: Launch | None
    descriptors: list[Description]
    output: Written
    partial: Written | None
    config: Config


def make_plan(call: Convolution | WeightGradient, config: Config) -> Plan:
    """
    Raises:
        ValueError: the config's loader cannot read the images.
    """
    if isinstance(call, Convolution):
        return _plan_conv(call, config)  # type: ignore[arg-type]
    return _plan_weight_grad(call, config)  # type: ignore[arg-type]


def why_unreadable(
    layout: Layout, config: Config, images: list[Tensor], weights: Tensor | None = None
) -> str | None:
    """What the config's loader asks of what is read and does not get, or None."""
    memory = memory_of(*images)
    tensors = images if weights is None else [*images, weights]
    return configs.why_unreadable(
        config,
        memory,
        math.gcd(*(x.shape[3 if memory == "contiguous" else 1] for x in images)),
        images[0].element_size(),
        not any(tensor.data_ptr() % 16 for tensor in tensors),
        layout.groups,
        layout.group_channels,
    )


def _plan_conv(call: Convolution, config: ConvConfig) -> Plan:
    x, layout, residual = call.x, call.layout, call.residual
    _check_readable(layout, config, [x], call.weights)
    y = empty_image(call.output_shape, x, call.channels_last, "meta", call.dtype)
    n, _, h, w = x.shape
    *_, out_h, out_w = y.shape
    pixels = n * out_h * out_w
    partial = None
    splits = min(config.splits, most_splits(layout, call.stored, config.BLOCK_K))
    if splits > 1:
        shape = (splits, pixels, layout.channels)
        partial = torch.empty(shape, dtype=torch.float32, device="meta")
    written = [y] if residual is None else [y, residual]
    dense_output = partial is not None or memory_of(*written) == "channels_last"
    (padding_h, _), (padding_w, _) = call.geometry.padding
    bias_channels = 0 if call.bias is None else layout.channels
    r = y if residual is None else residual
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(memory_of(x) == "channels_last", x=x), **_strides(dense_output, r=r, y=y),
        "bias_channels": bias_channels if partial is None else 0,  # else the sum adds it
        "stride_split": pixels * layout.channels, "padding_h": padding_h, "padding_w": padding_w,
        "splits": splits,
        **_constants(
            config, layout, call.geometry, call.precision, [x], [y, call.weights, residual],
            stored=call.stored, dense_output=dense_output,
        ),
    }  # fmt: skip
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    programs = count_boxes((n, out_h, out_w), config) * blocks * layout.groups * splits
    descriptors = []
    if config.loader != "pointer" and programs:
        descriptors = [_describe(config, 0, 0, config.BLOCK_K, x)]
        descriptors += _describe_weights(config, layout, call)
    main = _launch(conv_kernel, programs, arguments)
    if partial is None:
        return Plan(main, None, descriptors, _written(y), None, config)
    written = {"bias_channels": bias_channels, **_strides(False, r=r, y=y)}
    total = _sum((out_h, out_w), partial, _SUM_TILE, written)
    return Plan(main, total, descriptors, _written(y), _written(partial), config)


def _plan_weight_grad(call: WeightGradient, config: WeightGradConfig) -> Plan:
    x, grad, layout = call.x, call.grad, call.layout
    _check_readable(layout, config, [x, grad])
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    splits = min(config.splits, count_boxes((n, out_h, out_w), config))
    size = layout.size + call.bias_channels
    output = torch.empty(size, dtype=call.dtype, device="meta")
    partial = None
    if splits > 1:
        partial = torch.empty(splits, 1, size, dtype=torch.float32, device="meta")
    (padding_h, _), (padding_w, _) = call.geometry.padding
    sides = zip((n, out_h, out_w), config.box, strict=True)
    precision = call.precision or input_precision(x.dtype)
    constants = _constants(
        config, layout, call.geometry, precision, [x, grad], [],
        masked=any(size % side for size, side in sides), rounds=rounds_operands(precision),
    )  # fmt: skip
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, g=grad), "stride_partial": size,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits,
        "bias_channels": call.bias_channels, **constants,
    }  # fmt: skip
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    programs = (layout.taps + 1) // 2 * tiles * layout.groups
    programs = (programs + triton.cdiv(call.bias_channels, config.BLOCK_N)) * splits if size else 0
    descriptors = []
    if config.loader != "pointer" and programs:
        descriptors.append(_describe(config, 0, 0, config.BLOCK_K, x))
        descriptors.append(_describe(config, 2, 2, config.BLOCK_N, grad))
        if config.BLOCK_N != config.BLOCK_K:
            descriptors.append(_describe(config, 1, 0, config.BLOCK_N, x))
            descriptors.append(_describe(config, 3, 2, config.BLOCK_K, grad))
    main = _launch(weight_grad_kernel, programs, arguments)
    if partial is None:
        return Plan(main, None, descriptors, _written(output), None, config)
    vector = output.view(1, size, 1, 1)
    written = {"bias_channels": 0, **_strides(True, r=vector, y=vector)}  # only that of channels
    total = _sum((1, 1), partial, _SUM_VECTOR, written)
    return Plan(main, total, descriptors, _written(output), _written(partial), config)


def _written(tensor: Tensor) -> Written:
    return Written(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _sum(
    sides: tuple[int, int], partial: Tensor, tile: tuple[int, int], arguments: dict[str, Any]
) -> Launch:
    """Of the splits, into images of such sides."""
    splits, pixels, channels = partial.shape
    arguments = {
        "pixels": pixels, "channels": channels, "out_h": sides[0], "out_w": sides[1],
        "splits": splits, "stride_split": pixels * channels, **arguments,
        "BLOCK_M": tile[0], "BLOCK_N": tile[1],
    }  # fmt: skip
    programs = triton.cdiv(pixels, tile[0]) * triton.cdiv(channels, tile[1])
    return _launch(sum_splits_kernel, programs, arguments)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> Launch:
    """By position, as Triton takes arguments fastest."""
    names = kernel.arg_names
    scales = names.index("alpha")
    numbers = tuple(arguments[name] for name in names[:scales] if name in arguments)
    constants = tuple(arguments[name] for name in names[scales:] if name in arguments)
    options = {name: value for name, value in arguments.items() if name not in names}
    return Launch(kernel, programs, numbers, constants, options)


def _check_readable(
    layout: Layout, config: Config, images: list[Tensor], weights: Tensor | None = None
) -> None:
    reason = why_unreadable(layout, config, images, weights)
    if reason:
        sizes = ", ".join(str(list(x.shape)) for x in images)
        raise ValueError(f"{config} cannot read an image of size {sizes}: {reason}")


def _describe(
    config: Config, argument: int, tensor: int, channels: int, image: Tensor
) -> Description:
    """Memory without gaps in its format, and a box of pixels and so many channels."""
    sizes, block = dict(zip("nchw", image.shape, strict=True)), {"c": channels}
    block |= dict(zip("nhw", config.box, strict=True))
    n, c, h, w = image.shape
    if config.loader == "channels_last_descriptor":
        axes, strides = "nhwc", {"n": h * w * c, "h": w * c, "w": c, "c": 1}
    else:  # see load_pixels
        axes = "nhcw" if block["h"] == 1 else "nchw"
        strides = {"n": c * h * w, "c": h * w, "h": w, "w": 1}
    found = ([of[axis] for axis in axes] for of in (sizes, strides, block))
    return Description(argument, tensor, _fields(image, *found))


def _describe_weights(config: Config, layout: Layout, call: Convolution) -> list[Description]:
    """Matrices without gaps, if there are any, and a tile of one; and one for transposes, if it is
    another."""
    c, n, k, stored = layout.group_channels, config.BLOCK_N, config.BLOCK_K, call.stored
    if not stored:
        return []
    sizes, strides = [layout.groups * stored, c, c], [c * c, c, 1]
    found = [Description(1, 1, _fields(call.weights, sizes, strides, [1, n, k]))]
    if n != k and stored < layout.taps:
        found.append(Description(2, 1, _fields(call.weights, sizes, strides, [1, k, n])))
    return found


def _fields(
    tensor: Tensor, sizes: list[int], strides: list[int], block: list[int]
) -> dict[str, Any]:
    """Checked by Triton, once for all tensors that lie in memory like this one."""
    fields = dict(vars(TensorDescriptor(tensor, sizes, strides, block)))
    del fields["base"]
    return fields


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
    read: list[Tensor],
    others: list[Tensor | None],
    **own: Any,
) -> dict[str, Any]:
    """What a kernel is compiled for, by the images that it reads, whatever else it reads or writes,
    and what is its own."""
    tensors = [*read, *(tensor for tensor in others if tensor is not None)]
    return {
        **configs.constants(
            config,
            channels=layout.group_channels,
            groups=layout.groups,
            sign=layout.sign,
            kernel_size=layout.kernel_size,
            dilation=geometry.dilation,
            input_precision=precision or input_precision(read[0].dtype),
            dense=memory_of(*read) == "channels_last",
            wide=max(layout.size, *map(extent, tensors)) >= _MAX_OFFSET,
            **own,
        ),
        **configs.compile_options(config, on_nvidia=torch.version.hip is None),
    }
