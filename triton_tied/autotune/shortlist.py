"""Which candidates are worth timing for a problem, which is taken untimed, and why the rest fell.

Hard limits first, then the cost model's predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from ..kernels.configs import Config, as_listed, can_merge
from ..kernels.merging import MERGES
from .candidates import Candidate, list_of
from .cost_model import count_programs, floor_us, limit_splits, live_share, predict_us
from .gpus import GPU
from .problem import Problem

MAX_TIMED = 20  # configs of a problem
_MAX_WAVES = 4  # splits that just fill the multiprocessors are tried up to so many times
_HOPELESS_RATIO = 4.0  # of a prediction to the best one: it is not timed
_GOOD_SHARE = 0.75  # of live pixels; where there are fewer, the reason says so

_WORDS = {  # of the needs of candidates
    "scattered_output": "an output, or a residual, that is not channels-last",
    "ragged_boxes": "boxes that reach beyond the output",
    "scattered": "pixels that are not read 16 bytes at a time",
    "wide": "offsets of 64 bits",
}


class Predicted(NamedTuple):
    config: Config
    predicted_us: float


class Fallen(NamedTuple):
    config: Config
    reason: str


@dataclass(frozen=True)
class Shortlist:
    """What is left, best prediction first, why the others fell, the roofline's floor, and what may
    be taken where nothing is timed: the best prediction, then those that merge no columns, best
    first, then the others. That reads no rows of (N, C, H, W) memory by bulk copies: until a GPU
    has confirmed those, only a checked winner may."""

    candidates: tuple[Predicted, ...]
    fallen: tuple[Fallen, ...]
    floor_us: float
    safe: tuple[Predicted, ...]

    @property
    def ranked(self) -> tuple[Config, ...]:
        """What may be taken where nothing is timed."""
        return tuple(p.config for p in self.safe)

    @property
    def untimed(self) -> Config:
        return self.safe[0].config

    @property
    def untimed_us(self) -> float:
        return self.safe[0].predicted_us


def make_shortlist(problem: Problem, gpu: GPU, most: int = MAX_TIMED) -> Shortlist:
    """At most so many configs, always one, and what is taken without timing."""
    predicted: list[Predicted] = []
    fallen: list[Fallen] = []
    for candidate in list_of(problem.kernel, gpu.target, problem.dtype):
        reason = why_unfit(problem, gpu, candidate)
        if reason:
            fallen.append(Fallen(candidate.config, reason))
        else:
            predicted.append(_best_split(problem, gpu, candidate))
        predicted += _merging(problem, gpu, candidate)
    predicted.sort(key=lambda p: p.predicted_us)
    best = predicted[0].predicted_us
    kept = [p for p in predicted[:most] if p.predicted_us <= _HOPELESS_RATIO * best]
    safe = [p for p in predicted if p.config.loader != "planar_descriptor"]
    plain = [p for p in safe if p.config.merged == 1]
    # A winner has to beat what is taken without timing, and the best that merges no columns.
    missing = [p for p in dict.fromkeys((safe[0], plain[0])[:most]) if p not in kept]
    kept = [*kept[: most - len(missing)], *missing]
    # What is wrong with one that merges may be wrong with all of them.
    safe = list(dict.fromkeys((safe[0], *plain, *safe)))
    fallen += [
        Fallen(p.config, _why_slow(problem, p, best, most)) for p in predicted if p not in kept
    ]
    return Shortlist(tuple(kept), tuple(fallen), floor_us(problem, gpu), tuple(safe))


def _merging(problem: Problem, gpu: GPU, candidate: Candidate) -> list[Predicted]:
    """The candidate with as many columns merged as fill its tile, if that serves."""
    channels = problem.layout.channels
    merges = [merged for merged in MERGES if merged * channels <= candidate.config.tile_channels]
    if not can_merge(candidate.config) or not merges:
        return []
    config = replace(cast(Any, candidate.config), merged=merges[-1])
    merging = candidate._replace(config=config)
    return [_best_split(problem, gpu, merging)] if why_unfit(problem, gpu, merging) is None else []


def why_unfit(problem: Problem, gpu: GPU, candidate: Candidate) -> str | None:
    """The hard limits: why the GPU or the launcher would refuse, or None."""
    config = candidate.config
    if candidate.shared_bytes > gpu.block_shared_bytes:
        return f"{candidate.shared_bytes} bytes of shared memory, of {gpu.block_shared_bytes}"
    if config.loader != "pointer" and not gpu.has_descriptors:
        return f"{gpu.name} has no bulk copies"
    unmet = candidate.not_for & problem.needs(config)
    if unmet:
        return f"spills registers for {', '.join(sorted(_WORDS[need] for need in unmet))}"
    return problem.why_unreadable(config)


def _why_slow(problem: Problem, p: Predicted, best_us: float, most: int) -> str:
    ratio, share = p.predicted_us / best_us, live_share(problem, p.config)
    reason = f"predicted {p.predicted_us:.1f} us, {ratio:.1f} times the best"
    if ratio <= _HOPELESS_RATIO:
        reason += f"; {most} others are timed"
    if share < _GOOD_SHARE:
        reason += f"; {1 - share:.0%} of its pixels are dead"
    return reason


def serves(problem: Problem, gpu: GPU, config: Config) -> bool:
    """Whether a config, of any number of splits, is in the committed list and within the limits."""
    plain = as_listed(config)
    listed = list_of(problem.kernel, gpu.target, problem.dtype)
    found = [candidate for candidate in listed if candidate.config == plain]
    return bool(found) and why_unfit(problem, gpu, found[0]._replace(config=config)) is None


def _best_split(problem: Problem, gpu: GPU, candidate: Candidate) -> Predicted:
    config = candidate.config
    most = limit_splits(problem, config)
    programs = count_programs(problem, config)
    # Powers of two, and what just fills the multiprocessors a few times.
    full = [waves * gpu.multiprocessors // programs for waves in range(1, _MAX_WAVES + 1)]
    splits = {2**i for i in range(most.bit_length())} | {s for s in full if 0 < s <= most}
    choices = [replace(config, splits=s) for s in sorted(splits)]
    predicted = [
        Predicted(c, predict_us(problem, gpu, candidate._replace(config=c))) for c in choices
    ]
    return min(predicted, key=lambda p: p.predicted_us)
