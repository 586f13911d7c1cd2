"""The gradients of the packed vector, and of the bias, of few channels a group."""

import triton
import triton.language as tl

from .depthwise import column_tile, load_row, split_groups
from .tiles import dense_strides, widen


@triton.jit
def add_number(
    acc, g, x, CHANNELS: tl.constexpr, SIGN: tl.constexpr, TAPS: tl.constexpr,
    TAP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """acc + what some pixels give to the number of a tap from channel IN to OUT of each group: grad
    at one times x at the other, and vice versa for the opposite tap, with the sign. g: the parts of
    grad; x: those of x for all taps, one after another."""
    OPPOSITE: tl.constexpr = TAPS - 1 - TAP
    acc += g[OUT] * x[TAP * CHANNELS + IN]
    if TAP != OPPOSITE or OUT != IN:  # the diagonal of the centre has each number once
        other = g[IN] * x[OPPOSITE * CHANNELS + OUT]
        acc = acc + other if SIGN > 0 else acc - other
    return acc


@triton.jit(
    do_not_specialize=[
        "n", "h", "w", "out_h", "out_w", "stride_partial",
        "padding_h", "padding_w", "splits", "bias_channels",
    ]
)  # fmt: skip
def depthwise_grad_kernel(
    x, grad, partial,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_gn, stride_gc, stride_gh, stride_gw, stride_partial,
    padding_h, padding_w, splits, bias_channels, alpha,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dP_t = G_t + s G_opposite^T for G_t = sum over pixels m of grad[m] x[m + t]^T, of the centre
    the lower triangle, its diagonal once; that of the bias is the sum of grad. For GROUPS groups
    of CHANNELS, 1, 2 or 4.

    A program goes down the rows of its tiles as depthwise_kernel does, and keeps the rows of x that
    the next row of grad needs too. Each split has its own tiles, and writes its sums into row
    ``split`` of ``partial`` [splits, packed and bias].

    bias_channels, DENSE, WIDE: as in weight_grad_kernel."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PAIRS: tl.constexpr = TAPS // 2
    MATRIX: tl.constexpr = CHANNELS * CHANNELS
    MATRICES: tl.constexpr = PAIRS * MATRIX  # numbers of a group in its pairs, and in its centre
    TRIANGLE: tl.constexpr = TAPS % 2 * CHANNELS * (CHANNELS + SIGN) // 2
    ALL: tl.constexpr = GROUPS * CHANNELS
    C_BLOCKS: tl.constexpr = (ALL + BLOCK_C - 1) // BLOCK_C
    BLOCK_G: tl.constexpr = BLOCK_C // CHANNELS
    KEPT: tl.constexpr = TAPS - KERNEL_W  # tiles of x, from one row of grad to the next

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, ALL, WIDE)
        stride_gn, stride_gh, stride_gw = dense_strides(out_h, out_w, ALL, WIDE)
    pid = tl.program_id(0)
    channels = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    groups = pid % C_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    split = pid // C_BLOCKS
    wide_channels = widen(channels, WIDE)
    blocks = tl.cdiv(widen(n, WIDE) * out_w, BLOCK_W)
    tiles = blocks * (tl.cdiv(out_h, BLOCK_H * DILATION_H) * DILATION_H)

    sums = ()  # of the pairs, of the centre
    for _ in tl.static_range(MATRICES + TRIANGLE):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_G), tl.float32),)
    bias_sum = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for tile in tl.range(split, tiles, splits):
        images, columns, exists = column_tile(tile % blocks, n, out_w, WIDE, BLOCK_W)
        block = (tile // blocks).to(tl.int32)
        first = block // DILATION_H * (BLOCK_H * DILATION_H) + block % DILATION_H
        rows = tl.minimum(tl.cdiv(out_h - first, DILATION_H), BLOCK_H)
        keep = exists[:, None] & (channels < ALL)[None, :]
        images, left = widen(images, WIDE), columns - padding_w
        x_offsets = (images * stride_xn + left * stride_xw)[:, None]
        x_offsets += (wide_channels * stride_xc)[None, :]
        g_offsets = (images * stride_gn + columns * stride_gw)[:, None]
        g_offsets += (wide_channels * stride_gc)[None, :]
        top = first - padding_h

        kept = ()
        for before in tl.static_range(KERNEL_H - 1):
            kept = kept + load_row(
                x, x_offsets, top + before * DILATION_H, left, keep, h, w,
                stride_xh, stride_xw, KERNEL_W, DILATION_W, WIDE,
            )  # fmt: skip
        for step in tl.range(0, rows):
            taps = kept + load_row(
                x, x_offsets, top + (step + KERNEL_H - 1) * DILATION_H, left, keep, h, w,
                stride_xh, stride_xw, KERNEL_W, DILATION_W, WIDE,
            )  # fmt: skip
            row = widen(first + step * DILATION_H, WIDE)
            g = tl.load(grad + row * stride_gh + g_offsets, mask=keep, other=0.0).to(tl.float32)
            bias_sum += g
            g_parts = split_groups(g, CHANNELS, BLOCK_W, BLOCK_C)
            x_parts = ()
            for tap in tl.static_range(TAPS):
                numbers = taps[tap].to(tl.float32)
                x_parts = x_parts + split_groups(numbers, CHANNELS, BLOCK_W, BLOCK_C)
            added = ()
            for number in tl.static_range(MATRICES):
                acc = add_number(
                    sums[number], g_parts, x_parts, CHANNELS, SIGN, TAPS,
                    number // MATRIX, number % MATRIX // CHANNELS, number % CHANNELS,
                )  # fmt: skip
                added = added + (acc,)
            for out in tl.static_range(CHANNELS * (TAPS % 2)):
                for into in tl.static_range(CHANNELS):
                    if into < out or (into == out and SIGN > 0):
                        acc = add_number(
                            sums[MATRICES + out * (out + SIGN) // 2 + into], g_parts, x_parts,
                            CHANNELS, SIGN, TAPS, PAIRS, out, into,
                        )  # fmt: skip
                        added = added + (acc,)
            sums = added
            kept = ()
            for tap in tl.static_range(KEPT):
                kept = kept + (taps[KERNEL_W + tap],)

    target = partial + widen(split, True) * stride_partial
    wide_groups = widen(groups, WIDE)
    for number in tl.static_range(MATRICES + TRIANGLE):
        values = (alpha * tl.sum(sums[number], 0)).to(partial.dtype.element_ty)
        if number < MATRICES:
            place = wide_groups * MATRICES + number
        else:
            place = GROUPS * MATRICES + wide_groups * TRIANGLE + number - MATRICES
        tl.store(target + place, values, mask=groups < GROUPS)
    values = (alpha * tl.sum(bias_sum, 0)).to(partial.dtype.element_ty)
    target += stride_partial - bias_channels
    tl.store(target + channels, values, mask=channels < tl.minimum(bias_channels, ALL))
