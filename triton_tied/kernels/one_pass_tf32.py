"""The gradient of the packed vector of float32 images on sm_90 by blocks of taps, in TF32: as
:mod:`.one_pass`, but warps multiply, and what they multiply passes through registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .one_pass import store_centre, store_taps
from .tiles import box_start, round_to_tf32, triangle_size


@gluon.constexpr_function
def warps_of(BLOCK_C, num_warps):
    """That share the pixels of a step, the channels of grad and those of x. A warp has up to 32 of
    grad and 16 of x."""
    of_grad, of_x = max(1, BLOCK_C // 32), BLOCK_C // 16
    return [num_warps // (of_grad * of_x), of_grad, of_x]


@gluon.constexpr_function
def operand_layout(BLOCK_C, sharing, is_grad):
    """How 16 pixels for each of the warps that share a step lie in shared memory, where bulk copies
    write rows of 128 bytes, or of 64, swizzled: as an operand of a product, [warps, channels of
    grad, pixels] or [warps, pixels, channels of x].

    Pixels stand in such an order that a warp reads all banks at once; channels of grad so that a
    thread reads two at once, which its product takes."""

    def at(warp, channel, pixel):
        return [warp, channel, pixel] if is_grad else [warp, pixel, channel]

    bits = BLOCK_C.bit_length() - 1
    channels = [2**bit for bit in range(bits)]
    if is_grad:
        channels[:4] = [8, 1, 2, 4]
    together = min(5, bits)  # bits of a channel in one row
    # Of each bit of a pixel the bit of the channel that swizzling exchanges with it.
    if together == 5:
        pixels, swizzled = [4, 1, 2, 8], [*channels[2:5], 0]
    else:
        pixels, swizzled = [1, 4, 2, 8], [0, *channels[2:4], 0]
    bases = [at(0, channel, 0) for channel in channels[:together]]
    bases += [at(0, channel, pixel) for channel, pixel in zip(swizzled, pixels, strict=True)]
    bases += [at(0, channel, 0) for channel in channels[together:]]
    bases += [at(2**bit, 0, 0) for bit in range(sharing.bit_length() - 1)]
    return gl.SharedLinearLayout(bases, [], 1024)


@gluon.jit
def in_order(acc, BLOCK_C: gl.constexpr):
    """The sum of all warps that share a step, [channels of grad, channels of x], with the channels
    of grad as they are counted."""
    acc = gl.sum(acc, 0).reshape([BLOCK_C // 16, 2, 8, BLOCK_C])
    return acc.permute([0, 2, 1, 3]).reshape([BLOCK_C, BLOCK_C])


@gluon.jit
def copy_box(
    x, x_tail, grad, tiles, landed, stage, is_wanted, box, rows, columns, first_column,
    x_channel, grad_channel, down, right,
    DILATION_W: gl.constexpr, EXTRA: gl.constexpr, TAPS_W: gl.constexpr, STRIPS: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Starts to copy a box of x into a stage, with EXTRA rows below it, and before it what each
    column of taps multiplies it with: boxes of grad. What lies beyond the images is zero."""
    DEPTH: gl.constexpr = min(BLOCK_C, 32)  # channels of a row of shared memory
    HALVES: gl.constexpr = BLOCK_C // DEPTH
    ROW: gl.constexpr = BLOCK_I * BLOCK_W // 8 * HALVES  # strips of a row of the box
    TAIL: gl.constexpr = EXTRA & -EXTRA  # rows of a copy: a power of two
    layout: gl.constexpr = gl.NVMMASharedLayout(4 * DEPTH, 32, 5)
    shape: gl.constexpr = [BLOCK_H, HALVES, BLOCK_I, BLOCK_W, DEPTH]
    image, row, column = box_start(box, rows, columns, BLOCK_I, BLOCK_H, BLOCK_W)
    column += first_column
    x_half, grad_half = 0, 0
    if HALVES > 1:
        x_half, grad_half = x_channel // DEPTH, grad_channel // DEPTH
        x_channel, grad_channel = 0, 0
    here = landed.index(stage)
    mbarrier.expect(here, STRIPS * 8 * DEPTH * 4, pred=is_wanted)
    start = stage * STRIPS
    for tap in gl.static_range(TAPS_W):
        tma.async_copy_global_to_shared(
            grad, [row, grad_half, image, column + right - tap * DILATION_W, grad_channel], here,
            tiles.index(start + tap * BLOCK_H * ROW)._reinterpret(gl.float32, shape, layout),
            pred=is_wanted,
        )  # fmt: skip
    start += TAPS_W * BLOCK_H * ROW
    tma.async_copy_global_to_shared(
        x, [row + down, x_half, image, column, x_channel], here,
        tiles.index(start)._reinterpret(gl.float32, shape, layout), pred=is_wanted,
    )  # fmt: skip
    if EXTRA > 0:
        for below in gl.static_range(BLOCK_H, BLOCK_H + EXTRA, TAIL):
            tma.async_copy_global_to_shared(
                x_tail, [row + down + below, x_half, image, column, x_channel], here,
                tiles.index(start + below * ROW)._reinterpret(
                    gl.float32, [TAIL, HALVES, BLOCK_I, BLOCK_W, DEPTH], layout
                ),
                pred=is_wanted,
            )  # fmt: skip


