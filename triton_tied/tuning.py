"""Tuning ahead of time: the problems of a model or of a list, timed one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from . import autotune, gpus
from .cost import floor_us
from .packing import Layout
from .paths import rehearsing
from .problem import Problem
from .tuner import Config, Failure


class Report(NamedTuple):
    """What tuning a problem gave. Times in microseconds: ``before`` of the config that would have
    been taken without, ``after`` of the winner; None where it was not timed, or nothing worked."""

    problem: Problem
    config: Config | None
    before: float | None
    after: float | None
    floor: float
    failures: list[Failure]


def tune(
    what: Callable[[], object] | Iterable[Problem],
    *,
    device: torch.device | str | None = None,
    budget_s: float = float("inf"),
    again: bool = False,
    progress: Callable[[Problem, str], None] = lambda problem, text: None,
) -> list[Report]:
    """Times the problems on a GPU and keeps the winners in the user's table.

    Args:
        what: problems, or a function that is called once and whose convolutions are tuned; let it
            run the backward too.
        device: a GPU, by default the current one.
        budget_s: seconds for all of it, shared evenly among the problems that are left.
        again: times also what the table holds already.
        progress: is told each problem and the best config so far.

    Returns:
        One report for each problem, in the order in which they were met.

    Raises:
        RuntimeError: there is no GPU to time on.
    """
    device = torch.device(device or "cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU to time on, but got device={str(device)!r}")
    problems = problems_of(what) if callable(what) else list(what)
    reports = []
    for i, problem in enumerate(problems):
        share = budget_s / (len(problems) - i)
        report = _tune_one(problem, device, share, again, progress)
        budget_s -= report[1]
        reports.append(report[0])
    return reports


def _tune_one(
    problem: Problem,
    device: torch.device,
    budget_s: float,
    again: bool,
    progress: Callable[[Problem, str], None],
) -> tuple[Report, float]:
    start = time.monotonic()
    first = autotune.config_for(problem, device)
    tuned = autotune.tune_problem(
        problem, device, budget_s, lambda text: progress(problem, text), again
    )
    after = tuned.medians[tuned.winner] if tuned.winner else None
    before = tuned.medians.get(first)
    floor = floor_us(problem, gpus.of_device(device))
    report = Report(problem, tuned.winner, before, after, floor, tuned.failures)
    return report, time.monotonic() - start


def problems_of(function: Callable[[], object]) -> list[Problem]:
    """The problems that a function meets; it may run without a GPU."""
    with rehearsing(), autotune.recording() as found:
        function()
    return list(found)


def problems_of_layer(problem: Problem) -> list[Problem]:
    """A convolution's forward, its input gradient and its packed weight gradient, each once."""
    transposed = problem.geometry.transposed(problem.layout.kernel_size)
    backward = replace(problem, image=problem.output, geometry=transposed)
    weight = replace(problem, kernel="weight_grad", centre="none")
    return list(dict.fromkeys([problem, backward, weight]))


def centre_of(layout: Layout, pixels: int) -> autotune.Centre:
    """Where a convolution of this size takes its centre from."""
    if layout.taps % 2 == 0:
        return "none"
    return "unpacked" if autotune.unpacks_centre(layout, pixels) else "gathered"
