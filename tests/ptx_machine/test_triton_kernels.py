"""Kernels that have nothing to do with this package, compiled by Triton and executed."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx_machine import EARLY, LATE
from ptx_machine.triton_gpu import EmulatedGpu, emulated, skip_assembler
from triton_tied.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    for name, value in skip_assembler(tmp_path).items():
        monkeypatch.setenv(name, value)


@triton.jit
def softmax_kernel(x, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
    values = tl.exp2((values - tl.max(values, 0)) * 1.44269504)
    tl.store(y + row * columns + at, values / tl.sum(values, 0), mask=at < columns)


@triton.jit
def matmul_kernel(
    a, b, c, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if DESCRIPTORS:
            x = a.load([tl.program_id(0) * BLOCK_M, start])
            y = b.load([start, tl.program_id(1) * BLOCK_N])
        else:
            inner = start + tl.arange(0, BLOCK_K)
            mask = (rows < m)[:, None] & (inner < k)[None, :]
            x = tl.load(a + rows[:, None] * k + inner[None, :], mask=mask, other=0.0)
            mask = (inner < k)[:, None] & (columns < n)[None, :]
            y = tl.load(b + inner[:, None] * n + columns[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, y, acc)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(c + rows[:, None] * n + columns[None, :], acc, mask=mask)


@pytest.mark.parametrize("capability", [80, 90])
def test_softmax(capability):
    x = torch.randn(5, 100)
    y = torch.full_like(x, torch.nan)
    with emulated(EmulatedGpu(capability), softmax_kernel):
        softmax_kernel[(5,)](x, y, 100, BLOCK=128)
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-7)  # of exp2's argument


@pytest.mark.parametrize("timing", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "capability, descriptors, clusters",
    [(80, False, 1), (90, False, 1), (90, True, 1), (90, True, 2)],
)
def test_a_matrix_product(capability, descriptors, clusters, dtype, timing):
    m, n, k = 90, 72, 136
    a, b = torch.randint(-3, 4, (m, k)).to(dtype), torch.randint(-3, 4, (k, n)).to(dtype)
    c = torch.full((m, n), torch.nan)
    given = [a, b]
    if descriptors:
        given = [
            TensorDescriptor(a, [m, k], [k, 1], [64 * clusters, 32]),
            TensorDescriptor(b, [k, n], [n, 1], [32, 64]),
        ]
    with emulated(EmulatedGpu(capability, timing), matmul_kernel):
        matmul_kernel[(2 // clusters, 2)](
            *given, c, m, n, k, 64 * clusters, 64, 32, descriptors, num_stages=3, num_ctas=clusters
        )
    assert torch.equal(c, a.float() @ b.float())  # sums of small integers are exact
