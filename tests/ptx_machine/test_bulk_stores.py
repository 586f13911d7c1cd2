"""Bulk copies and reductions from shared to global memory."""

import pytest
import torch

from ptx_machine import EARLY, LATE, Fault, run
from ptx_machine.memory import Allocation
from ptx_machine.snippets import BARRIER, FENCE, MAP, OUT, program
from ptx_machine.tensor_map import TensorMap

BOTH = pytest.mark.parametrize("timing", [EARLY, LATE], ids=["early", "late"])
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int32: "s32"}

# 64 threads read 16 bytes each of ``out`` and write them to shared memory: 1024 bytes.
FILL = (
    "setp.eq.u32 %p1, %r0, 0; ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 16, %rd1; "
    "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd2]; shl.b32 %r2, %r0, 4; "
    "add.u32 %r2, %r1, %r2; st.shared.v4.b32 [%r2], {%r10, %r11, %r12, %r13};"
)
READY = FILL + FENCE + BARRIER
COMMIT = "cp.async.bulk.commit_group;"
READ, DONE = "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"


def store(row, column, what="cp.async", reduction=""):
    return (
        f"mov.b64 %rd6, map; mov.b32 %r14, {column}; mov.b32 %r15, {row}; "
        f"@%p1 {what}.bulk.tensor.2d.global.shared::cta{reduction}.tile.bulk_group "
        "[%rd6, {%r14, %r15}], [%r1];"
    )


