"""Each asynchronous unit, early and late; each kind of race, by a fault that is planted."""

import pytest
import torch

from ptx_machine import EARLY, LATE, Fault, run
from ptx_machine.machine import Timing
from ptx_machine.memory import Allocation
from ptx_machine.snippets import (
    A_BYTES,
    B_BYTES,
    BARRIER,
    FENCE,
    FILLED,
    FROM_REGISTERS,
    MAP,
    OUT,
    PRODUCT,
    WAIT,
    program,
    stored,
)
from ptx_machine.tensor_map import TensorMap

SHARED = A_BYTES + B_BYTES
LATE_PRODUCTS = Timing(False, True, late_registers=False)

# Two warps: each thread writes its number, and reads that of a thread of the other warp.
OWN = "shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2; st.shared.b32 [%r2], %r0;"
OTHERS = (
    "xor.b32 %r3, %r0, 32; shl.b32 %r3, %r3, 2; add.u32 %r3, %r1, %r3; ld.shared.b32 %r9, [%r3];"
)
COPY = (
    "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; shl.b32 %r2, %r0, 2; "
    "add.u32 %r2, %r1, %r2; cp.async.ca.shared.global [%r2], [%rd2], 4; cp.async.commit_group;"
)
COPIED = "cp.async.wait_group 0;"


def execute(body, threads=32, out=None, shared=SHARED, timing=LATE):
    out = torch.zeros(threads * 4, dtype=torch.int32) if out is None else out
    run(program(body, threads), (1,), (out,), shared, timing)
    return out


def test_a_barrier_orders_two_warps():
    out = execute(OWN + BARRIER + OTHERS + stored("%r9"), 64)
    assert out[:64].tolist() == [thread ^ 32 for thread in range(64)]


@pytest.mark.parametrize("first, then", [(OWN, OTHERS), (OTHERS, OWN)])
def test_two_warps_without_a_barrier_race(first, then):
    with pytest.raises(Fault, match="race: .* no barrier since another warp's use"):
        execute(OWN + BARRIER * (first == OTHERS) + first + then, 64)


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_a_copy_that_was_waited_for_is_there(timing):
    numbers = torch.randint(1000, (64,), dtype=torch.int32)
    wanted = numbers.view(2, 32).flip(0).flatten()
    execute(COPY + COPIED + BARRIER + OTHERS + stored("%r9"), 64, numbers, timing=timing)
    assert torch.equal(numbers, wanted)


@pytest.mark.parametrize("lacking", [COPIED, BARRIER])
def test_a_copy_that_was_not_waited_for_is_not_there(lacking):
    numbers = torch.randint(1000, (32,), dtype=torch.int32)
    before = numbers.clone()
    read = "ld.shared.b32 %r9, [%r2];" if lacking == COPIED else OTHERS.replace("32;", "1;", 1)
    body = (COPY + COPIED + BARRIER).replace(lacking, "") + read + stored("%r9")
    execute(body, 32, numbers)
    assert not torch.equal(numbers, before) and (numbers == -1).all()  # what memory starts as


def test_only_the_groups_waited_for_land():
    second = COPY.replace("[%r2], [%rd2]", "[%r2+128], [%rd2]")
    both = "ld.shared.b32 %r8, [%r2]; ld.shared.b32 %r9, [%r2+128]; max.s32 %r9, %r8, %r9;"
    numbers = torch.full((32,), 7, dtype=torch.int32)
    execute(COPY + second + "cp.async.wait_group 1;" + BARRIER + both + stored("%r9"), 32, numbers)
    assert (numbers == 7).all()  # of the first; the second is -1 still
    execute(COPY + second + "cp.async.wait_group 1;" + BARRIER
            + "ld.shared.b32 %r9, [%r2+128];" + stored("%r9"), 32, numbers)  # fmt: skip
    assert (numbers == -1).all()


