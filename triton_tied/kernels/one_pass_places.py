"""The gradients in one pass: which taps and channels a program has, and where its sums go."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .tiles import triangle_row, triangle_size


@gluon.jit
def work_of_program(
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Its split and group, the first channels of grad and of x in the group, and the first row and
    column of its block of taps."""
    BLOCKS_W: gl.constexpr = (KERNEL_W + TAPS_W - 1) // TAPS_W
    BLOCKS: gl.constexpr = (KERNEL_H + TAPS_H - 1) // TAPS_H * BLOCKS_W
    C_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    block = pid % BLOCKS  # of one split all blocks run side by side, on the same pixels
    k_start = pid // BLOCKS % C_BLOCKS * BLOCK_C
    n_start = pid // (BLOCKS * C_BLOCKS) % C_BLOCKS * BLOCK_C
    group = pid // (BLOCKS * C_BLOCKS * C_BLOCKS) % GROUPS
    split = pid // (BLOCKS * C_BLOCKS * C_BLOCKS * GROUPS)
    return split, group, n_start, k_start, block // BLOCKS_W * TAPS_H, block % BLOCKS_W * TAPS_W


@gluon.jit
def has_middle(
    first_row, first, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr,
):  # fmt: skip
    """Whether the middle of the kernel is in the block of taps that begins there."""
    MIDDLE_H: gl.constexpr = KERNEL_H // 2 // TAPS_H * TAPS_H
    MIDDLE_W: gl.constexpr = KERNEL_W // 2 // TAPS_W * TAPS_W
    return (first_row == MIDDLE_H) & (first == MIDDLE_W)


@gluon.jit
def row_of_split(partial, split, size):
    """Where a split writes: two rows of ``size`` numbers."""
    return partial + split.to(gl.int64) * 2 * size


@gluon.jit
def store_taps(
    acc, target, opposite_target, row, first, end, n_start, k_start,
    CHANNELS: gl.constexpr, SIGN: gl.constexpr, KERNEL_W: gl.constexpr, TAPS: gl.constexpr,
    BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Sums of one row of taps and some columns, from ``first`` to ``end``, [columns x N, K]: each
    where its tap is stored or, transposed, where its opposite is. Not the centre."""
    PAIRS: gl.constexpr = TAPS // 2
    layout: gl.constexpr = acc.type.layout
    m = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None]
    k = gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))[None, :]
    column, n, k = first + m // BLOCK_C, n_start + m % BLOCK_C, k_start + k
    tap = row * KERNEL_W + column
    turns = tap >= TAPS - PAIRS
    matrix = gl.where(turns, TAPS - 1 - tap, tap) * (CHANNELS * CHANNELS)
    offsets = matrix + n * gl.where(turns, 1, CHANNELS) + k * gl.where(turns, CHANNELS, 1)
    mask = (column < end) & ((tap < PAIRS) | turns) & (n < CHANNELS) & (k < CHANNELS)
    if SIGN < 0:
        acc = gl.where(turns, -acc, acc)
    gl.store(gl.where(turns, opposite_target, target) + offsets, acc, mask=mask)


@gluon.jit
def store_centre(
    acc, target, opposite_target, column: gl.constexpr, n_start, k_start,
    CHANNELS: gl.constexpr, SIGN: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Of the sums [columns x N, K] of a row of taps the centre, which is in one column: its lower
    triangle, the upper one as its opposite. The diagonal has no opposite."""
    layout: gl.constexpr = acc.type.layout
    n = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None] - column * BLOCK_C
    k = gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))[None, :] + k_start
    mask = (n >= 0) & (n < BLOCK_C) & (n_start + n < CHANNELS) & (k < CHANNELS)
    n += n_start
    turns = n < k
    offsets = triangle_row(gl.maximum(n, k), SIGN) + gl.minimum(n, k)
    if SIGN < 0:
        mask = mask & (n != k)
        acc = gl.where(turns, -acc, acc)
    gl.store(gl.where(turns, opposite_target, target) + offsets, acc, mask=mask)
    if SIGN > 0:
        gl.store(opposite_target + offsets, gl.zeros_like(acc), mask=mask & (n == k))


@gluon.jit
def as_it_is(acc):
    return acc


@gluon.jit
def store_sums(
    sums, target, size, first_row, first, group, n_start, k_start,
    COLUMNS: gl.constexpr, as_matrix: gl.constexpr,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr,
    BLOCK_C: gl.constexpr,
):  # fmt: skip
    """The sums of a block of taps into the two rows of ``size`` numbers at ``target``. Each of them
    is of so many COLUMNS side by side in one row of taps, the rows first, and ``as_matrix`` makes
    [COLUMNS x N, K] of it."""
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W
    end = gl.minimum(first + TAPS_W, KERNEL_W)
    taps = target + group * (TAPS // 2 * CHANNELS * CHANNELS)
    for i in gl.static_range((TAPS_W + COLUMNS - 1) // COLUMNS * TAPS_H):
        row, column = first_row + i % TAPS_H, first + i // TAPS_H * COLUMNS
        if (row < KERNEL_H) & (column < end):
            store_taps(
                as_matrix(sums[i]), taps, taps + size, row, column, end, n_start, k_start,
                CHANNELS, SIGN, KERNEL_W, TAPS, BLOCK_C,
            )  # fmt: skip
    if TAPS % 2 == 1:
        centre = target + GROUPS * (TAPS // 2) * CHANNELS * CHANNELS
        centre += group * triangle_size(CHANNELS, SIGN)
        if has_middle(first_row, first, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W):
            store_centre(
                as_matrix(sums[MIDDLE // COLUMNS * TAPS_H + KERNEL_H // 2 % TAPS_H]),
                centre, centre + size, MIDDLE % COLUMNS, n_start, k_start, CHANNELS, SIGN, BLOCK_C,
            )  # fmt: skip


@gluon.jit
def store_bias(
    acc, target, size, group, column: gl.constexpr, n_start, k_start,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Of the sums of grad, [columns x N], those of one column, at the end of the first row of
    ``size`` numbers at ``target``, and zeros at the end of the second. One of all tiles of x does
    it."""
    n = gl.arange(0, acc.shape[0], acc.type.layout) - column * BLOCK_C
    mask = (n >= 0) & (n < BLOCK_C) & (n_start + n < CHANNELS) & (k_start == 0)
    place = target + size - (GROUPS - group) * CHANNELS + n_start + n
    gl.store(place, acc, mask=mask)
    gl.store(place + size, gl.zeros_like(acc), mask=mask)
