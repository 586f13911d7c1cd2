"""A problem and a config to launches: grids, descriptors, strides, scratch; no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..geometry import Geometry
from ..memory_format import extent, memory_of
from ..packing import Layout
from . import configs
from .base_config import Reading
from .calls import Convolution, WeightGradient, images_of
from .configs import (
    ClusteredConfig,
    Config,
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    OnePassConfig,
    OnePassTf32Config,
    RowByRowConfig,
    WeightGradConfig,
    swizzled_channels,
)
from .conv import conv_kernel
from .depthwise import depthwise_kernel
from .depthwise_grad import depthwise_grad_kernel
from .descriptors import (
    Description,
    describe,
    describe_clustered,
    describe_halo,
    describe_row,
    describe_rows,
    describe_weights,
)
from .merge_columns import merge_columns_kernel
from .merging import merge
from .precision import input_precision, rounds_operands
from .stored_taps import most_splits
from .sum_merged import sum_merged_kernel
from .sum_rows import sum_rows_kernel
from .sum_splits import sum_splits_kernel
from .weight_grad import weight_grad_kernel

_MAX_OFFSET = 2**31  # the first that 32 bits do not hold
_SUM_TILE = (32, 64)  # pixels and channels that a program sums
_SUM_VECTOR = (1, 1024)  # and of a vector
_EXECUTED_ON = 3  # multiprocessors of a CPU, where tests execute what is compiled for a GPU
_SUM_ROWS = {"BLOCK_ROWS": 32, "BLOCK": 128}  # rows and numbers that a program sums at once
_SUM_MERGED = {"BLOCK_ROWS": 64, "BLOCK": 32}  # the same, of merged columns
_MERGED_BLOCK = 1024  # numbers of a weight that a program merges
# The tensors that a launch may take, by the names of a kernel's arguments, and their order.
CONV_TENSORS = ("x", "weights", "triangles", "bias", "residual", "y")
GRAD_TENSORS = ("x", "grad", "partial")
SUM_TENSORS = ("partial", "bias", "residual", "y")
MERGE_TENSORS = ("weights", "bias", "matrices", "merged_bias")


@dataclass(eq=False, slots=True)
class Launch:
    """A kernel, the number of its programs, or of clusters of them, and what stays the same
    from call to call: of its arguments ``numbers``, which follow the tensors, and
    ``constants``, which follow the scale factors, of which it takes so many; how it is
    compiled, and what came of it when it was launched first. ``arrange`` makes the kernel's
    tensors of None and those of the call; what is None may be described."""

    kernel: Any
    programs: int
    arrange: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    numbers: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]
    scales: int = 0
    compiled: Any = None


class Written(NamedTuple):
    """What a launch writes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device | str) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


class Merging(NamedTuple):
    """What is launched before a convolution of merged columns: it writes the weights and the bias
    (None: there is none) that the convolution reads."""

    launch: Launch
    weights: Written
    bias: Written | None


class Plan(NamedTuple):
    """A config made ready for all calls of one description: what is left are the tensors themselves
    and scale factors.

    ``output``: what comes out, and ``partial``: what the splits write that ``sum`` reads, or None.
    ``merging``: what comes before, or None. ``copied``: what the output is copied to, or None.
    """

    main: Launch
    sum: Launch | None
    descriptors: list[Description]
    output: Written
    partial: Written | None
    config: Config
    merging: Merging | None = None
    copied: Written | None = None


def make_plan(call: Convolution | WeightGradient, config: Config) -> Plan:
    """
    Raises:
        ValueError: the config cannot serve the call.
    """
    reason = why_unreadable(call, config)
    if reason:
        sizes = ", ".join(str(list(x.shape)) for x in images_of(call))
        raise ValueError(f"{config} cannot read an image of size {sizes}: {reason}")
    return (_plan if config.merged == 1 else _plan_merged)(call, config)


def copied_to_output(plan: Plan, call: Convolution) -> Plan:
    """The plan of the same call into channels-last memory, with its output copied to that of this
    call."""
    return plan._replace(copied=_written(call.empty_output()))


