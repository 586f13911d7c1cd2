"""mbarrier objects, and the bulk copies that complete on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .clocks import MOST_MBARRIERS, join, stamp, time_of, who_of
from .faults import Fault, Unsupported
from .numbers import Array

if TYPE_CHECKING:
    from .machine import Machine

_MOST = 2**20 - 1  # arrivals, and bytes to come either way


@dataclass
class _Barrier:
    """mbarrier objects at one address in all programs; it is the ``number``-th address.

    ``made`` says when, and which warp, initialised it; ``used``, when each warp last did something
    with it. ``collected`` is what those who came in this phase know, ``completed`` what those of
    the last phase knew.

    ``waited``: when each warp last saw, by its parity, that the last phase was over. ``seen`` is
    the last phase that any warp of the program saw begin; by the phases ``copied`` and ``told`` all
    bulk copies have landed, and all arrivals of other programs have come.
    """

    number: int
    count: Array
    pending: Array
    bytes: Array
    phase: Array
    made: Array
    seen: Array
    copied: Array
    told: Array
    used: Array
    waited: Array
    collected: Array
    completed: Array


@dataclass(frozen=True)
class _BulkCopy:
    """Words that go to these shared addresses, ``per_chunk`` of them to 16 bytes."""

    program: int
    addresses: Array
    per_chunk: int
    load: Callable[[], Array]


class MemoryBarriers:
    """Late: a copy lands when somebody waits for its mbarrier, in the order of issue or in the
    ``reverse`` one."""

    def __init__(self, machine: Machine, late: bool, reverse: bool):
        self._machine, self._late, self._reverse = machine, late, reverse
        self._clocks = machine.clocks
        self._barriers: dict[int, _Barrier] = {}
        self._copies: dict[tuple[int, int], list[_BulkCopy]] = {}
        self._initialised = np.zeros(machine.lanes, np.bool_)  # some, since its last fence

    def init(self, lanes: Array, address: int, counts: Array) -> None:
        if address % 8:
            raise Fault(f"an mbarrier at {address:#x}, which is not aligned to 8 bytes")
        programs = self._machine.programs_of(lanes)
        barrier = self._barriers.get(address) or self._new(address)
        if barrier.count[programs].any() or len(np.unique(programs)) < len(programs):
            raise Fault(f"the mbarrier at {address:#x} is initialised twice")
        if ((counts < 1) | (counts > _MOST)).any():
            raise Fault(f"an mbarrier of {counts.tolist()} arrivals")
        barrier.count[programs] = barrier.pending[programs] = counts
        barrier.bytes[programs] = barrier.phase[programs] = 0
        barrier.seen[programs] = barrier.copied[programs] = barrier.told[programs] = 0
        barrier.waited[programs] = 0
        barrier.collected[programs] = barrier.completed[programs] = 0
        self._machine.races.hold_mbarrier(programs, address, 1)
        warps = self._machine.warps_of(lanes) % self._clocks.team
        barrier.made[programs] = stamp(self._clocks.now, warps)
        self._initialised[lanes] = True

    def fence_inits(self, lanes: Array) -> None:
        """fence.mbarrier_init: of what these threads have initialised themselves."""
        warps = np.unique(self._machine.warps_of(lanes))
        self._initialised[lanes] = False
        if self._initialised.reshape(-1, 32)[warps].any():
            raise Fault("fence.mbarrier_init of another thread than initialised an mbarrier")
        self._clocks.fence_inits(warps)

    def invalidate(self, lanes: Array, address: int) -> None:
        programs = self._machine.programs_of(lanes)
        barrier = self._valid(lanes, programs, address)
        if any(self._copies.get((int(program), address)) for program in programs):
            raise Fault(f"the mbarrier at {address:#x} is invalidated before its copies landed")
        known = self._clocks.known[self._machine.warps_of(lanes), : self._clocks.team]
        if (barrier.used[programs] > known).any():
            raise Fault(
                f"race: the mbarrier at {address:#x} is invalidated with no barrier since another "
                "warp's use"
            )
        barrier.count[programs] = 0
        self._machine.races.hold_mbarrier(programs, address, -1)

    def arrive(
        self, lanes: Array, programs: Array, address: int, counts: Array, expected: Array,
        releases: bool,
    ) -> Array:  # fmt: skip
        """Of each thread ``counts`` arrivals, after it expects so many bytes more. Tells the phase
        in which each came."""
        barrier = self._valid(lanes, programs, address)
        self._machine.copies.publish(self._machine.mask_of(lanes))
        rows = self._clocks.release(self._machine.warps_of(lanes))
        phases = np.zeros(len(lanes), np.int64)
        for some in _one_by_one(programs):
            places = programs[some]
            self._expect(barrier, places, expected[some])
            if (barrier.pending[places] < counts[some]).any():
                raise Fault(f"more arrivals than the mbarrier at {address:#x} counts")
            if releases:
                join(rows[some], places, barrier.collected)
            phases[some] = barrier.phase[places]
            others = places[places != self._machine.programs_of(lanes[some])]
            barrier.told[others] = barrier.phase[others] + 1
            barrier.pending[places] -= counts[some]
            self._advance(barrier, places, address)
        return phases

    def expect(self, lanes: Array, programs: Array, address: int, expected: Array) -> None:
        barrier = self._valid(lanes, programs, address)
        for some in _one_by_one(programs):
            self._expect(barrier, programs[some], expected[some])

    def copy(
        self, lane: int, program: int, address: int, addresses: Array, size: int,
        load: Callable[[], Array],
    ) -> None:  # fmt: skip
        """Words of ``size`` bytes that ``load`` gets from global memory, to these shared addresses.
        They may be used by nobody who has not waited for the mbarrier."""
        lanes = np.array([lane])
        barrier = self._valid(lanes, np.array([program]), address)
        copy = _BulkCopy(program, addresses, max(1, 16 // size), load)
        known = self._clocks.known[self._machine.warps_of(lanes)[0]]
        chunks = addresses[:: copy.per_chunk]
        self._machine.begin_bulk(program, known, chunks, self._who(barrier, program))
        barrier.copied[program] = barrier.phase[program] + 1
        if self._late:
            self._copies.setdefault((program, address), []).append(copy)
        else:
            self._land(copy, barrier, address)

    def passed(
        self, lanes: Array, address: int, asked: Array, by_parity: bool, acquires: bool
    ) -> Array:
        """Whether the phase of this parity, or number, is over, for each thread that asks."""
        programs = self._machine.programs_of(lanes)
        barrier = self._valid(lanes, programs, address)
        if not by_parity and (barrier.phase[programs] - asked > 1).any():
            raise Fault(f"a wait for a phase of the mbarrier at {address:#x} that is long over")
        mask = 1 if by_parity else -1
        for program in np.unique(programs[barrier.phase[programs] & mask == asked]):
            copies = self._copies.get((int(program), address), [])
            before = barrier.phase[program]
            while copies and barrier.phase[program] == before:
                self._land(copies.pop(-1 if self._reverse else 0), barrier, address)
        over = barrier.phase[programs] & mask != asked
        barrier.seen[programs[over]] = barrier.phase[programs[over]]
        if by_parity:
            warps = self._machine.warps_of(lanes[over]) % self._clocks.team
            barrier.waited[programs[over], warps] = self._clocks.now
        if acquires and over.any():
            warps = np.unique(self._machine.warps_of(lanes[over]))
            rows = barrier.completed[self._machine.programs_of(warps * 32)]
            self._clocks.acquire(warps, rows)
        return over

    def check_end(self, programs: Array) -> None:
        """Nobody may write to the memory of a program, or tell its mbarriers, after its end."""
        for address, barrier in self._barriers.items():
            last = np.maximum(barrier.copied, barrier.told)[programs]
            if ((last > barrier.seen[programs]) & (barrier.count[programs] > 0)).any():
                raise Fault(
                    "a program ends with no wait for a bulk copy, or for the arrival of another "
                    f"program, at the mbarrier at {address:#x}"
                )

    def synchronise(self, programs: Array) -> None:
        """All that these programs have told each other has come."""
        for barrier in self._barriers.values():
            barrier.told[programs] = 0

    def lacking(self, program: int) -> list[str]:
        """What each mbarrier of a program lacks."""
        return [
            f"the mbarrier at {address:#x} is in phase {barrier.phase[program]} and lacks "
            f"{barrier.pending[program]} arrivals and {barrier.bytes[program]} bytes"
            for address, barrier in self._barriers.items()
            if barrier.count[program]
        ]

    def _new(self, address: int) -> _Barrier:
        if len(self._barriers) == MOST_MBARRIERS:
            raise Unsupported(f"mbarriers at more than {MOST_MBARRIERS} addresses")
        programs, columns = self._machine.programs, self._clocks.known.shape[1]
        count, pending, tx, phase, made, seen, copied, told = np.zeros((8, programs), np.int64)
        used, waited = np.zeros((2, programs, self._clocks.team), np.int64)
        collected, completed = np.zeros((2, programs, columns), np.int32)
        self._barriers[address] = _Barrier(
            len(self._barriers), count, pending, tx, phase, made, seen, copied, told, used, waited,
            collected, completed,
        )  # fmt: skip
        return self._barriers[address]

    def _expect(self, barrier: _Barrier, programs: Array, expected: Array) -> None:
        barrier.bytes[programs] += expected
        if (abs(barrier.bytes[programs]) > _MOST).any():
            raise Fault(f"an mbarrier that expects more than {_MOST} bytes")

    def _land(self, copy: _BulkCopy, barrier: _Barrier, address: int) -> None:
        words, who = copy.load(), self._who(barrier, copy.program)
        chunks = copy.addresses[:: copy.per_chunk]
        self._machine.land_bulk(copy.program, chunks, copy.addresses, words, who)
        barrier.collected[copy.program, self._clocks.landed + who] = self._clocks.tick()
        programs = np.array([copy.program])
        self._expect(barrier, programs, np.array([-words.nbytes]))
        self._advance(barrier, programs, address)

    def _who(self, barrier: _Barrier, program: int) -> int:
        """The number of an mbarrier among those of its cluster."""
        cluster = self._machine.cluster
        return barrier.number * cluster + program % cluster

    def _advance(self, barrier: _Barrier, programs: Array, address: int) -> None:
        over = programs[(barrier.pending[programs] == 0) & (barrier.bytes[programs] == 0)]
        # A warp that might be late would find the parity of this phase, and wait for another one.
        if (barrier.waited[over] > barrier.collected[over, : self._clocks.team]).any():
            raise Fault(
                f"race: the mbarrier at {address:#x} completes a phase, and nothing says that all "
                "warps have seen the end of the one before"
            )
        barrier.waited[over] = 0
        barrier.phase[over] += 1
        barrier.pending[over] = barrier.count[over]
        barrier.completed[over] = barrier.collected[over]
        barrier.collected[over] = 0

    def _valid(self, lanes: Array, programs: Array, address: int) -> _Barrier:
        """The mbarriers of ``programs`` that these threads use."""
        barrier, warps = self._barriers.get(address), self._machine.warps_of(lanes)
        if barrier is None or not barrier.count[programs].all():
            raise Fault(f"there is no mbarrier at {address:#x}")
        made = barrier.made[programs]
        if (
            self._clocks.known[warps, self._clocks.inits][np.arange(len(warps)), who_of(made)]
            < time_of(made)
        ).any():
            raise Fault(f"race: the mbarrier at {address:#x} is used with no barrier since another "
                        "warp initialised it")  # fmt: skip
        barrier.used[programs, warps % self._clocks.team] = self._clocks.now
        return barrier


def _one_by_one(programs: Array) -> Iterator[Array]:
    """The places of threads, of each program one at a time."""
    left = np.arange(len(programs))
    while len(left):
        _, first = np.unique(programs[left], return_index=True)
        yield left[first]
        left = np.delete(left, first)