@gluon.jit
def load_operand(tiles, strip, operand: gl.constexpr, BLOCK_C: gl.constexpr):
    """16 pixels for each of the warps that share a step, from a strip on; not rounded yet."""
    WARPS: gl.constexpr = operand.parent.warps_per_cta[0]
    IS_GRAD: gl.constexpr = operand.operand_index == 0
    shape: gl.constexpr = [WARPS, BLOCK_C, 16] if IS_GRAD else [WARPS, 16, BLOCK_C]
    layout: gl.constexpr = operand_layout(BLOCK_C, WARPS, IS_GRAD)
    return tiles.index(strip)._reinterpret(gl.float32, shape, layout).load(operand)


@gluon.jit
def add_pixels(grads, WARPS: gl.constexpr, BLOCK_C: gl.constexpr):
    """The sums over those pixels that a thread holds: [WARPS, channels of grad, 4]."""
    return gl.sum(grads.reshape([WARPS, BLOCK_C, 4, 4]), 2)


@gluon.jit
def store_bias(
    acc, target, size, n_start, is_wanted, CHANNELS: gl.constexpr, BLOCK_C: gl.constexpr
):
    """The sums of grad, and zeros in the row of ``size`` numbers that follows."""
    acc = gl.sum(gl.sum(acc, 2), 0).reshape([BLOCK_C // 16, 2, 8]).permute([0, 2, 1])
    acc = acc.reshape([BLOCK_C])
    n = n_start + gl.arange(0, BLOCK_C, acc.type.layout)
    mask = (n < CHANNELS) & is_wanted
    gl.store(target + n, acc, mask=mask)
    gl.store(target + size + n, gl.zeros_like(acc), mask=mask)


@gluon.jit(
    do_not_specialize=[
        "rows", "columns", "boxes", "first_column", "padding_h", "padding_w", "splits", "size",
    ]
)  # fmt: skip
def one_pass_tf32_kernel(
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
    channels of each, by matrix products with M = channels of grad, N = channels of x, K = pixels.

    Boxes, taps, splits and ``partial`` are those of :func:`.one_pass.one_pass_kernel`. Of 16 pixels
    for each of the warps that share a step a warp loads each row's x once and each column's grad
    once, and multiplies all with all. Both are rounded; the bias adds grad as it is.

    Shared memory is counted in strips of 8 pixels of at most 32 channels. Where there are two
    halves of 64 channels, those of a row of the box follow each other."""
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    BLOCKS_W: gl.constexpr = (KERNEL_W + TAPS_W - 1) // TAPS_W
    BLOCKS: gl.constexpr = (KERNEL_H + TAPS_H - 1) // TAPS_H * BLOCKS_W
    C_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    EXTRA: gl.constexpr = (TAPS_H - 1) * DILATION_H
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W  # column of its block, which sees all of grad
    WARPS: gl.constexpr = warps_of(BLOCK_C, gl.num_warps())
    SHARING: gl.constexpr = WARPS[0]
    DEPTH: gl.constexpr = min(BLOCK_C, 32)
    ROW: gl.constexpr = BLOCK_I * BLOCK_W // 8 * (BLOCK_C // DEPTH)
    STRIPS: gl.constexpr = ((TAPS_W + 1) * BLOCK_H + EXTRA) * ROW
    SLICE: gl.constexpr = 2 * SHARING * (BLOCK_C // DEPTH)  # strips that are multiplied at once
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], WARPS, [1, 16, 8])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 1)
    second_operand: gl.constexpr = gl.DotOperandLayout(1, sums_layout, 1)

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

    layout: gl.constexpr = gl.NVMMASharedLayout(4 * DEPTH, 32, 2)
    tiles = gl.allocate_shared_memory(gl.float32, [STAGES * STRIPS, 8, DEPTH], layout)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)

    steps = gl.cdiv(boxes - split, splits)
    for i in gl.static_range(STAGES - 1):
        copy_box(
            x, x_tail, grad, tiles, landed, i, i < steps, split + i * splits,
            rows, columns, first_column, start + k_start, start + n_start, down, right,
            DILATION_W, EXTRA, TAPS_W, STRIPS, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    sums = ()
    for _tap in gl.static_range(TAPS_H * TAPS_W):
        sums = sums + (gl.zeros([SHARING, BLOCK_C, BLOCK_C], gl.float32, sums_layout),)
    bias = add_pixels(gl.zeros([SHARING, BLOCK_C, 16], gl.float32, first_operand), SHARING, BLOCK_C)
    for step in range(steps):
        ahead = step + STAGES - 1
        fence_async_shared()  # between what was loaded and what is copied there next
        copy_box(
            x, x_tail, grad, tiles, landed, ahead % STAGES, ahead < steps, split + ahead * splits,
            rows, columns, first_column, start + k_start, start + n_start, down, right,
            DILATION_W, EXTRA, TAPS_W, STRIPS, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
        )  # fmt: skip
        stage = step % STAGES
        mbarrier.wait(landed.index(stage), step // STAGES & 1)
        for strip in gl.static_range(0, BLOCK_H * ROW, SLICE):
            images = ()
            for row in gl.static_range(TAPS_H):
                place = stage * STRIPS + (TAPS_W * BLOCK_H + row * DILATION_H) * ROW + strip
                tile = load_operand(tiles, place, second_operand, BLOCK_C)
                images = images + (round_to_tf32(tile),)
            found = ()
            for column in gl.static_range(TAPS_W):
                place = stage * STRIPS + column * BLOCK_H * ROW + strip
                tile = load_operand(tiles, place, first_operand, BLOCK_C)
                if HAS_BIAS and column == MIDDLE:
                    bias += add_pixels(tile, SHARING, BLOCK_C)
                tile = round_to_tf32(tile)
                for row in gl.static_range(TAPS_H):
                    acc = sums[column * TAPS_H + row]
                    acc = mma_v2(tile, images[row], acc, input_precision="tf32")
                    found = found + (acc,)
            sums = found

    target = partial + split.to(gl.int64) * 2 * size
    taps = target + group * (TAPS // 2 * CHANNELS * CHANNELS)
    for i in gl.static_range(TAPS_H * TAPS_W):
        row, column = first_row + i % TAPS_H, first + i // TAPS_H
        if (row < KERNEL_H) & (column < KERNEL_W):
            store_taps(
                in_order(sums[i], BLOCK_C), taps, taps + size, row, column, column + 1,
                n_start, k_start, CHANNELS, SIGN, KERNEL_W, TAPS, BLOCK_C,
            )  # fmt: skip
    if block == KERNEL_H // 2 // TAPS_H * BLOCKS_W + KERNEL_W // 2 // TAPS_W:  # in the middle
        if TAPS % 2 == 1:
            centre = target + GROUPS * (TAPS // 2) * CHANNELS * CHANNELS
            centre += group * triangle_size(CHANNELS, SIGN)
            store_centre(
                in_order(sums[MIDDLE * TAPS_H + KERNEL_H // 2 % TAPS_H], BLOCK_C),
                centre, centre + size, 0, n_start, k_start, CHANNELS, SIGN, BLOCK_C,
            )  # fmt: skip
        if HAS_BIAS:
            target += size - GROUPS * CHANNELS + start
            store_bias(bias, target, size, n_start, k_start == 0, CHANNELS, BLOCK_C)
