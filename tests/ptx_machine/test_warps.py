"""Warps that take different ways and synchronise in part: named barriers, mbarriers, registers."""

import pytest
import torch

from ptx_machine import EARLY, LATE, Fault, run
from ptx_machine.snippets import BARRIER, program, roles, stored

# 128 bytes of shared memory: each thread of a warp writes %r20, at first its number, or reads.
AT = "and.b32 %r2, %r0, 31; shl.b32 %r2, %r2, 2; add.u32 %r2, %r1, %r2;"
WRITE, READ = AT + "st.shared.b32 [%r2], %r20;", AT + "ld.shared.b32 %r9, [%r2];"


def execute(body, threads=64, timing=LATE, directives="", shared=2048):
    out = torch.full((threads,), -1, dtype=torch.int32)
    body = "mov.b32 %r20, %r0;" + body
    run(program(body, threads, directives=directives), (1,), (out,), shared, timing)
    return out


def sync(number, threads=64):
    return f"bar.sync {number}, {threads};"


def arrive(number, threads=64):
    return f"bar.arrive {number}, {threads};"


# Named barriers


def test_a_barrier_of_some_warps_orders_these():
    out = execute(roles(WRITE + arrive(1), sync(1) + READ + stored("%r9")))
    assert out[32:].tolist() == list(range(32))


@pytest.mark.parametrize(
    "one, two, three",
    [
        (WRITE + sync(1), sync(1), READ),  # the third took no part
        (arrive(1) + READ, WRITE + sync(1), ""),  # who only arrives waits for nobody
        (arrive(1) + WRITE, sync(1) + READ, ""),  # what comes after the arrival
        (WRITE + arrive(1), sync(2, 32) + READ, sync(1)),  # another barrier
    ],
)
def test_a_barrier_of_some_warps_orders_no_others(one, two, three):
    with pytest.raises(Fault, match="race: .* no barrier since another warp's use"):
        execute(roles(one, two, three), 96)


def test_order_passes_from_barrier_to_barrier():
    body = roles(WRITE + arrive(1), sync(1) + arrive(2), sync(2) + READ + stored("%r9"))
    assert execute(body, 96)[64:].tolist() == list(range(32))


def test_a_buffer_that_is_filled_and_emptied_in_turns():
    """As in the manual's example: who waits for a barrier and who only arrives takes turns."""
    fill = "add.u32 %r20, %r20, 100;" + sync(2) + WRITE + arrive(1)
    drain = sync(1) + READ + arrive(2) + "add.u32 %r8, %r8, %r9;"
    bodies = fill * 3, "mov.b32 %r8, 0;" + arrive(2) + drain * 2 + sync(1) + READ
    total = "add.u32 %r8, %r8, %r9;" + stored("%r8")
    out = execute(roles(bodies[0], bodies[1] + total))
    assert out[32:].tolist() == [600 + 3 * thread for thread in range(32)]
    with pytest.raises(Fault, match="race"):
        execute(roles(bodies[0].replace(sync(2) + WRITE, WRITE + sync(2)), bodies[1]))


def test_the_number_of_a_barrier_may_come_from_a_register():
    body = "add.u32 %r3, %r0, 1; mov.b32 %r4, 3;"
    barrier = "barrier.sync %r4, 64;"
    out = execute(body + roles(WRITE + barrier, barrier + READ + stored("%r9")))
    assert out[32:].tolist() == list(range(32))


@pytest.mark.parametrize(
    "one, two, fault",
    [
        (sync(16), sync(16), "barrier 16"),
        (sync(1, 48), sync(1, 48), "of 48 threads"),
        (sync(1, 96), sync(1, 96), "of 96 threads"),
        (arrive(1) + sync(1), "", "again before it is complete"),
        (arrive(1), sync(1, 32), "another number of threads"),
        (sync(1), "", "deadlock"),
        ("setp.eq.u32 %p1, %r0, 5; @%p1 bra $L1;" + sync(1) + "$L1: mov.b32 %r5, 0;", "",
         "not all threads of a warp"),
    ],
)  # fmt: skip
def test_barriers_used_wrongly(one, two, fault):
    with pytest.raises(Fault, match=fault):
        execute(roles(one, two))


