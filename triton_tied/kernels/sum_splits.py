"""The sum of what several programs wrote, in order, and the end of a convolution."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "pixels", "channels", "out_h", "out_w", "stride_split", "splits", "bias_channels",
    ]
)  # fmt: skip
def sum_splits_kernel(
    partial, bias, residual, y,
    pixels, channels, out_h, out_w, stride_split,
    stride_rn, stride_rc, stride_rh, stride_rw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    splits, bias_channels, alpha, beta,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[m] = alpha (sum over splits of partial[split, m] + bias) + beta residual[m] for all pixels
    m, in the order of (N, H, W), and channels. partial: [splits, pixels, channels], float32, its
    splits stride_split apart. bias, residual: as in conv_kernel."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(channels, BLOCK_N)
    offs_m = pid // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < pixels)[:, None] & (offs_n < channels)[None, :]
    has_bias = offs_n < tl.minimum(bias_channels, channels)
    images, rows = offs_m // (out_h * out_w), offs_m // out_w % out_h
    images, rows, columns = images.to(tl.int64), rows.to(tl.int64), (offs_m % out_w).to(tl.int64)
    wide_m, wide_n = offs_m.to(tl.int64)[:, None], offs_n.to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _split in range(splits):
        acc += tl.load(partial + wide_m * channels + wide_n, mask=mask, other=0.0)
        partial += stride_split
    acc += tl.load(bias + offs_n, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    acc *= alpha
    if beta != 0.0:
        offsets = images * stride_rn + rows * stride_rh + columns * stride_rw
        offsets = offsets[:, None] + wide_n * stride_rc
        acc += beta * tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = images * stride_yn + rows * stride_yh + columns * stride_yw
    offsets = offsets[:, None] + wide_n * stride_yc
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
