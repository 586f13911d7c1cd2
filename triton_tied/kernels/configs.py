"""How a kernel cuts a problem into tiles: the choices that do not change the result's meaning.

A *kind* of config is a class of them, for one kernel. What is known of a kind without Triton stands
in its class; :data:`KINDS` names them all.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from ..geometry import Geometry
from ..memory_format import Memory
from ..packing import Layout
from .base_config import BaseConfig, Loader, Need, Reading, Roles, Shared
from .precision import InputPrecision
from .stored_taps import UNPACKED_FROM
from .toolchain import why_no_clusters, why_no_gluon

_READS: dict[str, Memory] = {
    "channels_last_descriptor": "channels_last",
    "planar_descriptor": "contiguous",
}
_FEWER_REGISTERS = 128  # of a thread, half of what it may have
_MOST_MATRIX_ROWS = 256  # that Triton lays one after another, as bulk copies of matrices can
_BULK_COPY_BYTES = 16  # what bulk copies align to, and the least that they copy
HOPPER_SHARED_BYTES = 232448  # that a program can have on sm_90
# That a warpgroup moves results through, as Triton compiles it; and of all barriers, and gaps.
_MOST_RESULT_BYTES = 16384
_BARRIER_BYTES = 1024


@dataclass(frozen=True)
class ConvConfig(BaseConfig):
    """Tiles of the convolution.

    Args:
        box: images, rows and columns of a tile of pixels; powers of two.
        BLOCK_N, BLOCK_K: out- and in-channels of a tile, powers of two, at least 16.
        num_warps, num_stages: as Triton has them.
        loader: how pixels are read, see :data:`.base_config.Loader`.
        roles: the first operand of the matrix product: "pixels_first" or "weights_first".
        splits: so many programs share the sum of one tile of the output.
        merged: see :class:`.BaseConfig`.
    """

    kind = "conv"
    kernel = "conv"
    _own_needs = frozenset({"scattered_output"})

    box: tuple[int, int, int]
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    loader: Loader = "pointer"
    roles: Roles = "pixels_first"
    splits: int = 1
    merged: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        return {**_tile(self), "ROLES": self.roles}

    def _why_unreadable(self, reading: Reading) -> str | None:
        return _why_unloadable(self, reading, self.BLOCK_K)


@dataclass(frozen=True)
class WeightGradConfig(BaseConfig):
    """Tiles of the packed weight gradient: as :class:`ConvConfig`, where ``box`` is what one step
    of the sum reads, and ``splits`` programs share the pixels of one tile of the gradient."""

    kind = "weight_grad"
    kernel = "weight_grad"
    _own_needs = frozenset({"ragged_boxes"})

    box: tuple[int, int, int]
    BLOCK_N: int
    BLOCK_K: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    loader: Loader = "pointer"
    merged: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        return _tile(self)

    def _why_unreadable(self, reading: Reading) -> str | None:
        return _why_unloadable(self, reading, self.BLOCK_K, self.BLOCK_N)


@dataclass(frozen=True)
class HaloConfig(BaseConfig):
    """Tiles of the convolution of few channels on sm_90.

    Args:
        box: images, rows and columns of a tile of pixels; powers of two, images times columns a
            multiple of 8.
        BLOCK_C: channels of a group at most; a power of two, at least 16.
        num_stages: of all rings, for what the taps of one column of the kernel read; a multiple of
            ``consumers``, more than one for each.
        consumers: warpgroups that multiply, 1 or 2, each with a ring of its own.
        roles: as in :class:`ConvConfig`. The first operand has 64 rows or a multiple.
        streamed: of a column of taps so many matrices are copied at once, for a box of each
            consumer, into two stages of their own; 0: the whole weight stays in shared memory.
        splits: 1: a sum is not shared.
        merged: see :class:`.BaseConfig`.
    """

    kind = "halo"
    kernel = "conv"
    loader: ClassVar[Loader] = "channels_last_descriptor"
    num_warps: ClassVar[int] = 4  # of the first consumer; more join it

    box: tuple[int, int, int]
    BLOCK_C: int
    num_stages: int = 4
    consumers: int = 2
    roles: Roles = "weights_first"
    streamed: int = 0
    splits: int = 1
    merged: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        return {
            **_sides(self.box),
            "BLOCK_C": self.BLOCK_C,
            "STAGES": self.num_stages // self.consumers,
            "CONSUMERS": self.consumers,
            "ROLES": self.roles,
            "STREAMED": self.streamed,
        }

    def compile_options(self, on_nvidia: bool) -> dict[str, int]:
        """The kernel itself shares the registers out among its warps."""
        return {"num_warps": self.num_warps}

    @property
    def boxes_at_once(self) -> int:
        """For which matrices are streamed."""
        return self.consumers if self.streamed else 1

    def stage_pixels(self, kernel_rows: int, dilation: int) -> int:
        """That a stage holds: of a box, and of the rows below it."""
        images, rows, columns = self.box
        return images * columns * (rows + dilation * (kernel_rows - 1))

    def shared_bytes(self, layout: Layout, geometry: Geometry, itemsize: int) -> int:
        """The most that a program takes: stages, matrices, results on their way out, barriers."""
        pixels = self.stage_pixels(layout.kernel_size[0], geometry.dilation[0])
        held = layout.taps if itemsize == 4 else (layout.taps + 1) // 2
        if self.streamed:  # and a centre that is gathered
            held = 2 * min(self.streamed, layout.kernel_size[0]) + (itemsize == 2)
        rows = self.num_stages * pixels + held * self.BLOCK_C
        results = min(4 * self.BLOCK_M * self.BLOCK_C, _MOST_RESULT_BYTES)
        return rows * self.BLOCK_C * itemsize + self.consumers * results + _BARRIER_BYTES

    def _why_unreadable(self, reading: Reading) -> str | None:
        layout, channels = reading.layout, reading.layout.group_channels
        if layout.taps == 1:
            return "a kernel of one tap reads each pixel once anyway"
        if channels > self.BLOCK_C:
            return f"a tile of {self.BLOCK_C} channels does not hold the {channels} of a group"
        reason = _why_no_hopper_products(reading)
        if reason:
            return reason
        found = self.shared_bytes(layout, reading.geometry, reading.itemsize)
        if found > HOPPER_SHARED_BYTES:
            return f"{found} bytes of shared memory, of {HOPPER_SHARED_BYTES}"
        return _why_unloadable(self, reading, self.BLOCK_C) or why_no_gluon()


@dataclass(frozen=True)
class ClusteredConfig(BaseConfig):
    """Tiles of the convolution of many channels on sm_90, each of two programs.

    Args:
        box: images, rows and columns of a tile of pixels; powers of two.
        BLOCK_N: out-channels of a tile; of one program 64 or 128.
        num_stages: of the ring for operands.
        shared: what both programs need: "pixels", and each has half of the out-channels, or
            "weights", and each has half of the box, at most 256 pixels.
        splits: so many clusters share the sum of one tile of the output.
    """

    kind = "clustered"
    kernel = "conv"
    loader: ClassVar[Loader] = "channels_last_descriptor"
    merged: ClassVar[int] = 1

    box: tuple[int, int, int]
    BLOCK_N: int
    num_stages: int = 4
    shared: Shared = "pixels"
    splits: int = 1

    @property
    def program(self) -> tuple[int, int]:
        """Pixels and out-channels of one program."""
        if self.shared == "pixels":
            return self.BLOCK_M, self.BLOCK_N // 2
        return self.BLOCK_M // 2, self.BLOCK_N

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        """Of a program, that multiply; four more have operands copied."""
        return self.program[1] // 16

    @property
    def constants(self) -> dict[str, Any]:
        return {
            **_sides(self.box),
            "BLOCK_N": self.BLOCK_N,
            "STAGES": self.num_stages,
            "SHARED": self.shared,
        }

    def copied(self, itemsize: int) -> dict[str, tuple[list[int], int | None]]:
        """By the kernel's descriptors: the block that is copied at once, and along which axis each
        program has half of it; None where both have all."""
        depth, is_cut = swizzled_channels(itemsize), self.shared == "pixels"
        side = next((axis for axis in range(3) if self.box[axis] > 1), 2)
        return {
            "x": ([*self.box, depth], None if is_cut else side),
            "weights": ([1, self.BLOCK_N, depth], 1 if is_cut else None),
            "opposite_weights": ([1, depth, self.BLOCK_N], 2 if is_cut else None),
        }

    def compile_options(self, on_nvidia: bool) -> dict[str, int]:
        """Of four warps that multiply, two programs share a multiprocessor. The kernel itself
        shares the registers out among its warps."""
        most = 128 if self.num_warps == 4 else 168
        return {"num_warps": self.num_warps, "num_ctas": 2, "maxnreg": most}

    def _why_unreadable(self, reading: Reading) -> str | None:
        channels = reading.layout.group_channels
        if channels < UNPACKED_FROM:
            return f"of {channels} channels a group the centre is not unpacked"
        reason = _why_no_hopper_products(reading)
        if reason:
            return reason
        blocks = self.BLOCK_N, swizzled_channels(reading.itemsize)
        return _why_unloadable(self, reading, *blocks) or why_no_clusters()


@dataclass(frozen=True)
class OnePassConfig(BaseConfig):
    """Tiles of the packed weight gradient by blocks of taps: see :mod:`.one_pass`.

    Args:
        box: images, rows and columns that one step of the sum reads; powers of two, at least 8
            columns, at most 256 pixels.
        BLOCK_C: channels of a tile: 16, 32 or 64.
        taps: rows and columns of the block of taps that a program sums, fewer if the kernel has
            fewer.
        num_warps: 4 or 8.
        num_stages: boxes in shared memory.
        splits: so many programs share the pixels of one block of taps.
        merged: see :class:`.BaseConfig`.
    """

    kind = "one_pass"
    kernel = "weight_grad"
    loader = "channels_last_descriptor"

    box: tuple[int, int, int]
    BLOCK_C: int
    taps: tuple[int, int]
    num_warps: int = 8
    num_stages: int = 3
    splits: int = 1
    merged: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    @property
    def constants(self) -> dict[str, Any]:
        return {
            **_sides(self.box),
            "BLOCK_C": self.BLOCK_C,
            "STAGES": self.num_stages,
        }

    def taps_of(self, kernel_size: tuple[int, ...]) -> tuple[int, int]:
        """Of a block, for a kernel of that size."""
        rows, columns = (min(pair) for pair in zip(self.taps, kernel_size, strict=True))
        return rows, columns

    def tiles_of(self, layout: Layout) -> int:
        """Blocks of taps, and tiles of channels of both images."""
        sides = zip(layout.kernel_size, self.taps_of(layout.kernel_size), strict=True)
        blocks = math.prod(math.ceil(side / taps) for side, taps in sides)
        return layout.groups * math.ceil(layout.group_channels / self.BLOCK_C) ** 2 * blocks

    def columns_of(
        self, out_w: int, w: int, kernel_w: int, padding_w: int, dilation_w: int
    ) -> tuple[int, int]:
        """The first column of x that boxes cover, and how many: all that any tap sees, and so many
        that the middle column of taps sees all of the output."""
        middle = kernel_w // 2 * dilation_w - padding_w
        first = min(max(0, -padding_w), middle)
        end = max(min(w, out_w + (kernel_w - 1) * dilation_w - padding_w), middle + out_w)
        return first, end - first

    def _why_unreadable(self, reading: Reading) -> str | None:
        reason = self._why_other_products(reading)
        if reason:
            return reason
        needed = self.shared_bytes(reading.layout.kernel_size, reading.geometry.dilation)
        if needed > HOPPER_SHARED_BYTES:
            return f"{needed} bytes of shared memory, of {HOPPER_SHARED_BYTES}"
        return _why_unloadable(self, reading) or why_no_gluon()

    def _why_other_products(self, reading: Reading) -> str | None:
        """Why its products are not those of an image, or None."""
        if reading.itemsize != 2:
            return "it multiplies half precision only"
        if self.BLOCK_M > _MOST_MATRIX_ROWS:
            return f"a box of {self.BLOCK_M} pixels is no matrix in shared memory"
        return None

    def shared_bytes(self, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> int:
        """Of its boxes."""
        (images, rows, columns), (taps_h, taps_w) = self.box, self.taps_of(kernel_size)
        most = 16 * self.num_warps // self.BLOCK_C
        copied = (taps_w + 1) * rows + (taps_h - 1) * dilation[0]
        read = math.ceil(taps_w / most) * most * rows
        return self.num_stages * max(copied, read) * images * columns * self.BLOCK_C * 2


@dataclass(frozen=True)
class OnePassTf32Config(OnePassConfig):
    """Tiles of the packed weight gradient of float32 by blocks of taps: see
    :mod:`.one_pass_tf32`.

    Args:
        box: images, rows and columns that one step of the sum reads; powers of two, at least 8
            columns, a multiple of 16 pixels for each of the warps that share them.
        BLOCK_C: channels of a tile: 16 or 32.
    """

    kind = "one_pass_tf32"

    def _why_other_products(self, reading: Reading) -> str | None:
        if reading.itemsize != 4 or reading.precision != "tf32":
            return "it multiplies float32 in TF32 only"
        return None

    def shared_bytes(self, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> int:
        (images, rows, columns), (taps_h, taps_w) = self.box, self.taps_of(kernel_size)
        copied = (taps_w + 1) * rows + (taps_h - 1) * dilation[0]
        return self.num_stages * copied * images * columns * self.BLOCK_C * 4


@dataclass(frozen=True)
class RowByRowConfig(OnePassTf32Config):
    """Tiles of the packed weight gradient of float32 of 64 channels, row by row: see
    :mod:`.row_by_row`.

    Args:
        box: images, rows and columns; images times columns 32. A program goes down its rows.
        BLOCK_C: 64.
        num_warps: 8, that multiply.
        num_stages: rows in shared memory that are copied; at least 3.
    """

    kind = "row_by_row"

    def compile_options(self, on_nvidia: bool) -> dict[str, int]:
        """Four more warps prepare rows. The kernel itself shares the registers out among them."""
        return {"num_warps": self.num_warps, "maxnreg": 168}

    def _why_other_products(self, reading: Reading) -> str | None:
        depth = swizzled_channels(reading.itemsize)
        if reading.layout.group_channels % depth:
            return f"it copies {depth} channels at once"
        return super()._why_other_products(reading)

    def shared_bytes(self, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> int:
        """Of copied rows, and of the ring of transposed ones."""
        taps_h, taps_w = self.taps_of(kernel_size)
        rows = self.num_stages * (taps_w + 1) + (taps_h - 1) * dilation[0] + 2
        return rows * self.BLOCK_M // self.box[1] * self.BLOCK_C * 4 + _BARRIER_BYTES


class _Depthwise(BaseConfig):
    """What both kinds for groups of few channels have: tiles of columns and channels, and programs
    that go down their rows. The columns of all images are counted side by side."""

    loader: ClassVar[Loader] = "pointer"
    num_stages: ClassVar[int] = 1
    merged: ClassVar[int] = 1
    BLOCK_C: int

    @property
    def constants(self) -> dict[str, Any]:
        _, rows, columns = self.box
        return {"BLOCK_H": rows, "BLOCK_W": columns, "BLOCK_C": self.BLOCK_C}

    def compile_options(self, on_nvidia: bool) -> dict[str, int]:
        """With half of the registers that a thread may have, so that more threads wait for memory
        at once: else the compiler keeps addresses there that it can as well compute again."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "maxnreg": _FEWER_REGISTERS} if on_nvidia else options

    def count_tiles(self, output: tuple[int, ...], dilation: int) -> int:
        """Of so many images, rows and columns; the rows of a tile lie ``dilation`` apart."""
        n, rows, columns = output
        _, tile_rows, tile_columns = self.box
        down = math.ceil(rows / (tile_rows * dilation)) * dilation
        return math.ceil(n * columns / tile_columns) * down

    def count_boxes(self, sizes: tuple[int, ...]) -> int:
        return self.count_tiles(sizes, dilation=1)

    def neighbours(self, layout: Layout) -> int:
        return layout.channels

    def _why_unreadable(self, reading: Reading) -> str | None:
        channels = reading.layout.group_channels
        if channels not in (1, 2, 4):
            return f"it is for groups of 1, 2 or 4 channels, and these have {channels}"
        if channels > self._neighbours(reading):
            return f"a thread would not read all {channels} channels of a group at once"
        held, most = self._held(reading), _FEWER_REGISTERS - 2 * (self._numbers + 1)
        if held > most:
            return f"a thread would hold {held} numbers of its tile, and {most} fit into registers"
        return None

    @property
    def _numbers(self) -> int:
        """Of a row that a thread computes, on NVIDIA's GPUs."""
        return max(1, self.box[2] * self.BLOCK_C // (32 * self.num_warps))

    def _neighbours(self, reading: Reading) -> int:
        """Channels that a thread reads at once."""
        return min(self._numbers, 16 // reading.itemsize)

    def _held(self, reading: Reading) -> int:
        """Registers, from one row to the next."""
        raise NotImplementedError


@dataclass(frozen=True)
class DepthwiseConfig(_Depthwise):
    """Tiles of the convolution of 1, 2 or 4 channels a group.

    Args:
        box: 1, rows that a program goes down, columns of its tile; columns are a power of two.
        BLOCK_C: channels of its tile, a power of two.
        num_warps: as Triton has it.
        splits: 1: the sum is short.
    """

    kind = "depthwise"
    kernel = "conv"
    _own_needs = frozenset({"scattered_output"})

    box: tuple[int, int, int]
    BLOCK_C: int
    num_warps: int = 4
    splits: int = 1

    def _why_unreadable(self, reading: Reading) -> str | None:
        if self.splits > 1:
            return "its sums are too short to be shared"
        return super()._why_unreadable(reading)

    def _held(self, reading: Reading) -> int:
        """The weights of the channels that it reads at once; sums, as many as the kernel has rows;
        what is read of two rows of the image."""
        layout, numbers = reading.layout, self._numbers
        rows, columns = layout.kernel_size
        read = math.ceil(numbers * reading.itemsize / 4)
        weights = _numbers_of_group(layout) * self._neighbours(reading) // layout.group_channels
        return weights + rows * numbers + 2 * columns * read


@dataclass(frozen=True)
class DepthwiseGradConfig(_Depthwise):
    """Tiles of the packed weight gradient of few channels a group: as :class:`DepthwiseConfig`, but
    ``splits`` programs share the pixels."""

    kind = "depthwise_grad"
    kernel = "weight_grad"

    box: tuple[int, int, int]
    BLOCK_C: int
    num_warps: int = 4
    splits: int = 1

    def _held(self, reading: Reading) -> int:
        """The sums of the packed numbers and of the bias; what is read of as many rows of x as the
        kernel has, and of one of grad."""
        layout, numbers = reading.layout, self._numbers
        read = math.ceil(numbers * reading.itemsize / 4)
        sums = _numbers_of_group(layout) * numbers // layout.group_channels + numbers
        return sums + (layout.taps + 1) * read


Config = (
    ConvConfig
    | WeightGradConfig
    | HaloConfig
    | ClusteredConfig
    | OnePassConfig
    | OnePassTf32Config
    | RowByRowConfig
    | DepthwiseConfig
    | DepthwiseGradConfig
)
_ALL = (
    ConvConfig,
    WeightGradConfig,
    HaloConfig,
    ClusteredConfig,
    OnePassConfig,
    OnePassTf32Config,
    RowByRowConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
)
KINDS: dict[str, type[Config]] = {each.kind: each for each in _ALL}


def _numbers_of_group(layout: Layout) -> int:
    """Free ones, as if the weight were symmetric."""
    c = layout.group_channels
    return layout.pairs * c * c + layout.taps % 2 * c * (c + 1) // 2


def can_merge(config: Config) -> bool:
    """Whether it is of a kind that may merge columns."""
    return "merged" in (each.name for each in fields(config))


def as_listed(config: Any) -> Config:
    """As it stands in the committed list."""
    return replace(config, splits=1, **({"merged": 1} if can_merge(config) else {}))


def as_json(config: Config) -> dict[str, Any]:
    """With the name of its kind."""
    return {"kind": config.kind, **asdict(config)}


def from_json(row: dict[str, Any]) -> Config:
    """What :func:`as_json` made.

    Raises:
        KeyError, TypeError: it did not make this.
    """
    found = {name: tuple(of) if isinstance(of, list) else of for name, of in row.items()}
    return KINDS[found.pop("kind")](**found)


def constants(
    config: Config, layout: Layout, dilation: tuple[int, ...], input_precision: InputPrecision,
    dense: bool, wide: bool,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that a kernel is compiled for, as far as it takes them; a kind may have more.

    Args:
        dense: all images that are read are channels-last without gaps.
        wide: offsets take 64 bits.
    """
    return {
        "CHANNELS": layout.group_channels,
        "GROUPS": layout.groups,
        "SIGN": layout.sign,
        "KERNEL_H": layout.kernel_size[0],
        "KERNEL_W": layout.kernel_size[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "INPUT_PRECISION": input_precision,
        "DENSE": dense,
        "WIDE": wide,
        **config.constants,
    }


def swizzled_channels(itemsize: int) -> int:
    """In the 128 bytes of a row of shared memory."""
    return 128 // itemsize


def _sides(box: tuple[int, int, int]) -> dict[str, int]:
    """As kernels name them."""
    return dict(zip(("BLOCK_I", "BLOCK_H", "BLOCK_W"), box, strict=True))


def _tile(config: ConvConfig | WeightGradConfig) -> dict[str, Any]:
    return {
        "LOADER": config.loader,
        **_sides(config.box),
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }


def _why_no_hopper_products(reading: Reading) -> str | None:
    """What the convolutions for sm_90 alone ask of dtype and output and do not get, or None."""
    if reading.itemsize == 4 and reading.precision == "ieee":
        return "its products of float32 are TF32"
    if reading.output != "channels_last":
        return f"it writes channels-last memory, and its output or residual is {reading.output}"
    return None


def _why_unloadable(config: Config, reading: Reading, *blocks: int) -> str | None:
    """What the loader of blocks of so many channels asks of an image and does not get, or None."""
    if config.loader == "pointer":
        return None
    memory, itemsize, channels = reading.memory, reading.itemsize, reading.layout.group_channels
    wanted, planar = _READS[config.loader], config.loader == "planar_descriptor"
    if memory == "strided":
        return "it is contiguous in neither memory format"
    if memory != wanted:
        return f"its memory is {memory}, and {config.loader} reads {wanted}"
    if planar and config.box[0] > 1:
        return f"a box of {config.box[0]} images needs channels-last memory"
    if reading.innermost * itemsize % _BULK_COPY_BYTES or not reading.aligned:
        return f"its {'rows' if planar else 'pixels'}, or the weight, are not aligned to 16 bytes"
    if planar and config.box[2] * itemsize < _BULK_COPY_BYTES:
        return f"a row of {config.box[2]} pixels is less than 16 bytes"
    if channels * itemsize % _BULK_COPY_BYTES:
        return f"the rows of a matrix of {channels} channels are not aligned to 16 bytes"
    if reading.layout.groups > 1 and any(channels % block for block in blocks):
        return f"a block of {max(blocks)} channels would reach beyond the {channels} of a group"
    if planar and _starts_within_a_unit(reading):
        return "its taps start at columns that are not aligned to 16 bytes"
    return None


def _starts_within_a_unit(reading: Reading) -> bool:
    """Whether a bulk copy of a row for some tap would start between two multiples of 16 bytes, for
    GPUs an illegal instruction. Boxes start at such multiples."""
    columns, geometry = reading.layout.kernel_size[1], reading.geometry
    starts = (tap * geometry.dilation[1] - geometry.padding[1][0] for tap in range(columns))
    return any(start * reading.itemsize % _BULK_COPY_BYTES for start in starts)
