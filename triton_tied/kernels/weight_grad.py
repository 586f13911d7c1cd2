"""The gradients of the packed vector and of the bias: no dense one is ever made."""

import triton
import triton.language as tl

from .tiles import (
    box_pixels,
    box_start,
    dense_strides,
    finished,
    inside,
    load_pixels,
    round_to_tf32,
    triangle_row,
    triangle_size,
)


@triton.jit
def load_grad(
    grad, box, channel, channel_end, n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
    LOADER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a box of the output, [M, C]; see load_pixels."""
    image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    return load_pixels(
        grad, image, row, column, channel, channel_end, None,
        n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
        LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
    )  # fmt: skip


@triton.jit
def load_tap(
    x, box, down, right, channel, channel_end, n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    LOADER: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a tap, so far down and right, reads for a box of the output: [M, C], where MASKED zero
    beyond the output."""
    image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    keep = None
    if MASKED:
        images, rows, columns = box_pixels(image, row, column, BLOCK_I, BLOCK_H, BLOCK_W)
        keep = inside(images, rows, columns, n, out_h, out_w)
    return load_pixels(
        x, image, row + down, column + right, channel, channel_end, keep,
        n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
        LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_C,
    )  # fmt: skip


@triton.jit
def multiply_pixels(first, second, acc, INPUT_PRECISION: tl.constexpr, ROUNDS: tl.constexpr):
    """acc + first^T second, a sum over pixels, for first [M, N] and second [M, K]. ROUNDS: first,
    to TF32; that is enough, see docs/kernels.md."""
    if ROUNDS:
        first = round_to_tf32(first)
    return tl.dot(tl.trans(first), second, acc, input_precision=INPUT_PRECISION)


@triton.jit
def store_triangle(
    tile, target, row, column, CHANNELS: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a tile [N, K] of a matrix the lower triangle, its diagonal halved. By 32 columns at once:
    its rows start at odd places, and the addresses of all would not fit into the registers."""
    if BLOCK_K > 32:
        halves = tl.permute(tl.reshape(tile, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1))
        one, other = tl.split(halves)
        middle = column + BLOCK_K // 2
        store_triangle(one, target, row, column, CHANNELS, SIGN, BLOCK_N, BLOCK_K // 2)
        store_triangle(other, target, row, middle, CHANNELS, SIGN, BLOCK_N, BLOCK_K // 2)
    else:
        rows = (row + tl.arange(0, BLOCK_N))[:, None]
        columns = (column + tl.arange(0, BLOCK_K))[None, :]
        mask = (rows < CHANNELS) & ((rows > columns) | ((rows == columns) & (SIGN > 0)))
        tile = tl.where(rows == columns, tile * 0.5, tile).to(target.dtype.element_ty)
        tl.store(target + triangle_row(rows, SIGN) + columns, tile, mask=mask)


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "out_h", "out_w", "stride_partial",
        "padding_h", "padding_w", "splits", "bias_channels",
    ]
)  # fmt: skip
def weight_grad_kernel(
    x, opposite_x, grad, opposite_grad, partial,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_gn, stride_gc, stride_gh, stride_gw, stride_partial,
    padding_h, padding_w, splits, bias_channels, alpha,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    LOADER: tl.constexpr, MASKED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    ROUNDS: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dP_t = G_t + s G_opposite^T for G_t = sum over pixels m of grad[m] x[m + t]^T, by matrix
    products with M = channels of grad, N = channels of x, K = pixels. The centre is a pair with
    itself, its diagonal halved and its upper triangle left away. Each split sums its own boxes of
    pixels into row ``split`` of ``partial`` [splits, packed and bias].

    A tile is first or second operand of all its products. Were it first in one and second in the
    other, it would pass through registers and stay in shared memory, and Triton would copy the
    next tile into what wgmma still reads.

    x, grad: for tiles of BLOCK_K and BLOCK_N channels; opposite_x, opposite_grad: the same images
    for tiles of BLOCK_N and BLOCK_K, None where x and grad do. bias_channels: 0 where no gradient
    of a bias is wanted.
    CHANNELS: of one group. LOADER: see load_pixels. MASKED: boxes reach beyond the output.
    DENSE: x and grad are (N, H, W, C) without gaps. WIDE: offsets take 64 bits."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PAIRS: tl.constexpr = TAPS // 2
    MATRICES: tl.constexpr = (TAPS + 1) // 2
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = MATRICES * K_BLOCKS * N_BLOCKS * GROUPS
    ONE_TILE: tl.constexpr = N_BLOCKS == 1 and BLOCK_N == BLOCK_K
    # On sm_90 the first operand of a box with several sides passes through registers.
    IN_REGISTERS: tl.constexpr = LOADER != "pointer" and (BLOCK_I * BLOCK_H > 1 or ROUNDS or MASKED)

    if opposite_x is None:
        opposite_x, opposite_grad = x, grad
    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS * CHANNELS, WIDE)
        stride_gn, stride_gh, stride_gw = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)
    pid = tl.program_id(0)
    boxes = tl.cdiv(n, BLOCK_I) * tl.cdiv(out_h, BLOCK_H) * tl.cdiv(out_w, BLOCK_W)
    if pid >= TILES * splits:  # the bias
        block = pid - TILES * splits
        split = block % splits
        channel = block // splits * BLOCK_N
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for box in tl.range(split, boxes, splits):
            tile = load_grad(
                grad, box, channel, GROUPS * CHANNELS,
                n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
            )  # fmt: skip
            sums += tl.sum(tile.to(tl.float32), 0)
        channels = channel + tl.arange(0, BLOCK_N)
        target = partial + (split + 1).to(tl.int64) * stride_partial - bias_channels
        sums = (alpha * sums).to(partial.dtype.element_ty)
        tl.store(target + channels, sums, mask=channels < bias_channels)
        return

    tap = pid % MATRICES  # of one split all taps run side by side, on the same pixels
    k_start = (pid // MATRICES) % K_BLOCKS * BLOCK_K
    n_start = (pid // (MATRICES * K_BLOCKS)) % N_BLOCKS * BLOCK_N
    group = (pid // (MATRICES * K_BLOCKS * N_BLOCKS)) % GROUPS
    split = pid // TILES
    if tap == PAIRS and n_start + BLOCK_N <= k_start:
        return  # the upper triangle of the centre
    first, end = group * CHANNELS, (group + 1) * CHANNELS  # channels of the group
    down = tap // KERNEL_W * DILATION_H - padding_h
    right = tap % KERNEL_W * DILATION_W - padding_w
    opposite_down = (TAPS - 1 - tap) // KERNEL_W * DILATION_H - padding_h
    opposite_right = (TAPS - 1 - tap) % KERNEL_W * DILATION_W - padding_w

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if ONE_TILE:  # one tile of grad serves both products
        opposite_acc = acc
        for box in tl.range(split, boxes, splits):
            grad_box = load_grad(
                grad, box, first, end,
                n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
            )  # fmt: skip
            x_box = load_tap(
                x, box, down, right, first, end, n, h, w, out_h, out_w,
                stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, MASKED, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip
            opposite_box = load_tap(
                x, box, opposite_down, opposite_right, first, end, n, h, w, out_h, out_w,
                stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, MASKED, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip
            acc = multiply_pixels(grad_box, x_box, acc, INPUT_PRECISION, ROUNDS)
            opposite_acc = multiply_pixels(
                grad_box, opposite_box, opposite_acc, INPUT_PRECISION, ROUNDS
            )
            if IN_REGISTERS:
                opposite_acc = finished(opposite_acc, box < boxes)
        acc += SIGN * tl.trans(opposite_acc)
    else:
        for box in tl.range(split, boxes, splits):
            grad_box = load_grad(
                grad, box, first + n_start, end,
                n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
            )  # fmt: skip
            x_box = load_tap(
                x, box, down, right, first + k_start, end, n, h, w, out_h, out_w,
                stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, MASKED, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip
            acc = multiply_pixels(grad_box, x_box, acc, INPUT_PRECISION, ROUNDS)
            if IN_REGISTERS:
                acc = finished(acc, box < boxes)
        if SIGN < 0:
            acc = -acc
        for box in tl.range(split, boxes, splits):
            x_box = load_tap(
                opposite_x, box, opposite_down, opposite_right, first + n_start, end,
                n, h, w, out_h, out_w, stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, MASKED, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
            )  # fmt: skip
            grad_box = load_grad(
                opposite_grad, box, first + k_start, end,
                n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip
            acc = multiply_pixels(x_box, grad_box, acc, INPUT_PRECISION, ROUNDS)
            if IN_REGISTERS:
                acc = finished(acc, box < boxes)
        if SIGN < 0:
            acc = -acc

    acc *= alpha
    rows = (n_start + tl.arange(0, BLOCK_N))[:, None]
    columns = (k_start + tl.arange(0, BLOCK_K))[None, :]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    target = partial + split.to(tl.int64) * stride_partial
    if tap < PAIRS:
        target += (group * PAIRS + tap).to(tl.int64) * CHANNELS * CHANNELS
        values = acc.to(partial.dtype.element_ty)
        tl.store(target + rows * CHANNELS + columns, values, mask=mask)
    else:
        target += GROUPS * PAIRS * CHANNELS * CHANNELS
        target += group.to(tl.int64) * triangle_size(CHANNELS, SIGN)
        store_triangle(acc, target, n_start, k_start, CHANNELS, SIGN, BLOCK_N, BLOCK_K)
