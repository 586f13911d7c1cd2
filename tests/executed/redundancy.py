"""Which waits, barriers and fences a program does without: from what it was seen to do, not from
the machine's own checks. What is not proved here may still be redundant.

    python -m executed.redundancy

leaves each away in turn, and prints what became of it.
"""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ptx_machine.machine import LATE
from ptx_machine.triton_gpu import EmulatedGpu, emulated, skip_assembler

from .cases import Case, inputs_of, run
from .execution import KERNELS, compiled, execute
from .mutants import PROGRAMS, Mutant, mutants
from .recording import Event, Log, recorded


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(skip_assembler(Path(folder)))
        counts: collections.Counter[str] = collections.Counter()
        for name, case in PROGRAMS.items():
            logs = logs_of(case)
            for mutant in mutants(compiled(case)):
                if mutant.number is not None:
                    verdict = verdict_on(mutant, case, logs)
                    print(f"{name}, line {mutant.line}, without {mutant}: {verdict}", flush=True)
                    counts[verdict] += 1
        print(f"{counts.total()} programs that lack one: {dict(counts)}")


def verdict_on(mutant: Mutant, case: Case, logs: list[Log]) -> str:
    """ "found" by the machine, proved "redundant", or "unknown"."""
    found = bool(execute(case, rewrite=mutant, to_first_fault=True).faults)
    redundant = is_redundant(mutant, logs)
    if found and redundant:
        raise AssertionError(f"{mutant} of {case}: a fault, though it is proved to be redundant")
    return "found" if found else "redundant" if redundant else "unknown"


def logs_of(case: Case) -> list[Log]:
    """Of each program of its launch."""
    gpu = EmulatedGpu(int(case.target[3:]), LATE, most_lanes=1)
    inputs = inputs_of(case)
    with recorded() as logs, emulated(gpu, *KERNELS):
        run(case, inputs)
    return logs


def is_redundant(mutant: Mutant, logs: list[Log]) -> bool:
    """Whether it is proved that every program does without what the mutant lacks."""
    prove = {
        "bar.sync": _barrier,
        "cp.async.wait_group": _copies,
        "cp.async.commit_group": _copies,
        "wgmma.wait_group": _products,
        "wgmma.commit_group": _products,
        "wgmma.fence": _fence,
    }.get(mutant.what)
    return prove is not None and all(prove(log, mutant.line) for log in logs)


# Barriers: no two uses of one place, by two threads and one of them a write, have only this one
# between them; nor have a wait for a phase of an mbarrier and the arrival of another warp in the
# next one.


