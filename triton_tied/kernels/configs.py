"""How a kernel cuts a problem into tiles: the choices that do not change the result's meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..memory_format import Memory
from .precision import InputPrecision

# Pixels by masked loads of any memory, or by bulk copies (sm_90 and later) of one memory format.
Loader = Literal["pointer", "channels_last_descriptor", "planar_descriptor"]
Roles = Literal["pixels_first", "weights_first"]

_READS: dict[str, Memory] = {
    "channels_last_descriptor": "channels_last",
    "planar_descriptor": "contiguous",
}
_MAX_REGISTERS = 255  # of a thread, on NVIDIA's GPUs
_ALL_REGISTERS = 65536  # of the threads of a program there
_BULK_COPY_BYTES = 16  # what bulk copies align to, and the least that they copy


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the convolution.

    Args:
        box: images, rows and columns of a tile of pixels; powers of two.
        BLOCK_N, BLOCK_K: out- and in-channels of a tile, powers of two, at least 16.
        num_warps, num_stages: as Triton has them.
        loader: how pixels are read, see :data:`Loader`.
        roles: the first operand of the matrix product: "pixels_first" or "weights_first".
        splits: so many programs share the sum of one tile of the output.
    """

    box: tuple[int, int, int]
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    loader: Loader = "pointer"
    roles: Roles = "pixels_first"
    splits: int = 1

    @property
    def BLOCK_M(self) -> int:
        return math.prod(self.box)


@dataclass(frozen=True)
class WeightGradConfig:
    """Tiles of the packed weight gradient: as :class:`ConvConfig`, where ``box`` is what one step
    of the sum reads, and ``splits`` programs share the pixels of one tile of the gradient."""

    box: tuple[int, int, int]
    BLOCK_N: int
    BLOCK_K: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    loader: Loader = "pointer"

    @property
    def BLOCK_M(self) -> int:
        return math.prod(self.box)


Config = ConvConfig | WeightGradConfig


def constants(
    config: Config,
    *,
    channels: int,
    groups: int,
    sign: int,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    input_precision: InputPrecision,
    dense: bool,
    wide: bool,
    stored: int = 0,
    dense_output: bool = True,
    masked: bool = False,
    rounds: bool = False,
) -> dict[str, Any]:
    """The arguments that a kernel is compiled for.

    Args:
        channels: of one group.
        dense: all images that are read are channels-last without gaps.
        wide: offsets take 64 bits.
        stored: convolution: taps that are read as matrices.
        dense_output: convolution: what is written, and the residual, are channels-last.
        masked: weight gradient: boxes reach beyond the output.
        rounds: weight gradient: to TF32.
    """
    shared = {
        "CHANNELS": channels,
        "GROUPS": groups,
        "SIGN": sign,
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "LOADER": config.loader,
        "INPUT_PRECISION": input_precision,
        "DENSE": dense,
        "WIDE": wide,
        "BLOCK_I": config.box[0],
        "BLOCK_H": config.box[1],
        "BLOCK_W": config.box[2],
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }
    if isinstance(config, ConvConfig):
        own: dict[str, Any] = {"ROLES": config.roles, "STORED": stored}
        return {**shared, **own, "DENSE_OUTPUT": dense_output}
    return {**shared, "MASKED": masked, "ROUNDS": rounds}


def compile_options(config: Config, on_nvidia: bool) -> dict[str, int]:
    """How Triton compiles a config. Told that it may use all registers, NVIDIA's assembler spills
    none where of its own accord it would keep to fewer."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    most = min(_MAX_REGISTERS, _ALL_REGISTERS // (32 * config.num_warps))
    return {**options, "maxnreg": most} if on_nvidia else options


def count_boxes(sizes: tuple[int, ...], config: Config) -> int:
    """How many boxes cover so many images, rows and columns."""
    return math.prod(math.ceil(size / side) for size, side in zip(sizes, config.box, strict=True))


def why_unreadable(
    config: Config,
    memory: Memory,
    innermost: int,
    itemsize: int,
    aligned: bool,
    groups: int,
    group_channels: int,
) -> str | None:
    """What the config's loader asks of an image and does not get, or None.

    Args:
        memory: of all images that are read.
        innermost: elements of a pixel in "channels_last" memory, of a row in "contiguous".
        itemsize: bytes of an element.
        aligned: each image, and the weight, starts at a multiple of 16 bytes.
    """
    if config.loader == "pointer":
        return None
    wanted, planar = _READS[config.loader], config.loader == "planar_descriptor"
    if memory == "strided":
        return "it is contiguous in neither memory format"
    if memory != wanted:
        return f"its memory is {memory}, and {config.loader} reads {wanted}"
    if planar and config.box[0] > 1:
        return f"a box of {config.box[0]} images needs channels-last memory"
    if innermost * itemsize % _BULK_COPY_BYTES or not aligned:
        return f"its {'rows' if planar else 'pixels'}, or the weight, are not aligned to 16 bytes"
    if planar and config.box[2] * itemsize < _BULK_COPY_BYTES:
        return f"a row of {config.box[2]} pixels is less than 16 bytes"
    if group_channels * itemsize % _BULK_COPY_BYTES:
        return f"the rows of a matrix of {group_channels} channels are not aligned to 16 bytes"
    blocks = {config.BLOCK_K}
    if isinstance(config, WeightGradConfig):
        blocks.add(config.BLOCK_N)
    if groups > 1 and any(group_channels % block for block in blocks):
        return (
            f"a block of {max(blocks)} channels would reach beyond the {group_channels} of a group"
        )
    return None
