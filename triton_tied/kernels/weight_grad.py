"""The gradient of the packed vector: no dense one is ever made."""

import triton
import triton.language as tl

from .tiles import (
    box_pixels,
    box_start,
    dense_strides,
    finished,
    inside,
    load_pixels,
    triangle_offsets,
    triangle_size,
)


@triton.jit(do_not_specialize=["n", "h", "w", "out_h", "out_w", "padding_h", "padding_w", "splits"])
def weight_grad_kernel(
    x, grad, partial,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_gn, stride_gc, stride_gh, stride_gw, stride_partial,
    padding_h, padding_w, splits, alpha,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    LOADER: tl.constexpr, MASKED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dP_t = G_t + s G_opposite^T for G_t = sum over pixels m of grad[m] x[m + t]^T: two matrix
    products with M = channels of grad, N = channels of x, K = pixels. The centre is a pair with
    itself, its diagonal halved and its upper triangle left away. Each split sums its own boxes of
    pixels into row ``split`` of ``partial`` [splits, packed].

    In both products grad is the first operand and x the second. Were one tile first in one product
    and second in the other, it would pass through registers and stay in shared memory, and Triton
    would copy the next tile into what wgmma still reads.

    CHANNELS: of one group. LOADER: see load_pixels. MASKED: boxes reach beyond the output.
    DENSE: x and grad are (N, H, W, C) without gaps. WIDE: offsets take 64 bits."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PAIRS: tl.constexpr = TAPS // 2
    MATRICES: tl.constexpr = (TAPS + 1) // 2
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    ONE_TILE: tl.constexpr = N_BLOCKS == 1 and BLOCK_N == BLOCK_K
    # On sm_90 the first operand of a box with several sides passes through registers.
    IN_REGISTERS: tl.constexpr = LOADER != "pointer" and BLOCK_I * BLOCK_H > 1

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS * CHANNELS, WIDE)
        stride_gn, stride_gh, stride_gw = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)
    pid = tl.program_id(0)
    tap = pid % MATRICES  # of one split all taps run side by side, on the same pixels
    k_start = (pid // MATRICES) % K_BLOCKS * BLOCK_K
    n_start = (pid // (MATRICES * K_BLOCKS)) % N_BLOCKS * BLOCK_N
    group = (pid // (MATRICES * K_BLOCKS * N_BLOCKS)) % GROUPS
    split = pid // (MATRICES * K_BLOCKS * N_BLOCKS * GROUPS)
    if tap == PAIRS and n_start + BLOCK_N <= k_start:
        return  # the upper triangle of the centre
    first, end = group * CHANNELS, (group + 1) * CHANNELS  # channels of the group
    down, right = (tap // KERNEL_W) * DILATION_H, (tap % KERNEL_W) * DILATION_W
    opposite_down = (KERNEL_H - 1) * DILATION_H - down
    opposite_right = (KERNEL_W - 1) * DILATION_W - right

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    opposite_acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    boxes = tl.cdiv(n, BLOCK_I) * tl.cdiv(out_h, BLOCK_H) * tl.cdiv(out_w, BLOCK_W)
    for box in tl.range(split, boxes, splits):
        image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
        keep = None
        if MASKED:
            images, rows, columns = box_pixels(image, row, column, BLOCK_I, BLOCK_H, BLOCK_W)
            keep = inside(images, rows, columns, n, out_h, out_w)
        top, left = row - padding_h, column - padding_w  # where the first tap reads
        grad_out = load_pixels(
            grad, image, row, column, first + n_start, end, None,
            n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
        )  # fmt: skip
        x_in = load_pixels(
            x, image, top + down, left + right, first + k_start, end, keep,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
        )  # fmt: skip
        x_out = load_pixels(
            x, image, top + opposite_down, left + opposite_right, first + n_start, end, keep,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N,
        )  # fmt: skip
        if ONE_TILE:
            grad_in = grad_out
        else:
            grad_in = load_pixels(
                grad, image, row, column, first + k_start, end, None,
                n, out_h, out_w, stride_gn, stride_gc, stride_gh, stride_gw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip
        acc = tl.dot(tl.trans(grad_out), x_in, acc, input_precision=INPUT_PRECISION)
        opposite_acc = tl.dot(
            tl.trans(grad_in), x_out, opposite_acc, input_precision=INPUT_PRECISION
        )
        if IN_REGISTERS:
            opposite_acc = finished(opposite_acc, box < boxes)

    acc += SIGN * tl.trans(opposite_acc)
    acc *= alpha
    rows = (n_start + tl.arange(0, BLOCK_N))[:, None]
    columns = (k_start + tl.arange(0, BLOCK_K))[None, :]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    target = partial + split.to(tl.int64) * stride_partial
    if tap < PAIRS:
        start = (group * PAIRS + tap).to(tl.int64) * CHANNELS * CHANNELS
        offsets = start + rows * CHANNELS + columns
    else:
        acc = tl.where(rows == columns, acc * 0.5, acc)
        mask = mask & ((rows > columns) | ((rows == columns) & (SIGN > 0)))
        start = group.to(tl.int64) * triangle_size(CHANNELS, SIGN)
        start += GROUPS * PAIRS * CHANNELS * CHANNELS
        offsets = start + triangle_offsets(rows, columns, SIGN)
    tl.store(target + offsets, acc.to(partial.dtype.element_ty), mask=mask)
