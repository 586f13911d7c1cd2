"""The sum of what several programs summed of the packed gradient of merged columns."""

import triton
import triton.language as tl

from .merge_columns import packed_places


@triton.jit(
    do_not_specialize=[
        "rows", "channels", "kernel_w", "taps", "dilation", "padding",
        "merged", "merged_w", "merged_padding", "merged_taps", "size", "merged_size",
        "bias_channels",
    ]
)  # fmt: skip
def sum_merged_kernel(
    partial, y,
    rows, channels, kernel_w, taps, dilation, padding,
    merged, merged_w, merged_padding, merged_taps, size, merged_size, bias_channels,
    alpha,
    SIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = alpha x the gradient of packed, followed by that of a bias of ``bias_channels``, ``size``
    numbers in all, of the rows of partial [rows, merged_size], float32: those of the convolution of
    merged columns. There each number stands once for each of the merged columns. Always in the same
    order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = (taps + 1) // 2 * channels * channels  # of the taps that are held, and the centre
    is_bias = offs >= numbers
    tap, out, into = offs // (channels * channels), offs // channels % channels, offs % channels
    target, signs = packed_places(tap, out, into, taps, channels, SIGN)
    is_held = (tap < taps // 2) | ((out >= into) & (signs != 0.0))  # of the centre a triangle
    target = tl.where(is_bias, size - bias_channels + offs - numbers, target)
    mask = tl.where(is_bias, offs < numbers + bias_channels, is_held)
    is_own_opposite = (tap == taps - 1 - tap) & (out == into)
    bias_start = merged_size - merged * bias_channels + offs - numbers
    side = merged * channels
    acc = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for p in range(merged):
        shift = p + tap % kernel_w * dilation - padding + merged * merged_padding  # at least 0
        row = tap // kernel_w * merged_w + shift // merged
        q = shift % merged
        places, signs = packed_places(
            row, p * channels + out, q * channels + into, merged_taps, side, SIGN
        )
        # from p to q and from q to p it is one number of the merged convolution
        signs = tl.where(is_own_opposite & (p != q), 0.5, signs)
        places = tl.where(is_bias, bias_start + p * bias_channels, places)
        signs = tl.where(is_bias, 1.0, signs)
        for first in range(0, rows, BLOCK_ROWS):
            split = first + tl.arange(0, BLOCK_ROWS)
            offsets = split.to(tl.int64)[:, None] * merged_size + places[None, :]
            both = (split < rows)[:, None] & mask[None, :]
            acc += signs[None, :] * tl.load(partial + offsets, mask=both, other=0.0)
    total = alpha * tl.sum(acc, 0)
    tl.store(y + target, total.to(y.dtype.element_ty), mask=mask)
