"""The sum of many rows, in parallel over them too."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "rows"])
def sum_rows_kernel(
    partial, y, size, rows, alpha, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = alpha x the sum of the rows of partial [rows, size], float32. Of BLOCK_ROWS at once, so
    that a program waits for memory seldom; always in the same order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (offs < size)[None, :]
        offsets = row.to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.load(partial + offsets, mask=mask, other=0.0)
    total = alpha * tl.sum(acc, 0)
    tl.store(y + offs, total.to(y.dtype.element_ty), mask=offs < size)
