"""The weight of a convolution of merged columns; see merging.py."""

import triton
import triton.language as tl

from .tiles import triangle_offsets


@triton.jit
def packed_places(taps_at, rows, columns, taps, channels, SIGN: tl.constexpr):
    """Where the packed vector of one group holds [row, column] of the matrix of each tap, and the
    sign that it has there: 0 on the diagonal of an antisymmetric centre, which is not held."""
    pairs = taps // 2
    turns = taps_at >= taps - pairs
    is_centre = taps_at == taps - 1 - taps_at
    matrix = tl.where(turns, taps - 1 - taps_at, taps_at)
    row, column = tl.where(turns, columns, rows), tl.where(turns, rows, columns)
    triangle = pairs * channels * channels + triangle_offsets(rows, columns, SIGN)
    places = tl.where(is_centre, triangle, (matrix * channels + row) * channels + column)
    signs = tl.full(places.shape, 1.0, tl.float32)
    if SIGN < 0:
        signs = tl.where(turns | (is_centre & (rows < columns)), -signs, signs)
        signs = tl.where(is_centre & (rows == columns), 0.0, signs)
    return places, signs


# One code serves all layers.
@triton.jit(
    do_not_specialize=[
        "channels", "kernel_w", "taps", "dilation", "padding",
        "merged", "merged_w", "merged_padding", "stored", "bias_channels",
    ]
)  # fmt: skip
def merge_columns_kernel(
    weights, bias, matrices, merged_bias,
    channels, kernel_w, taps, dilation, padding,
    merged, merged_w, merged_padding, stored, bias_channels,
    SIGN: tl.constexpr, IS_PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """matrices[tap, out, in] of the first ``stored`` taps of the convolution of merged columns, and
    its bias, of ``bias_channels`` numbers. weights: packed, or [tap, out, in] of all taps."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    side = merged * channels
    tap, out, into = offs // (side * side), offs // side % side, offs % side
    # the columns of pixels that lie between the two, from the kernel's first one on
    shift = (
        merged * (tap % merged_w - merged_padding) + into // channels - out // channels + padding
    )
    column = tl.maximum(shift, 0) // dilation
    is_tap = (shift >= 0) & (column * dilation == shift) & (column < kernel_w)
    tap = tap // merged_w * kernel_w + column
    rows, columns = out % channels, into % channels
    if IS_PACKED:
        places, signs = packed_places(tap, rows, columns, taps, channels, SIGN)
    else:
        places = (tap * channels + rows) * channels + columns
        signs = tl.full(places.shape, 1.0, tl.float32)
    mask = offs < stored * side * side
    numbers = tl.load(weights + places, mask=mask & is_tap & (signs != 0.0), other=0.0)
    numbers = tl.where(signs < 0.0, -numbers, numbers)
    tl.store(matrices + offs, numbers, mask=mask)
    has_bias = offs < bias_channels
    numbers = tl.load(bias + offs % channels, mask=has_bias, other=0.0)
    tl.store(merged_bias + offs, numbers, mask=has_bias)
