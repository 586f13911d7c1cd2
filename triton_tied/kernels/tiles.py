"""What the kernels share: boxes of pixels, and tiles of the packed weight.

A box holds M = BLOCK_I x BLOCK_H x BLOCK_W pixels: of so many images, rows and columns.
"""

import triton
import triton.language as tl


@triton.jit
def box_start(
    box, out_h, out_w, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """First image, row and column of a box; boxes are numbered by image, row, column."""
    boxes_h = tl.cdiv(out_h, BLOCK_H)
    boxes_w = tl.cdiv(out_w, BLOCK_W)
    image = box // (boxes_h * boxes_w) * BLOCK_I
    row = box // boxes_w % boxes_h * BLOCK_H
    column = box % boxes_w * BLOCK_W
    return image, row, column


@triton.jit
def box_pixels(
    image, row, column, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Image, row and column of each pixel of a box: three [M]."""
    offs_m = tl.arange(0, BLOCK_I * BLOCK_H * BLOCK_W)
    images = image + offs_m // (BLOCK_H * BLOCK_W)
    rows = row + offs_m // BLOCK_W % BLOCK_H
    columns = column + offs_m % BLOCK_W
    return images, rows, columns


@triton.jit
def inside(images, rows, columns, n, h, w):
    """Which pixels lie in n images of h x w: [M]."""
    return (images < n) & (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)


@triton.jit
def widen(index, WIDE: tl.constexpr):
    """The index, in 64 bits where offsets are WIDE."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def pixel_offsets(images, rows, columns, stride_n, stride_h, stride_w, WIDE: tl.constexpr):
    """[M]"""
    images, rows, columns = widen(images, WIDE), widen(rows, WIDE), widen(columns, WIDE)
    return images * stride_n + rows * stride_h + columns * stride_w


@triton.jit
def dense_strides(h, w, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """Of images, rows and columns in (N, H, W, C) memory without gaps: multiples of CHANNELS,
    which the compiler must know to read several channels at once."""
    stride_h = widen(w * CHANNELS, WIDE)
    return h * stride_h, stride_h, CHANNELS


@triton.jit
def finished(acc, in_loop):
    """The sum of products of which the first operand passes through registers, as wgmma on sm_90
    has it where that is not a tile of shared memory as it stands. ``in_loop`` always holds. But the
    sum is used, so the compiler waits for the product before the next step overwrites them, which
    of its own it does not."""
    return acc * tl.where(in_loop, 1.0, 0.0)


@triton.jit
def load_pixels(
    x, image, row, column, channel, channel_end, keep,
    n, h, w, stride_n, stride_c, stride_h, stride_w,
    LOADER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A box of pixels and a block of channels as [M, C]; zero outside the images, from channel_end
    on, and where ``keep`` (None, or [M]) does not hold.

    LOADER: what ``x`` is: a "pointer"; a "channels_last_descriptor", of (N, H, W, C) memory; or a
    "planar_descriptor", of (N, C, H, W) memory, whose axes are N, H, C, W where boxes have one row
    (BLOCK_H == 1)."""
    if LOADER == "pointer":
        images, rows, columns = box_pixels(image, row, column, BLOCK_I, BLOCK_H, BLOCK_W)
        mask = inside(images, rows, columns, n, h, w)
        if keep is not None:
            mask = mask & keep
        channels = channel + tl.arange(0, BLOCK_C)
        mask = mask[:, None] & (channels < channel_end)[None, :]  # [M, C]
        channels = widen(channels, WIDE)
        offsets = pixel_offsets(images, rows, columns, stride_n, stride_h, stride_w, WIDE)
        tile = tl.load(x + offsets[:, None] + (channels * stride_c)[None, :], mask=mask, other=0.0)
    else:
        if LOADER == "channels_last_descriptor":
            tile = x.load([image, row, column, channel])  # [I, H, W, C]
            tile = tl.reshape(tile, (BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_C))
        elif BLOCK_H == 1:  # in this order the tile is a matrix as it lies in shared memory
            tile = x.load([image, row, channel, column])  # [1, 1, C, W]: BLOCK_I is 1
            tile = tl.trans(tl.reshape(tile, (BLOCK_C, BLOCK_W)))
        else:
            tile = x.load([image, channel, row, column])  # [1, C, H, W]
            tile = tl.trans(tl.reshape(tile, (BLOCK_C, BLOCK_H * BLOCK_W)))
        if keep is not None:
            tile = tl.where(keep[:, None], tile, 0.0)
    return tile


@triton.jit
def load_matrix(
    matrices, matrix, row, column, channels, LOADER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """A tile of one of many C x C matrices, [row, column]; zero outside it. LOADER: that of the
    pixels; if it is not "pointer", ``matrices`` is a descriptor too, of all of them."""
    if LOADER == "pointer":
        rows = widen(row + tl.arange(0, BLOCK_ROW), WIDE)
        columns = column + tl.arange(0, BLOCK_COLUMN)
        matrix = widen(matrix, WIDE)
        mask = (rows < channels)[:, None] & (columns < channels)[None, :]
        offsets = (matrix * channels * channels + rows * channels)[:, None] + columns[None, :]
        tile = tl.load(matrices + offsets, mask=mask, other=0.0)
    else:
        tile = tl.reshape(matrices.load([matrix, row, column]), (BLOCK_ROW, BLOCK_COLUMN))
    return tile


@triton.jit
def round_to_tf32(tile):
    """float32 to the nearest TF32, ties away from zero: products in TF32 cut off what is beyond."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def triangle_size(channels, SIGN: tl.constexpr):
    """Free numbers in the centre of one group."""
    return channels * (channels + SIGN) // 2


@triton.jit
def triangle_row(row, SIGN: tl.constexpr):
    """Where a row of the lower triangle starts."""
    return row * (row + SIGN) // 2


@triton.jit
def triangle_offsets(rows, columns, SIGN: tl.constexpr):
    """Where the lower triangle, by rows, holds [row, column] or its mirror image."""
    low, high = tl.minimum(rows, columns), tl.maximum(rows, columns)
    return triangle_row(high, SIGN) + low


@triton.jit
def load_centre(
    triangles, group, row, column, channels, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """A tile of the centre matrix of a group, gathered from its lower triangle."""
    rows = (row + tl.arange(0, BLOCK_ROW))[:, None]
    columns = (column + tl.arange(0, BLOCK_COLUMN))[None, :]
    mask = (rows < channels) & (columns < channels)
    if SIGN < 0:
        mask = mask & (rows != columns)
    start = widen(group, WIDE) * triangle_size(channels, SIGN)
    offsets = start + triangle_offsets(rows, columns, SIGN)
    tile = tl.load(triangles + offsets, mask=mask, other=0.0)
    if SIGN < 0:
        tile = tl.where(rows < columns, -tile, tile)
    return tile
