"""``python -m triton_tied bench``: this package against its peers, on this machine."""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..benchmark import results, suite
from ..benchmark.results import Result
from .arguments import seconds, seconds_or_none, writable_file, writable_folder

_QUICK_S, _FULL_S = 80.0, 480.0
_BUSY_RATIO = 0.3  # of the CPUs, by others, in the last minute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a subset, in under two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU, if there is one")
    parser.add_argument(
        "--budget",
        type=seconds_or_none,
        metavar="SECONDS",
        help=f"by default {_QUICK_S:.0f} with --quick, else {_FULL_S:.0f}; "
        f"what does not fit is left out, and said; with --tune it may be 0",
    )
    parser.add_argument(
        "--tune",
        type=seconds,
        metavar="SECONDS",
        help="first tune this package for the workloads, on a GPU",
    )
    parser.add_argument(
        "--tune-json", type=writable_file, metavar="FILE", help="write there what tuning gave"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--plots", type=writable_folder, metavar="FOLDER", help="draw there, PNG and SVG"
    )


def run(given: argparse.Namespace) -> int:
    """The exit status: 1 if a peer computes another function, 2 for a request that makes no
    sense."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wrong = _why_not(given, device)
    if wrong:
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler tells of each start
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > _BUSY_RATIO * (os.cpu_count() or 1):
        print("bench: this machine is busy, and the figures will show it", file=sys.stderr)
    cells = suite.plan(device, given.quick)
    if given.tune:
        _tune(cells, device, given.tune, given.tune_json)
    budget = given.budget
    if budget is None:
        budget = _QUICK_S if given.quick else _FULL_S
    if budget == 0:
        return 0
    result = _measure(cells, device, budget)
    _show(result)
    if given.json:
        result.write(given.json)
    if given.plots:
        from ..benchmark import plots  # needs matplotlib

        for path in plots.draw(result, given.plots):
            print(path)
    return 1 if result.faults else 0


def _tune(cells: list[suite.Cell], device: torch.device, seconds: float, path: Path | None) -> None:
    """Writes what it has after each problem: it may be ended from outside."""
    from .tune_report import reports_as_json  # needs Triton

    reports = []
    for report in suite.tune(cells, device, seconds):
        reports.append(report)
        if path:
            path.write_text(reports_as_json(reports) + "\n")
    tuned = sum(report.config is not None for report in reports)
    print(f"tuned {tuned} of {len(reports)} problems")


def _why_not(given: argparse.Namespace, device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU here"
    if given.tune and device.type != "cuda":
        return "there is no GPU here to tune for"
    if given.tune_json and not given.tune:
        return "--tune-json is for what --tune gives, which is not asked for"
    if given.budget == 0 and not given.tune:
        return "--budget 0 measures nothing: it is for --tune alone"
    if given.plots and importlib.util.find_spec("matplotlib") is None:
        return "--plots needs matplotlib, which is not installed"
    return None


def _measure(cells: list[suite.Cell], device: torch.device, budget: float) -> Result:
    with tqdm(total=len(cells), bar_format="{percentage:3.0f}%|{bar}| {elapsed} {desc}") as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.n = done
            bar.set_description_str(text)

        return suite.run(cells, device, budget, progress)


def _show(result: Result) -> None:
    machine, ceilings = result.machine, result.ceilings
    print(f"{machine['device']} ({machine['processor']}, {machine['threads']} threads), ", end="")
    print(f"torch {machine['torch']}, triton_tied {machine['triton_tied']}")
    rates = ", ".join(f"{dtype} {rate:.4g}" for dtype, rate in ceilings.tflops.items())
    print(f"ceilings: {ceilings.copy_gbs:.4g} GB/s; TFLOP/s: {rates}\n")
    print(results.table(result.rows), "\n")
    print(results.means_table(result.rows), "\n")
    for line in results.formula_table(result.rows):
        print(" | ".join(line))
    reasons = collections.Counter(
        (each.peer or each.pass_ or "workloads", each.reason) for each in result.left_out
    )
    for (what, reason), count in reasons.items():
        print(f"left out: {what} ({count}): {reason}")
    for fault in result.faults:
        print(f"FAULT: {fault}")
