"""How a kernel cuts a problem into tiles: the choices that do not change the result's meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .geometry import Memory

Loader = Literal["pointer", "descriptor"]
Roles = Literal["pixels_first", "weights_first"]


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the convolution.

    Args:
        box: images, rows and columns of a tile of pixels; powers of two.
        BLOCK_N, BLOCK_K: out- and in-channels of a tile, powers of two, at least 16.
        num_warps, num_stages: as Triton has them.
        loader: pixels by masked "pointer" loads, or by a "descriptor" (bulk copies, sm_90).
        roles: the first operand of the matrix product: "pixels_first" or "weights_first".
        accumulators: 2 sums the opposite taps apart; s = -1 always does.
    """

    box: tuple[int, int, int]
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    loader: Loader = "pointer"
    roles: Roles = "pixels_first"
    accumulators: int = 1

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
    accumulators: int = 1

    @property
    def BLOCK_M(self) -> int:
        return math.prod(self.box)


def compile_options(config: ConvConfig | WeightGradConfig, on_nvidia: bool) -> dict[str, int]:
    """How Triton compiles a config. Told that it may use all registers, NVIDIA's assembler spills
    none where of its own accord it would keep to fewer."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {**options, "maxnreg": 255} if on_nvidia else options


def why_no_descriptor(
    config: ConvConfig | WeightGradConfig,
    memory: Memory,
    innermost: int,
    itemsize: int,
    aligned: bool,
    groups: int,
    group_channels: int,
) -> str | None:
    """What bulk copies ask of an image and do not get, or None.

    Args:
        memory: of all images that are read.
        innermost: elements of a pixel in "channels_last" memory, of a row in "contiguous".
        itemsize: bytes of an element.
        aligned: each image starts at a multiple of 16 bytes.
    """
    planar = memory == "contiguous"
    if memory == "strided":
        return "it is contiguous in neither memory format"
    if planar and config.box[0] > 1:
        return f"a box of {config.box[0]} images needs channels-last memory"
    if innermost * itemsize % 16 or not aligned:
        return f"its {'rows' if planar else 'pixels'} are not aligned to 16 bytes"
    if planar and config.box[2] * itemsize < 16:
        return f"a row of {config.box[2]} pixels is less than 16 bytes"
    if groups > 1 and group_channels % config.BLOCK_K:
        return (
            f"a block of {config.BLOCK_K} channels would reach beyond the "
            f"{group_channels} of a group"
        )
    if isinstance(config, WeightGradConfig) and config.BLOCK_N != config.BLOCK_K:
        return "one box serves both blocks of channels, so BLOCK_N must equal BLOCK_K"
    return None
