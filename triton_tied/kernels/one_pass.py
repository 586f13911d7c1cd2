"""The gradient of the packed vector on sm_90 by blocks of taps: a program reads each pixel of x
about once and of the output gradient once for each column of its block, not once for each tap."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tiles import box_start, triangle_row, triangle_size


@gluon.jit
def copy_box(
    x, x_tail, grad, tiles, landed, stage, is_wanted, box, rows, columns, first_column,
    x_channel, grad_channel, down, right,
    DILATION_W: gl.constexpr, EXTRA: gl.constexpr, TAPS_W: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Starts to copy a box of x into a stage, with EXTRA rows below it, and before it what each
    column of taps multiplies it with: boxes of grad. What lies beyond the images is zero."""
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_C * BITS // 8, BITS, 4)
    TAIL: gl.constexpr = EXTRA & -EXTRA  # rows of a copy: a power of two
    PIXELS: gl.constexpr = ((TAPS_W + 1) * BLOCK_H + EXTRA) * BLOCK_I * BLOCK_W
    shape: gl.constexpr = [BLOCK_H, BLOCK_I, BLOCK_W, BLOCK_C]
    image, row, column = box_start(box, rows, columns, BLOCK_I, BLOCK_H, BLOCK_W)
    column += first_column
    here = landed.index(stage)
    mbarrier.expect(here, PIXELS * BLOCK_C * BITS // 8, pred=is_wanted)
    for tap in gl.static_range(TAPS_W):
        tma.async_copy_global_to_shared(
            grad, [row, image, column + right - tap * DILATION_W, grad_channel], here,
            tiles.index(stage * ROWS + tap * BLOCK_H)._reinterpret(x.dtype, shape, layout),
            pred=is_wanted,
        )  # fmt: skip
    start = stage * ROWS + TAPS_W * BLOCK_H
    tma.async_copy_global_to_shared(
        x, [row + down, image, column, x_channel], here,
        tiles.index(start)._reinterpret(x.dtype, shape, layout), pred=is_wanted,
    )  # fmt: skip
    if EXTRA > 0:
        for below in gl.static_range(BLOCK_H, BLOCK_H + EXTRA, TAIL):
            tma.async_copy_global_to_shared(
                x_tail, [row + down + below, image, column, x_channel], here,
                tiles.index(start + below)._reinterpret(
                    x.dtype, [TAIL, BLOCK_I, BLOCK_W, BLOCK_C], layout
                ),
                pred=is_wanted,
            )  # fmt: skip


@gluon.jit
def multiply_box(
    sums, tiles, start, DILATION_H: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr,
    BLOCK_H: gl.constexpr, BLOCK_C: gl.constexpr, PIXELS: gl.constexpr,
):  # fmt: skip
    """sums + grad^T x for each column and each row of taps, under way."""
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_C, 16, 2)
    MOST: gl.constexpr = 16 * gl.num_warps() // BLOCK_C
    found = ()
    for first in gl.static_range(0, TAPS_W, MOST):
        for row in gl.static_range(TAPS_H):
            acc = sums[first // MOST * TAPS_H + row]
            grads = tiles.index(start + first * BLOCK_H)._reinterpret(
                tiles.dtype, [PIXELS, acc.shape[0]], layout
            )
            pixels = tiles.index(start + TAPS_W * BLOCK_H + row * DILATION_H)._reinterpret(
                tiles.dtype, [PIXELS, BLOCK_C], layout
            )
            acc = warpgroup_mma(grads.permute((1, 0)), pixels, acc, is_async=True)
            found = found + (acc,)
    return found


@gluon.jit
def add_grad(
    acc, ones, tiles, start, BLOCK_H: gl.constexpr, BLOCK_C: gl.constexpr, PIXELS: gl.constexpr
):
    """acc + the sum of grad over a box, by a product with ones, [PIXELS, any], under way."""
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_C, 16, 2)
    grads = tiles.index(start)._reinterpret(tiles.dtype, [PIXELS, acc.shape[0]], layout)
    return warpgroup_mma(grads.permute((1, 0)), ones, acc, is_async=True)


