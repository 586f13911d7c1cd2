"""The first taps of a tied weight as matrices."""

import triton
import triton.language as tl

from .tiles import load_centre, load_matrix, round_to_tf32


@triton.jit
def matrices_kernel(
    packed, matrices,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr,
    TAPS: tl.constexpr, STORED: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """matrices[group, tap, out, in] of the first STORED taps, in the dtype of ``matrices``; ROUNDS
    to TF32."""
    PAIRS: tl.constexpr = TAPS // 2
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    k_start = (pid % K_BLOCKS) * BLOCK_K
    n_start = (pid // K_BLOCKS) % N_BLOCKS * BLOCK_N
    matrix = pid // (K_BLOCKS * N_BLOCKS)
    tap, group = matrix % STORED, matrix // STORED
    if tap < PAIRS:
        tile = load_matrix(
            packed, group * PAIRS + tap, n_start, k_start,
            "pointer", CHANNELS, True, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif tap == TAPS - 1 - tap:
        triangles = packed + GROUPS * PAIRS * CHANNELS * CHANNELS
        tile = load_centre(
            triangles, group, n_start, k_start, CHANNELS, SIGN, True, BLOCK_N, BLOCK_K
        )
    else:
        tile = load_matrix(
            packed, group * PAIRS + TAPS - 1 - tap, k_start, n_start,
            "pointer", CHANNELS, True, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        tile = SIGN * tl.trans(tile)
    if ROUNDS:
        tile = round_to_tf32(tile)
    rows = (n_start + tl.arange(0, BLOCK_N))[:, None]
    columns = (k_start + tl.arange(0, BLOCK_K))[None, :]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    offsets = matrix.to(tl.int64) * CHANNELS * CHANNELS + rows * CHANNELS + columns
    tl.store(matrices + offsets, tile.to(matrices.dtype.element_ty), mask=mask)
