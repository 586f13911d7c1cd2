"""The centre of a tied weight, unpacked."""

import triton
import triton.language as tl

from .tiles import load_centre


@triton.jit
def centre_kernel(
    packed, centre,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """centre[group, out, in] from its lower triangle, cast to the dtype of ``centre``."""
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    k_start = (pid % K_BLOCKS) * BLOCK_K
    n_start = (pid // K_BLOCKS) % N_BLOCKS * BLOCK_N
    group = pid // (K_BLOCKS * N_BLOCKS)
    triangles = packed + GROUPS * PAIRS * CHANNELS * CHANNELS
    tile = load_centre(triangles, group, n_start, k_start, CHANNELS, SIGN, True, BLOCK_N, BLOCK_K)
    rows = (n_start + tl.arange(0, BLOCK_N))[:, None]
    columns = (k_start + tl.arange(0, BLOCK_K))[None, :]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    offsets = group.to(tl.int64) * CHANNELS * CHANNELS + rows * CHANNELS + columns
    tl.store(centre + offsets, tile.to(centre.dtype.element_ty), mask=mask)
