"""Tuning ahead of time: the problems of a model or of a list, timed one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from . import autotune, gpus
from .cost import floor_us, sieve
from .packing import Layout
from .paths import rehearsing
from .problem import Problem
from .tuner import Config, Failure


class Candidate(NamedTuple):
    """What the sieves left, with its median where it was timed."""

    config: Config
    predicted_us: float
    median_us: float | None


class Report(NamedTuple):
    """What tuning a problem gave. Times in microseconds: ``before`` of what would have been taken
    without, or of the next that was timed, ``after`` of the winner; None where nothing worked.
    ``candidates`` come best prediction first."""

    problem: Problem
    config: Config | None
    before: float | None
    after: float | None
    floor: float
    candidates: list[Candidate]
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
        what: problems, or a function that is called once and whose convolutions are tuned, with
            their centre tap gathered and unpacked; let it run the backward too.
        device: a GPU, by default the current one.
        budget_s: seconds for all of it, shared evenly among the problems that are left.
        again: times also what the table holds already.
        progress: is told each problem and the best config so far.

    Returns:
        One report for each problem, in the order in which they were met.

    Raises:
        RuntimeError: there is no GPU to time on.
    """
    device = gpu_to_time_on(device)
    problems = both_centres(problems_of(what)) if callable(what) else list(what)
    end = time.monotonic() + budget_s
    reports = []
    for i, problem in enumerate(problems):
        share = (end - time.monotonic()) / (len(problems) - i)
        reports.append(_tune_one(problem, device, share, again, progress))
    return reports


def gpu_to_time_on(device: torch.device | str | None = None) -> torch.device:
    """The device, by default the current GPU.

    Raises:
        RuntimeError: it is no GPU, or there is none.
    """
    device = torch.device(device or "cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU to time on, but got device={str(device)!r}")
    return device


def _tune_one(
    problem: Problem,
    device: torch.device,
    budget_s: float,
    again: bool,
    progress: Callable[[Problem, str], None],
) -> Report:
    gpu = gpus.of_device(device)
    sieved, first = sieve(problem, gpu), autotune.config_for(problem, device)
    tuned = autotune.tune_problem(
        problem, device, budget_s, lambda text: progress(problem, text), again
    )
    medians = tuned.medians
    return Report(
        problem,
        tuned.winner,
        next((medians[config] for config in (first, *sieved.ranked) if config in medians), None),
        medians[tuned.winner] if tuned.winner else None,
        floor_us(problem, gpu),
        [Candidate(*left, medians.get(left.config)) for left in sieved.candidates],
        tuned.failures,
    )


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


def both_centres(problems: Iterable[Problem]) -> list[Problem]:
    """Each convolution with its centre tap gathered and unpacked, so that the faster way is taken
    later; the other problems as they are. Each once."""
    found: dict[Problem, None] = {}
    for problem in problems:
        ways: tuple[autotune.Centre, ...] = ("gathered", "unpacked")
        if problem.is_weight_grad or problem.layout.taps % 2 == 0:
            ways = ("none",)
        found |= dict.fromkeys(replace(problem, centre=way) for way in ways)
    return list(found)


def centre_of(layout: Layout, pixels: int) -> autotune.Centre:
    """Where a convolution of this size takes its centre from, unless a table knows better."""
    if layout.taps % 2 == 0:
        return "none"
    return "unpacked" if autotune.guess_unpacks_centre(layout, pixels) else "gathered"
