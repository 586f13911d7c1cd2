"""The tied convolution of few channels on sm_90: a pixel is read once for each column of the
kernel, not once for each tap. The weight stays in shared memory, or is streamed through it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tiles import box_start, dense_strides, inside, pixel_offsets, triangle_offsets, widen


@gluon.constexpr_function
def cut(channels, block, bits):
    """Which of a block's channels the products take, as (first, how many) pairs. How many is a
    power of two, and the matrix units take 32 bytes of each row at once: for 40 channels in half
    precision the first 32, and 16 more."""
    unit = 256 // bits
    taken = min(block, (channels + unit - 1) // unit * unit)
    last = taken & -taken
    return [(first, many) for first, many in ((0, taken - last), (taken - last, last)) if many]


@gluon.constexpr_function
def count_products(channels, block, bits):
    """Of one tap."""
    return sum(len(cut(channels - start, block, bits)) for start in range(0, channels, block))


@gluon.jit
def multiply(x, w, acc, ROLES: gl.constexpr, CHANNELS: gl.constexpr):
    """acc + x w^T for x [M, K] and w [N, K] in shared memory, under way. CHANNELS: those from the
    first one of these on. ROLES: as in conv.py."""
    PIECES: gl.constexpr = cut(CHANNELS, x.shape[1], x.dtype.primitive_bitwidth)
    for i in gl.static_range(len(PIECES)):
        x_piece = x.slice(PIECES[i][0], PIECES[i][1], dim=1)
        w_piece = w.slice(PIECES[i][0], PIECES[i][1], dim=1)
        if ROLES == "weights_first":
            acc = warpgroup_mma(w_piece, x_piece.permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(x_piece, w_piece.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def wait(acc, opposite, left: gl.constexpr, TWO_SUMS: gl.constexpr):
    """Until only the last so many products are under way."""
    if TWO_SUMS:
        acc, opposite = warpgroup_mma_wait(left, (acc, opposite))
    else:
        acc = warpgroup_mma_wait(left, (acc,))
    return acc, opposite


@gluon.jit
def store_centre(
    triangles, group, matrix, CHANNELS: gl.constexpr, SIGN: gl.constexpr, BLOCK_C: gl.constexpr
):
    """Writes the centre matrix of a group, from its lower triangle, into shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, BLOCK_C, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))[None, :]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    if SIGN < 0:
        mask = mask & (rows != columns)
    triangles += group * (CHANNELS * (CHANNELS + SIGN) // 2)
    tile = gl.load(triangles + triangle_offsets(rows, columns, SIGN), mask=mask, other=0.0)
    if SIGN < 0:
        tile = gl.where(rows < columns, -tile, tile)
    matrix.store(tile)
    fence_async_shared()


@gluon.jit
def copy_pixels(
    x, x_tail, pixels, full, empty, group, number, column,
    first, step, out_h, out_w, padding_h, padding_w,
    CHANNELS: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_W: gl.constexpr, EXTRA: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Has copied what the taps of a column see of the ``number``-th box of the program: the box,
    shifted, and EXTRA rows below it."""
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    BYTES: gl.constexpr = BLOCK_K * BITS // 8  # of a block of channels, the width of the swizzle
    K_BLOCKS: gl.constexpr = BLOCK_C // BLOCK_K
    ROWS: gl.constexpr = BLOCK_H + EXTRA
    TAIL: gl.constexpr = EXTRA & -EXTRA  # rows of one copy of those below: a power of two
    layout: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 4)

    box = first + number * step
    image, top, left = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    top -= padding_h
    left -= padding_w
    use = number // CONSUMERS * KERNEL_W + column
    stage = number % CONSUMERS * STAGES + use % STAGES
    mbarrier.wait(empty.index(stage), (use // STAGES & 1) ^ 1)
    landed = full.index(stage)
    mbarrier.expect(landed, K_BLOCKS * ROWS * BLOCK_I * BLOCK_W * BYTES)
    for k in gl.static_range(K_BLOCKS):
        start = [top, image, left + column * DILATION_W, group * CHANNELS + k * BLOCK_K]
        rows = pixels.index((stage * K_BLOCKS + k) * ROWS)
        rows = rows._reinterpret(x.dtype, [BLOCK_H, BLOCK_I, BLOCK_W, BLOCK_K], layout)
        tma.async_copy_global_to_shared(x, start, landed, rows)
        if EXTRA > 0:
            for row in gl.static_range(BLOCK_H, ROWS, TAIL):
                below = [top + row, start[1], start[2], start[3]]
                rows = pixels.index((stage * K_BLOCKS + k) * ROWS + row)
                rows = rows._reinterpret(x.dtype, [TAIL, BLOCK_I, BLOCK_W, BLOCK_K], layout)
                tma.async_copy_global_to_shared(x_tail, below, landed, rows)


@gluon.jit
def copy_matrix(
    weights, matrices, landed, matrix, place, copied, BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr
):
    """Has a matrix copied to its place, if ``copied``. Either way it arrives at ``landed``."""
    BITS: gl.constexpr = weights.dtype.primitive_bitwidth
    K_BLOCKS: gl.constexpr = BLOCK_C // BLOCK_K
    layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K * BITS // 8, BITS, 3)
    mbarrier.expect(landed, BLOCK_C * BLOCK_C * BITS // 8, pred=copied)
    mbarrier.arrive(landed, count=1, pred=copied == 0)
    for k in gl.static_range(K_BLOCKS):
        block = matrices.index(place * K_BLOCKS + k)
        block = block._reinterpret(weights.dtype, [1, BLOCK_C, BLOCK_K], layout)
        tma.async_copy_global_to_shared(
            weights, [matrix, 0, k * BLOCK_K], landed, block, pred=copied
        )  # fmt: skip


@gluon.jit
def stream_column(
    weights, matrices, full, empty, group, use, column,
    STORED: gl.constexpr, HELD: gl.constexpr, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr, RING: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Has the matrices of a column of taps copied, those of PART rows at once, into the two stages
    that come after the RING of those for pixels. All but a centre that is not STORED."""
    PARTS: gl.constexpr = (KERNEL_H + PART - 1) // PART
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    for part in range(PARTS):
        turn = use * PARTS + part
        stage = turn % 2
        mbarrier.wait(empty.index(RING + stage), (turn // 2 & 1) ^ 1)
        for i in gl.static_range(PART):
            row = part * PART + i
            tap = row * KERNEL_W + column
            copied = row < KERNEL_H
            if STORED < HELD:
                copied = copied & (tap != STORED)
            matrix = group * STORED + gl.where(tap < HELD, tap, TAPS - 1 - tap)
            landed = full.index(RING + stage)
            copy_matrix(
                weights, matrices, landed, matrix, stage * PART + i, copied, BLOCK_C, BLOCK_K
            )


@gluon.jit
def copy_ahead(
    x, weights, x_tail, pixels, matrices, full, empty, ready,
    group, first, step, boxes, out_h, out_w, padding_h, padding_w,
    CHANNELS: gl.constexpr, STORED: gl.constexpr, HELD: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_W: gl.constexpr, EXTRA: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """The work of one warp. It has the stored matrices copied, and then of box after box what the
    taps of each column see. Where the weight is streamed it goes from column to column for a box of
    every consumer, and has its matrices copied too."""
    IS_STREAMED: gl.constexpr = PART > 0
    TOGETHER: gl.constexpr = CONSUMERS if IS_STREAMED else 1
    if IS_STREAMED:
        mbarrier.arrive(ready, count=1)
    else:
        for tap in range(STORED):
            copy_matrix(weights, matrices, ready, group * STORED + tap, tap, True, BLOCK_C, BLOCK_K)
    for turn in range(gl.cdiv(boxes - first, step * TOGETHER)):
        for column in range(KERNEL_W):
            for i in gl.static_range(TOGETHER):
                copy_pixels(
                    x, x_tail, pixels, full, empty, group, turn * TOGETHER + i, column,
                    first, step, out_h, out_w, padding_h, padding_w,
                    CHANNELS, KERNEL_W, DILATION_W, EXTRA,
                    BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, CONSUMERS,
                )  # fmt: skip
            if IS_STREAMED:
                stream_column(
                    weights, matrices, full, empty, group, turn * KERNEL_W + column, column,
                    STORED, HELD, KERNEL_H, KERNEL_W, BLOCK_C, BLOCK_K, STAGES * CONSUMERS, PART,
                )  # fmt: skip


@gluon.jit
def add_columns(
    acc, opposite, number, which: gl.constexpr, start: gl.constexpr, stop: gl.constexpr,
    pixels, matrices, full, empty,
    CHANNELS: gl.constexpr, HELD: gl.constexpr, STORED: gl.constexpr, TWO_SUMS: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_H: gl.constexpr,
    ROLES: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    K_BLOCKS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Adds the products of columns start to stop - 1 of the kernel, whose taps in a row are all
    held, or none of them. The last ones are still under way."""
    BITS: gl.constexpr = pixels.dtype.primitive_bitwidth
    BLOCK_K: gl.constexpr = pixels.shape[2]
    IS_STREAMED: gl.constexpr = PART > 0
    AT_ONCE: gl.constexpr = PART if IS_STREAMED else KERNEL_H  # rows of taps, between waits
    PARTS: gl.constexpr = (KERNEL_H + AT_ONCE - 1) // AT_ONCE
    PRODUCTS: gl.constexpr = count_products(CHANNELS, BLOCK_K, BITS)
    layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K * BITS // 8, BITS, 2)
    for column in range(start, stop):
        use = number * KERNEL_W + column
        stage = which * STAGES + use % STAGES
        mbarrier.wait(full.index(stage), use // STAGES & 1)
        for part in gl.static_range(PARTS):
            turn = use * PARTS + part
            if IS_STREAMED:
                mbarrier.wait(full.index(RING + turn % 2), turn // 2 & 1)
            for row in gl.static_range(part * AT_ONCE, min((part + 1) * AT_ONCE, KERNEL_H)):
                tap = row * KERNEL_W + column
                if IS_STREAMED:
                    matrix = (turn % 2 - part) * PART + row
                    if STORED < HELD and row == KERNEL_H // 2 and row * KERNEL_W + start < HELD:
                        matrix = gl.where(tap == STORED, 2 * PART, matrix)
                elif row * KERNEL_W + start < HELD:
                    matrix = tap
                else:
                    matrix = KERNEL_H * KERNEL_W - 1 - tap
                for k in gl.static_range((CHANNELS + BLOCK_K - 1) // BLOCK_K):
                    x = pixels.index((stage * K_BLOCKS + k) * ROWS + row * DILATION_H)
                    x = x._reinterpret(pixels.dtype, [BLOCK_M, BLOCK_K], layout)
                    if row * KERNEL_W + start < HELD:
                        w = matrices.index(matrix * K_BLOCKS + k)
                        acc = multiply(x, w, acc, ROLES, CHANNELS - k * BLOCK_K)
                    else:  # K_BLOCKS is 1
                        w = matrices.index(matrix).permute((1, 0))
                        if TWO_SUMS:
                            opposite = multiply(x, w, opposite, ROLES, CHANNELS)
                        else:
                            acc = multiply(x, w, acc, ROLES, CHANNELS)
            acc, opposite = wait(
                acc, opposite, min(AT_ONCE, KERNEL_H - part * AT_ONCE) * PRODUCTS, TWO_SUMS
            )
            if part == 0:
                before = which * STAGES + (use + STAGES - 1) % STAGES
                mbarrier.arrive(empty.index(before), count=1, pred=column > 0)
            if IS_STREAMED:
                left = RING + (turn + 1) % 2
                mbarrier.arrive(empty.index(left), count=1, pred=column + part > 0)
    return acc, opposite


@gluon.jit
def sum_taps(
    number, which: gl.constexpr, pixels, matrices, full, empty,
    CHANNELS: gl.constexpr, SIGN: gl.constexpr, HELD: gl.constexpr, STORED: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_H: gl.constexpr,
    ROLES: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, RING: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The sum over all taps of the ``number``-th box of a warpgroup: [M, N], or as ROLES has it."""
    TWO_SUMS: gl.constexpr = SIGN < 0 and HELD < KERNEL_H * KERNEL_W
    K_BLOCKS: gl.constexpr = BLOCK_C // BLOCK_K
    BITS: gl.constexpr = pixels.dtype.primitive_bitwidth
    M: gl.constexpr = BLOCK_C if ROLES == "weights_first" else BLOCK_M
    N: gl.constexpr = BLOCK_M if ROLES == "weights_first" else BLOCK_C
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 256 // BITS])
    # From here on the taps of a row in the middle are opposite ones.
    MIDDLE: gl.constexpr = HELD - KERNEL_H // 2 * KERNEL_W if KERNEL_H % 2 == 1 else KERNEL_W

    acc = gl.zeros([M, N], gl.float32, sums)
    opposite = gl.zeros([M, N], gl.float32, sums)  # the sum that is subtracted
    acc, opposite = add_columns(
        acc, opposite, number, which, 0, min(MIDDLE, KERNEL_W), pixels, matrices, full, empty,
        CHANNELS, HELD, STORED, TWO_SUMS, KERNEL_H, KERNEL_W, DILATION_H,
        ROLES, BLOCK_M, ROWS, K_BLOCKS, STAGES, RING, PART,
    )  # fmt: skip
    if MIDDLE < KERNEL_W:
        acc, opposite = add_columns(
            acc, opposite, number, which, MIDDLE, KERNEL_W, pixels, matrices, full, empty,
            CHANNELS, HELD, STORED, TWO_SUMS, KERNEL_H, KERNEL_W, DILATION_H,
            ROLES, BLOCK_M, ROWS, K_BLOCKS, STAGES, RING, PART,
        )  # fmt: skip
    acc, opposite = wait(acc, opposite, 0, TWO_SUMS)
    use = number * KERNEL_W + KERNEL_W - 1
    mbarrier.arrive(empty.index(which * STAGES + use % STAGES), count=1)
    if PART > 0:
        turns = (use + 1) * ((KERNEL_H + PART - 1) // PART)
        mbarrier.arrive(empty.index(RING + (turns - 1) % 2), count=1)
    if TWO_SUMS:
        acc -= opposite
    return acc


@gluon.jit
def convolve_boxes(
    which: gl.constexpr, triangles, bias, residual, y, pixels, matrices, full, empty, ready,
    group, first, step, boxes, n, out_h, out_w, bias_channels, alpha, beta,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr, STORED: gl.constexpr,
    HELD: gl.constexpr, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, DILATION_H: gl.constexpr,
    EXTRA: gl.constexpr, ROLES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """The work of a warpgroup: every CONSUMERS-th box of the program. Where the weight is streamed,
    as many boxes as the others: there may be none left for the last turn."""
    dtype: gl.constexpr = y.dtype.element_ty
    BLOCK_M: gl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    VECTOR: gl.constexpr = 128 // dtype.primitive_bitwidth
    ACROSS: gl.constexpr = BLOCK_C // VECTOR
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    stride_n, stride_h, stride_w = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)

    if which == 0 and STORED < HELD:
        triangles += GROUPS * (KERNEL_H * KERNEL_W // 2) * CHANNELS * CHANNELS
        centre: gl.constexpr = STORED if PART == 0 else 2 * PART
        store_centre(triangles, group, matrices.index(centre), CHANNELS, SIGN, BLOCK_C)
        mbarrier.arrive(ready, count=1)
    if which < CONSUMERS:
        mbarrier.wait(ready, 0)
        start = first + which * step
        step *= CONSUMERS
        for number in range(gl.cdiv(boxes - (start if PART == 0 else first), step)):
            box = start + number * step
            acc = sum_taps(
                number, which, pixels, matrices, full, empty,
                CHANNELS, SIGN, HELD, STORED, KERNEL_H, KERNEL_W, DILATION_H, ROLES,
                BLOCK_M, BLOCK_H + EXTRA, BLOCK_C, BLOCK_K, STAGES, STAGES * CONSUMERS, PART,
            )  # fmt: skip
            if ROLES == "weights_first":
                acc = acc.permute((1, 0))
            acc = gl.convert_layout(acc, layout)  # [M, N]
            image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
            offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            images = image + offs_m // BLOCK_W % BLOCK_I
            rows = row + offs_m // (BLOCK_I * BLOCK_W)
            columns = column + offs_m % BLOCK_W
            channels = gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))
            mask = inside(images, rows, columns, n, out_h, out_w)[:, None]
            mask = mask & (channels < CHANNELS)[None, :]
            has_bias = channels < gl.minimum(bias_channels, CHANNELS)
            channels += group * CHANNELS
            acc += gl.load(bias + channels, mask=has_bias, other=0.0).to(gl.float32)[None, :]
            acc *= alpha
            offsets = pixel_offsets(images, rows, columns, stride_n, stride_h, stride_w, WIDE)
            offsets = offsets[:, None] + widen(channels, WIDE)[None, :]
            if beta != 0.0:
                acc += beta * gl.load(residual + offsets, mask=mask, other=0.0).to(gl.float32)
            gl.store(y + offsets, acc.to(dtype), mask=mask)


@gluon.jit(
    do_not_specialize=["n", "out_h", "out_w", "padding_h", "padding_w", "bias_channels"]
)  # fmt: skip
def halo_kernel(
    x, weights, x_tail, triangles, bias, residual, y,
    n, out_h, out_w, padding_h, padding_w, bias_channels, alpha, beta,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr, STORED: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    ROLES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, STREAMED: gl.constexpr,
):  # fmt: skip
    """What conv_kernel computes, for CHANNELS of a group up to BLOCK_C.

    A program holds the matrices of its group, and goes from box to box. One warp has pixels copied
    into rings of stages, and CONSUMERS warpgroups multiply, every one with a ring of its own. A
    stage holds pixels for the taps of one column of the kernel: rows outermost, then images, then
    columns. So the operand of each tap starts a whole number of rows further, which is one of
    swizzle patterns, since BLOCK_I * BLOCK_W is a multiple of 8.

    Where STREAMED is not 0 it holds no matrix but a centre that comes from its triangle. For a box
    of each consumer it has the matrices of each column copied, of so many rows at once, into two
    stages that all consumers read. For a tap whose opposite is stored that one is copied.

    x, x_tail: descriptors of (H, N, W, C), of BLOCK_H rows and of the rows below: the largest power
    of two that divides their number. weights: of the STORED matrices. The centre is one of those,
    or comes from triangles. The others are in conv_kernel."""
    dtype: gl.constexpr = x.dtype
    BITS: gl.constexpr = dtype.primitive_bitwidth
    BLOCK_K: gl.constexpr = min(BLOCK_C, 1024 // BITS)  # what a swizzle can span
    K_BLOCKS: gl.constexpr = BLOCK_C // BLOCK_K
    EXTRA: gl.constexpr = (KERNEL_H - 1) * DILATION_H
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    HELD: gl.constexpr = TAPS if STORED == TAPS else (TAPS + 1) // 2
    RING: gl.constexpr = STAGES * CONSUMERS
    PART: gl.constexpr = min(STREAMED, KERNEL_H)
    IS_STREAMED: gl.constexpr = STREAMED > 0
    STREAMS: gl.constexpr = 2 if IS_STREAMED else 0  # stages of matrices
    PLACES: gl.constexpr = 2 * PART + (HELD - STORED) if IS_STREAMED else HELD
    layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K * BITS // 8, BITS, 2)
    gl.static_assert(STAGES > 1 or KERNEL_W == 1)  # the last stage is left once the next is used

    rows: gl.constexpr = RING * K_BLOCKS * (BLOCK_H + EXTRA)
    pixels = gl.allocate_shared_memory(dtype, [rows, BLOCK_I * BLOCK_W, BLOCK_K], layout)
    matrices = gl.allocate_shared_memory(dtype, [PLACES * K_BLOCKS, BLOCK_C, BLOCK_K], layout)
    full = gl.allocate_shared_memory(gl.int64, [RING + STREAMS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING + STREAMS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(RING, RING + STREAMS):
        mbarrier.init(full.index(i), count=PART)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    mbarrier.init(ready, count=(1 if IS_STREAMED else STORED) + (HELD - STORED))

    boxes = gl.cdiv(n, BLOCK_I) * gl.cdiv(out_h, BLOCK_H) * gl.cdiv(out_w, BLOCK_W)
    group = gl.program_id(0) % GROUPS
    first, step = gl.program_id(0) // GROUPS, gl.num_programs(0) // GROUPS
    gl.warp_specialize(
        [
            (convolve_boxes, (
                0, triangles, bias, residual, y, pixels, matrices, full, empty, ready,
                group, first, step, boxes, n, out_h, out_w, bias_channels, alpha, beta,
                CHANNELS, GROUPS, SIGN, STORED, HELD, KERNEL_H, KERNEL_W, DILATION_H, EXTRA,
                ROLES, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, CONSUMERS, PART,
            )),
            (convolve_boxes, (
                1, triangles, bias, residual, y, pixels, matrices, full, empty, ready,
                group, first, step, boxes, n, out_h, out_w, bias_channels, alpha, beta,
                CHANNELS, GROUPS, SIGN, STORED, HELD, KERNEL_H, KERNEL_W, DILATION_H, EXTRA,
                ROLES, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, CONSUMERS, PART,
            )),
            (copy_ahead, (
                x, weights, x_tail, pixels, matrices, full, empty, ready,
                group, first, step, boxes, out_h, out_w, padding_h, padding_w,
                CHANNELS, STORED, HELD, KERNEL_H, KERNEL_W, DILATION_W, EXTRA,
                BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, CONSUMERS, PART,
            )),
        ],
        [4, 1],
        [232, 40],  # registers of a thread
    )  # fmt: skip