def why_unreadable(call: Convolution | WeightGradient, config: Config) -> str | None:
    """What the config asks of what is read and does not get, or None."""
    images = images_of(call)
    tensors = [*images, call.weights] if isinstance(call, Convolution) else images
    memory = memory_of(*images)
    shapes = [*(x.shape for x in images), call.output_shape]
    return config.why_unreadable(
        Reading(
            call.layout,
            call.geometry,
            memory,
            math.gcd(*(x.shape[3 if memory == "contiguous" else 1] for x in images)),
            call.x.element_size(),
            not any(tensor.data_ptr() % 16 for tensor in tensors),
            call.precision or input_precision(call.x.dtype),
            call.output_memory,
            math.gcd(*(shape[3] for shape in shapes)),
        )
    )


def _plan_conv(call: Convolution, config: ConvConfig) -> Plan:
    x, layout, residual = call.x, call.layout, call.residual
    y = call.empty_output()
    n, _, h, w = x.shape
    *_, out_h, out_w = y.shape
    pixels = n * out_h * out_w
    splits = min(config.splits, most_splits(layout, call.stored, config.BLOCK_K))
    partial = _partial_sums(splits, pixels, layout)
    written = [y] if residual is None else [y, residual]
    dense_output = partial is not None or memory_of(*written) == "channels_last"
    (padding_h, _), (padding_w, _) = call.geometry.padding
    r = y if residual is None else residual
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(memory_of(x) == "channels_last", x=x), **_strides(dense_output, r=r, y=y),
        "bias_channels": call.bias_channels if partial is None else 0,  # else the sum adds it
        "stride_split": pixels * layout.channels, "padding_h": padding_h, "padding_w": padding_w,
        "splits": splits,
        **_constants(call, config, [y, call.weights, residual]),
        "STORED": call.stored, "DENSE_OUTPUT": dense_output,
    }  # fmt: skip
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    programs = config.count_boxes((n, out_h, out_w)) * blocks * layout.groups * splits
    descriptors = []
    if config.loader != "pointer" and programs:
        descriptors = [describe(config, 0, 0, config.BLOCK_K, x)]
        descriptors += describe_weights(config, layout, call)
    main = _launch(conv_kernel, programs, CONV_TENSORS, arguments, _options(config))
    return _with_sum(Plan(main, None, descriptors, _written(y), None, config), call, partial)


def _partial_sums(splits: int, pixels: int, layout: Layout) -> Tensor | None:
    """What the splits of a convolution write, if there are several."""
    if splits == 1:
        return None
    return torch.empty((splits, pixels, layout.channels), dtype=torch.float32, device="meta")


def _with_sum(plan: Plan, call: Convolution, partial: Tensor | None) -> Plan:
    """With the end of a convolution that several splits share, where they do."""
    if partial is None:
        return plan
    y = call.empty_output()
    r = y if call.residual is None else call.residual
    written = {"bias_channels": call.bias_channels, **_strides(False, r=r, y=y)}
    _, _, out_h, out_w = y.shape
    total = _sum((out_h, out_w), partial, _SUM_TILE, written)
    return plan._replace(sum=total, partial=_written(partial))