def test_an_indexed_branch():
    body = """rem.u32 %r3, %r0, 3; $Table: .branchtargets $A, $B, $C; brx.idx %r3, $Table;
        $A: mov.b32 %r9, 7; bra $End; $B: mov.b32 %r9, 8; bra $End; $C: mov.b32 %r9, 9;
        $End: mov.b32 %r4, 0;"""
    out = execute(body + stored("%r9"))
    assert out.tolist() == [7 + thread % 3 for thread in range(64)]
    with pytest.raises(Fault, match="no target 3 of 3"):
        execute(body.replace("rem.u32 %r3, %r0, 3;", "rem.u32 %r3, %r0, 4;"))


# Proxy fences, between a warp that writes and one whose bulk copy reads: anywhere between the two

FENCE = "fence.proxy.async;"
STORE = (
    "setp.eq.u32 %p3, %r2, %r1; ld.param.b64 %rd1, [out]; "
    "@%p3 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 128; "
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
)


@pytest.mark.parametrize(
    "one, two, three",
    [
        (WRITE + FENCE + arrive(1), sync(1) + AT + STORE, ""),
        (WRITE + arrive(1), sync(1) + FENCE + AT + STORE, ""),
        (WRITE + arrive(1), sync(1) + FENCE + arrive(2), sync(2) + AT + STORE),
    ],
)
def test_a_fence_on_the_way_lets_a_bulk_copy_read(one, two, three):
    assert execute(roles(one, two, three), 96)[:32].tolist() == list(range(32))


@pytest.mark.parametrize(
    "one, two, three",
    [
        (WRITE + arrive(1), sync(1) + AT + STORE, ""),
        (FENCE + WRITE + arrive(1), sync(1) + AT + STORE, ""),
        (WRITE + arrive(1) + FENCE, sync(1) + AT + STORE, ""),
        (WRITE + arrive(1), sync(1) + AT + STORE, FENCE),
        (WRITE + arrive(1), FENCE + sync(1) + AT + STORE, ""),
    ],
)
def test_a_fence_elsewhere_does_not(one, two, three):
    with pytest.raises(Fault, match=r"without a fence\.proxy\.async"):
        execute(roles(one, two, three), 96)


# setmaxnreg: two warpgroups of 128 threads, each with 64 registers at first


def registers(one, two="", three=""):
    return execute(roles(one, two, three, threads=128), 256, directives=".maxnreg 64")


def inc(number):
    return f"setmaxnreg.inc.sync.aligned.u32 {number};"


def dec(number):
    return f"setmaxnreg.dec.sync.aligned.u32 {number};"


def test_registers_pass_from_one_warpgroup_to_the_other():
    registers(inc(104), dec(24))  # the first waits for the second
    registers(dec(24), inc(104))
    both = sync(1, 256)
    registers(inc(104) + both + dec(64), dec(24) + both + inc(64))


@pytest.mark.parametrize(
    "one, two, fault",
    [
        (inc(112), dec(24), "deadlock"),
        (inc(96), inc(96), "deadlock"),
        (inc(72), "", "deadlock"),
        # The second takes back what it gave before the first has it.
        (inc(104) + sync(1, 128) + dec(64), dec(24) + sync(2, 128) + inc(64), "deadlock"),
        (dec(28), "", "expected a multiple of 8"),
        (dec(16), "", "from 24 to 256"),
        (inc(264), "", "from 24 to 256"),
        (dec(72), "", r"\.dec from 64 to 72"),
        (dec(32) + sync(1, 128) + inc(24), "", r"\.inc from 32 to 24"),
        (dec(32) + dec(24), "", "no barrier of the warpgroup"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $L1;" + dec(32) + "$L1: mov.b32 %r5, 0;", "",
         "not executed by all warps"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $L1;" + dec(32) + "bra $L2; $L1: " + dec(40)
         + "$L2: mov.b32 %r5, 0;", "", r"dec 40 in one warp of a warpgroup, .dec 32"),
    ],
)  # fmt: skip
def test_registers_taken_wrongly(one, two, fault):
    with pytest.raises(Fault, match=fault):
        registers(one, two)


def test_all_threads_of_a_program_fit_into_a_multiprocessor():
    execute("", 384, directives=".maxnreg 168")
    with pytest.raises(Fault, match="384 threads of 169 registers"):
        execute("", 384, directives=".maxnreg 169")


