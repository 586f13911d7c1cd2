"""Executes what is committed: each config of the list in each form that it promises. Those with
faults leave the list, and the others say how many cases were executed.

    python -m executed.committed [--seed N] [--each N] [--jobs N] [--kind NAME ...]
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import time
from collections.abc import Iterator

from triton_tied.autotune.candidates import Candidate, read_file, write_file
from triton_tied.kernels.configs import KINDS

from .cases import Case, Key, draw
from .many import LISTS, executed


def cases_of(key: Key, candidate: Candidate, chance: random.Random, each: int) -> Iterator[Case]:
    """All that is promised at once, and nothing of it; of half precision both dtypes."""
    promised = candidate.config.needs - candidate.not_for
    for needs in dict.fromkeys((promised, frozenset())):
        for _ in range(each * (2 if key[2] == "half" else 1)):
            yield draw(key, candidate, chance, needs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m executed.committed", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--each", type=int, default=2, help="problems of each form")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    given = parser.parse_args()
    chance, start = random.Random(given.seed), time.monotonic()
    work = [
        (key, place, case)
        for key, found in LISTS.items()
        for place, candidate in enumerate(found)
        if candidate.config.kind in (given.kind or KINDS)
        for case in cases_of(key, candidate, chance, given.each)
    ]
    counts: collections.Counter[tuple[Key, int]] = collections.Counter()
    faulty: set[tuple[Key, int]] = set()
    outcomes = executed(iter([case for *_, case in work]), given.jobs)
    for number, ((key, place, case), outcome) in enumerate(zip(work, outcomes, strict=True), 1):
        counts[key, place] += 1
        verdict = f"FAULT {outcome.faults}" if outcome.faults else "right"
        print(f"{number}/{len(work)} {case}: {verdict}", flush=True)
        if outcome.faults:
            faulty.add((key, place))
    _write(counts, faulty)
    print(f"seed {given.seed}, {time.monotonic() - start:.0f} seconds")
    print(f"{counts.total()} cases executed, {len(faulty)} configs left out")


def _write(counts: collections.Counter[tuple[Key, int]], faulty: set[tuple[Key, int]]) -> None:
    """The list again."""
    listed = read_file()
    places: collections.Counter[Key] = collections.Counter()
    rows = []
    for row in listed["candidates"]:
        key = row["kernel"], row["target"], row["list"]
        name = key, places[key]
        places[key] += 1
        if name not in faulty:
            rows.append({**row, "executed": counts[name]} if name in counts else row)
    write_file({**listed, "candidates": rows})


if __name__ == "__main__":
    main()