def _plan_weight_grad(call: WeightGradient, config: WeightGradConfig) -> Plan:
    x, grad, layout = call.x, call.grad, call.layout
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    splits = min(config.splits, config.count_boxes((n, out_h, out_w)))
    size = layout.size + call.bias_channels
    output = torch.empty(size, dtype=call.dtype, device="meta")
    partial = None
    if splits > 1:
        partial = torch.empty(splits, 1, size, dtype=torch.float32, device="meta")
    (padding_h, _), (padding_w, _) = call.geometry.padding
    sides = zip((n, out_h, out_w), config.box, strict=True)
    constants = _constants(call, config)
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, g=grad), "stride_partial": size,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits,
        "bias_channels": call.bias_channels, **constants,
        "MASKED": any(size % side for size, side in sides),
        "ROUNDS": rounds_operands(constants["INPUT_PRECISION"]),
    }  # fmt: skip
    blocks = (config.BLOCK_N, config.BLOCK_K)
    tiles = math.prod(triton.cdiv(layout.group_channels, block) for block in blocks)
    programs = (layout.taps + 1) // 2 * tiles * layout.groups
    programs = (programs + triton.cdiv(call.bias_channels, config.BLOCK_N)) * splits if size else 0
    descriptors = []
    if config.loader != "pointer" and programs:
        descriptors.append(describe(config, 0, 0, config.BLOCK_K, x))
        descriptors.append(describe(config, 2, 2, config.BLOCK_N, grad))
        if config.BLOCK_N != config.BLOCK_K:
            descriptors.append(describe(config, 1, 0, config.BLOCK_N, x))
            descriptors.append(describe(config, 3, 2, config.BLOCK_K, grad))
    main = _launch(weight_grad_kernel, programs, GRAD_TENSORS, arguments, _options(config))
    if partial is None:
        return Plan(main, None, descriptors, _written(output), None, config)
    total = _sum_vectors(output, partial)
    return Plan(main, total, descriptors, _written(output), _written(partial), config)


