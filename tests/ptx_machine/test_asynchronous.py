"""Each asynchronous unit, early and late; each kind of race, by a fault that is planted."""

import numpy as np
import pytest
import torch

from ptx_machine import EARLY, LATE, Fault, run
from ptx_machine.faults import Unsupported
from ptx_machine.machine import LATE_COPIES, Timing
from ptx_machine.matrix import Swizzling
from ptx_machine.memory import Allocation, SharedMemory
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
from ptx_machine.tensor_map import TensorMap, swizzled

SHARED = A_BYTES + B_BYTES
LATE_PRODUCTS = Timing(False, True, holds_operands=False)

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


def test_a_copy_is_not_there_for_other_threads_of_the_warp_before_a_barrier():
    numbers = torch.randint(1000, (32,), dtype=torch.int32)
    execute(COPY + COPIED + OTHERS.replace("32;", "1;", 1) + stored("%r9"), 32, numbers)
    assert (numbers == -1).all()  # what memory starts as


def test_a_copy_needs_a_barrier_before_another_warp_reads_it():
    """A barrier before the wait is none: each thread waits for its own copies only."""
    with pytest.raises(Fault, match="race: .* read with no barrier since another warp's use"):
        execute(COPY + BARRIER + COPIED + OTHERS, 64, timing=EARLY)


MINE = "ld.shared.b32 %r9, [%r2];"
SECOND = COPY.replace("[%r2], [%rd2]", "[%r2+128], [%rd2]")  # for 32 threads: elsewhere


@pytest.mark.parametrize("timing", [EARLY, LATE])
@pytest.mark.parametrize(
    "use, what",
    [
        (MINE, "read"),
        (OWN, "written"),
        (COPY, "written by a cp.async"),
        ("cp.async.wait_group 1;" + MINE, "read"),
    ],
)
def test_what_a_copy_in_flight_writes_must_not_be_used(use, what, timing):
    with pytest.raises(Fault, match=f"race: 0x400 is {what} while a cp.async in flight writes it"):
        execute(COPY + use, timing=timing)
    execute(COPY + COPIED + use, timing=timing)


def test_only_the_groups_waited_for_land():
    waited = COPY + SECOND + "cp.async.wait_group 1;" + BARRIER
    numbers = torch.full((32,), 7, dtype=torch.int32)
    execute(waited + MINE + stored("%r9"), 32, numbers)
    assert (numbers == 7).all()
    with pytest.raises(Fault, match="0x480 is read while a cp.async in flight"):
        execute(waited + MINE.replace("%r2", "%r2+128"), 32, numbers)


def test_a_copy_that_was_not_committed_is_not_waited_for():
    with pytest.raises(Fault, match="read while a cp.async in flight"):
        execute(COPY.replace("cp.async.commit_group;", "") + COPIED + MINE)


# wgmma


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_a_product_that_was_waited_for(timing):
    body = FILLED + FENCE + BARRIER + PRODUCT + WAIT + stored("%r40")
    out = execute(body, 128, timing=timing)
    assert (out[:128].view(torch.float32) == 16).all()  # ones times ones


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_sums_must_not_be_read_before_the_wait(timing):
    with pytest.raises(Fault, match="uses %r40 while a wgmma in flight does"):
        execute(FILLED + FENCE + BARRIER + PRODUCT + stored("%r40") + WAIT, 128, timing=timing)


def test_a_product_that_was_not_committed_is_not_waited_for():
    body = FILLED + FENCE + BARRIER + PRODUCT.replace("wgmma.commit_group.sync.aligned;", "") + WAIT
    with pytest.raises(Fault, match="uses %r40 while a wgmma in flight does"):
        execute(body + stored("%r40"), 128)


ZEROS = "mov.b32 %r41, 0;"
WIDER = (  # another shape: the first sums are those of PRODUCT
    PRODUCT.replace("m64n8k16", "m64n16k16")
    .replace("%r43}", "%r43, %r44, %r45, %r46, %r47}")
    .replace("wgmma.fence.sync.aligned;", "")
)
ALL_MOVED = "".join(f"mov.b32 %r{i}, %r60;" for i in range(40, 44))
NO_FENCE = PRODUCT.replace("wgmma.fence.sync.aligned;", "")
SUMS_AS_OPERAND = (
    FROM_REGISTERS.replace("%r40, %r41, %r42, %r43", "%r44, %r45, %r46, %r47")
    .replace("%r50, %r51, %r52, %r53", "%r40, %r41, %r42, %r43")
    .replace("wgmma.fence.sync.aligned;", "")
)


