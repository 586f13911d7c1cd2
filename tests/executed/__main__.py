"""Executes drawn cases of the committed configs.

    python -m executed [--seed N] [--each N] [--jobs N]

Each kernel is compiled to PTX as for a GPU and run on the CPU, with its copies and products early,
late and mixed. Prints each fault, and at the end how many there were: exit status 1 if any.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import random
import time

from .many import LISTS, drawn, executed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m executed", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--each", type=int, default=2, help="cases of each list of configs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args()
    start, faults = time.monotonic(), 0
    counts: collections.Counter[str] = collections.Counter()
    cases = itertools.islice(drawn(given.seed), given.each * (len(LISTS) + 1))
    for outcome in executed(cases, given.jobs):
        case = outcome.case
        loader = case.config.loader if case.config else "-"
        counts[f"{case.target} {case.kernel} {loader} {case.dtype}"] += 1
        for timing, fault in outcome.faults.items():
            print(f"FAULT, {timing}: {case}\n    {fault}", flush=True)
        faults += bool(outcome.faults)
    for what, count in sorted(counts.items()):
        print(f"{count:5} {what}")
    print(f"seed {given.seed}, {time.monotonic() - start:.0f} seconds")
    print(f"{sum(counts.values())} cases executed, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