@gluon.jit
def wait(sums, left: gl.constexpr):
    """Until only so many products are under way."""
    found = warpgroup_mma_wait(left, sums)
    if len(sums) == 1:  # it is no tuple
        return (found,)
    else:
        return found


@gluon.jit
def no_sums(TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, BLOCK_C: gl.constexpr):
    """Zeros for each row of taps, [columns of taps x BLOCK_C, BLOCK_C]. So many columns as keep all
    warps busy share a sum; the last may be half as large."""
    WARPS: gl.constexpr = gl.num_warps()
    MOST: gl.constexpr = 16 * WARPS // BLOCK_C
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_C, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS // 2, 2], [16, BLOCK_C // 2, 16])
    sums = ()
    for first in gl.static_range(0, TAPS_W, MOST):
        for _row in gl.static_range(TAPS_H):
            if WARPS > 4 and 2 * (TAPS_W - first) <= MOST:
                sums = sums + (gl.zeros([8 * WARPS, BLOCK_C], gl.float32, half),)
            else:
                sums = sums + (gl.zeros([16 * WARPS, BLOCK_C], gl.float32, whole),)
    return sums


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
def store_bias(
    acc, target, size, column: gl.constexpr, n_start, k_start,
    CHANNELS: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Of the sums of grad, [columns of taps x N, any], those of one column, and zeros in the row of
    ``size`` numbers that follows. One of all tiles of x does it."""
    layout: gl.constexpr = acc.type.layout
    n = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None] - column * BLOCK_C
    k = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))[None, :]
    acc = gl.where(k == 0, acc, 0.0)
    mask = (n >= 0) & (n < BLOCK_C) & (n_start + n < CHANNELS) & (k < 2) & (k_start == 0)
    gl.store(target + k * size + n_start + n, acc, mask=mask)


@gluon.jit(
    do_not_specialize=[
        "rows", "columns", "boxes", "first_column", "padding_h", "padding_w", "splits", "size",
    ]
)  # fmt: skip
def one_pass_kernel(
    x, x_tail, grad, partial,
    rows, columns, boxes, first_column, padding_h, padding_w, splits, size,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """G_t = sum over pixels of grad x^T for a block of TAPS_H x TAPS_W taps t and a tile of BLOCK_C
    channels of each, by matrix products with M = columns of taps x channels of grad, N = channels
    of x, K = pixels.

    A box is of rows of the output and of columns of x, from first_column on. A column of taps sees
    it through the box of grad that lies so many columns aside, a row of taps through the box of x
    so many rows below: in shared memory both are matrices as they stand, which start at multiples
    of what the swizzling repeats after.

    Each split sums its own boxes into two rows of ``partial`` [splits, 2, size], size being that
    of packed and bias: the taps that are stored, and their opposites, transposed."""
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    BLOCKS_W: gl.constexpr = (KERNEL_W + TAPS_W - 1) // TAPS_W
    BLOCKS: gl.constexpr = (KERNEL_H + TAPS_H - 1) // TAPS_H * BLOCKS_W
    C_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    EXTRA: gl.constexpr = (TAPS_H - 1) * DILATION_H
    PIXELS: gl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    MOST: gl.constexpr = 16 * gl.num_warps() // BLOCK_C
    WARPS: gl.constexpr = gl.num_warps()
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W  # column of its block, which sees all of grad
    bias_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    # Columns of taps that fill up a sum read on into x: those are never stored.
    READ: gl.constexpr = (TAPS_W + MOST - 1) // MOST * MOST * BLOCK_H
    ROWS: gl.constexpr = max((TAPS_W + 1) * BLOCK_H + EXTRA, READ)

    pid = gl.program_id(0)
    block = pid % BLOCKS  # of one split all blocks run side by side, on the same pixels
    k_start = pid // BLOCKS % C_BLOCKS * BLOCK_C
    n_start = pid // (BLOCKS * C_BLOCKS) % C_BLOCKS * BLOCK_C
    group = pid // (BLOCKS * C_BLOCKS * C_BLOCKS) % GROUPS
    split = pid // (BLOCKS * C_BLOCKS * C_BLOCKS * GROUPS)
    start = group * CHANNELS
    first_row, first = block // BLOCKS_W * TAPS_H, block % BLOCKS_W * TAPS_W  # of its taps
    down = first_row * DILATION_H - padding_h
    right = padding_w - first * DILATION_W

    layout: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_C, 16, 2)
    tiles = gl.allocate_shared_memory(x.dtype, [STAGES * ROWS, BLOCK_I * BLOCK_W, BLOCK_C], layout)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)

    steps = gl.cdiv(boxes - split, splits)
    for i in gl.static_range(STAGES - 1):
        copy_box(
            x, x_tail, grad, tiles, landed, i, i < steps, split + i * splits,
            rows, columns, first_column, start + k_start, start + n_start, down, right,
            DILATION_W, EXTRA, TAPS_W, ROWS, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    sums = no_sums(TAPS_H, TAPS_W, BLOCK_C)
    if HAS_BIAS:
        flat: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
        one = gl.full([8, PIXELS], 1.0, x.dtype, flat)
        ones = gl.allocate_shared_memory(x.dtype, [8, PIXELS], gl.NVMMASharedLayout(32, 16, 2), one)
        fence_async_shared()
        sums = sums + (gl.zeros([16 * WARPS, 8], gl.float32, bias_layout),)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(landed.index(stage), step // STAGES & 1)
        found = multiply_box(
            sums, tiles, stage * ROWS, DILATION_H, TAPS_H, TAPS_W, BLOCK_H, BLOCK_C, PIXELS
        )
        if HAS_BIAS:
            middle = stage * ROWS + MIDDLE // MOST * MOST * BLOCK_H
            found = found + (
                add_grad(sums[-1], ones.permute((1, 0)), tiles, middle, BLOCK_H, BLOCK_C, PIXELS),
            )
        sums = wait(found, len(found))  # for the box before this one
        ahead = step + STAGES - 1
        copy_box(
            x, x_tail, grad, tiles, landed, ahead % STAGES, ahead < steps, split + ahead * splits,
            rows, columns, first_column, start + k_start, start + n_start, down, right,
            DILATION_W, EXTRA, TAPS_W, ROWS, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    sums = wait(sums, 0)

    target = partial + split.to(gl.int64) * 2 * size
    end = gl.minimum(first + TAPS_W, KERNEL_W)
    taps = target + group * (TAPS // 2 * CHANNELS * CHANNELS)
    for i in gl.static_range((TAPS_W + MOST - 1) // MOST * TAPS_H):
        row = first_row + i % TAPS_H
        if row < KERNEL_H:
            store_taps(
                sums[i], taps, taps + size, row, first + i // TAPS_H * MOST, end, n_start, k_start,
                CHANNELS, SIGN, KERNEL_W, TAPS, BLOCK_C,
            )  # fmt: skip
    if block == KERNEL_H // 2 // TAPS_H * BLOCKS_W + KERNEL_W // 2 // TAPS_W:  # in the middle
        if TAPS % 2 == 1:
            centre = target + GROUPS * (TAPS // 2) * CHANNELS * CHANNELS
            centre += group * triangle_size(CHANNELS, SIGN)
            store_centre(
                sums[MIDDLE // MOST * TAPS_H + KERNEL_H // 2 % TAPS_H], centre, centre + size,
                MIDDLE % MOST, n_start, k_start, CHANNELS, SIGN, BLOCK_C,
            )  # fmt: skip
        if HAS_BIAS:
            target += size - GROUPS * CHANNELS + start
            store_bias(
                sums[-1], target, size, MIDDLE % MOST, n_start, k_start, CHANNELS, BLOCK_C
            )  # fmt: skip
