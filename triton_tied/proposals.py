"""The configs that :mod:`triton_tied.inspection` compiles, to commit those that compile well.

A spread over problems, not a product: few and many pixels, maps from 2x2 up, 16 channels and up.
A config reads (box, BLOCK_N, BLOCK_K, num_warps, num_stages).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .configs import ConvConfig, Loader, Roles, WeightGradConfig

_Tiles = tuple[tuple[int, int, int], int, int, int, int]

_POINTER: tuple[_Tiles, ...] = (
    ((1, 4, 8), 16, 16, 4, 2),
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
    ((8, 4, 4), 64, 32, 8, 3),
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

# Of a box of one side the rows are a matrix as they stand, of any other only the columns: the
# former comes first in the product, the latter second, behind at least 64 out-channels.
_PIXELS_FIRST: tuple[_Tiles, ...] = (
    ((1, 1, 64), 32, 32, 4, 4),
    ((1, 1, 128), 16, 16, 4, 4),
    ((1, 1, 128), 32, 32, 4, 4),
    ((1, 1, 128), 64, 64, 4, 3),
    ((64, 1, 1), 64, 64, 4, 4),
    ((128, 1, 1), 64, 64, 4, 3),
    ((128, 1, 1), 128, 64, 8, 3),
    ((1, 1, 128), 128, 64, 8, 3),
    ((1, 1, 256), 64, 64, 8, 3),
    ((1, 1, 256), 128, 32, 8, 4),
)
_WEIGHTS_FIRST: tuple[_Tiles, ...] = (
    ((1, 1, 64), 64, 64, 4, 4),
    ((1, 8, 8), 64, 64, 4, 4),
    ((4, 4, 4), 64, 64, 4, 4),
    ((16, 2, 2), 64, 64, 4, 4),
    ((1, 8, 16), 64, 32, 4, 4),
    ((1, 8, 16), 64, 64, 4, 3),
    ((2, 8, 8), 64, 64, 4, 3),
    ((8, 4, 4), 64, 64, 4, 3),
    ((32, 2, 2), 64, 64, 4, 3),
    ((1, 16, 16), 64, 32, 4, 4),
    ((1, 16, 16), 64, 64, 8, 2),
    ((1, 8, 16), 128, 64, 8, 3),
    ((1, 8, 16), 128, 128, 8, 2),
    ((2, 8, 8), 128, 64, 8, 3),
    ((8, 4, 4), 128, 64, 8, 3),
    ((32, 2, 2), 128, 64, 8, 3),
    ((1, 16, 16), 128, 32, 8, 4),
    ((1, 16, 16), 128, 64, 8, 2),
    ((4, 8, 8), 128, 64, 8, 2),
    ((1, 8, 16), 256, 32, 8, 3),
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
    ((1, 1, 32), 64, 64, 4, 4),
    ((1, 1, 64), 64, 64, 4, 4),
    ((64, 1, 1), 64, 64, 4, 4),
    ((1, 1, 128), 64, 64, 4, 2),
    ((1, 1, 32), 128, 128, 8, 4),
    ((1, 1, 64), 128, 128, 8, 3),
    ((64, 1, 1), 128, 128, 8, 3),
    ((1, 1, 64), 128, 128, 8, 2),
)


def conv(target: str, dtype: str) -> Iterator[ConvConfig]:
    """For the convolution."""
    sums = 2 if target == "sm_100" else 1  # there two chained products were seen to go wrong
    exact = dtype == "float32_ieee" or (dtype == "float32" and target == "gfx942")
    pointer = _POINTER_IEEE if dtype == "float32_ieee" else _POINTER_FP32 if dtype == "float32" else _POINTER
    if target in ("sm_90", "sm_100") and not exact:
        pointer = pointer[::2]
    yield from _conv(pointer, target, "pointer", "pixels_first", sums)
    if target in ("sm_90", "sm_100") and not exact:
        halve = 2 if dtype == "float32" else 1
        yield from _conv(_PIXELS_FIRST, target, "descriptor", "pixels_first", sums, halve)
        yield from _conv(_WEIGHTS_FIRST, target, "descriptor", "weights_first", sums, halve)


def _conv(
    tiles: Iterable[_Tiles], target: str, loader: Loader, roles: Roles, sums: int, halve: int = 1
) -> Iterator[ConvConfig]:
    for box, n, k, warps, stages in tiles:
        stages = 2 if target == "gfx942" else stages
        yield ConvConfig(box, n, max(16, k // halve), warps, stages, loader, roles, sums)


def weight_grad(target: str, dtype: str) -> Iterator[WeightGradConfig]:
    """For the weight gradient."""
    sums = 2 if target == "sm_100" else 1
    pointer = _GRAD_IEEE if dtype == "float32_ieee" else _GRAD_FP32 if dtype == "float32" else _GRAD_POINTER
    for box, n, k, warps, stages in pointer:
        stages = 2 if target == "gfx942" else stages
        yield WeightGradConfig(box, n, k, 1, warps, stages, "pointer", sums)
    if target in ("sm_90", "sm_100") and dtype != "float32_ieee":
        for box, n, k, warps, stages in _GRAD_DESCRIPTOR:
            yield WeightGradConfig(box, n, k, 1, warps, stages, "descriptor", sums)
