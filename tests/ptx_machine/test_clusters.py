"""Programs of a cluster: each other's memory and mbarriers, their barrier, multicast."""

import pytest
import torch

from ptx_machine import EARLY, LATE, Fault, run
from ptx_machine.faults import Unsupported
from ptx_machine.memory import Allocation
from ptx_machine.snippets import BARRIER, MAP, OUT, program
from ptx_machine.tensor_map import TensorMap

BOTH = pytest.mark.parametrize("timing", [EARLY, LATE], ids=["early", "late"])

# %r30 is a program's rank in its cluster of two, %r31 that of the other; %r32 and %r33 are where
# the memory of the other starts, and of rank 0. Each thread's word is at %r2, its number all over
# %r20.
START = """mov.u32 %r30, %cluster_ctarank; xor.b32 %r31, %r30, 1; mov.b32 %r29, 0;
    mapa.shared::cluster.u32 %r32, %r1, %r31; mapa.shared::cluster.u32 %r33, %r1, %r29;
    mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x; mad.lo.u32 %r20, %r3, %r4, %r0;
    shl.b32 %r2, %r0, 2; add.u32 %r5, %r32, %r2; add.u32 %r2, %r1, %r2;
    setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r30, 0; setp.eq.u32 %p3, %r30, 1;
    and.pred %p4, %p1, %p2; and.pred %p5, %p1, %p3;"""
WRITE, READ = "st.shared.b32 [%r2], %r20;", "ld.shared.b32 %r9, [%r2];"
WRITE_OTHER = "st.shared::cluster.b32 [%r5], %r20;"
READ_OTHER = "ld.shared::cluster.b32 %r9, [%r5];"
STORE = "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r20, 4, %rd1; st.global.b32 [%rd2], %r9;"
ARRIVE, WAIT = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
SYNC = ARRIVE + WAIT
RELAXED = "barrier.cluster.arrive.relaxed.aligned;" + WAIT
FENCE_INIT = "fence.mbarrier_init.release.cluster;"


def execute(body, timing=LATE, threads=64, programs=4):
    out = torch.full((threads * programs,), -1, dtype=torch.int32)
    text = program(START + body, threads, directives=".reqnctapercluster 2")
    run(text, (programs,), (out,), 2048, timing)
    return out


def others(threads=64, programs=4):
    numbers = torch.arange(threads * programs, dtype=torch.int32).view(-1, 2, threads)
    return numbers.flip(1).flatten()


@pytest.mark.parametrize("first, then", [(WRITE, READ_OTHER), (WRITE_OTHER, READ)])
def test_programs_of_a_cluster_use_each_others_memory(first, then):
    out = execute(first + SYNC + then + STORE + SYNC)
    assert torch.equal(out, others())


@pytest.mark.parametrize(
    "body",
    [
        WRITE + READ_OTHER,
        WRITE_OTHER + READ,
        WRITE + BARRIER + READ_OTHER,  # the barrier of a program
        WRITE + RELAXED + READ_OTHER,
        ARRIVE + WRITE + WAIT + READ_OTHER,
        ARRIVE + WRITE_OTHER + WAIT + READ,
        WRITE + SYNC + READ_OTHER + WRITE,
    ],
)
def test_without_the_clusters_barrier_they_race(body):
    with pytest.raises(Fault, match="race: .* no barrier since another warp's use"):
        execute(body + SYNC)


@pytest.mark.parametrize(
    "body, fault",
    [
        (WAIT, "without an arrival"),
        (ARRIVE + ARRIVE, "again with no wait"),
        ("setp.lt.u32 %p6, %r0, 32; @!%p6 bra $L1;" + SYNC + "$L1: mov.b32 %r6, 0;" + BARRIER,
         "deadlock"),
        (SYNC + "@%p2 bra $L1;" + "bra $L2; $L1: ret; $L2: " + BARRIER
         + READ_OTHER, "memory of a program that has ended"),
        ("mov.b32 %r29, 2; mapa.shared::cluster.u32 %r33, %r1, %r29;", "no program 2"),
        (READ_OTHER.replace("::cluster", ""), "outside of the program's memory"),
    ],
)  # fmt: skip
def test_clusters_used_wrongly(body, fault):
    with pytest.raises(Fault, match=fault):
        execute(body)


def test_a_grid_is_made_of_whole_clusters():
    with pytest.raises(Fault, match="3 programs in clusters of 2"):
        execute(SYNC, programs=3)


@pytest.mark.parametrize(
    "instruction",
    [
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5], %r0, [%r33];",
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], 0;",
        "mbarrier.arrive_drop.shared::cta.b64 _, [%r1];",
        "barrier.cta.red.popc.u32 %r2, 1, %p1;",
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];",
    ],
)
def test_what_is_not_known_is_refused_with_its_line(instruction):
    with pytest.raises(Unsupported, match=r"line \d+: " + instruction[:10].replace(".", r"\.")):
        execute(instruction)


# Rank 1 writes into the memory of rank 0, and arrives at its mbarrier.

