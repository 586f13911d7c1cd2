"""Timing with a fake clock and fake failures: the right winner, losers dropped, faults survived."""

import itertools
import random
from functools import partial

import pytest

from triton_tied.autotune.race import race
from triton_tied.autotune.shortlist import Predicted, Shortlist
from triton_tied.kernels.configs import ConvConfig

CONFIGS = [ConvConfig((1, 8, 8), n, k) for n, k in itertools.product((16, 32, 64), (16, 32))]


@pytest.fixture
def truth():
    """A fresh speed for each config, all well apart, in milliseconds."""
    speeds = [1.0 + 0.15 * i for i in range(len(CONFIGS))]
    random.shuffle(speeds)
    return dict(zip(CONFIGS, speeds, strict=True))


class Bench:
    """A clock that says the true speed with 3% of noise, and a time that it takes."""

    def __init__(self, truth, failing=()):
        self.truth, self.failing = truth, failing
        self.ran, self.time, self.config = [], 0.0, None

    def prepare(self, config):
        return partial(self.run, config)

    def run(self, config):
        self.config = config
        if config in self.failing:
            raise self.failing[config]
        return config

    def clock(self, call):
        call()
        self.ran.append(self.config)
        self.time += 1.0
        return self.truth[self.config] * random.uniform(0.97, 1.03)

    def tune(self, is_right=lambda config: True, **options):
        predicted = tuple(Predicted(config, 1.0) for config in CONFIGS)
        shortlist = Shortlist(predicted, (), 0.1, predicted)
        return race(shortlist, self.prepare, is_right, self.clock, now=lambda: self.time, **options)


def test_the_fastest_wins(truth):
    tuned = Bench(truth).tune()
    assert tuned.winner == min(truth, key=truth.get)
    assert list(tuned.medians) == sorted(tuned.medians, key=tuned.medians.get)
    assert tuned.medians[tuned.winner] == pytest.approx(1000, rel=0.03)  # microseconds


def test_losers_are_dropped_after_their_first_turn(truth):
    bench = Bench(truth)
    bench.tune()
    times = {config: bench.ran.count(config) for config in CONFIGS}
    for config, speed in truth.items():
        if speed > 1.3 * 1.1:  # beyond the limit, noise included
            assert times[config] == 1
        if speed < 1.3 / 1.1:
            assert times[config] == 5


def test_candidates_take_turns(truth):
    bench = Bench(dict.fromkeys(CONFIGS, 1.0))
    bench.tune()
    assert bench.ran == CONFIGS * 5


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no PTX"), AssertionError(), MemoryError("shared"), Exception("PassManager")],
)
def test_a_config_that_fails_is_recorded_and_skipped(truth, error):
    fastest, second = sorted(truth, key=truth.get)[:2]
    tuned = Bench(truth, {fastest: error}).tune()
    assert tuned.winner == second
    assert fastest not in tuned.medians
    ((config, reason),) = tuned.failures
    assert config == fastest and type(error).__name__ in reason and str(error) in reason


def test_a_fault_and_a_failing_search_for_one_are_recorded_and_skipped(truth):
    fastest, second = sorted(truth, key=truth.get)[:2]

    def fault(config):
        if config == second:
            raise RuntimeError("no memory to compile")
        return "spills" if config == fastest else None

    bench = Bench(truth)
    tuned = bench.tune(fault=fault)
    assert not {fastest, second} & {*bench.ran, *tuned.medians}
    assert dict(tuned.failures) == {fastest: "spills", second: "RuntimeError: no memory to compile"}


def test_an_interrupt_is_not_a_failure(truth):
    with pytest.raises(KeyboardInterrupt):
        Bench(truth, {CONFIGS[0]: KeyboardInterrupt()}).tune()


def test_all_failing_gives_no_winner(truth):
    tuned = Bench(truth, dict.fromkeys(CONFIGS, ValueError("nothing works"))).tune()
    assert tuned.winner is None and not tuned.medians
    assert [failure.config for failure in tuned.failures] == CONFIGS


def test_a_wrong_winner_gives_way_to_the_next(truth):
    fastest, second = sorted(truth, key=truth.get)[:2]
    tuned = Bench(truth).tune(is_right=lambda config: config != fastest)
    assert tuned.winner == second and fastest not in tuned.medians
    assert tuned.failures[-1].config == fastest and "reference" in tuned.failures[-1].reason


def test_a_check_that_fails_counts_as_wrong(truth):
    fastest, second = sorted(truth, key=truth.get)[:2]

    def is_right(config):
        if config == fastest:
            raise RuntimeError("illegal memory access")
        return True

    tuned = Bench(truth).tune(is_right=is_right)
    assert tuned.winner == second and "illegal memory access" in tuned.failures[-1].reason


def test_budget_ends_the_timing_with_what_there_is(truth):
    bench = Bench(truth)
    tuned = bench.tune(budget_s=2.5)
    assert bench.ran == CONFIGS[:3]
    assert tuned.winner == min(CONFIGS[:3], key=truth.get)


def test_progress_tells_the_best_so_far(truth):
    told = []
    tuned = Bench(truth).tune(progress=told.append)
    assert str(tuned.winner) in told[-1] and "us" in told[-1]
