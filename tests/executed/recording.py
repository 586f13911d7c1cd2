"""What one program does to shared memory and to the registers of products, in order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from ptx_machine.asynchronous import AsyncCopies, MatrixUnit, RegisterUse
from ptx_machine.barriers import Barriers
from ptx_machine.machine import Machine
from ptx_machine.mbarriers import MemoryBarriers
from ptx_machine.memory import SHARED_BASE
from ptx_machine.numbers import Array

UNIT = 2  # bytes
_NOTHING = np.zeros(0, np.int64)
_WARP = 1024  # + its number: an instruction of all threads of a warp together


@dataclass(frozen=True)
class Event:
    """Of an instruction in this line: ``lanes`` are threads, or those who use ``units`` of shared
    memory one to one; ``registers`` are rows of products' registers.

    Kinds: "use" of units by threads; "copy", "commit copies", "wait for copies" (of cp.async);
    "product", "commit products", "wait for products", "registers" used by threads, "fence";
    "bulk" copy, "phase" over and "arrival" of an mbarrier; "barrier" passed.
    """

    kind: str
    line: int
    index: int
    epoch: int
    lanes: Array = field(default_factory=lambda: _NOTHING)
    units: Array = field(default_factory=lambda: _NOTHING)
    writes: bool = False
    registers: Array = field(default_factory=lambda: _NOTHING)
    operands: Array = field(default_factory=lambda: _NOTHING)
    shape: int = 0
    left: int = 0
    mbarrier: int = 0


class Log:
    """Of one program. An epoch ends where a barrier is passed."""

    def __init__(self, machine: Machine):
        self.machine, self.events, self.epoch = machine, [], 0
        self.units = -(-machine.shared.size // UNIT)

    def note(self, kind: str, **what: Any) -> None:
        line = self.machine.kernel.instructions[self.machine.pc].line
        self.events.append(Event(kind, line, len(self.events), self.epoch, **what))
        self.epoch += kind == "barrier"

    def use(self, kind: str, lanes: Array, addresses: Array, size: int, writes: bool) -> None:
        opcode = self.machine.kernel.instructions[self.machine.pc].opcode
        if opcode[0] in ("ldmatrix", "stmatrix"):
            lanes = _WARP + lanes // 32
        units = units_of(addresses, size)
        self.note(kind, lanes=np.repeat(lanes, units.shape[1]), units=units.ravel(), writes=writes)


def units_of(addresses: Array, size: int) -> Array:
    first = (addresses.astype(np.int64) - SHARED_BASE) // UNIT
    return first[:, None] + np.arange(max(1, size // UNIT))


@contextlib.contextmanager
def recorded() -> Iterator[list[Log]]:
    """A log of each program that is run meanwhile, each in a machine of its own."""
    logs: list[Log] = []
    with contextlib.ExitStack() as stack:

        def before(owner: type, name: str) -> Callable:
            """What is to be done before each call of a method."""

            def decorate(note: Callable) -> None:
                method = getattr(owner, name)

                @functools.wraps(method)
                def noting(self: Any, *arguments: Any) -> Any:
                    note(self, *arguments)
                    return method(self, *arguments)

                stack.enter_context(mock.patch.object(owner, name, noting))

            return decorate

        _note_memory(before, logs)
        _note_products(before, logs)
        _note_barriers(stack, before, logs)
        yield logs


def _note_memory(before: Callable, logs: list[Log]) -> None:
    @before(Machine, "run")
    def _(machine: Machine) -> None:
        if machine.programs > 1:
            raise ValueError(f"expected one program at a time, got {machine.programs}")
        logs.append(Log(machine))

    @before(Machine, "load_shared")
    def _(machine: Machine, lanes: Array, addresses: Array, size: int, count: int, *_: Any) -> None:
        logs[-1].use("use", lanes, addresses, size * count, writes=False)

    @before(Machine, "store_shared")
    def _(machine: Machine, lanes: Array, addresses: Array, words: Array, *_: Any) -> None:
        size = words.dtype.itemsize * words.shape[1]
        logs[-1].use("use", lanes, addresses, size, writes=True)

    @before(Machine, "begin_copies")
    def _(machine: Machine, lanes: Array, addresses: Array, size: int) -> None:
        logs[-1].use("copy", lanes, addresses, size, writes=True)

    @before(Machine, "end_copies")
    def _(machine: Machine, lanes: Array, addresses: Array, size: int) -> None:
        logs[-1].use("use", lanes, addresses, size, writes=True)

    @before(AsyncCopies, "commit")
    def _(copies: AsyncCopies, lanes: Array) -> None:
        logs[-1].note("commit copies", lanes=lanes)

    @before(AsyncCopies, "wait")
    def _(copies: AsyncCopies, mask: Array, left: int) -> None:
        logs[-1].note("wait for copies", lanes=np.flatnonzero(mask), left=left)


def _note_products(before: Callable, logs: list[Log]) -> None:
    @before(MatrixUnit, "issue")
    def _(unit: MatrixUnit, product: Any, groups: Array, accumulate: Array) -> None:
        log = logs[-1]
        rows = log.machine.kernel.matrix_registers
        chunks = [c.ravel() for c in product.places(log.machine, groups) if c is not None]
        log.note(
            "product", lanes=_lanes(groups), units=units_of(np.concatenate(chunks), 16).ravel(),
            registers=_numbers(rows, product.d), operands=_numbers(rows, product.a_names),
            shape=product.columns << 8 | product.inner,
        )  # fmt: skip

    @before(MatrixUnit, "commit")
    def _(unit: MatrixUnit, groups: Array) -> None:
        logs[-1].note("commit products", lanes=_lanes(groups))

    @before(MatrixUnit, "wait")
    def _(unit: MatrixUnit, groups: Array, left: int) -> None:
        logs[-1].note("wait for products", lanes=_lanes(groups), left=left)

    @before(RegisterUse, "by_threads")
    def _(use: RegisterUse, rows: Array, groups: Array, *_: Any) -> None:
        logs[-1].note("registers", lanes=_lanes(groups), registers=rows)

    @before(RegisterUse, "fence")
    def _(use: RegisterUse, groups: Array) -> None:
        logs[-1].note("fence", lanes=_lanes(groups))


def _note_barriers(stack: contextlib.ExitStack, before: Callable, logs: list[Log]) -> None:
    for name in ("init", "invalidate"):

        @before(MemoryBarriers, name)
        def _(barriers: MemoryBarriers, lanes: Array, address: int, *_: Any) -> None:
            logs[-1].use("use", lanes, np.full(len(lanes), address), 8, writes=True)

    @before(MemoryBarriers, "arrive")
    def _(barriers: MemoryBarriers, lanes: Array, programs: Array, address: int, *_: Any) -> None:
        logs[-1].use("use", lanes, np.full(len(lanes), address), 8, writes=False)
        logs[-1].note("arrival", lanes=lanes, mbarrier=address)

    @before(MemoryBarriers, "copy")
    def _(
        barriers: MemoryBarriers, lane: int, program: int, address: int, addresses: Array,
        size: int, *_: Any,
    ) -> None:  # fmt: skip
        logs[-1].use("use", np.array([lane]), np.array([address]), 8, writes=False)
        units = np.unique(units_of(addresses, size))
        logs[-1].note("bulk", lanes=np.array([lane]), units=units, writes=True, mbarrier=address)

    passed, arrive = MemoryBarriers.passed, Barriers.arrive

    def noting_passed(self: MemoryBarriers, lanes: Array, address: int, *rest: Any) -> Array:
        over = passed(self, lanes, address, *rest)
        logs[-1].use("use", lanes, np.full(len(lanes), address), 8, writes=False)
        logs[-1].note("phase", lanes=lanes[over], mbarrier=address)
        return over

    def noting_arrive(self: Barriers, number: int, threads: int, *rest: Any) -> list:
        if threads:
            raise ValueError("expected barriers of all threads")
        fragments = arrive(self, number, threads, *rest)
        if fragments:
            logs[-1].note("barrier")
        return fragments

    stack.enter_context(mock.patch.object(MemoryBarriers, "passed", noting_passed))
    stack.enter_context(mock.patch.object(Barriers, "arrive", noting_arrive))


def _lanes(groups: Array) -> Array:
    return (groups[:, None] * 128 + np.arange(128)).ravel()


def _numbers(rows: dict[str, int], names: tuple[str, ...]) -> Array:
    return np.array([rows[name] for name in names], np.int64)
