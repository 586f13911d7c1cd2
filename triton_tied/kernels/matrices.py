"""The first taps of a tied weight as matrices."""

import triton
import triton.language as tl

from .tiles import load_centre, load_matrix, round_to_tf32


# One code serves all layers.
@triton.jit(do_not_specialize=["channels", "groups", "taps", "stored"])
def matrices_kernel(
    packed, matrices, channels, groups, taps, stored,
    SIGN: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """matrices[group, tap, out, in] of the first ``stored`` taps, in the dtype of ``matrices``;
    ROUNDS to TF32. channels: of one group."""
    pairs = taps // 2
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    k_start = pid % blocks * BLOCK
    n_start = pid // blocks % blocks * BLOCK
    matrix = pid // (blocks * blocks)
    tap, group = matrix % stored, matrix // stored
    if tap < pairs:
        tile = load_matrix(
            packed, group * pairs + tap, n_start, k_start, channels, "pointer", True, BLOCK, BLOCK
        )
    elif tap == taps - 1 - tap:
        triangles = packed + groups.to(tl.int64) * pairs * channels * channels
        tile = load_centre(triangles, group, n_start, k_start, channels, SIGN, True, BLOCK, BLOCK)
    else:
        opposite = group * pairs + taps - 1 - tap
        tile = load_matrix(
            packed, opposite, k_start, n_start, channels, "pointer", True, BLOCK, BLOCK
        )
        tile = SIGN * tl.trans(tile)
    if ROUNDS:
        tile = round_to_tf32(tile)
    rows = (n_start + tl.arange(0, BLOCK))[:, None]
    columns = (k_start + tl.arange(0, BLOCK))[None, :]
    mask = (rows < channels) & (columns < channels)
    offsets = matrix.to(tl.int64) * channels * channels + rows * channels + columns
    tl.store(matrices + offsets, tile.to(matrices.dtype.element_ty), mask=mask)
