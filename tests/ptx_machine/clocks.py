"""What each warp knows of the others: happens-before, as vector clocks."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .numbers import Array

WHO_BITS = 8  # up to 256 warps that share memory, or mbarriers
EVER = 2 ** (31 - WHO_BITS) - 1  # later than any time; with who it was of it fits into 31 bits
MOST_MBARRIERS = 32  # of a program


class Clocks:
    """Time goes on with each synchronisation, so that what a warp does before one and after one
    has other times. A row for each warp says up to which time it knows, of each warp of its team,

    - what that warp has read and written (its own: for ever);
    - the same, as far as a proxy fence lies between: what asynchronous units may rely on,
    - which mbarriers that warp has initialised;

    and, of each mbarrier, which bulk copies have landed. A team is the warps that share memory:
    those of a program, or of a cluster.
    """

    def __init__(self, warps: int, team: int, cluster: int):
        if max(team, MOST_MBARRIERS * cluster) > 1 << WHO_BITS:
            raise Unsupported(f"{team} warps of {cluster} programs that share memory")
        self.team = team
        self.now = 1
        self.accesses, self.fenced, self.inits = (slice(i * team, (i + 1) * team) for i in range(3))
        self.landed = 3 * team  # from this column on
        self.known = np.zeros((warps, self.landed + MOST_MBARRIERS * cluster), np.int32)
        self.floor = np.zeros(warps, np.int32)  # what a warp knows of all others, at least
        self.fenced_floor = np.zeros(warps, np.int32)
        self._init_fences = np.zeros(warps, np.int32)  # when each warp last had fenced its inits
        everyone = np.arange(warps)
        for block in (self.accesses, self.inits):
            self.known[everyone, block.start + everyone % team] = EVER
        self._raise_floors(everyone)

    def tick(self) -> int:
        """The time so far; what follows is later."""
        self.now += 1
        if self.now >= EVER:
            raise Unsupported(f"more than {EVER} synchronisations")
        return self.now - 1

    def release(self, warps: Array, only_inits: bool = False) -> Array:
        """What these warps know and have done: a row for each. ``only_inits``: nothing but the
        mbarriers that they have initialised, before a fence for these."""
        own, each = warps % self.team, np.arange(len(warps))
        rows, now = self.known[warps], self.tick()
        if only_inits:
            rows[:] = 0
            rows[each, self.inits.start + own] = self._init_fences[warps]
        else:
            rows[each, own] = rows[each, self.inits.start + own] = now
        return rows

    def acquire(self, warps: Array, rows: Array) -> None:
        """These warps, each of them once, learn what is in the rows."""
        self.known[warps] = np.maximum(self.known[warps], rows)
        self._raise_floors(warps)

    def fence_proxy(self, warps: Array) -> None:
        """Makes what these warps know of known to the asynchronous proxy."""
        self.known[warps, self.fenced] = self.release(warps)[:, self.accesses]
        self._raise_floors(warps)

    def fence_inits(self, warps: Array) -> None:
        self._init_fences[warps] = self.tick()

    def _raise_floors(self, warps: Array) -> None:
        self.floor[warps] = self.known[warps, self.accesses].min(1)
        self.fenced_floor[warps] = self.known[warps, self.fenced].min(1)


def join(rows: Array, places: Array, into: Array) -> None:
    """``into[place]`` becomes the latest of itself and of the rows that go there."""
    np.maximum.at(into, places, rows)


def stamp(time: int, who: Array | int) -> Array:
    return np.asarray(time << WHO_BITS | who, np.int32)


def time_of(stamps: Array) -> Array:
    return stamps >> WHO_BITS


def who_of(stamps: Array) -> Array:
    return stamps & ((1 << WHO_BITS) - 1)
