"""The tied convolution of few channels a group: sums of products, row after row, no matrices.

A program has a tile of M columns and C channels, and goes down some rows. The columns of all images
are counted side by side, so that a tile may begin in one image and end in the next. A tile consists
of CHANNELS *parts* [M, C / CHANNELS]: the first channel of each group, the second, ... A thread has
whole groups, so that it moves nothing to make parts of a tile.
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
def split_groups(tile, CHANNELS: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The parts of a tile [M, C]: the first channel of each group, the second, ..."""
    parts = (tile,)
    if CHANNELS >= 2:
        parts = halve(parts, 1, M, C)
    if CHANNELS >= 4:
        parts = halve(parts, 2, M, C // 2)
    return parts


@triton.jit
def halve(parts, COUNT: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The even channels of each part, then the odd ones."""
    even, odd = (), ()
    for part in tl.static_range(COUNT):
        both = tl.split(tl.reshape(parts[part], (M, C // 2, 2)))
        even, odd = even + (both[0],), odd + (both[1],)
    return even + odd


@triton.jit
def join_groups(parts, CHANNELS: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The tile [M, C] of such parts."""
    if CHANNELS >= 4:
        parts = double(parts, 2, M, C // 2)
    if CHANNELS >= 2:
        parts = double(parts, 1, M, C)
    return parts[0]


@triton.jit
def double(parts, COUNT: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """So many parts of [M, C], of their even channels and their odd ones."""
    found = ()
    for part in tl.static_range(COUNT):
        found = found + (tl.reshape(tl.join(parts[part], parts[COUNT + part]), (M, C)),)
    return found


@triton.jit
def load_weights(
    weights, triangles, groups, keep, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    SIGN: tl.constexpr, STORED: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """All numbers of a group, one after another: the matrices of the stored taps, and the triangle
    of the centre if it is not among them; of many groups at once, so each is [groups]."""
    MATRICES: tl.constexpr = STORED * CHANNELS * CHANNELS
    TRIANGLE: tl.constexpr = CHANNELS * (CHANNELS + SIGN) // 2
    found = ()
    for number in tl.static_range(MATRICES):
        weight = tl.load(weights + groups * MATRICES + number, mask=keep, other=0.0)
        found = found + (weight.to(tl.float32),)
    if STORED == TAPS // 2 and TAPS % 2 == 1:
        triangles += GROUPS * MATRICES
        for number in tl.static_range(TRIANGLE):
            weight = tl.load(triangles + groups * TRIANGLE + number, mask=keep, other=0.0)
            found = found + (weight.to(tl.float32),)
    return found


@triton.jit
def add_product(
    acc, part, weights, CHANNELS: tl.constexpr, SIGN: tl.constexpr, STORED: tl.constexpr,
    TAPS: tl.constexpr, TAP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """acc + the product of a tap from channel IN to channel OUT of the groups. The opposite of a
    stored tap has its matrix transposed, as has the centre above its diagonal, with the sign."""
    OPPOSITE: tl.constexpr = TAPS - 1 - TAP
    if TAP < STORED:
        acc += part * weights[(TAP * CHANNELS + OUT) * CHANNELS + IN][None, :]
    elif TAP != OPPOSITE:
        product = part * weights[(OPPOSITE * CHANNELS + IN) * CHANNELS + OUT][None, :]
        acc = acc + product if SIGN > 0 else acc - product
    else:
        TRIANGLE: tl.constexpr = STORED * CHANNELS * CHANNELS
        if OUT > IN or (OUT == IN and SIGN > 0):
            acc += part * weights[TRIANGLE + OUT * (OUT + SIGN) // 2 + IN][None, :]
        elif OUT < IN:
            product = part * weights[TRIANGLE + IN * (IN + SIGN) // 2 + OUT][None, :]
            acc = acc + product if SIGN > 0 else acc - product
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
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SIGN: tl.constexpr, STORED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DENSE: tl.constexpr, DENSE_OUTPUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m] = alpha (sum over taps t of W_t x[m + t] + bias) + beta residual, for GROUPS groups of
    CHANNELS, 1, 2 or 4.

    The rows of a program lie DILATION_H apart, as do the rows of x that they read. It reads those
    one after another, each once, and adds what a row gives to the sums of the KERNEL_H rows of y
    that read it; then one of these sums is done.

    weights, triangles, bias, residual, DENSE, DENSE_OUTPUT, WIDE: as in conv_kernel."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    ALL: tl.constexpr = GROUPS * CHANNELS
    C_BLOCKS: tl.constexpr = (ALL + BLOCK_C - 1) // BLOCK_C
    BLOCK_G: tl.constexpr = BLOCK_C // CHANNELS

    if DENSE:
        stride_xn, stride_xh, stride_xw = dense_strides(h, w, ALL, WIDE)
    if DENSE_OUTPUT:
        stride_yn, stride_yh, stride_yw = dense_strides(out_h, out_w, ALL, WIDE)
        stride_rn, stride_rh, stride_rw = stride_yn, stride_yh, stride_yw
    pid = tl.program_id(0)
    channels = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    groups = pid % C_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    pid = pid // C_BLOCKS
    blocks = tl.cdiv(widen(n, WIDE) * out_w, BLOCK_W)
    images, columns, exists = column_tile(pid % blocks, n, out_w, WIDE, BLOCK_W)
    pid = (pid // blocks).to(tl.int32)
    first = pid // DILATION_H * (BLOCK_H * DILATION_H) + pid % DILATION_H
    rows = tl.minimum(tl.cdiv(out_h - first, DILATION_H), BLOCK_H)

    keep = exists[:, None] & (channels < ALL)[None, :]
    w_taps = load_weights(
        weights, triangles, groups, groups < GROUPS, CHANNELS, GROUPS, SIGN, STORED, TAPS
    )
    has_bias = channels < tl.minimum(bias_channels, ALL)
    b = tl.load(bias + channels, mask=has_bias, other=0.0).to(tl.float32)
    images, channels = widen(images, WIDE), widen(channels, WIDE)
    left = columns - padding_w
    x_offsets = (images * stride_xn + left * stride_xw)[:, None] + (channels * stride_xc)[None, :]
    y_offsets = (images * stride_yn + columns * stride_yw)[:, None]
    y_offsets += (channels * stride_yc)[None, :]
    r_offsets = (images * stride_rn + columns * stride_rw)[:, None]
    r_offsets += (channels * stride_rc)[None, :]

    sums = ()  # of the rows of y that end with this row of x, with the next, ...
    for _ in tl.static_range(KERNEL_H * CHANNELS):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_G), tl.float32),)
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
        parts = ()
        for tap in tl.static_range(KERNEL_W):
            parts = parts + split_groups(tiles[tap].to(tl.float32), CHANNELS, BLOCK_W, BLOCK_C)
        added = ()
        for i in tl.static_range(KERNEL_H * CHANNELS):
            acc = sums[i]
            for j in tl.static_range(KERNEL_W * CHANNELS):
                acc = add_product(
                    acc, parts[j], w_taps, CHANNELS, SIGN, STORED, TAPS,
                    (KERNEL_H - 1 - i // CHANNELS) * KERNEL_W + j // CHANNELS,
                    i % CHANNELS, j % CHANNELS,
                )  # fmt: skip
            added = added + (acc,)
        row = step - (KERNEL_H - 1)
        live = keep & (row >= 0)
        row = widen(first + row * DILATION_H, WIDE)
        acc = alpha * (join_groups(added, CHANNELS, BLOCK_W, BLOCK_C) + b[None, :])
        if beta != 0.0:
            r = tl.load(residual + row * stride_rh + r_offsets, mask=live, other=0.0)
            acc += beta * r.to(tl.float32)
        tl.store(y + row * stride_yh + y_offsets, acc.to(y.dtype.element_ty), mask=live)
        sums = ()
        for i in tl.static_range(CHANNELS, KERNEL_H * CHANNELS):
            sums = sums + (added[i],)
        for _ in tl.static_range(CHANNELS):
            sums = sums + (tl.zeros((BLOCK_W, BLOCK_G), tl.float32),)
        tiles = following