def _plan_halo(call: Convolution, config: HaloConfig) -> Plan:
    from .halo import halo_kernel  # not every Triton has Gluon

    x, layout, geometry = call.x, call.layout, call.geometry
    y = call.empty_output()
    n, *_ = x.shape
    *_, out_h, out_w = y.shape
    (padding_h, _), (padding_w, _) = geometry.padding
    arguments = {
        "n": n, "out_h": out_h, "out_w": out_w, "padding_h": padding_h, "padding_w": padding_w,
        "bias_channels": call.bias_channels,
        **_constants(call, config, [y, call.weights, call.residual]), "STORED": call.stored,
    }  # fmt: skip
    boxes = config.count_boxes((n, out_h, out_w))
    # A program has all registers of a multiprocessor, and goes on until no box is left.
    turns = triton.cdiv(boxes, config.boxes_at_once)
    programs = layout.groups * min(turns, max(1, _multiprocessors(x.device) // layout.groups))
    main = _launch(halo_kernel, programs, CONV_TENSORS, arguments, _options(config))
    descriptors = describe_halo(call, config) if programs else []
    return Plan(main, None, descriptors, _written(y), None, config)


def _plan_clustered(call: Convolution, config: ClusteredConfig) -> Plan:
    from .clustered import clustered_kernel  # not every Triton has clusters

    x, layout = call.x, call.layout
    if call.stored < (layout.taps + 1) // 2:
        raise ValueError(f"{config} reads the centre as a matrix: expected it unpacked")
    y = call.empty_output()
    n, *_ = x.shape
    *_, out_h, out_w = y.shape
    pixels = n * out_h * out_w
    depth = swizzled_channels(x.element_size())
    splits = min(config.splits, most_splits(layout, call.stored, depth))
    partial = _partial_sums(splits, pixels, layout)
    (padding_h, _), (padding_w, _) = call.geometry.padding
    arguments = {
        "n": n, "out_h": out_h, "out_w": out_w, "stride_split": pixels * layout.channels,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits,
        "bias_channels": call.bias_channels if partial is None else 0,  # else the sum adds it
        **_constants(call, config, [y, call.weights, call.residual]), "STORED": call.stored,
    }  # fmt: skip
    blocks = triton.cdiv(layout.group_channels, config.BLOCK_N)
    clusters = config.count_boxes((n, out_h, out_w)) * blocks * layout.groups * splits
    descriptors = describe_clustered(call, config) if clusters else []
    main = _launch(clustered_kernel, clusters, CONV_TENSORS, arguments, _options(config))
    return _with_sum(Plan(main, None, descriptors, _written(y), None, config), call, partial)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _EXECUTED_ON
    return torch.cuda.get_device_properties(device).multi_processor_count


def _one_pass_kernel(config: OnePassConfig) -> Any:
    # not every Triton has Gluon
    if isinstance(config, RowByRowConfig):
        from .row_by_row import row_by_row_kernel

        return row_by_row_kernel
    if isinstance(config, OnePassTf32Config):
        from .one_pass_tf32 import one_pass_tf32_kernel

        return one_pass_tf32_kernel
    from .one_pass import one_pass_kernel

    return one_pass_kernel


def _plan_one_pass(call: WeightGradient, config: OnePassConfig) -> Plan:
    kernel = _one_pass_kernel(config)
    x, grad, layout, geometry = call.x, call.grad, call.layout, call.geometry
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    kernel_h, kernel_w = layout.kernel_size
    (padding_h, bottom), (padding_w, right) = geometry.padding
    dilation_h, dilation_w = geometry.dilation
    first, columns = config.columns_of(out_w, w, kernel_w, padding_w, dilation_w)
    boxes = config.count_boxes((n, out_h, columns))
    splits = min(config.splits, boxes)
    size = layout.size + call.bias_channels
    output = torch.empty(size, dtype=call.dtype, device="meta")
    partial = torch.empty(max(splits, 1), 2, size, dtype=torch.float32, device="meta")
    taps_h, taps_w = config.taps_of(layout.kernel_size)
    arguments = {
        "rows": out_h, "columns": columns, "boxes": boxes, "first_column": first,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits, "size": size,
        **_constants(call, config),
        "TAPS_H": taps_h, "TAPS_W": taps_w, "HAS_BIAS": call.has_bias,
    }  # fmt: skip
    programs = config.tiles_of(layout) * splits if size else 0
    descriptors = []
    if programs:
        # What no tap sees is not read: it might be infinite.
        seen = max(1, h + min(0, bottom)), max(1, w + min(0, right))
        if isinstance(config, RowByRowConfig):
            descriptors = [describe_row(config, 0, x, seen)]
            descriptors.append(describe_row(config, 1, grad, (out_h, out_w)))
        else:
            extra = (taps_h - 1) * dilation_h
            descriptors = [describe_rows(config, 0, 0, config.box[1], x, seen)]
            if extra:
                descriptors.append(describe_rows(config, 1, 0, extra & -extra, x, seen))
            descriptors.append(describe_rows(config, 2, 2, config.box[1], grad, (out_h, out_w)))
    main = _launch(kernel, programs, GRAD_TENSORS, arguments, _options(config))
    arguments = {"size": size, "rows": 2 * splits, **_SUM_ROWS}
    programs = triton.cdiv(size, _SUM_ROWS["BLOCK"])
    total = _launch(sum_rows_kernel, programs, SUM_TENSORS, arguments, {})
    return Plan(main, total, descriptors, _written(output), _written(partial), config)


def _plan_depthwise(call: Convolution, config: DepthwiseConfig) -> Plan:
    x, residual = call.x, call.residual
    y = call.empty_output()
    n, _, h, w = x.shape
    *_, out_h, out_w = y.shape
    dense_output = memory_of(*[y] if residual is None else [y, residual]) == "channels_last"
    (padding_h, _), (padding_w, _) = call.geometry.padding
    constants = _constants(call, config, [y, call.weights, residual])
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x),
        **_strides(dense_output, r=y if residual is None else residual, y=y),
        "padding_h": padding_h, "padding_w": padding_w,
        "bias_channels": call.bias_channels, **constants,
        "STORED": call.stored, "DENSE_OUTPUT": dense_output,
    }  # fmt: skip
    tiles = config.count_tiles((n, out_h, out_w), call.geometry.dilation[0])
    programs = tiles * triton.cdiv(call.layout.channels, config.BLOCK_C)
    main = _launch(depthwise_kernel, programs, CONV_TENSORS, arguments, _options(config))
    return Plan(main, None, [], _written(y), None, config)


