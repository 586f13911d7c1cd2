"""``python -m triton_tied``: check this machine, or say what it is."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from . import __version__
from .check import Errors, Row, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 on a fault."""
    parser = argparse.ArgumentParser(prog="python -m triton_tied", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="outputs and gradients against float64 F.conv, on every device there is"
    )
    commands.add_parser("info", help="versions, devices, and which path serves them and why")
    command = parser.parse_args(arguments).command
    return _check() if command == "check" else _info()


def _check() -> int:
    print("Relative error against float64 F.conv: tied / dense F.conv of the same dtype.")
    print("A fault is more than twice the dense one's and more than the dtype's floor.\n")
    print(f"{'device':<7}{'dtype':<10}{'output':>19}{'input gradient':>19}", end="")
    print(f"{'weight gradient':>19}        problem")
    rows = []
    for device in _devices():
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


def _info() -> int:
    versions = {"triton_tied": __version__, "torch": torch.__version__, "triton": _triton_version()}
    for package, version in versions.items():
        print(f"{package:<12} {version}")
    print(f"{'python':<12} {platform.python_version()} on {platform.system()}")
    for device in _devices():
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        print(f"{device.type:<12} {name}")
        print(f"{'':<12} path: reference (plain PyTorch: unpack, then F.conv),")
        print(f"{'':<12} because this version has no fused kernels yet")
    return 0


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
