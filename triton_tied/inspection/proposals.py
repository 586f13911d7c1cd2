"""The configs that :mod:`triton_tied.inspection` compiles, to commit those that compile well.

A spread over problems, not a product: few and many pixels, maps from 2x2 up, 16 channels and up.
A config reads (box, BLOCK_N, BLOCK_K, num_warps, num_stages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..kernels.base_config import Loader, Roles, Shared
from ..kernels.configs import (
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
)

_Tiles = tuple[tuple[int, int, int], int, int, int, int]

_POINTER: tuple[_Tiles, ...] = (
    ((1, 4, 8), 16, 16, 2, 2),
    ((1, 8, 8), 16, 16, 4, 3),
    ((1, 8, 16), 16, 16, 4, 4),
    ((1, 16, 16), 16, 16, 8, 3),
    ((1, 4, 8), 32, 32, 4, 3),
    ((1, 8, 8), 32, 32, 4, 3),
    ((4, 4, 4), 32, 32, 4, 3),
    ((16, 2, 2), 32, 32, 4, 3),
    ((1, 8, 16), 32, 32, 4, 3),
    ((1, 16, 16), 32, 32, 8, 3),
    ((1, 8, 8), 64, 32, 4, 3),
    ((4, 4, 4), 64, 64, 4, 3),
    ((16, 2, 2), 64, 64, 4, 3),
    ((64, 1, 1), 64, 64, 4, 3),
    ((1, 1, 64), 64, 32, 4, 4),
    ((1, 8, 16), 64, 32, 4, 3),
    ((1, 8, 16), 64, 32, 8, 4),
    ((1, 8, 16), 64, 64, 8, 3),
    ((2, 8, 8), 64, 32, 4, 3),
    ((8, 4, 4), 64, 32, 4, 3),
    ((1, 16, 16), 64, 32, 8, 3),
    ((1, 8, 16), 128, 32, 8, 3),
    ((1, 8, 16), 128, 64, 8, 2),
    ((2, 8, 8), 128, 32, 8, 3),
    ((8, 4, 4), 128, 32, 8, 3),
    ((32, 2, 2), 128, 32, 8, 3),
)
_POINTER_FP32: tuple[_Tiles, ...] = (
    ((1, 4, 8), 16, 16, 4, 2),
    ((1, 8, 8), 16, 16, 4, 3),
    ((1, 8, 16), 16, 16, 4, 3),
    ((1, 4, 8), 32, 32, 4, 3),
    ((1, 8, 8), 32, 32, 4, 3),
    ((4, 4, 4), 32, 32, 4, 3),
    ((16, 2, 2), 32, 32, 4, 3),
    ((1, 8, 16), 32, 32, 8, 3),
    ((1, 8, 8), 64, 32, 4, 3),
    ((1, 8, 16), 64, 16, 4, 4),
    ((1, 8, 16), 64, 32, 8, 3),
    ((2, 8, 8), 64, 32, 8, 3),
    ((1, 16, 16), 64, 16, 8, 3),
    ((1, 8, 16), 128, 16, 8, 3),
    ((1, 8, 16), 128, 32, 8, 2),
)
_POINTER_IEEE: tuple[_Tiles, ...] = (
    ((1, 4, 8), 16, 16, 4, 2),
    ((1, 8, 8), 16, 16, 4, 2),
    ((1, 4, 8), 32, 16, 4, 2),
    ((1, 8, 8), 32, 16, 4, 2),
    ((1, 8, 8), 32, 32, 4, 2),
    ((16, 2, 2), 32, 16, 4, 2),
    ((1, 8, 16), 32, 16, 8, 2),
    ((1, 8, 8), 64, 16, 4, 2),
    ((1, 8, 8), 64, 16, 8, 2),
    ((1, 8, 16), 64, 16, 8, 2),
)

# A box of one row is a matrix as it stands, of any other only its transpose: the former comes
# first in the product, the latter second, behind at least 64 out-channels.
_PIXELS_FIRST: tuple[_Tiles, ...] = (
    ((1, 1, 64), 32, 32, 4, 4),
    ((1, 1, 128), 16, 16, 4, 4),
    ((1, 1, 128), 32, 32, 4, 4),
    ((1, 1, 256), 16, 16, 8, 4),
    ((1, 1, 256), 32, 32, 8, 4),
    ((1, 1, 128), 64, 64, 4, 3),
    ((1, 1, 256), 64, 64, 8, 3),
    ((1, 1, 128), 128, 64, 8, 4),
)
_WEIGHTS_FIRST: tuple[_Tiles, ...] = (
    ((1, 8, 8), 64, 64, 4, 4),
    ((4, 4, 4), 64, 64, 4, 4),
    ((16, 2, 2), 64, 64, 4, 4),
    ((64, 1, 1), 64, 64, 4, 4),
    ((1, 8, 16), 64, 64, 4, 4),
    ((2, 8, 8), 64, 64, 4, 4),
    ((8, 4, 4), 64, 64, 4, 4),
    ((32, 2, 2), 64, 64, 4, 4),
    ((1, 16, 16), 64, 64, 4, 3),
    ((1, 16, 16), 64, 64, 8, 4),
    ((1, 8, 8), 128, 64, 8, 4),
    ((4, 4, 4), 128, 64, 8, 4),
    ((16, 2, 2), 128, 64, 8, 4),
    ((1, 8, 16), 128, 64, 8, 4),
    ((2, 8, 8), 128, 64, 8, 4),
    ((8, 4, 4), 128, 64, 8, 4),
    ((32, 2, 2), 128, 64, 8, 4),
    ((128, 1, 1), 128, 64, 8, 4),
    ((1, 16, 16), 128, 64, 8, 4),
    ((4, 8, 8), 128, 64, 8, 4),
    ((16, 4, 4), 128, 64, 8, 4),
    ((64, 2, 2), 128, 64, 8, 4),
    ((1, 8, 16), 256, 64, 8, 3),
)
# TF32: as many bytes are half as many channels.
_PIXELS_FIRST_TF32: tuple[_Tiles, ...] = (
    ((1, 1, 64), 32, 32, 4, 4),
    ((1, 1, 128), 16, 16, 4, 4),
    ((1, 1, 128), 32, 32, 4, 4),
    ((1, 1, 256), 32, 32, 8, 4),
    ((1, 1, 128), 64, 32, 4, 4),
)
_WEIGHTS_FIRST_TF32: tuple[_Tiles, ...] = (
    ((1, 8, 8), 64, 32, 4, 4),
    ((4, 4, 4), 64, 32, 4, 4),
    ((16, 2, 2), 64, 32, 4, 4),
    ((1, 8, 16), 64, 32, 4, 4),
    ((8, 4, 4), 64, 32, 4, 4),
    ((1, 16, 16), 64, 32, 8, 4),
    ((1, 8, 16), 128, 32, 8, 4),
    ((2, 8, 8), 128, 32, 8, 4),
    ((8, 4, 4), 128, 32, 8, 4),
    ((32, 2, 2), 128, 32, 8, 4),
    ((1, 16, 16), 128, 32, 16, 4),
    ((4, 8, 8), 128, 32, 16, 4),
    ((16, 4, 4), 128, 32, 16, 4),
)
_GRAD_POINTER: tuple[_Tiles, ...] = (
    ((1, 4, 8), 16, 16, 4, 2),
    ((1, 8, 8), 16, 16, 4, 3),
    ((1, 4, 8), 32, 32, 4, 3),
    ((1, 8, 8), 32, 32, 4, 3),
    ((8, 2, 2), 32, 32, 4, 3),
    ((1, 4, 8), 64, 32, 4, 3),
    ((1, 4, 8), 64, 64, 4, 3),
    ((1, 8, 8), 64, 64, 4, 2),
    ((2, 4, 4), 64, 64, 4, 3),
    ((8, 2, 2), 64, 64, 4, 3),
    ((1, 4, 8), 64, 64, 8, 3),
    ((1, 8, 8), 64, 64, 8, 3),
    ((1, 4, 8), 128, 64, 8, 3),
    ((1, 4, 8), 128, 128, 8, 2),
)
_GRAD_FP32: tuple[_Tiles, ...] = (
    ((1, 2, 8), 16, 16, 4, 2),
    ((1, 4, 8), 16, 16, 4, 3),
    ((1, 4, 8), 32, 32, 4, 3),
    ((8, 2, 2), 32, 32, 4, 3),
    ((1, 2, 8), 64, 32, 4, 3),
    ((1, 4, 8), 64, 32, 4, 3),
    ((1, 4, 8), 64, 64, 8, 3),
    ((8, 2, 2), 64, 64, 8, 3),
)
_GRAD_IEEE: tuple[_Tiles, ...] = (
    ((1, 2, 8), 16, 16, 4, 2),
    ((1, 4, 8), 16, 16, 4, 2),
    ((1, 2, 8), 32, 32, 4, 2),
    ((4, 2, 2), 32, 32, 4, 2),
    ((1, 4, 8), 32, 32, 4, 2),
    ((1, 2, 8), 64, 32, 8, 2),
)
_GRAD_DESCRIPTOR: tuple[_Tiles, ...] = (
    ((1, 1, 64), 32, 32, 4, 4),
    ((1, 1, 128), 32, 32, 4, 4),
    ((1, 1, 32), 64, 64, 4, 4),
    ((1, 1, 64), 64, 64, 4, 4),
    ((1, 8, 8), 64, 64, 4, 4),
    ((4, 4, 4), 64, 64, 4, 4),
    ((16, 2, 2), 64, 64, 4, 4),
    ((1, 1, 128), 64, 64, 4, 2),
    ((1, 8, 8), 64, 128, 4, 4),
    ((4, 4, 4), 64, 128, 4, 4),
    ((16, 2, 2), 64, 128, 4, 4),
    ((1, 1, 32), 128, 128, 8, 4),
    ((1, 1, 64), 128, 128, 8, 3),
    ((1, 8, 8), 128, 128, 8, 3),
    ((4, 4, 4), 128, 128, 8, 3),
    ((16, 2, 2), 128, 128, 8, 3),
    ((1, 1, 64), 128, 256, 8, 3),
    ((1, 8, 8), 128, 256, 8, 3),
    ((4, 4, 4), 128, 256, 8, 3),
    ((16, 2, 2), 128, 256, 8, 3),
)
# Box, BLOCK_C, taps, num_warps, num_stages.
_ONE_PASS: tuple[tuple[tuple[int, int, int], int, tuple[int, int], int, int], ...] = (
    ((1, 8, 32), 16, (3, 3), 4, 3),
    ((1, 8, 32), 16, (3, 3), 4, 6),
    ((1, 8, 16), 16, (3, 3), 4, 4),
    ((1, 8, 16), 16, (5, 5), 8, 4),
    ((1, 8, 16), 16, (7, 7), 8, 4),
    ((1, 8, 16), 32, (3, 3), 4, 3),
    ((1, 8, 16), 32, (3, 3), 8, 6),
    ((1, 8, 32), 32, (3, 3), 8, 3),
    ((1, 8, 8), 32, (3, 3), 4, 4),
    ((2, 4, 8), 32, (3, 3), 4, 4),
    ((1, 8, 16), 32, (5, 5), 8, 3),
    ((1, 8, 16), 32, (7, 4), 8, 4),
    ((1, 8, 16), 64, (3, 3), 8, 3),
    ((1, 16, 8), 64, (3, 3), 8, 3),
    ((1, 8, 8), 64, (3, 3), 8, 6),
    ((2, 4, 8), 64, (3, 3), 8, 5),
    ((1, 8, 16), 64, (3, 1), 4, 2),
    ((1, 8, 16), 64, (5, 2), 8, 3),
    ((1, 8, 16), 64, (4, 2), 8, 3),
    ((1, 1, 64), 64, (1, 9), 8, 2),
)
_ONE_PASS_TF32: tuple[tuple[tuple[int, int, int], int, tuple[int, int], int, int], ...] = (
    ((1, 16, 16), 16, (3, 3), 8, 3),
    ((1, 8, 32), 16, (3, 3), 4, 3),
    ((1, 8, 16), 16, (3, 3), 4, 3),
    ((2, 8, 8), 16, (3, 3), 4, 4),
    ((1, 16, 16), 16, (5, 3), 8, 2),
    ((1, 16, 8), 16, (7, 3), 8, 4),
    ((1, 16, 16), 16, (7, 2), 8, 3),
    ((1, 1, 128), 16, (1, 9), 8, 2),
    ((1, 16, 8), 32, (3, 3), 8, 3),
    ((1, 8, 16), 32, (3, 3), 8, 3),
    ((1, 8, 8), 32, (3, 3), 4, 3),
    ((2, 4, 8), 32, (3, 3), 4, 3),
    ((1, 16, 8), 32, (7, 1), 8, 4),
    ((1, 16, 8), 32, (5, 2), 8, 3),
    ((1, 1, 64), 32, (1, 9), 8, 2),
)
_ROW_BY_ROW: tuple[tuple[tuple[int, int, int], tuple[int, int], int], ...] = (
    ((1, 16, 32), (3, 3), 4),
    ((2, 16, 16), (3, 3), 4),
    ((4, 8, 8), (3, 3), 4),
    ((8, 4, 4), (3, 3), 4),
    ((16, 2, 2), (3, 3), 4),
    ((1, 16, 32), (7, 1), 4),
    ((4, 8, 8), (7, 1), 4),
    ((1, 16, 32), (5, 2), 4),
    ((1, 1, 32), (1, 5), 4),
)

# Rows and columns of a tile, BLOCK_C. On NVIDIA's GPUs a thread of 128 has 8 numbers of a row, or
# fewer for larger kernels, of which it holds more weights or sums.
_DEPTHWISE: tuple[tuple[int, int, int], ...] = (
    (16, 16, 64),
    (4, 16, 64),
    (16, 32, 32),
    (4, 32, 32),
    (16, 8, 64),
    (4, 8, 64),
    (16, 16, 32),
    (16, 64, 8),
    (16, 4, 64),
    (4, 4, 64),
    (16, 8, 32),
    (16, 4, 32),
)
_DEPTHWISE_GRAD: tuple[tuple[int, int, int], ...] = (
    (16, 16, 64),
    (16, 32, 32),
    (16, 8, 64),
    (4, 8, 64),
    (16, 16, 32),
    (16, 64, 8),
    (16, 4, 64),
    (16, 8, 32),
    (16, 4, 32),
)


# Box, channels, stages, consumers. Of 64 channels those come first in the product, of fewer the
# pixels. Tall boxes have less below them.
_HALO: dict[str, tuple[tuple[tuple[int, int, int], int, int, int], ...]] = {
    "half": (
        ((1, 16, 8), 64, 8, 2),
        ((1, 16, 8), 64, 4, 2),
        ((1, 8, 16), 64, 6, 2),
        ((2, 8, 8), 64, 6, 2),
        ((8, 4, 4), 64, 6, 2),
        ((1, 8, 8), 64, 8, 2),
        ((1, 16, 16), 32, 8, 2),
        ((1, 16, 16), 32, 4, 2),
        ((4, 8, 8), 32, 8, 2),
        ((8, 4, 4), 32, 8, 2),
        ((1, 16, 32), 16, 8, 2),
        ((1, 16, 16), 16, 12, 2),
        ((4, 8, 8), 16, 12, 2),
    ),
    "float32": (
        ((1, 8, 8), 64, 3, 1),
        ((4, 4, 4), 64, 2, 1),
        ((1, 16, 8), 32, 6, 2),
        ((1, 16, 8), 32, 4, 2),
        ((2, 8, 8), 32, 6, 2),
        ((8, 4, 4), 32, 4, 2),
        ((1, 16, 16), 16, 8, 2),
        ((4, 8, 8), 16, 6, 2),
    ),
}
# The same where the weight is streamed, and so many matrices are copied at once: up to 9x9.
_STREAMED: dict[str, tuple[tuple[tuple[int, int, int], int, int, int, int], ...]] = {
    "half": (
        ((1, 16, 8), 64, 4, 2, 5),
        ((2, 8, 8), 64, 4, 2, 3),
        ((1, 8, 8), 64, 4, 2, 4),
        ((4, 4, 4), 64, 4, 2, 4),
    ),
    "float32": (
        ((1, 16, 8), 64, 2, 1, 3),
        ((2, 8, 8), 64, 2, 1, 2),
        ((1, 8, 8), 64, 2, 1, 3),
        ((1, 16, 8), 32, 4, 2, 4),
        ((2, 8, 8), 32, 4, 2, 3),
    ),
}

# Box and out-channels of two programs, stages, what both need.
_CLUSTERED: tuple[tuple[tuple[int, int, int], int, int, Shared], ...] = (
    ((1, 16, 16), 256, 4, "pixels"),
    ((4, 8, 8), 256, 4, "pixels"),
    ((16, 4, 4), 256, 4, "pixels"),
    ((64, 2, 2), 256, 4, "pixels"),
    ((1, 8, 16), 256, 6, "pixels"),
    ((2, 8, 8), 256, 6, "pixels"),
    ((8, 4, 4), 256, 6, "pixels"),
    ((32, 2, 2), 256, 6, "pixels"),
    ((2, 8, 8), 128, 4, "pixels"),
    ((1, 32, 16), 128, 4, "weights"),
    ((2, 16, 16), 128, 4, "weights"),
    ((1, 16, 16), 128, 6, "weights"),
    ((4, 8, 8), 128, 6, "weights"),
    ((16, 4, 4), 128, 6, "weights"),
)

_BY_LIST = {
    "conv": {"half": _POINTER, "float32": _POINTER_FP32, "float32_ieee": _POINTER_IEEE},
    "weight_grad": {"half": _GRAD_POINTER, "float32": _GRAD_FP32, "float32_ieee": _GRAD_IEEE},
}


def propose(kind: str, target: str, list_name: str) -> Iterator[Config]:
    """For a kind of config, a target, and "half", "float32" or "float32_ieee"."""
    if target == "gfx942" and list_name == "float32":
        return iter(())  # there is no TF32
    return _KINDS[kind](target, list_name)


def _conv(target: str, list_name: str) -> Iterator[ConvConfig]:
    tiles, list_name, descriptors = _tiles_of("conv", target, list_name)
    for box, n, k, warps, stages in tiles:
        yield ConvConfig(box, n, k, warps, _stages(target, stages))
    if not descriptors:
        return
    tf32 = list_name == "float32"
    roles: tuple[tuple[Roles, tuple[_Tiles, ...]], ...] = (
        ("pixels_first", _PIXELS_FIRST_TF32 if tf32 else _PIXELS_FIRST),
        ("weights_first", _WEIGHTS_FIRST_TF32 if tf32 else _WEIGHTS_FIRST),
    )
    for role, found in roles:
        for box, n, k, warps, stages in found:
            for loader in _descriptors(box):
                yield ConvConfig(box, n, k, warps, stages, loader, role)


def _weight_grad(target: str, list_name: str) -> Iterator[WeightGradConfig]:
    tiles, list_name, descriptors = _tiles_of("weight_grad", target, list_name)
    for box, n, k, warps, stages in tiles:
        yield WeightGradConfig(box, n, k, 1, warps, _stages(target, stages))
    for box, n, k, warps, stages in _GRAD_DESCRIPTOR if descriptors else ():
        if list_name == "float32":
            box = (box[0], max(1, box[1] // 2), max(1, box[2] // (2 if box[1] == 1 else 1)))
        for loader in _descriptors(box):
            yield WeightGradConfig(box, n, k, 1, warps, stages, loader)


def _one_pass(target: str, list_name: str) -> Iterator[OnePassConfig]:
    if target == "sm_90" and list_name == "half":
        for tiles in _ONE_PASS:
            yield OnePassConfig(*tiles)


def _one_pass_tf32(target: str, list_name: str) -> Iterator[OnePassTf32Config]:
    if target == "sm_90" and list_name == "float32":
        for tiles in _ONE_PASS_TF32:
            yield OnePassTf32Config(*tiles)


def _row_by_row(target: str, list_name: str) -> Iterator[RowByRowConfig]:
    if target == "sm_90" and list_name == "float32":
        for box, taps, stages in _ROW_BY_ROW:
            yield RowByRowConfig(box, 64, taps, 8, stages)


def _depthwise(target: str, list_name: str) -> Iterator[DepthwiseConfig]:
    for rows, columns, channels in _DEPTHWISE:
        yield DepthwiseConfig((1, rows, columns), channels)


def _depthwise_grad(target: str, list_name: str) -> Iterator[DepthwiseGradConfig]:
    for rows, columns, channels in _DEPTHWISE_GRAD:
        yield DepthwiseGradConfig((1, rows, columns), channels)


def _halo(target: str, list_name: str) -> Iterator[HaloConfig]:
    if target != "sm_90":
        return
    resident = [(*tiles, 0) for tiles in _HALO.get(list_name, ())]
    for box, channels, stages, consumers, streamed in (*resident, *_STREAMED.get(list_name, ())):
        roles: Roles = "weights_first" if channels == 64 else "pixels_first"
        yield HaloConfig(box, channels, stages, consumers, roles, streamed)


def _clustered(target: str, list_name: str) -> Iterator[ClusteredConfig]:
    serves = target == "sm_90" and list_name != "float32_ieee"
    for box, n, stages, shared in _CLUSTERED if serves else ():
        yield ClusteredConfig(box, n, stages, shared)


def _tiles_of(kind: str, target: str, list_name: str) -> tuple[tuple[_Tiles, ...], str, bool]:
    """Those that read by pointers, of which list, and whether others read by descriptors."""
    if target == "gfx942" and list_name == "float32_ieee":
        list_name = "float32"  # exact products have matrix instructions
    descriptors = target in ("sm_90", "sm_100") and list_name != "float32_ieee"
    # Where descriptors serve the large problems, fewer will do.
    tiles = _BY_LIST[kind][list_name][:: 3 if descriptors else 1]
    return tiles, list_name, descriptors


def _descriptors(box: tuple[int, int, int]) -> tuple[Loader, ...]:
    """Bulk copies of several images need channels-last memory."""
    if box[0] > 1:
        return ("channels_last_descriptor",)
    return ("channels_last_descriptor", "planar_descriptor")


def _stages(target: str, stages: int) -> int:
    """AMD's pipelines are shallow."""
    return 2 if target == "gfx942" else stages


_KINDS: dict[str, Callable[[str, str], Iterator[Config]]] = {
    "conv": _conv,
    "weight_grad": _weight_grad,
    "one_pass": _one_pass,
    "one_pass_tf32": _one_pass_tf32,
    "row_by_row": _row_by_row,
    "depthwise": _depthwise,
    "depthwise_grad": _depthwise_grad,
    "halo": _halo,
    "clustered": _clustered,
}