# wgmma


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_a_product_that_was_waited_for(timing):
    body = FILLED + FENCE + BARRIER + PRODUCT + WAIT + stored("%r40")
    out = execute(body, 128, timing=timing)
    assert (out[:128].view(torch.float32) == 16).all()  # ones times ones


def test_sums_are_not_there_before_the_wait():
    body = "mov.b32 %r40, 0;" + FILLED + FENCE + BARRIER + PRODUCT + stored("%r40") + WAIT
    assert (execute(body, 128, timing=EARLY)[:128].view(torch.float32) == 16).all()
    assert (execute(body, 128, timing=LATE)[:128] == 0).all()


def test_a_product_of_what_threads_wrote_needs_a_proxy_fence():
    with pytest.raises(Fault, match=r"without a fence\.proxy\.async"):
        execute(FILLED + BARRIER + PRODUCT + WAIT, 128)


def test_a_product_of_what_other_warps_wrote_needs_a_barrier():
    """Threads from 128 on write, the others multiply."""
    threads = FILLED.replace("%r0", "%r5")
    writers = f"sub.u32 %r5, %r0, 128; setp.lt.u32 %p3, %r5, 128; @!%p3 bra $L2; {threads} $L2: "
    readers = "setp.ge.u32 %p2, %r0, 128; @%p2 bra $L1;" + PRODUCT + WAIT + "$L1: mov.b32 %r6, 0;"
    with pytest.raises(Fault, match="race: .* read by wgmma with no barrier"):
        execute(writers + FENCE + readers, 256)
    execute(writers + FENCE + BARRIER + readers, 256)


def test_a_product_of_what_its_own_warps_wrote_needs_a_barrier():
    with pytest.raises(Fault, match="race: .* read by wgmma with no barrier"):
        execute(FILLED + FENCE + PRODUCT + WAIT, 128)


def test_what_a_product_read_needs_a_barrier_before_it_is_written():
    """A warp that waited knows nothing of the other three, which read the same."""
    body = FILLED + FENCE + BARRIER + PRODUCT + WAIT
    with pytest.raises(Fault, match="race: .* with no barrier since wgmma's, or"):
        execute(body + FILLED, 128)
    execute(body + BARRIER + FILLED, 128)


def test_what_a_product_has_yet_to_read_must_not_be_written():
    body = FILLED + FENCE + BARRIER + PRODUCT
    with pytest.raises(Fault, match="race: .* while wgmma has yet to read it"):
        execute(body + FILLED + WAIT, 128, timing=LATE_PRODUCTS)
    execute(body + WAIT + BARRIER + FILLED, 128, timing=LATE_PRODUCTS)


def test_registers_of_a_product_in_flight_show_when_it_reads_them_late():
    ones = "".join(f"mov.b32 %r{i}, 0x3c003c00;" for i in range(50, 54))
    twos = ones.replace("3c003c00", "40004000")
    body = FILLED + FENCE + BARRIER + ones + FROM_REGISTERS + twos + WAIT + stored("%r40")
    assert (execute(body, 128, timing=LATE_PRODUCTS)[:128].view(torch.float32) == 16).all()
    assert (execute(body, 128, timing=LATE)[:128].view(torch.float32) == 32).all()


def test_a_warp_that_is_not_whole_cannot_multiply():
    body = "setp.lt.u32 %p1, %r0, 100; @!%p1 bra $L1;" + PRODUCT + "$L1: mov.b32 %r6, 0;"
    with pytest.raises(Fault, match="not all threads"):
        execute(FILLED + FENCE + BARRIER + body, 128)


# Bulk copies

INIT = "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1+1024], 1;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+1024], 256;"
BULK = (
    "mov.b64 %rd6, map; mov.b32 %r10, 8; mov.b32 %r11, 1; "
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r1], [%rd6, {%r10, %r11}], [%r1+1024];"
)
AWAIT = (
    "{ .reg .pred complete; waitLoop: "
    "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1+1024], 0; "
    "@!complete bra.uni waitLoop; }"
)
READ = "shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2; ld.shared.b32 %r9, [%r2];"


