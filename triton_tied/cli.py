"""``python -m triton_tied``: check this machine, or say what it is."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import __version__, cli_bench
from .check import Comparison, Errors, Row, check, compare
from .paths import HAS_TRITON, why_reference

if TYPE_CHECKING:
    from .inspection import Row as InspectionRow


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 on a fault."""
    parser = argparse.ArgumentParser(prog="python -m triton_tied", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="outputs and gradients against float64 F.conv, on every device there is"
    )
    commands.add_parser("info", help="versions, devices, and which path serves them and why")
    inspect = commands.add_parser(
        "inspect", help="compile the kernels for a target that need not be there, and say how well"
    )
    _add_inspect_arguments(inspect)
    tune = commands.add_parser(
        "tune", help="pick configs for shapes or for a model, or show what would be tried"
    )
    bench = commands.add_parser("bench", help="this package against its peers, on this machine")
    cli_bench.add_arguments(bench)
    if HAS_TRITON:
        from . import cli_tune

        cli_tune.add_arguments(tune)
    given = parser.parse_args(arguments)
    if given.command in ("inspect", "tune") and not HAS_TRITON:
        parser.error(f"{given.command} needs Triton, which is not installed")
    if given.command == "bench":
        return cli_bench.run(given)
    if given.command == "tune":
        return cli_tune.run(given)
    if given.command == "inspect":
        return _regenerate(given.jobs) if given.write else _inspect(given.target, given.json)
    return _check() if given.command == "check" else _info()


def _check() -> int:
    print("The largest error against float64 F.conv over its bound, which follows from the number")
    print("of products in a sum and the dtype's roundoff: above 1 is a fault.\n")
    print(_CHECK_HEAD + "        problem")
    rows = []
    for device in _devices():
        for row in check(device):
            tie = "" if row.exactly_tied else "  (weight not tied to the bit)"
            print(f"{_line(row, row.worst)}  {row.case}{tie}", flush=True)
            rows.append(row)
    print("\nThe root mean square error of all problems over that of dense F.conv in the same")
    print(f"dtype: above 2 is a fault.\n\n{_CHECK_HEAD}")
    comparisons = compare(rows)
    for each in comparisons:
        print(_line(each, each.ratio))
    passed = [row.passed for row in rows] + [each.passed for each in comparisons]
    faults = passed.count(False)
    print(f"\n{len(passed)} checks, {faults} faults")
    return 1 if faults else 0


_CHECK_HEAD = f"{'device':<7}{'dtype':<10}" + "".join(
    f"{name.replace('_', ' '):>17}" for name in Errors._fields
)


def _line(row: Row | Comparison, numbers: Errors) -> str:
    verdict = "ok   " if row.passed else "FAULT"
    shown = "".join(f"{number:>17.3f}" for number in numbers)
    return f"{row.device.type:<7}{row.arithmetic:<10}{shown}  {verdict}"


def _info() -> int:
    versions = {"triton_tied": __version__, "torch": torch.__version__, "triton": _triton_version()}
    for package, version in versions.items():
        print(f"{package:<12} {version}")
    print(f"{'python':<12} {platform.python_version()} on {platform.system()}")
    for device in _devices():
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        print(f"{device.type:<12} {name}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            reason = why_reference(device, dtype)
            path = f"reference: {reason}" if reason else "kernels"
            print(f"{'':<12} {str(dtype).removeprefix('torch.'):<9}{path}")
    return 0


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=("sm_80", "sm_90", "sm_100", "gfx942"))
    what.add_argument(
        "--write",
        action="store_true",
        help="compile all that is proposed for all targets, and commit what is good",
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that --write may use"
    )


def _inspect(target: str, as_json: bool) -> int:
    from . import inspection  # needs Triton

    rows, faults = [], 0
    if not as_json:
        print(_INSPECT_HEAD)
    for row, found in inspection.rows(target):
        rows.append(row._asdict())
        faults += bool(found)
        if as_json:
            _say(f"{len(rows)} compiled")
        else:
            print(_inspect_line(row, found), flush=True)
    _say("")
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"\n{len(rows)} rows, {faults} faults")
    return 1 if faults else 0


def _regenerate(jobs: int) -> int:
    from .regenerate import regenerate

    regenerate(jobs, lambda text: print(text, file=sys.stderr, flush=True))
    return 0


_INSPECT_HEAD = (
    f"{'kernel':<12}{'dtype':<13}{'loader':<11}{'first':<8}{'box':<11}{'N x K':<9}"
    f"{'warps':>5}{'stages':>7}{'regs':>6}{'spill':>6}{'shared':>8}{'matrix':>7}{'bulk':>5}"
    f"{'async':>6}{'waits':>6}"
)


def _inspect_line(row: InspectionRow, faults: list[str]) -> str:
    config = row.config
    first = (row.roles or "").removesuffix("_first")
    box = "x".join(map(str, config.get("box", ())))
    waits = "-" if row.matrix_waits is None else row.matrix_waits
    return (
        f"{row.kernel:<12}{row.dtype:<13}{row.loader:<11}{first:<8}{box:<11}"
        f"{config['BLOCK_N']:>3} x{config['BLOCK_K']:>3} {config['num_warps']:>5}"
        f"{config.get('num_stages', 1):>7}{row.registers:>6}{row.spill_bytes:>6}"
        f"{row.shared_bytes:>8}{row.matrix_instructions:>7}{row.bulk_copies:>5}"
        f"{row.async_copies_16b:>6}{waits:>6}" + (f"  FAULT: {'; '.join(faults)}" if faults else "")
    )


def _say(text: str) -> None:
    """A line that the next one replaces, for people only."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