def test_setmaxnreg_needs_a_kernel_with_a_number_of_registers():
    with pytest.raises(Fault, match=r"without \.maxnreg"):
        execute(dec(24), 128)


# mbarriers between warps

LEADER = "setp.eq.u32 %p1, %r0, 0;"


def init(count, at=1024):
    return LEADER + f"@%p1 mbarrier.init.shared::cta.b64 [%r1+{at}], {count};" + BARRIER


def come(at=1024, count="", form="", lane=True):
    """One lane of each warp, or all, arrive."""
    count = f", {count}" if count else ""
    elect = "elect.sync %r61|%p2, -1; @%p2 " if lane else ""
    return f"{elect}mbarrier.arrive{form}.shared::cta.b64 _, [%r1+{at}]{count};"


def wait(parity=0, at=1024, form=""):
    return (
        "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity"
        f"{form}.shared::cta.b64 complete, [%r1+{at}], {parity}; @!complete bra.uni waitLoop; }}"
    )


@pytest.mark.parametrize("timing", [EARLY, LATE])
@pytest.mark.parametrize(
    "count, come", [(1, come()), (32, come(lane=False)), (64, come(count=2, lane=False))]
)
def test_who_waits_for_an_mbarrier_knows_what_those_did_who_arrived(count, come, timing):
    body = init(count) + roles(WRITE + come, wait() + READ + stored("%r9"))
    assert execute(body, timing=timing)[32:].tolist() == list(range(32))


@pytest.mark.parametrize(
    "one, two",
    [
        (come() + WRITE, wait() + READ),  # written after the arrival
        (WRITE + come(form=".relaxed.cta"), wait() + READ),
        (WRITE + come(), wait(form=".relaxed.cta") + READ),
        (WRITE + come(), READ + wait()),
    ],
)
def test_without_an_arrival_or_a_wait_they_race(one, two):
    with pytest.raises(Fault, match="race: .* no barrier since another warp's use"):
        execute(init(1) + roles(one, two))


def test_an_mbarrier_of_several_arrivals_waits_for_all():
    second = WRITE.replace("[%r2]", "[%r2+128]")
    lacks = "deadlock: 32 threads at .*; the mbarrier at 0x800 is in phase 0 and lacks 1 arrivals"
    both = wait() + READ + "ld.shared.b32 %r8, [%r2+128]; add.u32 %r9, %r8, %r9;" + stored("%r9")
    out = execute(init(2) + roles(WRITE + come(), second + come(), both), 96)
    assert out[64:].tolist() == [32 + 2 * thread for thread in range(32)]
    with pytest.raises(Fault, match=lacks):
        execute(init(2) + roles(WRITE + come(), second, both), 96)
    with pytest.raises(Fault, match="deadlock"):  # counting one of two, two phases go by
        execute(init(1) + roles(WRITE + come(), second + come(), both), 96)


FULL, EMPTY = 1024, 1032


def ring(produced, consumed, rounds, early=0):
    """One buffer goes back and forth; phases of ``early`` are asked for too early."""
    produce = consume = ""
    for i in range(rounds):
        produce += f"{wait(i + 1 & 1, EMPTY)} add.u32 %r20, %r20, {i}; {produced}"
        consume += f"{wait(i + early & 1, FULL)} {consumed} add.u32 %r8, %r8, %r9;"
    start = init(1, FULL) + init(1, EMPTY) + "mov.b32 %r8, 0;"
    return start + roles(produce, consume + stored("%r8"))


def test_a_ring_of_many_phases():
    rounds = int(torch.randint(3, 8, ()))
    added = sum(sum(range(i + 1)) for i in range(rounds))
    out = execute(ring(WRITE + come(FULL), READ + come(EMPTY), rounds))
    assert out[32:].tolist() == [rounds * thread + added for thread in range(32)]
    for produced, consumed in [
        (come(FULL) + WRITE, READ + come(EMPTY)),
        (WRITE + come(FULL), come(EMPTY) + READ),
    ]:
        with pytest.raises(Fault, match="race"):
            execute(ring(produced, consumed, rounds))
    with pytest.raises(Fault, match="deadlock"):
        execute(ring(WRITE + come(FULL), READ + come(EMPTY), rounds, early=1))
    with pytest.raises(Fault, match="deadlock"):
        execute(ring(WRITE + come(FULL), READ, rounds))


