"""A race of configs: timed in turns, losers dropped early, and the winner checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..kernels.configs import Config
from ..kernels.toolchain import ToolchainError
from .shortlist import Shortlist

_ROUNDS = 5
_LOSING_RATIO = 1.3  # of a median to the best so far: the config is dropped


class Failure(NamedTuple):
    config: Config
    reason: str


@dataclass
class Outcome:
    """The medians in microseconds of what ran, best first, and what failed."""

    medians: dict[Config, float]
    failures: list[Failure] = field(default_factory=list)

    @property
    def winner(self) -> Config | None:
        return next(iter(self.medians), None)


def race(
    shortlist: Shortlist,
    prepare: Callable[[Config], Callable[[], object]],
    is_right: Callable[[Config], bool],
    clock: Callable[[Callable[[], object]], float],
    budget_s: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] = lambda text: None,
    fault: Callable[[Config], str | None] = lambda config: None,
) -> Outcome:
    """Times the candidates in turns, drops losers early, and keeps a winner only if it is right.

    Args:
        prepare: what it returns launches a config. Whatever either raises is recorded, and the
            config left out; but a ToolchainError, of a machine that can compile nothing, ends the
            race.
        is_right: whether the result of a config is that of the reference.
        clock: milliseconds of a call; see ``triton.testing.do_bench``.
        budget_s: seconds after which no further timing starts; each candidate is timed once before
            any is timed again, best prediction first.
        now: the time in seconds. progress: is told the best so far.
        fault: why a config should not be timed at all, or None.
    """
    end = now() + budget_s
    samples: dict[Config, list[float]] = {}
    failures: list[Failure] = []
    alive = [candidate.config for candidate in shortlist.candidates]
    for _ in range(_ROUNDS):
        for config in list(alive):
            if samples and now() >= end:
                break
            reason = None
            try:
                if config not in samples:
                    reason = fault(config)
                if not reason:
                    ms = clock(prepare(config))
                    samples.setdefault(config, []).append(ms * 1e3)
            except ToolchainError:
                raise  # all others would fail as well
            except Exception as error:  # a compiler has many ways to fail, none of them ours
                reason = f"{type(error).__name__}: {error}"
            if reason:
                failures.append(Failure(config, reason))
                samples.pop(config, None)
                alive.remove(config)
            else:
                progress(_best(samples))
        alive = _survivors(samples, alive)
    return Outcome(_check(samples, is_right, failures), failures)


def _best(samples: dict[Config, list[float]]) -> str:
    config, times = min(samples.items(), key=lambda item: statistics.median(item[1]))
    return f"{statistics.median(times):.1f} us {config}"


def _survivors(samples: dict[Config, list[float]], alive: list[Config]) -> list[Config]:
    medians = {config: statistics.median(samples[config]) for config in alive if config in samples}
    best = min(medians.values(), default=0.0)
    return [config for config, median in medians.items() if median <= _LOSING_RATIO * best]


def _check(
    samples: dict[Config, list[float]],
    is_right: Callable[[Config], bool],
    failures: list[Failure],
) -> dict[Config, float]:
    """The medians, best first, from the first config that is right on."""
    medians = {config: statistics.median(times) for config, times in samples.items()}
    ranked = sorted(medians, key=lambda config: medians[config])
    for i, config in enumerate(ranked):
        try:
            if is_right(config):
                return {c: medians[c] for c in ranked[i:]}
            failures.append(Failure(config, "its result is not that of the reference"))
        except Exception as error:  # as above
            failures.append(Failure(config, f"{type(error).__name__}: {error}"))
    return {}
