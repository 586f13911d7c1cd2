"""``python -m triton_tied check``: outputs and gradients on every device there is."""

from __future__ import annotations

import argparse

from ..check import Errors, Row, check
from .devices import devices


def run(given: argparse.Namespace) -> int:
    """The exit status: 1 on a fault."""
    print("Relative error against float64 F.conv: tied / dense F.conv of the same dtype.")
    print("A fault is more than twice the dense one's and more than the dtype's floor.\n")
    print(f"{'device':<7}{'dtype':<10}{'output':>19}{'input gradient':>19}", end="")
    print(f"{'weight gradient':>19}        problem")
    rows = []
    for device in devices():
        for row in check(device):
            print(_line(row), flush=True)
            rows.append(row)
    faults = sum(not row.passed for row in rows)
    print(f"\n{len(rows)} checks, {faults} faults")
    return 1 if faults else 0


def _line(row: Row) -> str:
    errors = (
        f"{getattr(row.tied, e):>10.1e} /{getattr(row.dense, e):>7.1e}" for e in Errors._fields
    )
    verdict = "ok   " if row.passed else "FAULT"
    tie = "" if row.exactly_tied else "  (weight not tied to the bit)"
    name = str(row.dtype).removeprefix("torch.")
    return f"{row.device.type:<7}{name:<10}{''.join(errors)}  {verdict}  {row.case}{tie}"
