"""The gradient of the packed vector of float32 images on sm_90 by blocks of taps, in TF32: as
:mod:`.one_pass`, but warps multiply, and what they multiply passes through registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .one_pass import copy_box
from .one_pass_places import has_middle, row_of_split, store_bias, store_sums, work_of_program
from .tiles import round_to_tf32


@gluon.constexpr_function
def operand_layout(BLOCK_C, sharing, is_grad):
    """How 16 pixels for each of the warps that share a step lie in shared memory, where bulk copies
    write rows of 128 bytes, or of 64, swizzled: as an operand of a product, [warps, channels of
    grad, pixels] or [warps, pixels, channels of x].

    Pixels stand in such an order that a warp reads all banks at once; channels of grad so that a
    thread reads two at once, which its product takes."""

    def at(warp, channel, pixel):
        return [warp, channel, pixel] if is_grad else [warp, pixel, channel]

    channels = [8, 1, 2, 4, 16] if is_grad else [1, 2, 4, 8, 16]
    # Of each bit of a pixel the bit of the channel that swizzling exchanges with it.
    if BLOCK_C == 32:
        pixels, swizzled = [4, 1, 2, 8], [*channels[2:], 0]
    else:
        channels = channels[:4]
        pixels, swizzled = [1, 4, 2, 8], [0, *channels[2:], 0]
    bases = [at(0, channel, 0) for channel in channels]
    bases += [at(0, channel, pixel) for channel, pixel in zip(swizzled, pixels, strict=True)]
    bases += [at(2**bit, 0, 0) for bit in range(sharing.bit_length() - 1)]
    return gl.SharedLinearLayout(bases, [], 1024)


@gluon.jit
def in_order(acc):
    """The sum of all warps that share a step, [channels of grad, channels of x], with the channels
    of grad as they are counted."""
    BLOCK_C: gl.constexpr = acc.shape[1]
    acc = gl.sum(acc, 0).reshape([BLOCK_C // 16, 2, 8, BLOCK_C])
    return acc.permute([0, 2, 1, 3]).reshape([BLOCK_C, BLOCK_C])


@gluon.jit
def load_operand(strips, strip, operand: gl.constexpr, BLOCK_C: gl.constexpr):
    """16 pixels for each of the warps that share a step, from a strip on; not rounded yet."""
    WARPS: gl.constexpr = operand.parent.warps_per_cta[0]
    IS_GRAD: gl.constexpr = operand.operand_index == 0
    shape: gl.constexpr = [WARPS, BLOCK_C, 16] if IS_GRAD else [WARPS, 16, BLOCK_C]
    layout: gl.constexpr = operand_layout(BLOCK_C, WARPS, IS_GRAD)
    return strips.index(strip)._reinterpret(gl.float32, shape, layout).load(operand)


@gluon.jit
def add_pixels(grads, WARPS: gl.constexpr, BLOCK_C: gl.constexpr):
    """The sums over those pixels that a thread holds: [WARPS, channels of grad, 4]."""
    return gl.sum(grads.reshape([WARPS, BLOCK_C, 4, 4]), 2)


@gluon.jit
def sum_pixels(acc, BLOCK_C: gl.constexpr):
    """Of what :func:`add_pixels` gave, with the channels of grad as they are counted."""
    acc = gl.sum(gl.sum(acc, 2), 0).reshape([BLOCK_C // 16, 2, 8]).permute([0, 2, 1])
    return acc.reshape([BLOCK_C])


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

    A warp has up to 32 channels of grad and 16 of x. Copies count shared memory in rows of a box,
    and loads in strips of 8 pixels."""
    EXTRA: gl.constexpr = (TAPS_H - 1) * DILATION_H
    MIDDLE: gl.constexpr = KERNEL_W // 2 % TAPS_W  # column of its block, which sees all of grad
    SHARING: gl.constexpr = gl.num_warps() * 16 // BLOCK_C  # warps, of the pixels of a step
    ROWS: gl.constexpr = (TAPS_W + 1) * BLOCK_H + EXTRA
    STRIPS: gl.constexpr = BLOCK_I * BLOCK_W // 8  # of a row
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [2, 0], [SHARING, 1, BLOCK_C // 16], [1, 16, 8]
    )
    first_operand: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 1)
    second_operand: gl.constexpr = gl.DotOperandLayout(1, sums_layout, 1)

    split, group, n_start, k_start, first_row, first = work_of_program(
        CHANNELS, GROUPS, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, BLOCK_C
    )
    start = group * CHANNELS
    down = first_row * DILATION_H - padding_h
    right = padding_w - first * DILATION_W

    layout: gl.constexpr = gl.NVMMASharedLayout(4 * BLOCK_C, 32, 2)
    tiles = gl.allocate_shared_memory(
        gl.float32, [STAGES * ROWS, BLOCK_I * BLOCK_W, BLOCK_C], layout
    )
    strips = tiles._reinterpret(gl.float32, [STAGES * ROWS * STRIPS, 8, BLOCK_C], layout)
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
            DILATION_W, EXTRA, TAPS_W, ROWS, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
        )  # fmt: skip
        stage = step % STAGES
        mbarrier.wait(landed.index(stage), step // STAGES & 1)
        grad_start = stage * ROWS * STRIPS
        x_start = grad_start + TAPS_W * BLOCK_H * STRIPS
        for strip in gl.static_range(0, BLOCK_H * STRIPS, 2 * SHARING):
            images = ()
            for row in gl.static_range(TAPS_H):
                place = x_start + row * DILATION_H * STRIPS + strip
                tile = load_operand(strips, place, second_operand, BLOCK_C)
                images = images + (round_to_tf32(tile),)
            found = ()
            for column in gl.static_range(TAPS_W):
                place = grad_start + column * BLOCK_H * STRIPS + strip
                tile = load_operand(strips, place, first_operand, BLOCK_C)
                if HAS_BIAS and column == MIDDLE:
                    bias += add_pixels(tile, SHARING, BLOCK_C)
                tile = round_to_tf32(tile)
                for row in gl.static_range(TAPS_H):
                    acc = sums[column * TAPS_H + row]
                    acc = mma_v2(tile, images[row], acc, input_precision="tf32")
                    found = found + (acc,)
            sums = found

    target = row_of_split(partial, split, size)
    store_sums(
        sums, target, size, first_row, first, group, n_start, k_start, 1, in_order,
        CHANNELS, GROUPS, SIGN, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W, BLOCK_C,
    )  # fmt: skip
    if HAS_BIAS:
        sees_all = has_middle(first_row, first, KERNEL_H, KERNEL_W, TAPS_H, TAPS_W)
        if sees_all:
            store_bias(
                sum_pixels(bias, BLOCK_C), target, size, group, 0, n_start, k_start,
                CHANNELS, GROUPS, BLOCK_C,
            )  # fmt: skip
