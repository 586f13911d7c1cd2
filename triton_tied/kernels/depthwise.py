"""The tied convolution of one channel a group: sums of products, row after row, no matrices.

A program has a tile of M columns and C channels, and goes down some rows. The columns of all images
are counted side by side, so that a tile may begin in one image and end in the next.
"""

import triton
import triton.language as tl

from .tiles import dense_strides, widen


@triton.jit
def column_tile(block, n, out_w, WIDE: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image and column of each column of a tile of the output, and whether there is one: [M]."""
    columns = widen(block, WIDE) * BLOCK_W + tl.arange(0, BLOCK_W)
    return columns // out_w, columns % out_w, columns < widen(n, WIDE) * out_w


@triton.jit
def load_row(
    x, offsets, row, columns, keep, h, w, stride_h, stride_w,
    KERNEL_W: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the taps of a row of the kernel read in a row of the images: KERNEL_W tiles [M, C]; zero
    outside the images and where ``keep`` [M, C] does not hold.

    offsets [M, C] and columns [M]: where the first tap reads, in row 0."""
    x += widen(row, WIDE) * stride_h
    keep = keep & (row >= 0) & (row < h)
    tiles = ()
    for tap in tl.static_range(KERNEL_W):
        shift = tap * DILATION_W
        inside = (columns + shift >= 0) & (columns + shift < w)
        tile = tl.load(x + shift * stride_w + offsets, mask=keep & inside[:, None], other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_weights(
    weights, triangles, channels, keep, SIGN: tl.constexpr, STORED: tl.constexpr,
    TAPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The weights of the stored taps, and of the centre if it is not among them: each [C]."""
    found = ()
    for tap in tl.static_range(STORED):
        weight = tl.load(weights + channels * STORED + tap, mask=keep, other=0.0)
        found = found + (weight.to(tl.float32),)
    if STORED == TAPS // 2 and TAPS % 2 == 1 and SIGN > 0:  # an antisymmetric number is zero
        triangles += channels + GROUPS * (TAPS // 2)
        found = found + (tl.load(triangles, mask=keep, other=0.0).to(tl.float32),)
    return found


@triton.jit
def add_tap(
    acc, tile, weights, SIGN: tl.constexpr, STORED: tl.constexpr, TAPS: tl.constexpr,
    TAP: tl.constexpr,
):  # fmt: skip
    """acc + the product of a tap: the opposite of one that is not stored has its weight, with the
    sign."""
    OPPOSITE: tl.constexpr = TAPS - 1 - TAP
    if TAP < STORED or (TAP == OPPOSITE and SIGN > 0):
        acc += tile * weights[TAP][None, :]
    elif TAP != OPPOSITE and SIGN > 0:
        acc += tile * weights[OPPOSITE][None, :]
    elif TAP != OPPOSITE:
        acc -= tile * weights[OPPOSITE][None, :]
    return acc


@triton.jit(
    do_not_specialize=["n", "h", "w", "out_h", "out_w", "padding_h", "padding_w", "bias_channels"]
)
def depthwise_kernel(
    x, weights, triangles, bias, residual, y,
    n, h, w, out_h, out_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_rn, stride_rc, stride_rh, stride_rw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    padding_h, padding_w, bias_channels, alpha, beta,
    GROUPS: tl.constexpr, SIGN: tl.constexpr, STORED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DENSE: tl.constexpr, DENSE_OUTPUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m] = alpha (sum over taps t of W_t x[m + t] + bias) + beta residual, for GROUPS channels.

    The rows of a program lie DILATION_H apart, as do the rows of x that they read. It reads those
    one after another, each once, and adds what a row gives to the sums of the KERNEL_H rows of y
    that read it; then one of these sums is done.

    weights, triangles, bias, residual, DENSE, DENSE_OUTPUT, WIDE: as in conv_kernel."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    C_BLOCKS: tl.constexpr = (GROUPS + BLOCK_C - 1) // BLOCK_C

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, GROUPS, WIDE)
    if DENSE_OUTPUT:
        stride_yn, stride_yh, stride_yw = dense_strides(out_h, out_w, GROUPS, WIDE)
        stride_rn, stride_rh, stride_rw = stride_yn, stride_yh, stride_yw
    pid = tl.program_id(0)
    channels = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // C_BLOCKS
    blocks = tl.cdiv(widen(n, WIDE) * out_w, BLOCK_W)
    images, columns, exists = column_tile(pid % blocks, n, out_w, WIDE, BLOCK_W)
    pid = (pid // blocks).to(tl.int32)
    first = pid // DILATION_H * (BLOCK_H * DILATION_H) + pid % DILATION_H
    rows = tl.minimum(tl.cdiv(out_h - first, DILATION_H), BLOCK_H)

    has_channel = channels < GROUPS
    keep = exists[:, None] & has_channel[None, :]
    w_taps = load_weights(weights, triangles, channels, has_channel, SIGN, STORED, TAPS, GROUPS)
    has_bias = channels < tl.minimum(bias_channels, GROUPS)
    b = tl.load(bias + channels, mask=has_bias, other=0.0).to(tl.float32)
    images, channels = widen(images, WIDE), widen(channels, WIDE)
    left = columns - padding_w
    x_offsets = (images * stride_xn + left * stride_xw)[:, None] + (channels * stride_xc)[None, :]
    y_offsets = (images * stride_yn + columns * stride_yw)[:, None]
    y_offsets += (channels * stride_yc)[None, :]
    r_offsets = (images * stride_rn + columns * stride_rw)[:, None]
    r_offsets += (channels * stride_rc)[None, :]

    sums = ()  # of the rows of y that end with this row of x, with the next, ...
    for _ in tl.static_range(KERNEL_H):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    top = first - padding_h
    steps = rows + KERNEL_H - 1
    tiles = load_row(
        x, x_offsets, top, left, keep & (steps > 0), h, w,
        stride_xh, stride_xw, KERNEL_W, DILATION_W, WIDE,
    )  # fmt: skip
    for step in tl.range(0, steps):
        following = load_row(  # on its way while this row is added
            x, x_offsets, top + (step + 1) * DILATION_H, left, keep & (step + 1 < steps), h, w,
            stride_xh, stride_xw, KERNEL_W, DILATION_W, WIDE,
        )  # fmt: skip
        added = ()
        for end in tl.static_range(KERNEL_H):
            acc = sums[end]
            for tap in tl.static_range(KERNEL_W):
                acc = add_tap(
                    acc, tiles[tap].to(tl.float32), w_taps, SIGN, STORED, TAPS,
                    (KERNEL_H - 1 - end) * KERNEL_W + tap,
                )  # fmt: skip
            added = added + (acc,)
        row = step - (KERNEL_H - 1)
        live = keep & (row >= 0)
        row = widen(first + row * DILATION_H, WIDE)
        acc = alpha * (added[0] + b[None, :])
        if beta != 0.0:
            r = tl.load(residual + row * stride_rh + r_offsets, mask=live, other=0.0)
            acc += beta * r.to(tl.float32)
        tl.store(y + row * stride_yh + y_offsets, acc.to(y.dtype.element_ty), mask=live)
        sums = ()
        for end in tl.static_range(KERNEL_H - 1):
            sums = sums + (added[end + 1],)
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
        tiles = following
