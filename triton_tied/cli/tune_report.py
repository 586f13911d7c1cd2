"""What ``tune`` prints: problems, shortlists and reports, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..autotune import tuned_configs
from ..autotune.gpus import GPU
from ..autotune.problem import Problem
from ..autotune.shortlist import Shortlist
from ..autotune.tuning import Report
from ..kernels.configs import Config, as_json

_MAX_SHOWN = 8  # configs of a shortlist, for people


def print_reports(reports: list[Report]) -> None:
    """What tuning gave, a line a problem."""
    print(
        f"{'problem':<52}{'before us':>10}{'after us':>10}{'ratio':>7}{'of roofline':>13}", end=""
    )
    print(f"{'timed':>9}")
    for r in reports:
        before = f"{r.before:.1f}" if r.before else "-"
        after = f"{r.after:.1f}" if r.after else "-"
        ratio = f"{r.before / r.after:.2f}" if r.before and r.after else "-"
        share = f"{r.floor / r.after:.0%}" if r.after else "-"
        timed = f"{sum(c.median_us is not None for c in r.candidates)}/{len(r.candidates)}"
        print(f"{name_of(r.problem):<52}{before:>10}{after:>10}{ratio:>7}{share:>13}{timed:>9}")
        for failure in r.failures:
            print(f"    failed: {failure.config}: {failure.reason}")


def print_shortlists(found: Sequence[tuple[Problem, Shortlist]], gpu: GPU) -> None:
    """What would be timed, and why the rest fell."""
    for problem, shortlist in found:
        print(f"{name_of(problem)} on {gpu.name}: floor {shortlist.floor_us:.1f} us")
        for config, predicted in shortlist.candidates[:_MAX_SHOWN]:
            print(f"    {predicted:>8.1f} us  {_short(config)}")
        more = len(shortlist.candidates) - _MAX_SHOWN
        if more > 0:
            print(f"    and {more} more")
        if shortlist.untimed != shortlist.candidates[0].config:
            print(f"    taken if nothing is timed: {_short(shortlist.untimed)}")
        for config, reason in shortlist.fallen:
            print(f"    fell: {_short(config)}: {reason}")


def shortlists_as_json(found: Sequence[tuple[Problem, Shortlist]]) -> str:
    """What would be timed, and why the rest fell."""
    return json.dumps([_shortlist_as_json(*pair) for pair in found], indent=1)


def name_of(problem: Problem) -> str:
    layout, times = problem.layout, "x"
    image = times.join(map(str, (problem.image[0], layout.channels, *problem.image[1:])))
    kernel = times.join(map(str, layout.kernel_size))
    groups = f" g{layout.groups}" if layout.groups > 1 else ""
    sign = " skew" if layout.sign < 0 else ""
    padding = "" if problem.is_weight_grad else f" p{problem.geometry.padding[0][0]}"
    output = "" if problem.output_memory == "channels_last" else f" to {problem.output_memory}"
    return f"{problem.kernel} {image} k{kernel}{padding}{groups}{sign}{output} {problem.dtype}"


_USUAL = {"merged": 1, "streamed": 0}  # is not shown


def _short(config: Config) -> str:
    fields = ", ".join(
        f"{name}={'x'.join(map(str, value)) if name == 'box' else value}"
        for name, value in asdict(config).items()
        if _USUAL.get(name) != value
    )
    return f"{config.kind} {fields}"


def _problem_as_json(problem: Problem) -> dict[str, Any]:
    return {"key": problem.key, "name": name_of(problem), **asdict(problem)}


def _shortlist_as_json(problem: Problem, shortlist: Shortlist) -> dict[str, Any]:
    return {
        "problem": _problem_as_json(problem),
        "floor_us": shortlist.floor_us,
        "candidates": [
            {"config": as_json(config), "predicted_us": predicted}
            for config, predicted in shortlist.candidates
        ],
        "fallen": [
            {"config": as_json(config), "reason": reason} for config, reason in shortlist.fallen
        ],
    }


def reports_as_json(reports: Sequence[Report]) -> str:
    """What tuning on the current GPU gave."""
    origin = asdict(tuned_configs.origin_of(torch.device("cuda")))
    return json.dumps([{"origin": origin, **_as_json(report)} for report in reports], indent=1)


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "problem": _problem_as_json(report.problem),
        "config": as_json(report.config) if report.config else None,
        "before_us": report.before,
        "after_us": report.after,
        "floor_us": report.floor,
        "candidates": [
            {"config": as_json(config), "predicted_us": predicted, "median_us": median}
            for config, predicted, median in report.candidates
        ],
        "failures": [
            {"config": as_json(config), "reason": reason} for config, reason in report.failures
        ],
    }
