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


@triton.jit
def share(steps, split, splits):
    """The first step of a split, and the one after its last. Splits are not empty. If the compiler
    did not know that, sums would come from two places, and each product would wait for the last."""
    start, stop = steps * split // splits, steps * (split + 1) // splits
    tl.assume(start < stop)
    return start, stop


@triton.jit
def add_taps(
    acc, start, stop, x, weights, group, image, top, left, n_start,
    n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
    OPPOSITE: tl.constexpr, STORED: tl.constexpr, CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    LOADER: tl.constexpr, ROLES: tl.constexpr, INPUT_PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the products of steps start to stop - 1, which go through the stored taps and, of each,
    through the blocks of in-channels; of OPPOSITE ones the transposed matrix and the other end of
    the kernel."""
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    for step in tl.range(start, stop):
        stored = step // K_BLOCKS
        k_start = (step % K_BLOCKS) * BLOCK_K
        tap = KERNEL_H * KERNEL_W - 1 - stored if OPPOSITE else stored
        x_tap = load_pixels(
            x, image, top + tap // KERNEL_W * DILATION_H, left + tap % KERNEL_W * DILATION_W,
            group * CHANNELS + k_start, (group + 1) * CHANNELS, None,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
        )  # fmt: skip  # [M, K]
        matrix = group * STORED + stored
        if OPPOSITE:
            w_tap = load_matrix(
                weights, matrix, k_start, n_start, CHANNELS, LOADER, WIDE, BLOCK_K, BLOCK_N
            )
            w_tap = tl.trans(w_tap)
        else:
            w_tap = load_matrix(
                weights, matrix, n_start, k_start, CHANNELS, LOADER, WIDE, BLOCK_N, BLOCK_K
            )
        acc = multiply(x_tap, w_tap, acc, ROLES, INPUT_PRECISION)  # w_tap is [N, K]
    return acc


# What need not be known when it is compiled makes no code anew: sizes, paddings, whether there is
# a bias or a residual, the number of splits.
@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "out_h", "out_w", "stride_split",
        "padding_h", "padding_w", "splits", "bias_channels",
    ]
)  # fmt: skip
def conv_kernel(
    x, weights, opposite_weights, triangles, bias, residual, y,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_rn, stride_rc, stride_rh, stride_rw,
    stride_yn, stride_yc, stride_yh, stride_yw, stride_split,
    padding_h, padding_w, splits, bias_channels, alpha, beta,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr, STORED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    LOADER: tl.constexpr, ROLES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    DENSE: tl.constexpr, DENSE_OUTPUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m] = alpha (sum over taps t of W_t x[m + t] + bias) + beta residual, as a matrix product:
    M = pixels of a box, N = out-channels, K = taps x in-channels. First come the STORED taps, then
    those that are s times the transpose of one, then the centre, if it is in neither.

    weights: the first STORED taps [group, tap, out, in], which packed starts with;
    opposite_weights: the same, for tiles of BLOCK_K x BLOCK_N, None where weights does.
    triangles: packed, for the centre of each group.
    bias: bias_channels is 0 where there is none; residual: beta is 0 where there is none.
    splits: so many programs, no more than a loop has steps, share a sum, and write a y each,
    stride_split apart. CHANNELS: of one group. LOADER, ROLES: see load_pixels, multiply.
    DENSE: x is (N, H, W, C) without gaps; DENSE_OUTPUT: residual and y are. WIDE: offsets take 64
    bits."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PAIRS: tl.constexpr = TAPS // 2
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    HAS_OPPOSITE: tl.constexpr = STORED < TAPS and PAIRS > 0
    HAS_TRIANGLE: tl.constexpr = STORED == PAIRS and TAPS % 2 == 1

    if opposite_weights is None:
        opposite_weights = weights
    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS * CHANNELS, WIDE)
    if DENSE_OUTPUT:
        stride_yn, stride_yh, stride_yw = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)
        stride_rn, stride_rh, stride_rw = stride_yn, stride_yh, stride_yw
    pid = tl.program_id(0)
    n_start = (pid % N_BLOCKS) * BLOCK_N
    group = (pid // N_BLOCKS) % GROUPS
    split = pid // (N_BLOCKS * GROUPS) % splits
    box = pid // (N_BLOCKS * GROUPS * splits)
    image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    top, left = row - padding_h, column - padding_w  # where the first tap reads

    if ROLES == "weights_first":
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if STORED > 0:
        start, stop = share(STORED * K_BLOCKS, split, splits)
        acc = add_taps(
            acc, start, stop, x, weights, group, image, top, left, n_start,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            False, STORED, CHANNELS, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W,
            LOADER, ROLES, INPUT_PRECISION, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HAS_OPPOSITE:
        # A sign is applied to the sum: a negated operand would have to leave shared memory.
        if SIGN < 0:
            acc = -acc
        start, stop = share(PAIRS * K_BLOCKS, split, splits)
        acc = add_taps(
            acc, start, stop, x, opposite_weights, group, image, top, left, n_start,
            n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
            True, STORED, CHANNELS, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W,
            LOADER, ROLES, INPUT_PRECISION, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SIGN < 0:
            acc = -acc
    if HAS_TRIANGLE:
        triangles += GROUPS * PAIRS * CHANNELS * CHANNELS
        centre_row = top + KERNEL_H // 2 * DILATION_H
        centre_column = left + KERNEL_W // 2 * DILATION_W
        for k_start in tl.range(0, tl.where(split == 0, CHANNELS, 0), BLOCK_K):
            x_tap = load_pixels(
                x, image, centre_row, centre_column,
                group * CHANNELS + k_start, (group + 1) * CHANNELS, None,
                n, h, w, stride_xn, stride_xc, stride_xh, stride_xw,
                LOADER, WIDE, BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_K,
            )  # fmt: skip  # [M, K]
            w_tap = load_centre(
                triangles, group, n_start, k_start, CHANNELS, SIGN, WIDE, BLOCK_N, BLOCK_K
            )  # [N, K]
            acc = multiply(x_tap, w_tap, acc, ROLES, INPUT_PRECISION)
            if SIGN < 0 and ROLES == "weights_first":
                acc = finished(acc, k_start < CHANNELS)  # its signs were set in registers

    if ROLES == "weights_first":
        acc = tl.trans(acc)
    images, rows, columns = box_pixels(image, row, column, BLOCK_I, BLOCK_H, BLOCK_W)
    channels = n_start + tl.arange(0, BLOCK_N)
    mask = inside(images, rows, columns, n, out_h, out_w)[:, None] & (channels < CHANNELS)[None, :]
    has_bias = channels < tl.minimum(bias_channels, CHANNELS)
    channels += group * CHANNELS
    acc += tl.load(bias + channels, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    acc *= alpha
    channels = widen(channels, WIDE)
    if beta != 0.0:
        offsets = pixel_offsets(images, rows, columns, stride_rn, stride_rh, stride_rw, WIDE)
        offsets = offsets[:, None] + (channels * stride_rc)[None, :]
        acc += beta * tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = pixel_offsets(images, rows, columns, stride_yn, stride_yh, stride_yw, WIDE)
    offsets = offsets[:, None] + (channels * stride_yc)[None, :]
    y += split.to(tl.int64) * stride_split
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