@pytest.mark.parametrize(
    "before, product, fault",
    [
        ("", NO_FENCE, "the first wgmma of a warpgroup"),
        (PRODUCT + WAIT + stored("%r40"), NO_FENCE, "uses %r40 with no wgmma.fence"),
        (PRODUCT + WAIT + ZEROS, NO_FENCE, "uses %r41 with no wgmma.fence"),
        (
            PRODUCT + WAIT + "mov.b32 %r60, 1;" + ALL_MOVED,
            NO_FENCE,
            "uses %r40 with no wgmma.fence",
        ),
        (PRODUCT + WAIT + ALL_MOVED, NO_FENCE, "uses %r40 with no wgmma.fence"),
        (PRODUCT + WAIT + "wgmma.fence.sync.aligned;" + ALL_MOVED, NO_FENCE, None),
        (PRODUCT + WAIT, WIDER, "uses %r40 with no wgmma.fence"),
        (PRODUCT + WAIT, SUMS_AS_OPERAND, "uses %r40 with no wgmma.fence"),
        (PRODUCT, NO_FENCE, None),  # sums of the same shape
        (PRODUCT + WAIT + "mov.b32 %r50, 0;", NO_FENCE, None),  # not a register of it
    ],
)
def test_registers_of_a_product_need_a_fence_after_another_use(before, product, fault):
    body = FILLED + FENCE + BARRIER + before
    if fault:
        with pytest.raises(Fault, match=fault):
            execute(body + product + WAIT, 128, shared=2 * SHARED)
        product = "wgmma.fence.sync.aligned;" + product
    execute(body + product + WAIT, 128, shared=2 * SHARED)


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


def test_operands_in_registers_must_not_be_used_before_the_wait():
    """The assembler may make it wait: ``holds_operands`` is for programs that count on it."""
    ones = "".join(f"mov.b32 %r{i}, 0x3c003c00;" for i in range(50, 54))
    twos = ones.replace("3c003c00", "40004000")
    body = FILLED + FENCE + BARRIER + ones + FROM_REGISTERS + twos + WAIT + stored("%r40")
    assert (execute(body, 128, timing=LATE_PRODUCTS)[:128].view(torch.float32) == 16).all()
    with pytest.raises(Fault, match="uses %r50 while a wgmma in flight does"):
        execute(body, 128, timing=LATE)


def test_a_warp_that_is_not_whole_cannot_multiply():
    body = "setp.lt.u32 %p1, %r0, 100; @!%p1 bra $L1;" + PRODUCT + "$L1: mov.b32 %r6, 0;"
    with pytest.raises(Fault, match="not all threads"):
        execute(FILLED + FENCE + BARRIER + body, 128)


# The same product of matrices whose rows of 32 bytes are swizzled, as bulk copies place them. A may
# start in the middle of the pattern, which repeats after 256 bytes.

B_START = 3072


def swizzled_product(start, base_offset, swizzling, a, b):
    """``a @ b.T``, by a descriptor of A with this base offset."""
    image = torch.zeros(4096 // 2, dtype=torch.float16)
    for matrix, at in ((a, start), (b, B_START)):
        places = swizzled(at + 2 * np.arange(matrix.numel()), 1) // 2
        image[torch.from_numpy(places)] = matrix.flatten()
    body = (
        "ld.param.b64 %rd1, [out]; mul.wide.u32 %rd3, %r0, 32; add.u64 %rd3, %rd1, %rd3; "
        "shl.b32 %r3, %r0, 5; add.u32 %r3, %r1, %r3; "
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd3]; "
        "ld.global.v4.b32 {%r8, %r9, %r10, %r11}, [%rd3+16]; "
        "st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; "
        "st.shared.v4.b32 [%r3+16], {%r8, %r9, %r10, %r11};"
    )
    for register, at, offset in (("%rd4", start, base_offset), ("%rd5", B_START, 0)):
        bits = (1024 + at) >> 4 | 256 >> 4 << 32 | offset << 49 | 3 << 62
        body += f"mov.b64 {register}, {bits};"
    product = PRODUCT[PRODUCT.index("wgmma.fence") :]
    results = "".join(f"st.global.b32 [%rd3+{4 * i}], %r{40 + i};" for i in range(4))
    text = program(body + FENCE + BARRIER + product + WAIT + results, 128)
    run(text, (1,), (image,), 4096, swizzling=swizzling)
    sums = image.view(torch.float32).view(4, 8, 4, 8)[..., :4]  # warp, row, quad, half and element
    return sums.unflatten(-1, (2, 2)).permute(0, 3, 1, 2, 4).reshape(64, 8)


