"""What each warp knows of the others: happens-before, as vector clocks."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .numbers import Array

EVER = 2**24 - 1  # later than any time; a time and who it was of fit into 31 bits
WHO_BITS = 7  # up to 128 warps that share memory, or mbarriers
MOST_MBARRIERS = 32


class Clocks:
    """Time goes on with each synchronisation, so that what a warp does before one and after one
    has other times. A row for each warp says up to which time it knows, of each warp of its team,

    - what that warp has read and written (its own: for ever);
    - the same, as far as a proxy fence lies between: what asynchronous units may rely on;

    and, of each mbarrier, which bulk copies have landed. A team is the warps that share memory:
    those of a program, or of a cluster.
    """

    def __init__(self, warps: int, team: int, programs_of_team: int = 1):
        if team > 1 << WHO_BITS:
            raise Unsupported(f"{team} warps that share memory")
        self.team = team
        self.now = 1
        self.known = np.zeros((warps, 2 * team + MOST_MBARRIERS * programs_of_team), np.int32)
        self.known[np.arange(warps), np.arange(warps) % team] = EVER
        self.floor = np.zeros(warps, np.int32)  # what a warp knows of all others, at least
        self.fenced_floor = np.zeros(warps, np.int32)
        self._raise_floors(np.arange(warps))

    def tick(self) -> int:
        """The time so far; what follows is later."""
        self.now += 1
        if self.now >= EVER:
            raise Unsupported(f"more than {EVER} synchronisations")
        return self.now - 1

    def release(self, warps: Array) -> Array:
        """What these warps know and have done: a row for each."""
        rows = self.known[warps]
        rows[np.arange(len(warps)), warps % self.team] = self.tick()
        return rows

    def acquire(self, warps: Array, rows: Array) -> None:
        """These warps, each of them once, learn what is in the rows."""
        self.known[warps] = np.maximum(self.known[warps], rows)
        self._raise_floors(warps)

    def fence(self, warps: Array) -> None:
        """Makes what these warps know of known to the asynchronous proxy."""
        self.known[warps, self.team : 2 * self.team] = self.release(warps)[:, : self.team]
        self._raise_floors(warps)

    def _raise_floors(self, warps: Array) -> None:
        self.floor[warps] = self.known[warps, : self.team].min(1)
        self.fenced_floor[warps] = self.known[warps, self.team : 2 * self.team].min(1)


def join(rows: Array, places: Array, into: Array) -> None:
    """``into[place]`` becomes the latest of itself and of the rows that go there."""
    np.maximum.at(into, places, rows)


def stamp(time: int, who: Array | int) -> Array:
    return np.asarray(time << WHO_BITS | who, np.int32)


def time_of(stamps: Array) -> Array:
    return stamps >> WHO_BITS


def who_of(stamps: Array) -> Array:
    return stamps & ((1 << WHO_BITS) - 1)