INIT = "@%p4 mbarrier.init.shared::cta.b64 [%r1+1024], 64;" + FENCE_INIT + RELAXED
WRITE_ZERO = "@%p3 st.shared::cluster.b32 [%r5], %r20;"
ARRIVE_ZERO = "@%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r33+1024];"
AWAIT = """@%p3 bra $Done; { .reg .pred complete; waitLoop:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%r1+1024], 0;
    @!complete bra.uni waitLoop; }"""
DONE = "$Done: mov.b32 %r6, 0;"


@BOTH
def test_an_arrival_at_the_mbarrier_of_another_program(timing):
    out = execute(INIT + WRITE_ZERO + ARRIVE_ZERO + AWAIT + READ + STORE + DONE + SYNC, timing)
    assert torch.equal(out.view(-1, 64)[::2], others().view(-1, 64)[::2])
    assert (out.view(-1, 64)[1::2] == -1).all()


@pytest.mark.parametrize(
    "body, fault",
    [
        (INIT.replace(FENCE_INIT, "") + ARRIVE_ZERO + AWAIT + DONE, "another warp initialised it"),
        (INIT.replace(RELAXED, BARRIER) + ARRIVE_ZERO + AWAIT + DONE, "another warp initialised|"
         "no mbarrier"),
        (INIT + ARRIVE_ZERO + WRITE_ZERO + AWAIT + READ + DONE, "race"),
        (INIT + WRITE_ZERO + AWAIT + READ + DONE, "deadlock"),
        # Thread 1 fences what thread 0 has initialised.
        (INIT.replace(FENCE_INIT, "setp.eq.u32 %p6, %r0, 1; @%p6 " + FENCE_INIT), "another thread"),
        ("@%p5 mbarrier.init.shared::cta.b64 [%r33+1024], 64;", "mbarrier of another program"),
        (INIT + AWAIT.replace("@%p3 bra", "@%p2 bra").replace("[%r1", "[%r33") + DONE,
         "mbarrier of another program"),
    ],
)  # fmt: skip
def test_mbarriers_of_other_programs_used_wrongly(body, fault):
    with pytest.raises(Fault, match=fault):
        execute(body + SYNC)


@BOTH
def test_a_program_must_not_end_before_what_others_tell_it(timing):
    """Which of the two comes first nobody knows."""
    execute(INIT + ARRIVE_ZERO + AWAIT + DONE, timing)
    execute(INIT + ARRIVE_ZERO + SYNC, timing)  # at this barrier all arrivals have come
    with pytest.raises(Fault, match="ends with no wait for .* the arrival of another program"):
        execute(INIT + ARRIVE_ZERO, timing)
    with pytest.raises(Fault, match="memory of a program that has ended"):
        execute(INIT + "@%p2 bra $Done;" + SYNC + ARRIVE_ZERO + DONE, timing)


# Each rank gives both a half of a box of 16 rows of 16 floats.

READY = (
    "@%p1 mbarrier.init.shared::cta.b64 [%r1+1024], 1;" + FENCE_INIT + RELAXED
    + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+1024], 1024;"
)  # fmt: skip
MULTICAST = """mov.b64 %rd6, map; mov.b32 %r10, 0; shl.b32 %r11, %r30, 3; mov.b16 %rs1, 3;
    shl.b32 %r12, %r30, 9; add.u32 %r12, %r12, %r1;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    .multicast::cluster [%r12], [%rd6, {%r10, %r11}], [%r1+1024], %rs1;""".replace("\n    .", ".")
ARRIVED = """{ .reg .pred complete; waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1+1024], 0;
    @!complete bra.uni waitLoop; }"""


def multicast(body, timing=LATE):
    image = torch.randn(16, 16)
    start = image.data_ptr()
    tensor = TensorMap(Allocation(start, start + 1024), start, (16, 16), (64,), (16, 8), 4, 0)
    out = torch.zeros(4 * 256)
    text = program(START + body, 256, f"{OUT}, {MAP}", directives=".reqnctapercluster 2")
    run(text, (4,), (out, tensor), 2048, timing)
    return out.view(4, 256), image.flatten()


@BOTH
def test_a_multicast_lands_in_all_programs(timing):
    out, image = multicast(READY + MULTICAST + ARRIVED + READ + STORE + SYNC, timing)
    assert (out == image).all()


@BOTH
@pytest.mark.parametrize(
    "body, fault",
    [
        (READY + MULTICAST.replace(", 3;", ", 7;") + ARRIVED, "multicast to 0x7"),
        (READY + MULTICAST.replace("%rs1, 3", "%rs1, 1") + ARRIVED, "deadlock"),
        # The other program may still read what is multicast over.
        (READY + MULTICAST + ARRIVED + READ + "fence.proxy.async;" + BARRIER + MULTICAST + SYNC,
         "no wait for the last one there"),
        (READY + "@%p3 bra $Done;" + SYNC + MULTICAST + "$Done: ret;",
         "memory of a program that has ended"),
    ],
)  # fmt: skip
def test_multicasts_used_wrongly(body, fault, timing):
    with pytest.raises(Fault, match=fault):
        multicast(body + SYNC, timing)