@pytest.mark.parametrize("swizzling", Swizzling)
@pytest.mark.parametrize(
    "start, base_offset", [(0, 0), (128, 1), (256, 2), (128, 3), (256, 0), (128, 0), (0, 1)]
)
def test_readings_of_the_base_offset(start, base_offset, swizzling):
    """They differ where it is not that of the start address: then, of this swizzle, A has its
    halves of rows exchanged."""
    a, b = torch.randint(-3, 4, (64, 16)).half(), torch.randint(-3, 4, (8, 16)).half()
    product = swizzled_product(start, base_offset, swizzling, a, b)
    differs = (base_offset - start // 128) % 2 and swizzling is Swizzling.BY_BASE_OFFSET
    assert torch.equal(product, (a.roll(8, 1) if differs else a).float() @ b.float().T)


def test_a_base_offset_needs_a_swizzle():
    body = PRODUCT.replace("wgmma.fence", f"add.u64 %rd4, %rd4, {1 << 49}; wgmma.fence")
    with pytest.raises(Unsupported, match="wgmma.mma_async.* a base offset without a swizzle"):
        execute(FILLED + FENCE + BARRIER + body, 128)


def test_products_of_tf32_cut_off_the_lowest_13_bits():
    """Of integers with other lowest bits the product is that of the integers."""
    a, b = (int(n) for n in torch.randint(1, 100, (2,)))
    bits = []
    for number in (a, b):
        whole = int(torch.tensor(float(number)).view(torch.int32))
        bits.append(whole | int(torch.randint(1, 2**13, ())))
    moves = "".join(
        f"mov.b32 %r{i}, {bits[0]}; mov.b32 %r{i + 4}, {bits[1]};" for i in range(50, 54)
    )
    wgmma = "k8.f32.tf32.tf32"
    filled = FILLED.replace("mov.b32 %r2, 0x3c003c00;", f"mov.b32 %r2, {bits[0]};")
    filled = filled.replace("@%p1 st", f"mov.b32 %r2, {bits[1]}; @%p1 st")
    warps = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r40, %r41, %r42, %r43}, "
        "{%r50, %r51, %r52, %r53}, {%r54, %r55}, {%r36, %r36, %r36, %r36};"
    )
    shared = PRODUCT.replace("k16.f32.f16.f16", wgmma).replace("1, 1, 0, 0;", "1, 1;")
    registers = FROM_REGISTERS.replace("k16.f32.f16.f16", wgmma).replace("1, 1, 0;", "1, 1;")
    for product in ("mov.b32 %r36, 0;" + warps, shared + WAIT, registers + WAIT):
        out = execute(moves + filled + FENCE + BARRIER + product + stored("%r40"), 128)
        assert (out[:128].view(torch.float32) == 8 * a * b).all()


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


BOTH = EXPECT.replace("256", "512") + BULK + BULK.replace("[%r1]", "[%r1+256]") + AWAIT
REVERSE = Timing(True, False, reverse_copies=True)


@pytest.mark.parametrize("timing", [EARLY, LATE_COPIES, REVERSE])
def test_two_bulk_copies_in_flight_must_not_write_one_place(timing):
    with pytest.raises(Fault, match="written by a bulk copy with no wait for the last one there"):
        bulk(INIT + BARRIER + BOTH.replace("[%r1+256]", "[%r1]"), timing)


@pytest.mark.parametrize("timing, order", [(LATE_COPIES, [0, 1]), (REVERSE, [1, 0])])
def test_copies_land_in_either_order(timing, order, monkeypatch):
    landed, store = [], SharedMemory.store

    def spy(self, programs, addresses, words):
        landed.append(int(addresses[0]))
        store(self, programs, addresses, words)

    monkeypatch.setattr(SharedMemory, "store", spy)
    out, wanted = bulk(INIT + BARRIER + BOTH + READ + stored("%r9"), timing)
    assert torch.equal(out, wanted) and landed == [1024 + 256 * i for i in order]
    landed.clear()
    execute(COPY + SECOND + COPIED + BARRIER, timing=timing)
    assert landed == [1024 + 128 * i for i in order]


def test_a_bulk_copy_over_what_threads_read_needs_a_proxy_fence():
    before, after = INIT + BARRIER + READ, BARRIER + EXPECT + BULK + AWAIT
    with pytest.raises(Fault, match=r"without a fence\.proxy\.async since threads used it"):
        bulk(before + after)
    bulk(before + FENCE + after)


@pytest.mark.parametrize("timing", [EARLY, LATE])
def test_a_program_must_not_end_before_its_bulk_copies_have_landed(timing):
    """What comes next into its shared memory would be overwritten."""
    body = INIT + BARRIER + EXPECT + BULK
    bulk(body + AWAIT, timing)
    with pytest.raises(Fault, match="ends with no wait for a bulk copy"):
        bulk(body, timing)
    again = BARRIER + EXPECT + BULK.replace("[%r1]", "[%r1+256]")
    with pytest.raises(Fault, match="ends with no wait for a bulk copy"):
        bulk(body + AWAIT + again, timing)
    bulk(body + AWAIT + again + AWAIT.replace(", 0;", ", 1;"), timing)


def test_an_mbarrier_that_nobody_completes_is_a_deadlock():
    with pytest.raises(Fault, match="deadlock: 64 threads at line"):
        bulk(INIT + BARRIER + EXPECT.replace("256", "512") + BULK + AWAIT)


def test_an_mbarrier_made_by_another_warp_needs_a_barrier():
    with pytest.raises(Fault, match="mbarrier .* no barrier since another warp initialised"):
        bulk(INIT + EXPECT + BULK + AWAIT)


def test_a_bulk_copy_must_not_write_over_an_mbarrier():
    with pytest.raises(Fault, match="written by a bulk copy though an mbarrier lies there"):
        bulk(INIT + BARRIER + EXPECT + BULK.replace("[%r1]", "[%r1+896]"))


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
