"""Finds global memory that two programs of one launch use, one of them writing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from .faults import Fault
from .memory import Allocation, sparse_zeros
from .numbers import Array

Use = Literal["read", "written", "reduced"]
_MANY, _ANY = -1, -2  # in place of a program: several have read; some reduce


class GlobalRaces:
    """For each element of each tensor, which program of the launch has read it, and which has
    written it. Programs run in no order that anybody promises, so two of them race in any timing.
    """

    def __init__(self, allocations: Iterable[Allocation]):
        self._areas = _merged(allocations)
        self._starts = np.array([area.start for area in self._areas], np.uint64)
        self._readers: dict[int, Array] = {}  # 0 for nobody, else the program's number + 1
        self._writers: dict[int, Array] = {}

    def note(self, use: Use, programs: Array, addresses: Array, size: int) -> None:
        """``size`` bytes from each address on. Reductions of several programs are no race."""
        for area, some, places in self._places(addresses, size):
            me = (programs[some] + 1).astype(np.int32)[:, None]
            if use == "reduced":
                me = np.full_like(me, _ANY)
            if use == "read":
                if area in self._writers:
                    self._check(use, "written", self._writers[area][places], me, addresses[some])
                self._note_readers(self._marks(self._readers, area), places, me)
                continue
            writers = self._marks(self._writers, area)
            self._check(use, "written", writers[places], me, addresses[some])
            writers[places] = me
            self._check(use, "written", writers[places], me, addresses[some])
            if area in self._readers:
                self._check(use, "read", self._readers[area][places], me, addresses[some])

    def _note_readers(self, readers: Array, places: Array, me: Array) -> None:
        before = readers[places]
        if not ((before == me) | (before == _MANY)).all():
            readers[places] = me
            shared = (readers[places] != me) | (before != 0) & (before != me)
            readers[places[shared]] = _MANY

    def _check(self, what: str, before: str, users: Array, me: Array, addresses: Array) -> None:
        others = (users != 0) & (users != me)
        if others.any():
            which = int(np.flatnonzero(others.any(1))[0])
            other = _name(int(users[which][others[which]][0]))
            what = f"{what} by {_name(int(me[which, 0]))} of the launch and {before} by {other}"
            raise Fault(f"race: global {int(addresses[which]):#x} is {what}", which)

    def _marks(self, marks: dict[int, Array], area: int) -> Array:
        if area not in marks:
            marks[area] = sparse_zeros(self._areas[area].elements)
        return marks[area]

    def _places(self, addresses: Array, size: int) -> Iterable[tuple[int, Array | slice, Array]]:
        """The areas hit, which addresses hit each, and the elements there. What hits none is a
        fault of the access itself."""
        if not len(self._starts):
            return
        hit = np.searchsorted(self._starts, addresses, "right") - 1
        for area in np.unique(hit[hit >= 0]).tolist():
            span = self._areas[area]
            some = slice(None) if (hit == area).all() else hit == area
            first = (addresses[some] - np.uint64(span.start)).astype(np.int64) // span.element
            places = first[:, None] + np.arange(max(1, size // span.element))
            yield area, some, np.minimum(places, span.elements - 1, out=places)


def _name(user: int) -> str:
    return {_MANY: "several programs", _ANY: "a reduction"}.get(user, f"program {user - 1}")


def _merged(allocations: Iterable[Allocation]) -> list[Allocation]:
    """Those that overlap as one, of the smaller element."""
    merged: list[Allocation] = []
    for new in sorted(allocations, key=lambda allocation: allocation.start):
        if merged and new.start < merged[-1].end:
            last = merged.pop()
            end, element = max(last.end, new.end), min(last.element, new.element)
            new = Allocation(last.start, end, element)
        if new.end > new.start:
            merged.append(new)
    return merged
