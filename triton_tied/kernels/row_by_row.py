"""The gradient of the packed vector of float32 images on sm_90 by blocks of taps, in TF32, for 64
channels or more: images come row by row, and x is transposed in shared memory."""

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
from .tiles import box_start, round_to_tf32

# A row is of 32 pixels and 64 channels. Bulk copies write it by halves of 32 channels, of which the
# 16-byte pieces change places with the lowest three bits of the pixel. The layouts below say, for
# each bit of a place in shared memory, which bits of the channel and the pixel change with it.


@gluon.constexpr_function
def swizzled(pixel):
    """The bit of a channel that changes places with a bit of a pixel; 0: none."""
    return {1: 4, 2: 8, 4: 16}.get(pixel, 0)


@gluon.constexpr_function
def joined(channel):
    """The bit of a pixel that is counted anew with a bit of a channel; 0: none. Threads that load
    and store at once differ in these bits of the channel, and by this in the banks of both."""
    return {4: 8, 8: 1, 16: 16}.get(channel, 0)


@gluon.constexpr_function
def grad_layout():
    """A row as first operand, [channels, pixels]: of eight pixels those that a thread reads at once
    with its neighbours come first."""
    pixels = {1: 4, 2: 1, 4: 2, 8: 8, 16: 16}
    bases = [[2**bit, 0] for bit in range(5)]
    bases += [[swizzled(pixel), pixels[pixel]] for pixel in (1, 2, 4, 8, 16)]
    return gl.SharedLinearLayout([*bases, [32, 0]], [], 1024)


@gluon.constexpr_function
def x_layout():
    """Half of a row as it was copied, [pixels, channels], joined."""
    bases = [[joined(channel), channel] for channel in (1, 2, 4, 8, 16)]
    for pixel in (1, 2, 4, 8, 16):
        channel = swizzled(pixel)
        bases.append([pixel ^ joined(channel), channel])
    return gl.SharedLinearLayout(bases, [], 1024)


@gluon.constexpr_function
def transposed_layout():
    """The same half of which each channel has its pixels side by side, in the order of
    :func:`grad_layout`, swizzled as wgmma wants it."""
    pixels = [2, 4, 1, 8, 16]
    bases = [[pixel, 0] for pixel in pixels]
    for channel, pixel in zip((1, 2, 4, 8, 16), (*pixels[2:], 0, 0), strict=True):
        bases.append([pixel ^ joined(channel), channel])
    return gl.SharedLinearLayout(bases, [], 1024)


@gluon.constexpr_function
def moving_layout():
    """The registers that it passes through: a thread has four channels of two pixels."""
    registers, lanes = [[0, 1], [0, 2], [2, 0]], [[0, 4], [0, 8], [0, 16], [4, 0], [1, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, 32])