def execute(body, image, box, timing=LATE):
    """``box`` lies in ``out``; ``image`` is what the tensor map describes, in boxes of 8 rows."""
    rows, columns = image.shape
    start, size = image.data_ptr(), image.element_size()
    tensor = TensorMap(
        Allocation(start, start + image.numel() * size), start, (columns, rows),
        (columns * size,), (128 // size, 8), size, 3, KINDS[image.dtype],
    )  # fmt: skip
    out = box.view(torch.int32).clone()
    run(program(body, 64, f"{OUT}, {MAP}"), (1,), (out, tensor), 1024, timing)


def swizzled(box):
    """A box of 8 rows of 128 bytes as it lies in memory: 16 bytes, by the row that they are in."""
    chunks = box.view(8, 8, -1)
    return torch.stack([chunks[i, torch.arange(8) ^ i] for i in range(8)]).view(8, -1)


@BOTH
@pytest.mark.parametrize("row, column", [(2, 8), (-3, 4), (9, -16), (-20, 0), (0, 100)])
def test_a_store_leaves_away_what_is_outside(row, column, timing):
    image, box = torch.randn(12, 40), torch.randn(8, 32)
    wanted = torch.nn.functional.pad(image, (64, 128, 64, 64))
    if column < 100 and row > -8:
        wanted[64 + row : 72 + row, 64 + column : 96 + column] = box
    execute(READY + store(row, column) + COMMIT + READ, image, swizzled(box), timing)
    assert torch.equal(image, wanted[64:76, 64:104])


@BOTH
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("operation", ["add", "min", "max"])
def test_a_reduction(operation, dtype, timing):
    columns = 128 // torch.empty(0, dtype=dtype).element_size()
    image = torch.randint(-9, 9, (8, columns)).to(dtype)
    box = torch.randint(-9, 9, (8, columns)).to(dtype)
    function = {"add": torch.add, "min": torch.minimum, "max": torch.maximum}[operation]
    wanted = function(function(image, box), box)
    twice = store(0, 0, "cp.reduce.async", f".{operation}") * 2
    execute(READY + twice + COMMIT + READ, image, swizzled(box), timing)
    assert torch.equal(image, wanted)


@BOTH
def test_rows_of_bytes_go_both_ways(timing):
    """Without a tensor map: to shared memory, back, and added."""
    numbers = torch.randn(64)
    bar = "[%r1+1024]"
    body = f"""setp.eq.u32 %p1, %r0, 0; ld.param.b64 %rd1, [out];
        @%p1 mbarrier.init.shared::cta.b64 {bar}, 1; {BARRIER}
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, {bar}, 128;
        @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes
            [%r1], [%rd1], 128, {bar};
        {{ .reg .pred complete; waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 complete, {bar}, 0;
        @!complete bra.uni waitLoop; }}
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1+128], [%r1], 64;
        @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32
            [%rd1+192], [%r1], 64; {COMMIT} {READ}"""
    wanted = torch.cat([numbers[:32], numbers[:16], numbers[48:] + numbers[:16]])
    run(program(body, 64), (1,), (numbers,), 1032, timing)
    assert torch.equal(numbers, wanted)


def test_only_the_full_wait_says_that_global_memory_is_written():
    """The first of three rows goes to the second, which is then read and written to the third."""

    def third(wait, timing):
        numbers = torch.arange(96, dtype=torch.int32)
        body = f"""setp.eq.u32 %p1, %r0, 0; ld.param.b64 %rd1, [out];
            mad.wide.u32 %rd2, %r0, 4, %rd1; shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2;
            ld.global.b32 %r9, [%rd2]; st.shared.b32 [%r2], %r9; {FENCE} {BARRIER}
            @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1+128], [%r1], 128;
            {COMMIT} {wait} ld.global.b32 %r8, [%rd2+128]; st.global.b32 [%rd2+256], %r8;"""
        run(program(body), (1,), (numbers,), 128, timing)
        assert numbers[32:64].tolist() == list(range(32))
        return numbers[64:].tolist()

    new, old = list(range(32)), list(range(32, 64))
    assert third(DONE, LATE) == third(DONE, EARLY) == third(READ, EARLY) == new
    assert third(READ, LATE) == old


@BOTH
@pytest.mark.parametrize(
    "body, fault",
    [
        (FILL + BARRIER + store(0, 0) + COMMIT + READ, r"without a fence\.proxy\.async"),
        (FILL + FENCE + store(0, 0) + COMMIT + READ, "read by a bulk store with no barrier"),
        (READY + store(0, 0) + COMMIT + FILL + READ, "while a bulk store has yet to read it"),
        (READY + store(0, 0) + COMMIT + READ + FILL, "no barrier since .* a bulk store's, use"),
        (READY + store(0, 0) + READ + COMMIT + BARRIER + FILL, "has yet to read it"),
        (READY + (store(0, 0) + COMMIT) * 2 + READ.replace("0", "1") + BARRIER + FILL,
         "has yet to read it"),
        (READY + store(0, 0) + COMMIT, "ends with no wait for a bulk store"),
        (READY + store(0, 0) + READ, "ends with no wait for a bulk store"),
        (READY + store(0, 0).replace("[%r1]", "[%r1+64]") + COMMIT + READ, "not aligned to 128"),
        (READY + store(0, 0, "cp.reduce.async", ".xor") + COMMIT + READ, "reduction xor of f32"),
    ],
)  # fmt: skip
def test_stores_used_wrongly(body, fault, timing):
    with pytest.raises(Fault, match=fault):
        execute(body, torch.zeros(8, 32), torch.randn(8, 32), timing)


@BOTH
def test_a_buffer_may_be_written_again_after_the_wait_and_a_barrier(timing):
    image, box = torch.zeros(16, 32), torch.randn(8, 32)
    once = store(0, 0) + COMMIT + READ + BARRIER
    doubled = "".join(f"add.f32 %r{i}, %r{i}, %r{i};" for i in range(10, 14))
    twos = FILL.replace("st.shared", doubled + "st.shared")
    twos = twos.replace("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd2];", "")
    again = twos + FENCE + BARRIER + store(8, 0) + COMMIT + READ
    execute(READY + once + again, image, swizzled(box), timing)
    assert torch.equal(image, torch.cat([box, 2 * box]))
