"""What is proved to be redundant of small programs, and what is not."""

import pytest
import torch
from ptx_machine import LATE, run
from ptx_machine.snippets import BARRIER, FENCE, FILLED, PRODUCT, WAIT, program, stored
from ptx_machine.test_asynchronous import (
    AWAIT,
    BULK,
    COPIED,
    COPY,
    EXPECT,
    INIT,
    OTHERS,
    OWN,
    READ,
    SHARED,
    bulk,
)

from .mutants import mutants
from .recording import recorded
from .redundancy import is_redundant

NEIGHBOURS = OTHERS.replace("32;", "1;", 1)  # of the same warp
FILL = FILLED + FENCE + BARRIER
LATER = COPY.replace("[%r2], [%rd2]", "[%r2+256], [%rd2]")
READ_LATER = READ.replace("%r2];", "%r2+256];")
WAIT_1 = "cp.async.wait_group 1;"


def redundant(body, what, threads=64, go=None):
    """Of each ``what`` of a program, whether it is proved redundant. ``go`` runs its body."""
    body = body.replace(";", ";\n")  # an instruction a line
    text = program(body, threads)
    with recorded() as logs:
        if go:
            go(body)
        else:
            out = torch.zeros(threads * 4, dtype=torch.int32)
            run(text, (1,), (out,), SHARED, LATE, most_lanes=1)
    single = [m for m in mutants(text) if m.what == what and m.number is not None]
    return [is_redundant(mutant, logs) for mutant in single]


@pytest.mark.parametrize(
    "body, expected",
    [
        (OWN + BARRIER + OTHERS, [False]),
        (OWN + BARRIER + BARRIER + OTHERS, [True, True]),  # each of them, if the other stays
        (OWN + BARRIER + NEIGHBOURS, [False]),  # the machine takes a warp's threads to be in step
        (OWN + BARRIER + READ, [True]),  # what a thread itself wrote
        (OTHERS + BARRIER + OTHERS, [True]),
        (OWN + BARRIER + OTHERS + BARRIER + OWN, [False, False]),
        (COPY + COPIED + BARRIER + OTHERS, [False]),
        (COPY + BARRIER + COPIED + BARRIER + OTHERS, [True, False]),
    ],
)
def test_barriers(body, expected):
    assert redundant(body, "bar.sync") == expected


@pytest.mark.parametrize(
    "body, expected",
    [
        (COPY + COPIED + BARRIER + READ, [False]),
        (COPY + COPIED + COPIED + BARRIER + READ, [True, True]),
        (COPY + COPIED + BARRIER + COPIED + READ, [False, True]),  # the second is after the barrier
        (COPY + LATER + WAIT_1 + COPIED + BARRIER + READ, [True, True]),
        (COPY + LATER + COPIED + WAIT_1 + BARRIER + READ_LATER, [False, True]),
        (COPY + COPIED, [True]),  # nobody uses it
    ],
)
def test_waits_for_copies(body, expected):
    assert redundant(body, "cp.async.wait_group") == expected


def test_groups_of_copies():
    used = BARRIER + READ
    assert redundant(COPY + COPIED + used, "cp.async.commit_group") == [False]
    assert redundant(COPY + LATER + COPIED + used, "cp.async.commit_group") == [True, True]
    assert redundant(COPY + LATER + WAIT_1 + used, "cp.async.commit_group") == [False, False]


@pytest.mark.parametrize(
    "body, what, expected",
    [
        (PRODUCT + WAIT + stored("%r40"), "wgmma.wait_group", [False]),
        (PRODUCT + WAIT + PRODUCT + WAIT + stored("%r40"), "wgmma.wait_group", [True, False]),
        (PRODUCT + WAIT + WAIT + BARRIER + FILLED, "wgmma.wait_group", [True, True]),
        (PRODUCT + WAIT + BARRIER + WAIT + FILLED, "wgmma.wait_group", [False, True]),
        (PRODUCT + WAIT + stored("%r40"), "wgmma.commit_group", [False]),
        (PRODUCT + PRODUCT + WAIT + stored("%r40"), "wgmma.commit_group", [True, False]),
        (PRODUCT + PRODUCT + WAIT, "wgmma.fence", [False, True]),
        (PRODUCT + WAIT + stored("%r40") + PRODUCT + WAIT, "wgmma.fence", [False, False]),
    ],
)
def test_products(body, what, expected):
    assert redundant(FILL + body, what, 128) == expected


def test_a_barrier_before_the_next_phase_of_an_mbarrier():
    """Else a warp could be late for the last one, unless that was a phase of another mbarrier."""
    other = INIT.replace("1024", "1032")
    first = INIT + other + BARRIER + EXPECT + BULK + AWAIT + READ + BARRIER

    def barriers(at):
        body = first + EXPECT.replace("[%r1+1024], 256", f"[%r1+{at}], 0")
        return redundant(body, "bar.sync", go=bulk)

    assert barriers(1024) == [False, False]
    assert barriers(1032) == [False, True]


def test_barriers_around_bulk_copies():
    def barriers(body):
        return redundant("setp.eq.u32 %p1, %r0, 0;" + body, "bar.sync", go=bulk)

    assert barriers(INIT + BARRIER + EXPECT + BULK + AWAIT + READ) == [False]  # of the mbarrier
    assert barriers(INIT + BARRIER + EXPECT + BARRIER + BULK + AWAIT + READ) == [True, True]
    assert barriers(INIT + BARRIER + READ + BARRIER + FENCE + EXPECT + BULK + AWAIT) == [
        True,
        False,
    ]