def _plan_depthwise_grad(call: WeightGradient, config: DepthwiseGradConfig) -> Plan:
    x, grad, layout = call.x, call.grad, call.layout
    n, _, h, w = x.shape
    *_, out_h, out_w = grad.shape
    tiles = config.count_tiles((n, out_h, out_w), call.geometry.dilation[0])
    splits = max(1, min(config.splits, tiles))
    size = layout.size + call.bias_channels
    output = torch.empty(size, dtype=call.dtype, device="meta")
    (padding_h, _), (padding_w, _) = call.geometry.padding
    constants = _constants(call, config)
    arguments = {
        "n": n, "h": h, "w": w, "out_h": out_h, "out_w": out_w,
        **_strides(constants["DENSE"], x=x, g=grad), "stride_partial": size,
        "padding_h": padding_h, "padding_w": padding_w, "splits": splits,
        "bias_channels": call.bias_channels, **constants,
    }  # fmt: skip
    programs = triton.cdiv(layout.channels, config.BLOCK_C) * splits if size and tiles else 0
    main = _launch(depthwise_grad_kernel, programs, GRAD_TENSORS, arguments, _options(config))
    if splits == 1:
        return Plan(main, None, [], _written(output), None, config)
    partial = torch.empty(splits, 1, size, dtype=torch.float32, device="meta")
    total = _sum_vectors(output, partial)
    return Plan(main, total, [], _written(output), _written(partial), config)


# By the kind of config.
_PLANS: dict[type[Config], Callable[[Any, Any], Plan]] = {
    ConvConfig: _plan_conv,
    WeightGradConfig: _plan_weight_grad,
    HaloConfig: _plan_halo,
    OnePassConfig: _plan_one_pass,
    OnePassTf32Config: _plan_one_pass,
    RowByRowConfig: _plan_one_pass,
    DepthwiseConfig: _plan_depthwise,
    DepthwiseGradConfig: _plan_depthwise_grad,
    ClusteredConfig: _plan_clustered,
}


def _plan(call: Convolution | WeightGradient, config: Config) -> Plan:
    return _PLANS[type(config)](call, config)


def _plan_merged(call: Convolution | WeightGradient, config: Any) -> Plan:
    """That of the same memory, of which so many columns are one."""
    of_merged = replace(config, merged=1)
    if isinstance(call, Convolution):
        return _plan_merged_conv(call, config, of_merged)
    return _plan_merged_grad(call, config, of_merged)


def _plan_merged_conv(call: Convolution, config: Config, of_merged: Config) -> Plan:
    m, precision = config.merged, call.precision or input_precision(call.x.dtype)
    layout, geometry = merge(call.layout, call.geometry, m)
    is_packed = call.weights.dim() == 1
    if not is_packed and call.stored < call.layout.taps:
        raise ValueError(f"{config} merges packed weights, or matrices of all taps")
    stored = layout.taps if precision == "tf32" else (layout.taps + 1) // 2
    shape = 1, stored, layout.channels, layout.channels
    matrices = torch.empty(shape, dtype=call.x.dtype, device="meta")
    merged_call = call._replace(
        x=_merge_columns(call.x, m), weights=matrices, layout=layout, geometry=geometry,
        residual=None if call.residual is None else _merge_columns(call.residual, m),
    )  # fmt: skip
    plan = _plan(merged_call, of_merged)
    bias = None
    if call.bias is not None:
        bias = Written((layout.channels,), (1,), call.bias.dtype)
    arguments = {
        **_merged_numbers(call, layout, geometry, m), "stored": stored,
        "bias_channels": 0 if bias is None else layout.channels,
        "SIGN": layout.sign, "IS_PACKED": is_packed, "BLOCK": _MERGED_BLOCK,
    }  # fmt: skip
    programs = triton.cdiv(matrices.numel(), _MERGED_BLOCK)
    launch = _launch(merge_columns_kernel, programs, MERGE_TENSORS, arguments, {})
    return plan._replace(
        output=_written(call.empty_output()),
        config=config,
        merging=Merging(launch, _written(matrices), bias),
    )


