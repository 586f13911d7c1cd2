"""Drawn programs of several warps: the machine finds a race exactly where two uses of one place are
ordered by no chain of barriers, which is worked out from the program alone."""

import itertools
import random

import pytest
import torch

from ptx_machine import Fault, run
from ptx_machine.snippets import BARRIER, program, roles

WARPS, PLACES, EVENTS = 5, 3, 14
MBARRIERS = 1024  # where they lie; each event has one of its own, and a barrier of its own


def drawn(chance):
    """Events in an order in which they may happen: uses of a place by one warp, and meetings, at
    which some warps give what they know and some take it."""
    events = []
    for number in range(1, EVENTS):
        if chance.random() < 0.45:
            kind = chance.choice(["read", "write"])
            events.append((kind, chance.randrange(WARPS), chance.randrange(PLACES)))
            continue
        some = chance.sample(range(WARPS), chance.randint(2, WARPS))
        givers = set(some[: chance.randint(1, len(some))])
        if chance.random() < 0.5:  # at a barrier who waits gives too
            events.append(("barrier", number, set(some), set(some) - set(some[:1])))
        else:
            events.append(("mbarrier", number, givers, set(some) - givers or givers))
    return events


def text_of(events):
    """Each warp's part of the events, one after the other."""
    inits, bodies = "", [""] * WARPS
    for event in events:
        if event[0] in ("read", "write"):
            kind, warp, place = event
            use = (
                "ld.shared.b32 %r9, [%r2+{}];" if kind == "read" else "st.shared.b32 [%r2+{}], %r0;"
            )
            bodies[warp] += use.format(128 * place)
            continue
        kind, number, givers, takers = event
        at = f"[%r1+{MBARRIERS + 8 * number}]"
        inits += f"@%p1 mbarrier.init.shared::cta.b64 {at}, {len(givers)};"
        for warp in givers | takers:
            if kind == "barrier":
                action = "sync" if warp in takers else "arrive"
                bodies[warp] += f"bar.{action} {number}, {32 * len(givers | takers)};"
                continue
            if warp in givers:
                bodies[warp] += (
                    f"elect.sync %r61|%p2, -1; @%p2 mbarrier.arrive.shared::cta.b64 _, {at};"
                )
            if warp in takers:
                bodies[warp] += (
                    "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 "
                    f"complete, {at}, 0; @!complete bra.uni waitLoop; }}"
                )
    start = "setp.eq.u32 %p1, %r0, 0; and.b32 %r2, %r0, 31; shl.b32 %r2, %r2, 2; "
    return start + "add.u32 %r2, %r1, %r2;" + inits + BARRIER + roles(*bodies)


def has_race(events):
    """Of all pairs of uses of one place by two warps, one writing: whether what the first warp did
    reached the second one before its use."""
    for (i, first), (j, second) in itertools.combinations(enumerate(events), 2):
        uses = {first[0], second[0]} <= {"read", "write"}
        if not uses or "write" not in (first[0], second[0]) or first[2] != second[2]:
            continue
        know = {first[1]}
        for event in events[i + 1 : j]:
            if event[0] in ("barrier", "mbarrier") and know & event[2]:
                know |= event[3]
        if second[1] not in know:
            return True
    return False


@pytest.mark.parametrize("_", range(60))
def test_a_race_is_found_exactly_where_there_is_one(_):
    chance = random.Random(int(torch.randint(2**31, ())))
    events = drawn(chance)
    text = program(text_of(events), 32 * WARPS)

    def execute():
        run(text, (1,), (torch.zeros(1),), MBARRIERS + 8 * (EVENTS + 1))

    if not has_race(events):
        execute()
        return
    with pytest.raises(Fault, match="race: .* no barrier since another warp's use"):
        execute()
