"""Tuning: problems timed on a GPU, and their winners kept in the user's table."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..kernels.configs import Config
from . import disk_cache, gpus, trial, tuned_configs
from .compile_ahead import Compilers, Job
from .cost_model import floor_us
from .disk_cache import Entry
from .problem import Problem
from .race import Failure, Outcome
from .recording import problems_of
from .shortlist import MAX_TIMED, Shortlist, make_shortlist

_tuning = threading.RLock()
_COMPILING_RATIO = 0.5  # of a limited time


class Measured(NamedTuple):
    """A config of the shortlist, with its median where it was timed."""

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
    candidates: list[Measured]
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

    The candidates are compiled first, by several processes.

    Args:
        what: problems, or a function that is called once and whose convolutions are tuned; let it
            run the backward too.
        device: a GPU, by default the current one.
        budget_s: seconds for all of it, shared evenly among the problems that are left. Those that
            are left when it ends are not tuned.
        again: times also what the table holds already.
        progress: is told each problem and the best config so far.

    Returns:
        One report for each problem that was tuned, in the order in which they were met.

    Raises:
        RuntimeError: there is no GPU to time on.
    """
    device = gpu_to_time_on(device)
    problems = problems_of(what) if callable(what) else list(what)
    return list(tune_each(problems, device, budget_s, again, progress))


def tune_each(
    problems: Sequence[Problem],
    device: torch.device,
    budget_s: float = float("inf"),
    again: bool = False,
    progress: Callable[[Problem, str], None] = lambda problem, text: None,
) -> Iterator[Report]:
    """:func:`tune`, one problem after another."""
    end = time.monotonic() + budget_s
    compile_candidates(problems, device, _COMPILING_RATIO * budget_s, again)
    for i, problem in enumerate(problems):
        left = end - time.monotonic()
        if left <= 0:
            return
        yield _tune_one(problem, device, left / (len(problems) - i), again, progress)


def compile_candidates(
    problems: Sequence[Problem],
    device: torch.device,
    seconds: float,
    again: bool,
    most: int = MAX_TIMED,
) -> None:
    """Compiles what will be timed, at most so many for a problem, the best predictions of all
    problems first, while time is left. What fails is met again, and reported, when it is timed."""
    if torch.version.hip is not None:
        return
    gpu = gpus.of_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    lists = [
        [Job(10 * major + minor, problem, candidate.config) for candidate in shortlist.candidates]
        for problem in problems
        if again or tuned_configs.entry_for(problem, device) is None
        for shortlist in [make_shortlist(problem, gpu, most)]
    ]
    jobs = [job for rank in itertools.zip_longest(*lists) for job in rank if job]
    with Compilers() as compilers:
        limit = threading.Timer(min(seconds, threading.TIMEOUT_MAX), compilers.end)
        limit.daemon = True
        limit.start()
        for _ in compilers.compile(jobs):
            pass
        limit.cancel()


def gpu_to_time_on(device: torch.device | str | None = None) -> torch.device:
    """The device, by default the current GPU.

    Raises:
        RuntimeError: it is no GPU, or there is none.
    """
    device = torch.device(device or "cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU to time on, but got device={str(device)!r}")
    return device


def tune_problem(
    problem: Problem,
    device: torch.device,
    budget_s: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
    again: bool = False,
    most: int = MAX_TIMED,
) -> Outcome:
    """Times a problem on a GPU and keeps the winner in the user's table.

    Where another process was faster its choice is taken, so that all agree, unless ``again``. The
    table is locked while it is read and written, not while the GPU is waited for. Where it cannot
    be locked or written, a warning says so, and the winner is kept for this process alone.
    ``most``: configs that are timed, best prediction first.
    """
    origin = tuned_configs.origin_of(device)
    path = disk_cache.path_of(origin)

    def known() -> Outcome | None:
        tuned_configs.read_again()
        entry = None if again else tuned_configs.entry_for(problem, device)
        return Outcome({entry.config: entry.median_us}) if entry else None

    with _tuning:
        outcome = known()
        if outcome is None:
            shortlist = make_shortlist(problem, gpus.of_device(device), most)
            outcome = trial.race_on(device, problem, shortlist, budget_s, progress)
            with disk_cache.locked(path):
                theirs = known()
                if theirs:
                    return theirs
                tuned_configs.keep(path, origin, problem, _as_entry(shortlist, outcome))
    return outcome


def give_up(problem: Problem, device: torch.device) -> None:
    """The problem cannot be timed in this process, and is not tried again."""
    origin = tuned_configs.origin_of(device)
    tuned_configs.keep(disk_cache.path_of(origin), origin, problem, None)


def _as_entry(shortlist: Shortlist, outcome: Outcome) -> Entry | None:
    predicted = {candidate.config: candidate.predicted_us for candidate in shortlist.candidates}
    winner = outcome.winner
    if winner is None:
        return None
    first_us = outcome.medians.get(shortlist.untimed)
    return Entry(winner, outcome.medians[winner], first_us, predicted[winner])


def _tune_one(
    problem: Problem,
    device: torch.device,
    budget_s: float,
    again: bool,
    progress: Callable[[Problem, str], None],
) -> Report:
    gpu = gpus.of_device(device)
    shortlist, first = make_shortlist(problem, gpu), tuned_configs.config_for(problem, device)
    outcome = tune_problem(problem, device, budget_s, lambda text: progress(problem, text), again)
    medians = outcome.medians
    return Report(
        problem,
        outcome.winner,
        next((medians[config] for config in (first, *shortlist.ranked) if config in medians), None),
        medians[outcome.winner] if outcome.winner else None,
        floor_us(problem, gpu),
        [Measured(*left, medians.get(left.config)) for left in shortlist.candidates],
        outcome.failures,
    )