class _Uses:
    """Of each unit: by which threads (the lowest and the highest), whether written, whether read by
    products, whether written by bulk copies."""

    def __init__(self, units: int):
        self.low, self.high = np.full(units, 2**15 - 1, np.int16), np.full(units, -1, np.int16)
        self.written, self.multiplied, self.bulk = np.zeros((3, units), np.bool_)

    def add(self, event: Event) -> None:
        if event.kind in ("use", "copy"):
            np.minimum.at(self.low, event.units, event.lanes.astype(np.int16))
            np.maximum.at(self.high, event.units, event.lanes.astype(np.int16))
            self.written[event.units] |= event.writes
        elif event.kind == "product":
            self.multiplied[event.units] = True
        elif event.kind == "bulk":
            self.bulk[event.units] = True

    def join(self, other: _Uses) -> None:
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        self.written |= other.written
        self.multiplied |= other.multiplied
        self.bulk |= other.bulk

    def by_others_than(self, warp: int, units: np.ndarray) -> bool:
        used = self.high[units] >= 0
        return bool(
            (used & ((self.low[units] // 32 != warp) | (self.high[units] // 32 != warp))).any()
        )


def _barrier(log: Log, line: int) -> bool:
    epochs = _epochs(log)
    for joined in _joined(log, line):
        before = _Uses(log.units)
        for epoch in joined:
            now = _Uses(log.units)
            for event in epochs[epoch]:
                now.add(event)
            if _conflict(log, before, now, epochs[epoch], [e for e in joined if e < epoch]):
                return False
            before.join(now)
    return True


def _epochs(log: Log) -> list[list[Event]]:
    """A product in flight reads in all epochs up to its wait."""
    epochs: list[list[Event]] = [[] for _ in range(log.epoch + 1)]
    ends = _ends(log, "products", None)
    for event in log.events:
        last = event.epoch
        if event.kind == "product":
            end = ends[event.index]
            last = end.epoch if end else log.epoch
        for epoch in range(event.epoch, last + 1):
            epochs[epoch].append(event)
    return epochs


def _joined(log: Log, line: int) -> Iterator[list[int]]:
    """Runs of epochs between which only barriers of this line lie."""
    joined = [0]
    for event in log.events:
        if event.kind == "barrier":
            if event.line == line:
                joined.append(event.epoch + 1)
            else:
                yield joined
                joined = [event.epoch + 1]
    yield joined


def _conflict(log: Log, before: _Uses, now: _Uses, events: list[Event], earlier: list[int]) -> bool:
    both = (before.high >= 0) & (now.high >= 0) & (before.written | now.written)
    alone = (before.low == now.high) & (before.high == now.low)
    if (both & ~alone).any() or (before.multiplied & now.written).any():
        return True
    if (before.written & now.multiplied).any():
        return True
    for event in events:
        if event.kind == "bulk":
            units = event.units
            if before.multiplied[units].any() or before.bulk[units].any():
                return True
            if before.by_others_than(int(event.lanes[0]) // 32, units):
                return True
        if event.kind == "arrival" and _may_be_late_for(log, event, earlier):
            return True
    return _uses_what_others_waited_for(log, now, events, earlier)


def _may_be_late_for(log: Log, arrival: Event, earlier: list[int]) -> bool:
    """Warps that wait in these earlier epochs for a phase before that of the arrival."""
    warps = set((arrival.lanes // 32).tolist())
    return any(
        set((event.lanes // 32).tolist()) - warps
        for event in log.events[: arrival.index]
        if event.kind == "phase" and event.mbarrier == arrival.mbarrier and event.epoch in earlier
    )


def _uses_what_others_waited_for(
    log: Log, now: _Uses, events: list[Event], earlier: list[int]
) -> bool:
    """A bulk copy of these earlier epochs, for which not all warps have waited themselves."""
    used = (now.high >= 0) | now.multiplied
    warps = log.machine.threads // 32
    until = max((event.index for event in events), default=0)
    for bulk in log.events:
        if bulk.kind == "bulk" and bulk.epoch in earlier and used[bulk.units].any():
            waited = {
                warp
                for event in log.events[bulk.index : until + 1]
                if event.kind == "phase" and event.mbarrier == bulk.mbarrier
                for warp in (event.lanes // 32).tolist()
            }
            if len(waited) < warps:
                return True
    return False


# Waits and groups: what this one is for is over before anybody uses it, by another wait; and a
# barrier lies between that wait and the use.


def _ends(log: Log, what: str, without: int | None) -> dict[int, Event | None]:
    """The wait that ends each copy, or product, where the instruction of one line is left away."""
    issue = {"copies": "copy", "products": "product"}[what]
    committed, pending = 0, []
    ends: dict[int, Event | None] = {}
    for event in log.events:
        if event.kind == issue:
            pending.append((event.index, committed))
            ends[event.index] = None
        if event.line == without or event.kind not in (f"commit {what}", f"wait for {what}"):
            continue
        if len(event.lanes) != log.machine.threads:
            raise ValueError(f"expected all threads in line {event.line}")
        if event.kind == f"commit {what}":
            committed += 1
        else:
            over = [index for index, group in pending if group < committed - event.left]
            ends.update(dict.fromkeys(over, event))
            pending = [(i, group) for i, group in pending if group >= committed - event.left]
    return ends


def _copies(log: Log, line: int) -> bool:
    waits = {e.line for e in log.events if e.kind == "wait for copies"}
    for index, end in _ends(log, "copies", line).items():
        mine = np.zeros(log.units, np.bool_)
        mine[log.events[index].units] = True
        for event in log.events[index + 1 :]:
            # cp.async that have been waited for are noted as a use: by the wait itself
            own = event.kind == "use" and event.line in waits
            if not own and event.units.size and mine[event.units].any():
                if end is None or event.index < end.index or event.epoch <= end.epoch:
                    return False
                break
    return True


def _products(log: Log, line: int) -> bool:
    for index, end in _ends(log, "products", line).items():
        product, mine = log.events[index], np.zeros(log.units, np.bool_)
        mine[product.units] = True
        held = {*product.registers.tolist(), *product.operands.tolist()}
        written = touched = False
        for event in log.events[index + 1 :]:
            if not written and event.writes and mine[event.units].any():
                written = True
                if end is None or event.index < end.index or event.epoch <= end.epoch:
                    return False
            if not touched and event.kind == "registers" and held & set(event.registers.tolist()):
                touched = True
                if end is None or event.index < end.index:
                    return False
            if written and touched:
                break
    return True


# Fences: of the registers that products use since it, the last use before was no thread's, nor
# that of a product of another shape, or another fence lies between.


def _fence(log: Log, line: int) -> bool:
    last: dict[int, int | str] = {}
    fenced = False
    for event in log.events:
        if event.kind == "fence" and event.line != line:
            last, fenced = {}, True
        elif event.kind == "registers":
            last.update(dict.fromkeys(event.registers.tolist(), "thread"))
        elif event.kind == "product":
            sums, operands = event.registers.tolist(), event.operands.tolist()
            if not fenced or any(last.get(row, event.shape) != event.shape for row in sums):
                return False
            if any(last.get(row, "operand") != "operand" for row in operands):
                return False
            last.update(dict.fromkeys(sums, event.shape) | dict.fromkeys(operands, "operand"))
    return True


if __name__ == "__main__":
    main()
