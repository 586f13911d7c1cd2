"""Descriptors of bulk copies: what lies where in memory, and how much is copied at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..packing import Layout
from .calls import Convolution
from .configs import (
    ClusteredConfig,
    Config,
    HaloConfig,
    OnePassConfig,
    RowByRowConfig,
    swizzled_channels,
)


class Description(NamedTuple):
    """An argument that is a descriptor of the tensor of an argument, by their places; its class,
    and all fields of it but the tensor."""

    argument: int
    tensor: int
    kind: type
    fields: dict[str, Any]


def describe(
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
    return _description(argument, tensor, TensorDescriptor(image, *found))


def describe_halo(call: Convolution, config: HaloConfig) -> list[Description]:
    """The rows of a box, whole matrices, and the rows below a box; see halo_kernel."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x, layout = call.x, call.layout
    sides, of_group, bits = x.shape[2:], layout.group_channels, 8 * x.element_size()
    block = min(config.BLOCK_C, 1024 // bits)
    sizes, strides = [layout.groups * call.stored, of_group, of_group], [of_group**2, of_group, 1]
    shared = NVMMASharedLayout(block * bits // 8, bits, 3)
    matrix = [1, config.BLOCK_C, block]
    found = [
        describe_rows(config, 0, 0, config.box[1], x, sides),
        _description(1, 1, TensorDescriptor(call.weights, sizes, strides, matrix, shared)),
    ]
    below = (layout.kernel_size[0] - 1) * call.geometry.dilation[0]
    if below:
        found.append(describe_rows(config, 2, 0, below & -below, x, sides))
    return found


def describe_rows(
    config: HaloConfig | OnePassConfig,
    argument: int,
    tensor: int,
    rows: int,
    image: Tensor,
    sides: Sequence[int],
) -> Description:
    """Of the first rows and columns of an image in channels-last memory without gaps so many rows
    of a box. The axes are H, N, W, C: what lies some rows below starts some rows of pixels later,
    for all images of a box."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, c, h, w = image.shape
    bits = 8 * image.element_size()
    images, _, columns = config.box
    block = [rows, images, columns, min(config.BLOCK_C, 1024 // bits)]
    shape, strides = [sides[0], n, sides[1], c], [w * c, h * w * c, c, 1]
    shared = NVMMASharedLayout(block[-1] * bits // 8, bits, 4)
    found = TensorDescriptor(image, shape, strides, block, shared)
    return _description(argument, tensor, found)


def describe_row(
    config: RowByRowConfig, argument: int, image: Tensor, sides: tuple[int, int]
) -> Description:
    """The same of one row, cut into parts of as many channels as can be swizzled. The axes are
    H, parts, N, W, C."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, c, h, w = image.shape
    images, _, columns = config.box
    depth = swizzled_channels(image.element_size())
    shape = [sides[0], c // depth, n, sides[1], depth]
    strides = [w * c, depth, h * w * c, c, 1]
    block = [1, config.BLOCK_C // depth, images, columns, depth]
    found = TensorDescriptor(image, shape, strides, block, NVMMASharedLayout(128, 32, 5))
    return _description(argument, argument, found)


def describe_weights(config: Config, layout: Layout, call: Convolution) -> list[Description]:
    """Matrices without gaps, if there are any, and a tile of one; and one for transposes, if it is
    another."""
    c, n, k, stored = layout.group_channels, config.BLOCK_N, config.BLOCK_K, call.stored
    if not stored:
        return []
    sizes, strides = [layout.groups * stored, c, c], [c * c, c, 1]
    described = TensorDescriptor(call.weights, sizes, strides, [1, n, k])
    found = [_description(1, 1, described)]
    if n != k and stored < layout.taps:
        described = TensorDescriptor(call.weights, sizes, strides, [1, k, n])
        found.append(_description(2, 1, described))
    return found


def describe_clustered(call: Convolution, config: ClusteredConfig) -> list[Description]:
    """A box, and tiles of matrices as they stand and to be transposed; see clustered_kernel."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x, layout = call.x, call.layout
    n, c, h, w = x.shape
    of_group, itemsize = layout.group_channels, x.element_size()
    image = x, [n, h, w, c], [h * w * c, w * c, c, 1]
    sizes, strides = [layout.groups * call.stored, of_group, of_group], [of_group**2, of_group, 1]
    matrices = call.weights, sizes, strides
    found = []
    for argument, (block, axis) in enumerate(config.copied(itemsize).values()):
        if argument < 2 or call.stored < layout.taps:
            shared = halved_layout(8 * itemsize, len(block), axis)
            descriptor = TensorDescriptor(*(matrices if argument else image), block, shared)
            found.append(_description(argument, min(argument, 1), descriptor))
    return found


def halved_layout(bits: int, rank: int, axis: int | None) -> Any:
    """Of a block in the shared memory of a cluster; see :meth:`.ClusteredConfig.copied`."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    halves = [int(place == axis) for place in range(rank)]
    return NVMMASharedLayout(128, bits, rank, cga_layout=[halves])


def _description(argument: int, tensor: int, descriptor: Any) -> Description:
    """Checked by Triton, once for all tensors that lie in memory like this one."""
    fields = dict(vars(descriptor))
    del fields["base"]
    return Description(argument, tensor, type(descriptor), fields)