@gluon.jit
def copy_row(
    x, grad, tiles, landed, step, steps, split, splits, rows, columns, first_column,
    x_channel, grad_channel, down, right,
    DILATION_W: gl.constexpr, EXTRA: gl.constexpr, TAPS_W: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
):  # fmt: skip
    """Starts to copy what a step needs: a row of x and, from the row EXTRA of a box on, one of grad
    for each column of taps. What lies beyond the images is zero."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 5)
    shape: gl.constexpr = [1, 2, BLOCK_I, BLOCK_W, 32]
    box, row = split + step // (BLOCK_H + EXTRA) * splits, step % (BLOCK_H + EXTRA)
    image, first_row, column = box_start(box, rows, columns, BLOCK_I, BLOCK_H, BLOCK_W)
    column += first_column
    grad_row = gl.where(row < EXTRA, -1, first_row + row - EXTRA)
    stage, is_wanted = step % STAGES, step < steps
    here = landed.index(stage)
    mbarrier.expect(here, (TAPS_W + 1) * 32 * 64 * 4, pred=is_wanted)
    for tap in gl.static_range(TAPS_W):
        tma.async_copy_global_to_shared(
            grad,
            [grad_row, grad_channel // 32, image, column + right - tap * DILATION_W, 0], here,
            tiles.index((stage * (TAPS_W + 1) + tap) * 2)._reinterpret(gl.float32, shape, layout),
            pred=is_wanted,
        )  # fmt: skip
    tma.async_copy_global_to_shared(
        x, [first_row + row + down, x_channel // 32, image, column, 0], here,
        tiles.index((stage * (TAPS_W + 1) + TAPS_W) * 2)._reinterpret(gl.float32, shape, layout),
        pred=is_wanted,
    )  # fmt: skip


@gluon.jit
def prepare_rows(
    x, grad, tiles, ring, landed, ready, done,
    steps, split, splits, rows, columns, first_column, x_channel, grad_channel, down, right,
    DILATION_W: gl.constexpr, EXTRA: gl.constexpr, TAPS_W: gl.constexpr, STAGES: gl.constexpr,
    RING: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
):  # fmt: skip
    """The work of four warps: rows are copied, and those of x transposed and rounded, one step
    ahead of the products."""
    layout: gl.constexpr = moving_layout()
    for i in gl.static_range(STAGES - 2):
        copy_row(
            x, grad, tiles, landed, i, steps, split, splits, rows, columns, first_column,
            x_channel, grad_channel, down, right,
            DILATION_W, EXTRA, TAPS_W, STAGES, BLOCK_I, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    for step in range(steps):
        mbarrier.wait(done.index(step % 2), (step // 2 - 1) & 1, pred=step > 1)
        fence_async_shared()  # between what was loaded and what is copied there next
        copy_row(
            x, grad, tiles, landed, step + STAGES - 2, steps, split, splits,
            rows, columns, first_column, x_channel, grad_channel, down, right,
            DILATION_W, EXTRA, TAPS_W, STAGES, BLOCK_I, BLOCK_H, BLOCK_W,
        )  # fmt: skip
        stage = step % STAGES
        mbarrier.wait(landed.index(stage), step // STAGES & 1)
        for half in gl.static_range(2):
            tile = tiles.index((stage * (TAPS_W + 1) + TAPS_W) * 2 + half)
            row = tile._reinterpret(gl.float32, [32, 32], x_layout()).load(layout)
            place = ring.index(step % RING * 2 + half)
            place._reinterpret(gl.float32, [32, 32], transposed_layout()).store(round_to_tf32(row))
        fence_async_shared()
        mbarrier.arrive(ready.index(step % 2), count=1)


@gluon.jit
def load_grad(tiles, place, layout: gl.constexpr):
    """A row of grad as it is, [channels, pixels]."""
    return tiles.index(2 * place)._reinterpret(gl.float32, [64, 32], grad_layout()).load(layout)


@gluon.jit
def add_pixels(grads):
    """The sums over those pixels that a thread holds, [channels, 4]."""
    return gl.sum(grads.reshape([64, 8, 4]), 1)


@gluon.jit
def wait(sums, operands):
    """Until no product is under way. The registers of their operands are kept until then."""
    found = warpgroup_mma_wait(0, sums + operands)
    return found[: len(sums)]


@gluon.jit
def sum_rows(
    partial, tiles, ring, landed, ready, done,
    steps, split, size, first_row, first, group, n_start, k_start,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_H: gl.constexpr,
    EXTRA: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_H: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The work of the other warps: the products, and what comes of them."""
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W  # column of its block, which sees all of grad
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 8])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 1)
    transposed: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)

    sums = ()
    for _tap in gl.static_range(TAPS_H * TAPS_W):
        sums = sums + (gl.zeros([64, 64], gl.float32, layout),)
    bias = add_pixels(gl.zeros([64, 32], gl.float32, operand))
    for step in range(steps):
        mbarrier.wait(ready.index(step % 2), step // 2 & 1)
        if step % (BLOCK_H + EXTRA) >= EXTRA:
            stage = step % STAGES
            mbarrier.wait(landed.index(stage), step // STAGES & 1)
            found, grads = (), ()
            for column in gl.static_range(TAPS_W):
                tile = load_grad(tiles, stage * (TAPS_W + 1) + column, operand)
                if HAS_BIAS and column == MIDDLE:
                    bias += add_pixels(tile)
                tile = round_to_tf32(tile)
                grads = grads + (tile,)
                for row in gl.static_range(TAPS_H):
                    place = (step + RING - (TAPS_H - 1 - row) * DILATION_H) % RING
                    pixels = ring.index(2 * place)._reinterpret(gl.float32, [64, 32], transposed)
                    acc = sums[column * TAPS_H + row]
                    acc = warpgroup_mma(tile, pixels.permute((1, 0)), acc, is_async=True)
                    found = found + (acc,)
            sums = wait(found, grads)
        mbarrier.arrive(done.index(step % 2), count=1)

    target = row_of_split(partial, split, size)
    store_sums(
        sums, target, size, first_row, first, group, n_start, k_start, 1, as_it_is,
        CHANNELS, GROUPS, SIGN, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, 64,
    )  # fmt: skip
    if HAS_BIAS:
        sees_all = has_middle(first_row, first, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W)
        if sees_all:
            store_bias(
                gl.sum(bias, 1), target, size, group, 0, n_start, k_start, CHANNELS, GROUPS, 64
            )


@gluon.jit(
    do_not_specialize=[
        "rows", "columns", "boxes", "first_column", "padding_h", "padding_w", "splits", "size",
    ]
)  # fmt: skip
def row_by_row_kernel(
    x, grad, partial,
    rows, columns, boxes, first_column, padding_h, padding_w, splits, size,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """G_t = sum over pixels of grad x^T for a block of TAPS_H x TAPS_W taps t and a tile of 64
    channels of each, by matrix products with M = channels of grad, N = channels of x, K = pixels.

    Boxes, taps, splits and ``partial`` are those of :func:`.one_pass.one_pass_kernel`, but a box is
    gone through row by row. In TF32 wgmma wants pixels side by side: of grad they are in registers,
    x is transposed. The last rows of x stay in a ring, so that each is copied once for a box, and
    is multiplied with as many rows of grad as there are rows of taps.

    Eight warps multiply, four prepare rows for them. Of two mbarriers each, in turn, ``ready`` says
    that a row of x is transposed, ``done`` that the products of a step are."""
    EXTRA: gl.constexpr = (TAPS_H - 1) * DILATION_H
    RING: gl.constexpr = EXTRA + 2  # one is written while others are multiplied
    swizzling: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)

    split, group, n_start, k_start, first_row, first = work_of_program(
        CHANNELS, GROUPS, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, 64
    )
    start = group * CHANNELS
    down = first_row * DILATION_H - padding_h
    right = padding_w - first * DILATION_W

    tiles = gl.allocate_shared_memory(gl.float32, [STAGES * (TAPS_W + 1) * 2, 32, 32], swizzling)
    ring = gl.allocate_shared_memory(gl.float32, [RING * 2, 32, 32], swizzling)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=1)

    steps = gl.cdiv(boxes - split, splits) * (BLOCK_H + EXTRA)
    gl.warp_specialize(
        [
            (sum_rows, (
                partial, tiles, ring, landed, ready, done,
                steps, split, size, first_row, first, group, n_start, k_start,
                CHANNELS, GROUPS, SIGN, KERNEL_H, KERNEL_W, DILATION_H, EXTRA,
                TAPS_H, TAPS_W, HAS_BIAS, BLOCK_H, STAGES, RING,
            )),
            (prepare_rows, (
                x, grad, tiles, ring, landed, ready, done,
                steps, split, splits, rows, columns, first_column,
                start + k_start, start + n_start, down, right,
                DILATION_W, EXTRA, TAPS_W, STAGES, RING, BLOCK_I, BLOCK_H, BLOCK_W,
            )),
        ],
        [4],
        [40],  # registers of a thread
    )  # fmt: skip
