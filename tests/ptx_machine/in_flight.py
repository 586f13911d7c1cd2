"""Shared memory that cp.async will write and that nobody may use before its wait."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .memory import SHARED_BASE
from .numbers import Array

_WORD = 4  # bytes: the least that cp.async copies


class CopiesInFlight:
    """What cp.async of all programs will write, from their issue to the wait of their threads."""

    def __init__(self, programs: int, size: int):
        self._writes = np.zeros((programs, -(-size // _WORD)), np.bool_)
        self._count = 0

    def begin(self, programs: Array, addresses: Array, size: int) -> None:
        self._writes[programs[:, None], self._places(addresses, size)] = True
        self._count += len(addresses)

    def end(self, programs: Array, addresses: Array, size: int) -> None:
        self._writes[programs[:, None], self._places(addresses, size)] = False
        self._count -= len(addresses)

    def check(self, what: str, programs: Array, addresses: Array, size: int) -> None:
        """A use, by anybody, of so many bytes from each address on."""
        if self._count:
            used = self._writes[programs[:, None], self._places(addresses, size)].any(1)
            if used.any():
                which = int(np.flatnonzero(used)[0])
                place = f"{int(addresses[which]):#x}"
                raise Fault(f"race: {place} is {what} while a cp.async in flight writes it", which)

    def _places(self, addresses: Array, size: int) -> Array:
        first = addresses.astype(np.int64) - SHARED_BASE
        words = np.arange(-(-size // _WORD)) * _WORD
        places = (first[:, None] + words) // _WORD
        return np.clip(places, 0, self._writes.shape[1] - 1)  # the access itself will fail
