"""The sixteen barriers of a program (bar, barrier), and its pool of registers (setmaxnreg)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Fragment
from .clocks import join
from .faults import Fault
from .numbers import Array

if TYPE_CHECKING:
    from .machine import Machine


_ALL_REGISTERS = 65536  # of a multiprocessor; a thread gets a multiple of 8


@dataclass
class _Barrier:
    """One number, in all programs: who came, how many are needed (0: all), what they knew, and
    where those that wait go on."""

    came: Array
    needed: Array
    known: Array
    waiting: list[Fragment] = field(default_factory=list)


class Barriers:
    def __init__(self, machine: Machine):
        self._machine = machine
        self._barriers: dict[int, _Barrier] = {}

    def arrive(self, number: int, threads: int, waits: bool, aligned: bool) -> list[Fragment]:
        """The active threads come to a barrier of so many (0: of all), and wait or go on. Tells who
        goes on, and where."""
        machine, mask = self._machine, self._machine.active.mask
        if not 0 <= number < 16 or threads % 32 or threads > machine.threads:
            raise Fault(f"barrier {number} of {threads} threads")
        if aligned:
            machine.active.check_whole_warps(machine.live)
        barrier = self._barriers.get(number) or self._new(number)
        if (barrier.came & mask).any():
            raise Fault(f"a warp comes to barrier {number} again before it is complete")
        programs = np.flatnonzero(self._of_programs(mask).any(1))
        started = self._of_programs(barrier.came).any(1)[programs]
        if (barrier.needed[programs] != threads)[started].any():
            raise Fault(f"barrier {number} with another number of threads")
        barrier.needed[programs] = threads
        machine.copies.publish(mask)
        warps = np.unique(machine.active.lanes // 32)
        join(machine.clocks.release(warps), machine.programs_of(warps * 32), barrier.known)
        barrier.came = barrier.came | mask
        here: list[Fragment] = [(machine.pc + 1, mask)]
        if not waits:
            return here + self._complete(number, barrier)
        barrier.waiting += here
        return self._complete(number, barrier)

    def complete(self) -> list[Fragment]:
        """Those that may go on since others have exited."""
        return [
            fragment
            for number, barrier in self._barriers.items()
            for fragment in self._complete(number, barrier)
        ]

    @property
    def waiting(self) -> list[Fragment]:
        return [fragment for barrier in self._barriers.values() for fragment in barrier.waiting]

    def _new(self, number: int) -> _Barrier:
        machine = self._machine
        known = np.zeros((machine.programs, machine.clocks.known.shape[1]), np.int32)
        needed = np.zeros(machine.programs, np.int64)
        self._barriers[number] = _Barrier(np.zeros(machine.lanes, np.bool_), needed, known)
        return self._barriers[number]

    def _complete(self, number: int, barrier: _Barrier) -> list[Fragment]:
        machine = self._machine
        counts = self._of_programs(barrier.came).sum(1)
        needed = np.where(barrier.needed, barrier.needed, self._of_programs(machine.live).sum(1))
        if (counts > needed).any():
            most = int(needed[counts > needed][0])
            raise Fault(f"more threads than the {most} of barrier {number}")
        passes = np.repeat((counts == needed) & (counts > 0), machine.threads)
        if not passes.any():
            return []
        barrier.came = barrier.came & ~passes
        fragments = [(pc, mask & passes) for pc, mask in barrier.waiting]
        left = [(pc, mask & ~passes) for pc, mask in barrier.waiting]
        barrier.waiting = [(pc, mask) for pc, mask in left if mask.any()]
        for _, mask in fragments:
            warps = np.unique(np.flatnonzero(mask) // 32)
            machine.clocks.acquire(warps, barrier.known[machine.programs_of(warps * 32)])
        barrier.known[passes[:: machine.threads]] = 0
        return fragments

    def _of_programs(self, mask: Array) -> Array:
        return mask.reshape(self._machine.programs, -1)


class RegisterPool:
    """setmaxnreg: warps give registers to their program's pool and take from it."""

    def __init__(self, machine: Machine):
        self._machine, self._clocks = machine, machine.clocks
        warps, registers = machine.lanes // 32, machine.kernel.registers_of_thread
        if machine.threads * -(-registers // 8) * 8 > _ALL_REGISTERS:
            raise Fault(f"{machine.threads} threads of {registers} registers each")
        self._held = np.full(warps, registers)
        self._free = np.zeros(machine.programs, np.int64)
        # What each warp asked for, and when if that changed anything (else 0).
        self._asked: list[list[tuple[str, int, int]]] = [[] for _ in range(warps)]

    def set(self, action: str, number: int) -> list[Fragment]:
        """The active warps hold ``number`` registers a thread from now on; those that take more
        than there are wait. Tells who goes on, and where."""
        machine = self._machine
        if not machine.kernel.registers_of_thread:
            raise Fault("setmaxnreg in a kernel without .maxnreg")
        if not 24 <= number <= 256 or number % 8:
            raise Fault(f"setmaxnreg of {number}, expected a multiple of 8 from 24 to 256")
        machine.active.check_whole_warps(machine.live)
        waits = np.zeros(machine.lanes, np.bool_)
        for warp in np.unique(machine.active.lanes // 32).tolist():
            program = int(machine.programs_of(warp * 32))
            more = number - int(self._held[warp])
            if (more < 0) != (action == "dec") and more:
                raise Fault(f"setmaxnreg.{action} from {self._held[warp]} to {number}")
            if 32 * more > self._free[program]:
                waits[warp * 32 : warp * 32 + 32] = True
                continue
            self._ask(warp, action, number, more)
            self._free[program] -= 32 * more
            self._held[warp] = number
        if waits.any():
            machine.stall(waits)
        return [(machine.pc + 1, machine.active.mask & ~waits)]

    def check_end(self) -> None:
        for first in range(0, len(self._asked), 4):
            if len({len(asked) for asked in self._asked[first : first + 4]}) > 1:
                raise Fault("setmaxnreg was not executed by all warps of a warpgroup")

    def _ask(self, warp: int, action: str, number: int, more: int) -> None:
        """All four warps of a warpgroup ask for the same, and none again before all have
        synchronised. (Triton's compiler asks for what a warp holds already without a barrier: that
        changes nothing.)"""
        before = self._asked[warp]
        turn, first = len(before), warp // 4 * 4
        before.append((action, number, self._clocks.now if more else 0))
        for other in range(first, first + 4):
            theirs = self._asked[other]
            if theirs[turn : turn + 1] and theirs[turn][:2] != (action, number):
                one, two = f"{action} {number}", "{} {}".format(*theirs[turn])
                raise Fault(f"setmaxnreg.{one} in one warp of a warpgroup, .{two} in another")
            known = self._clocks.known[warp, other % self._clocks.team]
            late = len(theirs) < turn or any(when > known for *_, when in theirs[:turn])
            if more and late:
                raise Fault("setmaxnreg again, with no barrier of the warpgroup since the last one")
