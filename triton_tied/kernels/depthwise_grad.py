"""The gradients of the packed vector, and of the bias, of one channel a group."""

import triton
import triton.language as tl

from .depthwise import column_tile, load_row
from .tiles import dense_strides, widen


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
    GROUPS: tl.constexpr, SIGN: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dP_t = sum over pixels m of grad[m] (x[m + t] + s x[m + opposite t]), and of the centre
    sum of grad[m] x[m]; that of the bias is the sum of grad. For GROUPS channels.

    A program goes down the rows of its tiles as depthwise_kernel does, and keeps the rows of x that
    the next row of grad needs too. Each split has its own tiles, and writes its sums into row
    ``split`` of ``partial`` [splits, packed and bias].

    bias_channels, DENSE, WIDE: as in weight_grad_kernel."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PAIRS: tl.constexpr = TAPS // 2
    HAS_CENTRE: tl.constexpr = TAPS % 2 == 1 and SIGN > 0
    C_BLOCKS: tl.constexpr = (GROUPS + BLOCK_C - 1) // BLOCK_C
    KEPT: tl.constexpr = TAPS - KERNEL_W  # tiles of x, from one row of grad to the next

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS, WIDE)
        stride_gn, stride_gh, stride_gw = dense_strides(out_h, out_w, GROUPS, WIDE)
    pid = tl.program_id(0)
    channels = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // C_BLOCKS
    has_channel = channels < GROUPS
    wide_channels = widen(channels, WIDE)
    blocks = tl.cdiv(widen(n, WIDE) * out_w, BLOCK_W)
    tiles = blocks * (tl.cdiv(out_h, BLOCK_H * DILATION_H) * DILATION_H)

    sums = ()  # of the pairs, of the centre, of the bias
    for _ in tl.static_range(PAIRS + HAS_CENTRE + 1):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    for tile in tl.range(split, tiles, splits):
        images, columns, exists = column_tile(tile % blocks, n, out_w, WIDE, BLOCK_W)
        block = (tile // blocks).to(tl.int32)
        first = block // DILATION_H * (BLOCK_H * DILATION_H) + block % DILATION_H
        rows = tl.minimum(tl.cdiv(out_h - first, DILATION_H), BLOCK_H)
        keep = exists[:, None] & has_channel[None, :]
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
            added = ()
            for tap in tl.static_range(PAIRS):
                one, other = taps[tap].to(tl.float32), taps[TAPS - 1 - tap].to(tl.float32)
                if SIGN > 0:
                    added = added + (sums[tap] + g * one + g * other,)
                else:
                    added = added + (sums[tap] + g * one - g * other,)
            if HAS_CENTRE:
                added = added + (sums[PAIRS] + g * taps[PAIRS].to(tl.float32),)
            sums = added + (sums[PAIRS + HAS_CENTRE] + g,)
            kept = ()
            for tap in tl.static_range(KEPT):
                kept = kept + (taps[KERNEL_W + tap],)

    target = partial + widen(split, True) * stride_partial
    for tap in tl.static_range(PAIRS + HAS_CENTRE):
        values = (alpha * tl.sum(sums[tap], 0)).to(partial.dtype.element_ty)
        place = wide_channels * PAIRS + tap if tap < PAIRS else GROUPS * PAIRS + wide_channels
        tl.store(target + place, values, mask=has_channel)
    values = (alpha * tl.sum(sums[PAIRS + HAS_CENTRE], 0)).to(partial.dtype.element_ty)
    target += stride_partial - bias_channels
    tl.store(target + channels, values, mask=channels < tl.minimum(bias_channels, GROUPS))
