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

from .one_pass_places import (
    as_it_is,
    has_middle,
    row_of_split,
    store_bias,
    store_sums,
    work_of_program,
)
from .tiles import box_start


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
def first_of_rows(acc):
    """Of the sums of :func:`add_grad`, of which all columns are the same, one."""
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))[None, :]
    return gl.sum(gl.where(column == 0, acc, 0.0), 1)


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
    EXTRA: gl.constexpr = (TAPS_H - 1) * DILATION_H
    PIXELS: gl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    MOST: gl.constexpr = 16 * gl.num_warps() // BLOCK_C
    WARPS: gl.constexpr = gl.num_warps()
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W  # column of its block, which sees all of grad
    bias_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    # Columns of taps that fill up a sum read on into x: those are never stored.
    READ: gl.constexpr = (TAPS_W + MOST - 1) // MOST * MOST * BLOCK_H
    ROWS: gl.constexpr = max((TAPS_W + 1) * BLOCK_H + EXTRA, READ)

    split, group, n_start, k_start, first_row, first = work_of_program(
        CHANNELS, GROUPS, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, BLOCK_C
    )
    start = group * CHANNELS
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

    target = row_of_split(partial, split, size)
    store_sums(
        sums, target, size, first_row, first, group, n_start, k_start, MOST, as_it_is,
        CHANNELS, GROUPS, SIGN, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, BLOCK_C,
    )  # fmt: skip
    if HAS_BIAS:
        sees_all = has_middle(first_row, first, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W)
        if sees_all:
            store_bias(
                first_of_rows(sums[-1]), target, size, group, MIDDLE % MOST, n_start, k_start,
                CHANNELS, GROUPS, BLOCK_C,
            )  # fmt: skip