def bulk(body, timing=LATE, threads=64):
    """A box of 4 rows of 16 floats, from column 8 and row 1 of 4 x 20, goes to shared memory."""
    image = torch.arange(80, dtype=torch.float32).view(4, 20).contiguous()
    start = image.data_ptr()
    tensor = TensorMap(Allocation(start, start + 320), start, (20, 4), (80,), (16, 4), 4, 0)
    out = torch.zeros(threads)
    text = program(body, threads, f"{OUT}, {MAP}")
    run(text, (1,), (out, tensor), 2048, timing)
    wanted = torch.zeros(4, 16)
    wanted[:3, :12] = image[1:, 8:]
    return out, wanted.flatten()


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_a_bulk_copy_is_zero_outside_of_its_tensor(timing):
    body = INIT + BARRIER + EXPECT + BULK + AWAIT + READ + stored("%r9")
    out, wanted = bulk(body, timing)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("timing", [EARLY, LATE])
@pytest.mark.parametrize(
    "use", [READ, READ.replace("ld.shared.b32 %r9, [%r2]", "st.shared.b32 [%r2], %r0")]
)
def test_a_bulk_copy_that_was_not_waited_for_must_not_be_used(use, timing):
    with pytest.raises(Fault, match="race: .* with no wait for its bulk copy"):
        bulk(INIT + BARRIER + EXPECT + BULK + use, timing)


def test_a_bulk_copy_over_what_threads_read_needs_a_proxy_fence():
    before, after = INIT + BARRIER + READ, BARRIER + EXPECT + BULK + AWAIT
    with pytest.raises(Fault, match=r"without a fence\.proxy\.async since threads used it"):
        bulk(before + after)
    bulk(before + FENCE + after)


def test_an_mbarrier_that_nobody_completes_is_a_deadlock():
    with pytest.raises(Fault, match="deadlock: 64 threads at line"):
        bulk(INIT + BARRIER + EXPECT.replace("256", "512") + BULK + AWAIT)


def test_an_mbarrier_made_by_another_warp_needs_a_barrier():
    with pytest.raises(Fault, match="mbarrier .* no barrier since another warp initialised"):
        bulk(INIT + EXPECT + BULK + AWAIT)


@pytest.mark.parametrize(
    "body, fault",
    [
        (EXPECT, "there is no mbarrier"),
        (INIT + INIT, "initialised twice"),
        (INIT + BARRIER + EXPECT + EXPECT, "more arrivals"),
        (INIT + BARRIER + EXPECT + BULK + "@%p1 mbarrier.inval.shared::cta.b64 [%r1+1024];",
         "before its copies landed"),
    ],
)  # fmt: skip
def test_mbarriers_used_wrongly(body, fault):
    with pytest.raises(Fault, match=fault):
        bulk("setp.eq.u32 %p1, %r0, 0;" + body)


def test_a_bulk_copy_must_not_write_what_a_product_has_yet_to_read():
    start = "setp.eq.u32 %p1, %r0, 0;" + FILLED.replace("%p1", "%p2")
    init = INIT.replace("1024", "4096")
    copy = (EXPECT + BULK).replace("1024", "4096")
    wait = AWAIT.replace("1024", "4096")
    before = start + init + FENCE + BARRIER + PRODUCT
    image = torch.ones(4, 20)
    tensor = TensorMap(
        Allocation(image.data_ptr(), image.data_ptr() + 320), image.data_ptr(), (20, 4), (80,),
        (16, 4), 4, 0,
    )  # fmt: skip

    def go(body):
        text = program(body, 128, f"{OUT}, {MAP}")
        run(text, (1,), (torch.zeros(1), tensor), 8192, LATE_PRODUCTS)

    with pytest.raises(Fault, match="written by a bulk copy while wgmma has yet to read it"):
        go(before + copy + WAIT + wait)
    go(before + WAIT + BARRIER + copy + wait)
