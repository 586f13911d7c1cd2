"""Kernels in Gluon: a warp-specialised product, with faults planted in it, and a multicast."""

import re

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    cluster,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ptx_machine import EARLY, LATE, Fault
from ptx_machine.machine import LATE_COPIES, LATE_PRODUCTS
from ptx_machine.triton_gpu import EmulatedGpu, emulated, skip_assembler
from triton_tied.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SIDE, STAGES = 64, 3  # of all blocks; of the ring


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    for name, value in skip_assembler(tmp_path).items():
        monkeypatch.setenv(name, value)


# A producer warp fills a ring of buffers by bulk copies; a warpgroup multiplies what is in them.


@gluon.jit
def producer(
    a_desc, b_desc, a, b, full, empty, steps,
    SIDE: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if FAULT != "does not wait for empty":
            mbarrier.wait(empty.index(stage), phase ^ 1)
        expected: gl.constexpr = (2 if FAULT == "expects one copy" else 4) * SIDE * SIDE
        mbarrier.expect(full.index(stage), expected)
        row = gl.program_id(0) * SIDE
        tma.async_copy_global_to_shared(
            a_desc, [row, step * SIDE], full.index(stage), a.index(stage)
        )
        tma.async_copy_global_to_shared(b_desc, [step * SIDE, 0], full.index(stage), b.index(stage))


@gluon.jit
def consumer(
    c, a, b, full, empty, steps,
    SIDE: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16]
    )
    acc = gl.zeros([SIDE, SIDE], gl.float32, layout)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if FAULT == "waits for the wrong phase":
            phase = phase ^ 1
        if FAULT != "does not wait for full":
            mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(a.index(stage), b.index(stage), acc, is_async=True)
        if FAULT == "arrives before the product is done":
            mbarrier.arrive(empty.index(stage), count=1)
        elif FAULT != "does not arrive":
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    rows = gl.program_id(0) * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    columns = gl.arange(0, SIDE, gl.SliceLayout(0, layout))
    gl.store(c + rows[:, None] * SIDE + columns[None, :], acc)


@gluon.jit
def matmul(a_desc, b_desc, c, steps, SIDE: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a = gl.allocate_shared_memory(gl.float16, [STAGES, SIDE, SIDE], swizzled)
    b = gl.allocate_shared_memory(gl.float16, [STAGES, SIDE, SIDE], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (consumer, (c, a, b, full, empty, steps, SIDE, STAGES, FAULT)),
            (producer, (a_desc, b_desc, a, b, full, empty, steps, SIDE, STAGES, FAULT)),
        ],
        [1],
        [24],
    )


def multiply(timing, fault="", steps=8):
    """How far two programs' product of small integers is from the exact one."""
    a = torch.randint(-3, 4, (2 * SIDE, steps * SIDE)).half()
    b = torch.randint(-3, 4, (steps * SIDE, SIDE)).half()
    c = torch.full((2 * SIDE, SIDE), torch.nan)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    given = [TensorDescriptor.from_tensor(x, [SIDE, SIDE], layout) for x in (a, b)]
    with emulated(EmulatedGpu(90, timing), matmul):
        matmul[(2,)](*given, c, steps, SIDE, STAGES, fault, num_warps=4)
    return (c - a.float() @ b.float()).abs().max().item()


@pytest.mark.parametrize("timing", [EARLY, LATE_COPIES, LATE_PRODUCTS, LATE], ids=str)
def test_a_ring_of_buffers(timing):
    steps = int(torch.randint(1, 10, ()))
    assert multiply(timing, steps=steps) == 0


@pytest.mark.parametrize("timing", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("does not arrive", "deadlock"),
        # The consumer may be done before the producer begins, which then waits for ever.
        ("does not wait for full", "deadlock|read by wgmma with no wait for its bulk copy"),
        ("waits for the wrong phase", "deadlock|read by wgmma with no wait for its bulk copy"),
        ("does not wait for empty", "more arrivals than|written by a bulk copy with no"),
        ("expects one copy", "deadlock|read by wgmma with no wait for its bulk copy"),
        ("arrives before the product is done", "written by a bulk copy .* wgmma"),
    ],
)
def test_a_planted_fault_is_found(fault, message, timing):
    with pytest.raises(Fault, match=message):
        multiply(timing, fault)


@gluon.jit
def multicast_kernel(x_desc, y_desc):
    """Two programs of a cluster get one box; each writes it to its half of ``y``."""
    halves: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, cga_layout=[[1, 0]])
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, cga_layout=[[0, 0]])
    x = gl.allocate_shared_memory(gl.float16, [64, 64], layout)
    landed = mbarrier.allocate_mbarrier()
    mbarrier.init(landed, count=1)
    mbarrier.sync_cluster_init()
    mbarrier.expect(landed, 64 * 64 * 2)
    tma.async_copy_global_to_shared(x_desc, [0, 0], landed, x, multicast=True)
    mbarrier.wait(landed, 0)
    tma.async_copy_shared_to_global(y_desc, [0, 0], x._reinterpret(gl.float16, [128, 64], halves))
    tma.store_wait(0)
    cluster.arrive()
    cluster.wait()


WITHOUT = {
    "fence.mbarrier_init": "race: the mbarrier .* another warp initialised",
    "barrier.cluster": "race: the mbarrier .* another warp initialised|there is no mbarrier",
    "mbarrier.try_wait": "race: .* no wait for its bulk copy",
    "cp.async.bulk.wait_group": "ends with no wait for a bulk store",
}


@pytest.mark.parametrize("timing", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("lacking", [None, *WITHOUT])
def test_a_multicast(lacking, timing):
    def rewrite(text):
        if lacking == "mbarrier.try_wait":
            text = text.replace("@!complete bra.uni waitLoop;", "")
        return re.sub(rf"(@%p\d+ )?{lacking}[^;]*;", "", text) if lacking else text

    x, y = torch.randn(64, 64).half(), torch.full((128, 64), torch.nan).half()
    given = [
        TensorDescriptor.from_tensor(
            tensor, list(tensor.shape), gl.NVMMASharedLayout(128, 16, 2, cga_layout=[[axis, 0]])
        )
        for axis, tensor in enumerate((x, y))
    ]
    with emulated(EmulatedGpu(90, timing, rewrite=rewrite), multicast_kernel):
        if lacking is None:
            multicast_kernel[(1,)](*given, num_ctas=2)
            assert torch.equal(y, torch.cat([x, x]))
            return
        with pytest.raises(Fault, match=WITHOUT[lacking]):
            multicast_kernel[(1,)](*given, num_ctas=2)
