"""What all kinds of configs have, and what they are told of a launch to refuse it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

from ..geometry import Geometry
from ..memory_format import Memory
from ..packing import Layout
from .merging import merge, why_unmergeable
from .precision import InputPrecision

Kernel = Literal["conv", "weight_grad"]  # what a launch computes
# Pixels by masked loads of any memory, or by bulk copies (sm_90 and later) of one memory format.
Loader = Literal["pointer", "channels_last_descriptor", "planar_descriptor"]
Roles = Literal["pixels_first", "weights_first"]
Shared = Literal["pixels", "weights"]  # what both programs of a cluster need
# What a problem may ask of the compiled code, beyond the plain one: images of channels-last
# memory, pixels of a multiple of 16 bytes, boxes that end with the output, offsets of 32 bits.
Need = Literal[
    "scattered_output",  # convolution: what is written, or a residual, is not channels-last
    "ragged_boxes",  # weight gradient: boxes reach beyond the output
    "scattered",  # "pointer": any other memory, or another number of channels
    "wide",  # offsets of 64 bits
]

_MAX_REGISTERS = 255  # of a thread, on NVIDIA's GPUs
_ALL_REGISTERS = 65536  # of the threads of a program there


class Reading(NamedTuple):
    """What a launch reads and writes, as far as a config may refuse it.

    Args:
        memory: of all images that are read.
        innermost: elements of a pixel in "channels_last" memory, of a row in "contiguous".
        itemsize: bytes of an element.
        aligned: each image, and the weight, starts at a multiple of 16 bytes.
        precision: of products of float32.
        output: memory of what a convolution writes, and of its residual.
        columns: the greatest common divisor of those of the input and of the output.
    """

    layout: Layout
    geometry: Geometry
    memory: Memory
    innermost: int
    itemsize: int
    aligned: bool
    precision: InputPrecision
    output: Memory
    columns: int


class BaseConfig:
    """What all kinds have.

    Attributes:
        kind: its name, and that of the file of its jit kernel.
        kernel: what it computes.
        box: images, rows and columns of a tile of pixels; powers of two.
        splits: so many programs share a sum; 1 in the committed list, since it compiles nothing
            anew.
        merged: so many columns of pixels are read as the channels of one, see :mod:`.merging`; 1 in
            the committed list, since to the compiler that is another layer.
    """

    kind: ClassVar[str]
    kernel: ClassVar[Kernel]
    box: tuple[int, int, int]
    num_warps: int
    num_stages: int
    loader: Loader
    splits: int
    merged: int
    _own_needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def BLOCK_M(self) -> int:
        return math.prod(self.box)

    @property
    def tile_channels(self) -> int:
        """Of a tile; where its sides differ, of the longer."""
        names = ("BLOCK_C", "BLOCK_N", "BLOCK_K")
        return max(self.constants[name] for name in names if name in self.constants)

    def count_boxes(self, sizes: tuple[int, ...]) -> int:
        """How many boxes cover so many images, rows and columns."""
        pairs = zip(sizes, self.box, strict=True)
        return math.prod(math.ceil(size / side) for size, side in pairs)

    def neighbours(self, layout: Layout) -> int:
        """Channels that a program may read side by side where images are channels-last."""
        return layout.group_channels

    @property
    def needs(self) -> frozenset[Need]:
        """What a problem can ask of its code."""
        by_pointer: set[Need] = {"scattered"} if self.loader == "pointer" else set()
        return frozenset({"wide", *by_pointer, *self._own_needs})

    @property
    def constants(self) -> dict[str, Any]:
        """Of the arguments that its kernel is compiled for, those that it chooses."""
        raise NotImplementedError

    def compile_options(self, on_nvidia: bool) -> dict[str, int]:
        """How Triton compiles it. Told that it may use all registers, NVIDIA's assembler spills
        none where of its own accord it would keep to fewer."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        most = min(_MAX_REGISTERS, _ALL_REGISTERS // (32 * self.num_warps))
        return {**options, "maxnreg": most} if on_nvidia else options

    def why_unreadable(self, reading: Reading) -> str | None:
        """What it asks of what is read and does not get, or None."""
        if self.merged == 1:
            return self._why_unreadable(reading)
        if not reading.memory == reading.output == "channels_last":
            return "columns are merged in channels-last memory"
        layout, geometry = reading.layout, reading.geometry
        reason = why_unmergeable(layout, geometry, reading.columns, self.merged)
        if reason:
            return reason
        layout, geometry = merge(layout, geometry, self.merged)
        innermost = self.merged * reading.innermost
        as_read = reading._replace(layout=layout, geometry=geometry, innermost=innermost)
        return self._why_unreadable(as_read)

    def _why_unreadable(self, reading: Reading) -> str | None:
        """The same of what the kernel itself is given."""
        raise NotImplementedError
