"""Global memory that two programs of one launch use, one of them writing."""

import pytest
import torch

from ptx_machine import Fault, run
from ptx_machine.memory import Allocation
from ptx_machine.snippets import FENCE, MAP, OUT, program
from ptx_machine.tensor_map import TensorMap
from ptx_machine.test_asynchronous import AWAIT, BARRIER, BULK, EXPECT, INIT

# %rd2 points at 4 bytes of each thread: %r4 of them, a multiple of 32, from `out` on.
POINT = (
    "mov.u32 %r2, %ctaid.x; {where} add.u32 %r4, %r4, %r0; "
    "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r4, 4, %rd1;"
)
OWN = POINT.format(where="shl.b32 %r4, %r2, 5;")
FIRST = POINT.format(where="mov.b32 %r4, 0;")
OTHERS = POINT.format(where="xor.b32 %r4, %r2, 1; shl.b32 %r4, %r4, 5;")
LOAD, STORE = "ld.global.b32 %r9, [%rd2];", "st.global.b32 [%rd2], %r0;"


def launch(body, together, programs=2):
    """Programs side by side, or one after the other."""
    out = torch.zeros(32 * programs, dtype=torch.int32)
    lanes = 32 * programs if together else 32
    run(program(body), (programs,), (out,), 0, most_lanes=lanes)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "body, what",
    [
        (FIRST + STORE, "written by program . of the launch and written by program"),
        (OWN + STORE + OTHERS + LOAD, "written by program"),
        (OTHERS + LOAD + OWN + STORE, "read by program"),
        (FIRST + LOAD + STORE, "by"),
    ],
)
def test_programs_that_use_the_same_memory_race(body, what, together):
    with pytest.raises(Fault, match=f"race: global 0x.* {what}"):
        launch(body, together)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("body", [FIRST + LOAD, OWN + LOAD + STORE + LOAD, FIRST + LOAD + LOAD])
def test_programs_may_read_the_same_memory_and_write_their_own(body, together):
    launch(body, together)


def test_one_of_many_readers_writes():
    """The one that was the last to read."""
    last = "setp.eq.u32 %p1, %r2, 3; @%p1 "
    with pytest.raises(Fault, match="written by program 3 of the launch and read by several"):
        launch(FIRST + LOAD + last + STORE, True, programs=4)


def test_views_of_one_tensor_are_one_memory():
    buffer = torch.zeros(64, dtype=torch.int32)
    body = (
        "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; ld.param.b64 %rd1, [a]; "
        "@%p1 ld.param.b64 %rd1, [b]; mad.wide.u32 %rd2, %r0, 4, %rd1;" + STORE
    )
    text = program(body, parameters=".param .u64 a, .param .u64 b")
    run(text, (2,), (buffer[:32], buffer[32:]), 0)
    with pytest.raises(Fault, match="race: global"):
        run(text, (2,), (buffer[:33], buffer[31:]), 0)


def test_what_a_bulk_copy_reads_is_not_written_by_another_program():
    """It reads columns 8 to 19 from row 1 on."""
    image = torch.zeros(4, 20)
    start = image.data_ptr()
    tensor = TensorMap(Allocation(start, start + 320, 4), start, (20, 4), (80,), (16, 4), 4, 0)
    write = (
        "mov.u32 %r2, %ctaid.x; mul.lo.u32 %r2, %r2, %r0; setp.eq.u32 %p2, %r2, {thread}; "
        "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; @%p2 " + STORE
    )

    def go(thread):
        body = INIT + BARRIER + EXPECT + BULK + AWAIT + write.replace("{thread}", str(thread))
        run(program(body, 64, f"{OUT}, {MAP}"), (2,), (image, tensor), 2048)

    for thread in (27, 40, 47):
        go(thread)
    for thread in (28, 39, 48):
        with pytest.raises(Fault, match="race: global .* by program 1 .* read by several"):
            go(thread)


REDUCE = (
    "setp.eq.u32 %p1, %r0, 0; mov.b32 %r10, 1; "
    "@%p1 st.shared.v4.b32 [%r1], {%r10, %r10, %r10, %r10};" + FENCE + "ld.param.b64 %rd1, [out]; "
    "@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%rd1], [%r1], 16; "
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
)


@pytest.mark.parametrize("together", [True, False])
def test_programs_may_reduce_in_one_place_that_no_other_uses(together):
    """The second half of the programs reads, or writes, the last of the four numbers."""
    lanes = 128 if together else 32
    out = torch.zeros(128, dtype=torch.int32)
    run(program(REDUCE), (4,), (out,), 16, most_lanes=lanes)
    assert out[:5].tolist() == [4, 4, 4, 4, 0]
    second = "mov.u32 %r2, %ctaid.x; setp.ge.u32 %p2, %r2, 2; @%p2 bra $L1;" + REDUCE + "ret; $L1: "
    for use in (LOAD, STORE):
        for first, races in ((4, False), (3, True)):
            at = (
                f"add.u32 %r4, %r2, {first - 2}; ld.param.b64 %rd1, [out]; setp.eq.u32 %p3, %r0, 0;"
            )
            body = second + at + "mad.wide.u32 %rd2, %r4, 4, %rd1; @%p3 " + use
            if races:
                with pytest.raises(Fault, match="race: global 0x.* reduc"):
                    run(program(body), (4,), (out,), 16, most_lanes=lanes)
            else:
                run(program(body), (4,), (out,), 16, most_lanes=lanes)
