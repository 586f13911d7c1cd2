"""The tied convolution, forward and, by its symmetry, input gradient."""

import triton
import triton.language as tl

from .tiles import (
    box_pixels,
    box_start,
    dense_strides,
    finished,
    inside,
    load_centre,
    load_matrix,
    load_pixels,
    pixel_offsets,
    widen,
)


@triton.jit
def multiply(x, w, acc, ROLES: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """acc + x w^T for x [M, K] and w [N, K].

    ROLES: the product's first operand. "pixels_first": acc is [M, N]; "weights_first": [N, M].
    On sm_90 the first operand of a box with several sides would pass through registers."""
    if ROLES == "weights_first":
        acc = tl.dot(w, tl.trans(x), acc, input_precision=INPUT_PRECISION)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=INPUT_PRECISION)
    return acc


# Sizes and paddings decide nothing at compile time: no code is made anew for other images.
@triton.jit(do_not_specialize=["n", "h", "w", "out_h", "out_w", "padding_h", "padding_w"])
def conv_kernel(
    x, packed, centre, bias, residual, y,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_rn, stride_rc, stride_rh, stride_rw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    padding_h, padding_w, alpha,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    LOADER: tl.constexpr, ROLES: tl.constexpr, ACCUMULATORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m] = alpha (sum over pairs t of P_t x[m + t] + s P_t^T x[m + opposite t] + centre x[m]
    + bias) + residual, as a matrix product: M = pixels of a box, N = out-channels, K = taps x
    in-channels.

    packed: [pairs: group, tap, out, in | centre: group, lower triangle].
    centre: None, or the unpacked one [group, out, in]. bias, residual: None, or given.
    CHANNELS: of one group. LOADER, ROLES: see load_pixels, multiply.
    ACCUMULATORS: 1, or 2 to sum the opposite taps apart.
    DENSE: x, residual and y are (N, H, W, C) without gaps. WIDE: offsets take 64 bits."""
    PAIRS: tl.constexpr = KERNEL_H * KERNEL_W // 2
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    # Where one tile covers a matrix, the tile that is read serves both of its taps.
    ONE_TILE: tl.constexpr = K_BLOCKS == 1 and BLOCK_N == BLOCK_K
    # s = -1 is applied to a sum of its own: a negated operand would have to leave shared memory.
    TWO_SUMS: tl.constexpr = SIGN < 0 or ACCUMULATORS == 2

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS * CHANNELS, WIDE)
        stride_yn, stride_yh, stride_yw = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)
        stride_rn, stride_rh, stride_rw = stride_yn, stride_yh, stride_yw
    pid = tl.program_id(0)
    n_start = (pid % N_BLOCKS) * BLOCK_N
    group = (pid // N_BLOCKS) % GROUPS
    box = pid // (N_BLOCKS * GROUPS)
    image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    first, end = group * CHANNELS, (group + 1) * CHANNELS  # channels of the group
    top, left = row - padding_h, column - padding_w  # where the first tap reads

    if ROLES == "weights_first":
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    opposite_acc = acc
    for step in tl.range(0, PAIRS * K_BLOCKS):
        tap = step // K_BLOCKS
        k_start = (step % K_BLOCKS) * BLOCK_K
        down, right = (tap // KERNEL_W) * DILATION_H, (tap % KERNEL_W) * DILATION_W
        x_tap = load_pixels(
            x, image, top + down, left + right, first + k_start, end, None,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
        )  # fmt: skip  # [M, K]
        opposite_down = (KERNEL_H - 1) * DILATION_H - down
        opposite_right = (KERNEL_W - 1) * DILATION_W - right
        x_opposite = load_pixels(
            x, image, top + opposite_down, left + opposite_right, first + k_start, end, None,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
        )  # fmt: skip  # [M, K]
        matrix = group * PAIRS + tap
        w_tap = load_matrix(
            packed, matrix, n_start, k_start, CHANNELS, WIDE, BLOCK_N, BLOCK_K
        )  # [N, K]
        if ONE_TILE:
            w_opposite = w_tap
        else:
            w_opposite = load_matrix(
                packed, matrix, k_start, n_start, CHANNELS, WIDE, BLOCK_K, BLOCK_N
            )  # [K, N]
        acc = multiply(x_tap, w_tap, acc, ROLES, INPUT_PRECISION)
        if TWO_SUMS:
            opposite_acc = multiply(
                x_opposite, tl.trans(w_opposite), opposite_acc, ROLES, INPUT_PRECISION
            )
        else:
            acc = multiply(x_opposite, tl.trans(w_opposite), acc, ROLES, INPUT_PRECISION)

    if KERNEL_H * KERNEL_W % 2 == 1:
        centre_row = top + KERNEL_H // 2 * DILATION_H
        centre_column = left + KERNEL_W // 2 * DILATION_W
        triangles = packed + GROUPS * PAIRS * CHANNELS * CHANNELS
        for k_start in tl.range(0, CHANNELS, BLOCK_K):
            x_tap = load_pixels(
                x, image, centre_row, centre_column, first + k_start, end, None,
                n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip  # [M, K]
            if centre is not None:
                w_tap = load_matrix(
                    centre, group, n_start, k_start, CHANNELS, WIDE, BLOCK_N, BLOCK_K
                )  # [N, K]
            else:
                w_tap = load_centre(
                    triangles, group, n_start, k_start, CHANNELS, SIGN, WIDE, BLOCK_N, BLOCK_K
                )  # [N, K]
            acc = multiply(x_tap, w_tap, acc, ROLES, INPUT_PRECISION)
            if centre is None and SIGN < 0 and ROLES == "weights_first":
                acc = finished(acc, k_start < CHANNELS)  # its signs were set in registers

    if TWO_SUMS:
        acc += SIGN * opposite_acc
    if ROLES == "weights_first":
        acc = tl.trans(acc)
    images, rows, columns = box_pixels(image, row, column, BLOCK_I, BLOCK_H, BLOCK_W)
    channels = first + n_start + tl.arange(0, BLOCK_N)
    mask = inside(images, rows, columns, n, out_h, out_w)[:, None] & (channels < end)[None, :]
    if bias is not None:
        acc += tl.load(bias + channels, mask=channels < end, other=0.0).to(tl.float32)[None, :]
    acc *= alpha
    channels = widen(channels, WIDE)
    if residual is not None:
        offsets = pixel_offsets(images, rows, columns, stride_rn, stride_rh, stride_rw, WIDE)
        offsets = offsets[:, None] + (channels * stride_rc)[None, :]
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = pixel_offsets(images, rows, columns, stride_yn, stride_yh, stride_yw, WIDE)
    offsets = offsets[:, None] + (channels * stride_yc)[None, :]
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
