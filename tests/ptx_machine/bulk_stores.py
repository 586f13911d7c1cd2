"""Bulk copies and reductions from shared to global memory, and their groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault
from .numbers import UNSIGNED, Array, from_bits, is_float, to_bits

if TYPE_CHECKING:
    from .machine import Machine

_REDUCTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
REDUCTIONS = frozenset(_REDUCTIONS)


def reduced(before: Array, words: Array, operation: str, kind: str) -> Array:
    """What words of this kind become; without an operation, the new ones."""
    if not operation:
        return words
    if is_float(kind) and operation not in ("add", "min", "max"):
        raise Fault(f"a reduction {operation} of {kind}")
    numbers = _REDUCTIONS[operation](from_bits(before, kind), from_bits(words, kind))
    return to_bits(numbers, kind)


@dataclass
class _Store:
    """Of one thread, in its ``group``-th group. ``words``: what was read, once it has been."""

    lane: int
    group: int
    addresses: Array
    size: int
    write: Callable[[Array], None]
    words: Array | None = None
    waited: bool = False  # for its read


class BulkStores:
    """Late: shared memory is read at the wait for the read, and global memory written at the full
    wait, or when the program ends. In any case nobody may write to what no wait says was read."""

    def __init__(self, machine: Machine, late: bool):
        self._machine, self._late = machine, late
        self._committed = np.zeros(machine.lanes, np.int64)
        self._stores: list[_Store] = []

    def issue(self, lane: int, addresses: Array, size: int, write: Callable[[Array], None]) -> None:
        """Words of ``size`` bytes go from these shared addresses to where ``write`` puts them."""
        store = _Store(lane, int(self._committed[lane]), addresses, size, write)
        self._machine.await_store(lane, _chunks(store), 1)
        if not self._late:
            self._read(store)
            write(store.words)
        self._stores.append(store)

    def commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def wait(self, lanes: Array, left: int, for_read: bool) -> None:
        """All but the last ``left`` groups of each thread have been read, or are done."""
        waits = self._machine.mask_of(lanes)
        kept = []
        for store in self._stores:
            over = waits[store.lane] and store.group < self._committed[store.lane] - left
            if over and not store.waited:
                self._read(store)
                self._machine.await_store(store.lane, _chunks(store), -1)
                store.waited = True
            if not over or for_read:
                kept.append(store)
            elif self._late:
                store.write(store.words)
        self._stores = kept

    def check_exit(self, mask: Array) -> None:
        if any(mask[store.lane] and not store.waited for store in self._stores):
            raise Fault("the program ends with no wait for a bulk store that reads its memory")

    def finish(self) -> None:
        if self._late:
            for store in self._stores:
                store.write(store.words)

    def _read(self, store: _Store) -> None:
        if store.words is None:
            programs = np.full(len(store.addresses), store.lane // self._machine.threads)
            words = self._machine.shared.load(programs, store.addresses, store.size, 1)
            store.words = words[:, 0].astype(UNSIGNED[store.size], copy=True)


def _chunks(store: _Store) -> Array:
    """The 16 bytes that each word of a store is the first of."""
    return store.addresses[:: max(1, 16 // store.size)]
