"""``python -m triton_tied``: check this machine, tune, benchmark, or say what is here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..dispatch import why_no_triton
from . import bench, check, info, inspect

if why_no_triton() is None:
    from . import tune, warm


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 on a fault."""
    parser = argparse.ArgumentParser(prog="python -m triton_tied", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="outputs and gradients against float64 F.conv, on every device there is"
    )
    commands.add_parser("info", help="versions, devices, and which path serves them and why")
    inspect.add_arguments(
        commands.add_parser(
            "inspect",
            help="compile the kernels for a target that need not be there, and say how well",
        )
    )
    tune_parser = commands.add_parser(
        "tune", help="pick configs for shapes or for a model, or show what would be tried"
    )
    warm_parser = commands.add_parser(
        "warm", help="compile the kernels of shapes or of a model ahead, for any GPU"
    )
    bench.add_arguments(
        commands.add_parser("bench", help="this package against its peers, on this machine")
    )
    without_triton = why_no_triton()
    if without_triton is None:
        tune.add_arguments(tune_parser)
        warm.add_arguments(warm_parser)
    given = parser.parse_args(arguments)
    if given.command in ("inspect", "tune", "warm") and without_triton:
        parser.error(f"{given.command} needs Triton: {without_triton}")
    if given.command in ("tune", "warm"):
        return {"tune": tune, "warm": warm}[given.command].run(given)
    command = {"check": check, "info": info, "inspect": inspect, "bench": bench}[given.command]
    return command.run(given)
