"""``python -m triton_tied check``: outputs and gradients on every device there is."""

from __future__ import annotations

import argparse

from ..check import Comparison, Errors, Row, check, compare
from .devices import devices

_HEAD = f"{'device':<7}{'dtype':<10}" + "".join(
    f"{name.replace('_', ' '):>17}" for name in Errors._fields
)


def run(given: argparse.Namespace) -> int:
    """The exit status: 1 on a fault."""
    print("The largest error against float64 F.conv over its bound, which follows from the number")
    print("of products in a sum and the dtype's roundoff: above 1 is a fault.\n")
    print(_HEAD + "        problem")
    rows = []
    for device in devices():
        for row in check(device):
            tie = "" if row.exactly_tied else "  (weight not tied to the bit)"
            print(f"{_line(row, row.worst)}  {row.case}{tie}", flush=True)
            rows.append(row)
    print("\nThe root mean square error of all problems over that of dense F.conv in the same")
    print(f"dtype: above 2 is a fault.\n\n{_HEAD}")
    comparisons = compare(rows)
    for each in comparisons:
        print(_line(each, each.ratio))
    passed = [row.passed for row in rows] + [each.passed for each in comparisons]
    faults = passed.count(False)
    print(f"\n{len(passed)} checks, {faults} faults")
    return 1 if faults else 0


def _line(row: Row | Comparison, numbers: Errors) -> str:
    verdict = "ok   " if row.passed else "FAULT"
    shown = "".join(f"{number:>17.3f}" for number in numbers)
    return f"{row.device.type:<7}{row.arithmetic:<10}{shown}  {verdict}"