def _plan_merged_grad(call: WeightGradient, config: Config, of_merged: Config) -> Plan:
    m = config.merged
    layout, geometry = merge(call.layout, call.geometry, m)
    plan = _plan(
        call._replace(
            x=_merge_columns(call.x, m), grad=_merge_columns(call.grad, m), layout=layout,
            geometry=geometry, dtype=torch.float32,
        ),
        of_merged,
    )  # fmt: skip
    partial = plan.partial or plan.output
    merged_size = plan.output.shape[0]
    output = torch.empty(call.layout.size + call.bias_channels, dtype=call.dtype, device="meta")
    arguments = {
        **_merged_numbers(call, layout, geometry, m), "merged_taps": layout.taps,
        "rows": math.prod(partial.shape) // max(merged_size, 1),
        "size": output.numel(), "merged_size": merged_size, "bias_channels": call.bias_channels,
        "SIGN": layout.sign, **_SUM_MERGED,
    }  # fmt: skip
    places = (call.layout.taps + 1) // 2 * call.layout.channels**2 + call.bias_channels
    programs = triton.cdiv(places, _SUM_MERGED["BLOCK"])
    total = _launch(sum_merged_kernel, programs, SUM_TENSORS, arguments, {})
    return plan._replace(sum=total, output=_written(output), partial=partial, config=config)


def _merged_numbers(
    call: Convolution | WeightGradient, layout: Layout, geometry: Geometry, merged: int
) -> dict[str, int]:
    """Of a convolution, and of that of merged columns."""
    return {
        "channels": call.layout.channels, "kernel_w": call.layout.kernel_size[1],
        "taps": call.layout.taps, "dilation": call.geometry.dilation[1],
        "padding": call.geometry.padding[1][0], "merged": merged,
        "merged_w": layout.kernel_size[1], "merged_padding": geometry.padding[1][0],
    }  # fmt: skip


def _merge_columns(image: Tensor, merged: int) -> Tensor:
    """The same channels-last memory, without gaps."""
    n, c, h, w = image.shape
    return image.as_strided(
        (n, merged * c, h, w // merged), (h * w * c, 1, w * c, merged * c), image.storage_offset()
    )


def _written(tensor: Tensor) -> Written:
    return Written(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _sum_vectors(output: Tensor, partial: Tensor) -> Launch:
    """Of the splits of a packed gradient."""
    vector = output.view(1, -1, 1, 1)
    written = {"bias_channels": 0, **_strides(True, r=vector, y=vector)}  # only that of channels
    return _sum((1, 1), partial, _SUM_VECTOR, written)


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
    return _launch(sum_splits_kernel, programs, SUM_TENSORS, arguments, {})


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[str, ...],
    arguments: dict[str, Any],
    options: dict[str, int],
) -> Launch:
    """By position, as Triton takes arguments fastest: tensors, numbers, scale factors, constants.
    Of the arguments those that the kernel takes."""
    names = kernel.arg_names
    scales = sum(name in names for name in ("alpha", "beta"))
    end = names.index("alpha") if scales else len(names)
    first = next(place for place, name in enumerate(names) if name in arguments)
    places = [1 + tensors.index(name) if name in tensors else 0 for name in names[:first]]
    numbers = tuple(arguments[name] for name in names[first:end] if name in arguments)
    constants = tuple(arguments[name] for name in names[end:] if name in arguments)
    return Launch(kernel, programs, itemgetter(*places), numbers, constants, options, scales)


def _options(config: Config) -> dict[str, int]:
    return config.compile_options(on_nvidia=torch.version.hip is None)


def _strides(dense: bool, **images: Tensor) -> dict[str, int]:
    """Four for each image. Of dense ones the kernel knows them; any number serves that is the same
    for all images, so that none makes code anew."""
    return {
        f"stride_{name}{axis}": 1 if dense else stride
        for name, image in images.items()
        for axis, stride in zip("nchw", image.stride(), strict=True)
    }


def _constants(
    call: Convolution | WeightGradient, config: Config, others: list[Tensor | None] | None = None
) -> dict[str, Any]:
    """What a kernel is compiled for, by the images that it reads and whatever else it reads or
    writes."""
    read = images_of(call)
    tensors = [*read, *(tensor for tensor in others or () if tensor is not None)]
    return configs.constants(
        config,
        call.layout,
        call.geometry.dilation,
        call.precision or input_precision(call.x.dtype),
        dense=memory_of(*read) == "channels_last",
        wide=max(call.layout.size, *map(extent, tensors)) >= _MAX_OFFSET,
    )