@pytest.mark.parametrize(
    "fault, bodies",
    [
        ("race", (wait(1) + READ, WRITE + come())),  # the phase before the first is over
        ("deadlock", (WRITE + come(), wait(1) + READ)),  # the second never will be
    ],
)
def test_a_wait_for_the_wrong_phase(fault, bodies):
    with pytest.raises(Fault, match=fault):
        execute(init(1) + roles(*bodies))


def test_a_phase_must_not_end_before_all_have_seen_the_one_before():
    """A warp that comes late would find the same parity two phases later, or wait for ever. Here
    the second warp may be late, whatever the third has seen."""
    for met, late in ((96, False), (64, True)):
        leave = sync(1, met)
        second = wait() + (leave if met == 96 else "")
        body = init(1) + roles(come() + leave + come(), second, wait() + leave)
        if late:
            with pytest.raises(Fault, match="race: .* all warps have seen the end"):
                execute(body, 96)
        else:
            execute(body, 96)


@pytest.mark.parametrize(
    "instruction", ["elect.sync %r61|%p2, -1;", "shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;"]
)
def test_what_a_warp_does_together_needs_all_its_threads(instruction):
    some = "setp.lt.u32 %p1, %r0, 40; @%p1 bra $L1;" + instruction + "$L1: mov.b32 %r5, 0;"
    execute(some.replace("40", "32"))
    with pytest.raises(Fault, match="not all threads of a warp"):
        execute(some)


COME_BY_STATE = "mbarrier.arrive.shared::cta.b64 %rd8, [%r1+1024];"
WAIT_BY_STATE = (
    "{ .reg .pred complete; waitLoop: mbarrier.try_wait.shared::cta.b64 complete, "
    "[%r1+1024], %rd8; @!complete bra.uni waitLoop; }"
)


def test_a_wait_for_a_phase_by_its_state():
    other = AT.replace("and.b32", "xor.b32").replace("31", "32") + "ld.shared.b32 %r9, [%r2];"
    own = AT.replace("31", "63") + "st.shared.b32 [%r2], %r0;"
    out = execute(init(64) + own + COME_BY_STATE + WAIT_BY_STATE + other + stored("%r9"))
    assert out.tolist() == [thread ^ 32 for thread in range(64)]
    with pytest.raises(Fault, match="race"):
        execute(init(64) + own + COME_BY_STATE + other)


def test_a_wait_for_a_phase_long_over():
    later = COME_BY_STATE.replace("%rd8", "_")
    execute(init(32) + COME_BY_STATE + WAIT_BY_STATE, 32)
    with pytest.raises(Fault, match="long over"):
        execute(init(32) + COME_BY_STATE + later + WAIT_BY_STATE, 32)


@pytest.mark.parametrize(
    "body, fault",
    [
        (init(0), "of .*0.* arrivals"),
        (init(2**20), "arrivals"),
        (init(1) + come(count=2), "more arrivals"),
        (init(2) + come(form=".expect_tx", count=2**20), "bytes"),
        (init(1) + "st.shared.b32 [%r1+1028], %r0;", "written though an mbarrier lies there"),
        (init(1) + wait(2), "parity of 2"),
        (init(1) + come() + LEADER + "@%p1 mbarrier.inval.shared::cta.b64 [%r1+1024];" + wait(),
         "there is no mbarrier"),
    ],
)  # fmt: skip
def test_mbarriers_used_wrongly(body, fault):
    with pytest.raises(Fault, match=fault):
        execute(body, 32)


def test_what_lies_beside_an_mbarrier_or_where_one_was_may_be_written():
    drop = BARRIER + LEADER + "@%p1 mbarrier.inval.shared::cta.b64 [%r1+1024];"
    beside = "st.shared.b32 [%r1+1032], %r0;"
    execute(init(1) + beside + drop + "st.shared.b32 [%r1+1028], %r0;", 32)


def test_an_mbarrier_that_others_use_must_not_be_invalidated():
    drop = "elect.sync %r61|%p2, -1; @%p2 mbarrier.inval.shared::cta.b64 [%r1+1024];"
    used = init(1) + roles(come(), wait())
    execute(used + roles("", drop))  # the second warp waited for the first
    execute(used + BARRIER + roles(drop))
    with pytest.raises(Fault, match="invalidated with no barrier"):
        execute(used + roles(drop))
