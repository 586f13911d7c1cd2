"""Programs of a cluster: addresses in each other's shared memory, and their barrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Fragment, Step, source
from .clocks import join
from .faults import Fault, Unsupported
from .numbers import Array
from .parser import Instruction, name_of

if TYPE_CHECKING:
    from .machine import Machine

_WINDOW_BITS = 24  # an address with 1 + the rank of a program above these is in its memory


def mapa(instruction: Instruction) -> Step:
    """An address of the own memory as that of the same place in another program's."""
    if instruction.opcode[1:] not in (("shared::cluster", "u32"), ("shared::cluster", "u64")):
        raise Unsupported(instruction.text)
    kind = instruction.opcode[2]
    target, address, rank = instruction.operands
    name, read, read_rank = name_of(target), source(address, kind), source(rank, "u32")

    def step(machine: Machine) -> None:
        ranks = np.broadcast_to(read_rank(machine), machine.lanes).astype(np.uint64)
        if (ranks[machine.active.mask] >= machine.cluster).any():
            raise Fault(f"no program {ranks.max()} in a cluster of {machine.cluster}")
        own = read(machine).astype(np.uint64) & np.uint64((1 << _WINDOW_BITS) - 1)
        machine.write(name, own + ((ranks + np.uint64(1)) << np.uint64(_WINDOW_BITS)))

    return step


def located(machine: Machine, lanes: Array, addresses: Array) -> tuple[Array, Array]:
    """Whose memory these threads mean, and where in it."""
    own, addresses = machine.programs_of(lanes), addresses.astype(np.int64)
    window = addresses >> _WINDOW_BITS
    if (window > machine.cluster).any():
        raise Fault(f"{int(addresses.max()):#x} is in no memory of the cluster")
    others = own // machine.cluster * machine.cluster + window - 1
    programs = np.where(window > 0, others, own)
    check_running(machine, programs)
    return programs, addresses & ((1 << _WINDOW_BITS) - 1)


def check_running(machine: Machine, programs: Array) -> None:
    if not machine.live.reshape(machine.programs, -1).any(1)[programs].all():
        raise Fault("memory of a program that has ended")


class ClusterBarrier:
    """barrier.cluster: all threads of a cluster arrive, and then wait."""

    def __init__(self, machine: Machine):
        self._machine = machine
        clusters, columns = machine.programs // machine.cluster, machine.clocks.known.shape[1]
        self._came = np.zeros(machine.lanes, np.bool_)
        self._owes = np.zeros(machine.lanes, np.bool_)  # a wait, after its arrival
        self._known = np.zeros((clusters, columns), np.int32)
        self._completed = np.zeros((clusters, columns), np.int32)

    def arrive(self, releases: bool) -> None:
        machine, mask = self._machine, self._machine.active.mask
        if (self._owes & mask).any():
            raise Fault("a thread arrives at the cluster's barrier again with no wait between")
        machine.copies.publish(mask)
        warps = np.unique(machine.active.lanes // 32)
        rows = machine.clocks.release(warps, only_inits=not releases)
        join(rows, self._cluster_of(warps), self._known)
        self._came, self._owes = self._came | mask, self._owes | mask
        self.complete()

    def wait(self, acquires: bool) -> list[Fragment]:
        """Tells who goes on; the others try again."""
        machine, mask = self._machine, self._machine.active.mask
        if (mask & ~self._owes).any():
            raise Fault("a thread waits for the cluster's barrier without an arrival")
        waits, passes = mask & self._came, mask & ~self._came
        if passes.any():
            self._owes = self._owes & ~passes
            warps = np.unique(np.flatnonzero(passes) // 32)
            if acquires:
                machine.clocks.acquire(warps, self._completed[self._cluster_of(warps)])
        if waits.any():
            machine.stall(waits)
        return [(machine.pc + 1, passes)]

    def complete(self) -> None:
        """Where all threads that have not exited have come, the next phase begins."""
        clusters = len(self._known)
        came, live = (m.reshape(clusters, -1) for m in (self._came, self._machine.live))
        over = (came >= live).all(1) & came.any(1)
        if over.any():
            self._came = self._came & ~np.repeat(over, self._machine.lanes // clusters)
            self._machine.mbarriers.synchronise(np.repeat(over, self._machine.cluster))
            self._completed[over] = self._known[over]
            self._known[over] = 0

    def _cluster_of(self, warps: Array) -> Array:
        return self._machine.programs_of(warps * 32) // self._machine.cluster


def cluster_barrier(instruction: Instruction, parts: list[str]) -> Step:
    action, *rest = parts
    modifiers = set(rest)
    if action not in ("arrive", "wait") or modifiers - {"aligned", "release", "relaxed", "acquire"}:
        raise Unsupported(instruction.text)
    orders, aligned = "relaxed" not in modifiers, "aligned" in modifiers

    def step(machine: Machine) -> list[Fragment]:
        if aligned:
            machine.active.check_whole_warps(machine.live)
        if action == "wait":
            return machine.cluster_barrier.wait(orders)
        machine.cluster_barrier.arrive(orders)
        return [(machine.pc + 1, machine.active.mask)]

    return step
