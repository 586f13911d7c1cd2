"""``python -m triton_tied inspect``: what the compiler makes of the kernels."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, get_args

from ..autotune.candidates import Target

if TYPE_CHECKING:
    from ..inspection.report import CompiledConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        required=True,
        help="the kind of GPU",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(given: argparse.Namespace) -> int:
    """The exit status: 1 on a fault."""
    from ..inspection import report  # needs Triton

    rows, faults = [], 0
    if not given.json:
        print(_HEAD)
    for row, found in report.rows(given.target):
        rows.append(row._asdict())
        faults += bool(found)
        if given.json:
            _say(f"{len(rows)} compiled")
        else:
            print(_line(row, found), flush=True)
    _say("")
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"\n{len(rows)} rows, {faults} faults")
    return 1 if faults else 0


_HEAD = (
    f"{'kernel':<16}{'dtype':<13}{'loader':<26}{'first':<8}{'box':<11}{'blocks':<9}"
    f"{'warps':>5}{'stages':>7}{'regs':>6}{'spill':>6}{'shared':>8}{'matrix':>7}{'bulk':>5}"
    f"{'async':>6}{'waits':>6}{'barriers':>9}{'fences':>7}{'narrow':>7}{'layouts':>8}{'redundancy':>11}"
)


def _line(row: CompiledConfig, faults: list[str]) -> str:
    config = row.config
    first = (row.roles or "").removesuffix("_first")
    box = "x".join(map(str, config.get("box", ())))
    blocks = "x".join(str(size) for name, size in config.items() if name.startswith("BLOCK"))
    return (
        f"{config.get('kind', row.kernel):<16}{row.dtype:<13}{row.loader:<26}{first:<8}{box:<11}"
        f"{blocks:<9}{config.get('num_warps', 4):>5}"
        f"{config.get('num_stages', 1):>7}{row.registers:>6}{row.spill_bytes:>6}"
        f"{row.shared_bytes:>8}{row.matrix_instructions:>7}{row.bulk_copies:>5}"
        f"{row.async_copies_16b:>6}{row.loop_waits:>6}{row.loop_barriers:>9}{row.loop_fences:>7}"
        f"{row.narrow_accesses:>7}{row.layout_changes:>8}{row.redundancy:>11}"
        + (f"  FAULT: {'; '.join(faults)}" if faults else "")
    )


def _say(text: str) -> None:
    """A line that the next one replaces, for people only."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
