"""Three sieves before anything is timed: hard limits, dead pixels and waves, and a roofline.

Everything here is arithmetic on a :class:`Problem` and a :class:`GPU`; nothing runs. The constants
of the last sieve are guesses until measurements replace them: they rank, they do not predict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from .candidates import Candidate, list_of
from .configs import ConvConfig, WeightGradConfig
from .gpus import GPU
from .problem import Problem

KEPT = 20
_MOST_PROGRAMS = 32  # of one multiprocessor at once
_MOST_SPLITS = 64
_MOST_WAVES = 4
_LAUNCH_US = 3.0
_LATENCY_US = 0.7  # of a load; as many are on their way as there are stages, less the one in use
_HOPELESS = 4.0  # times the best prediction

_WORDS = {  # of the needs of candidates
    "two_sums": "a skew-adjoint weight",
    "gathered_centre": "a centre gathered from its triangle",
    "ragged_boxes": "boxes that reach beyond the output",
    "scattered": "pixels that are not read 16 bytes at a time",
    "planar": "contiguous (NCHW) images",
    "wide": "offsets of 64 bits",
}


class Predicted(NamedTuple):
    config: ConvConfig | WeightGradConfig
    predicted_us: float


class Fallen(NamedTuple):
    config: ConvConfig | WeightGradConfig
    reason: str


@dataclass(frozen=True)
class Sieved:
    """What is left, best prediction first, why the others fell, the roofline's floor, and what may
    be taken where nothing is timed, best prediction first. That reads no rows of (N, C, H, W)
    memory by bulk copies: until a GPU has confirmed those, only a checked winner may."""

    candidates: tuple[Predicted, ...]
    fallen: tuple[Fallen, ...]
    floor_us: float
    ranked: tuple[ConvConfig | WeightGradConfig, ...]

    @property
    def untimed(self) -> ConvConfig | WeightGradConfig:
        return self.ranked[0]


def sieve(problem: Problem, gpu: GPU) -> Sieved:
    """At most :data:`KEPT` configs for a problem, always one, and what is taken without timing."""
    predicted: list[Predicted] = []
    fallen: list[Fallen] = []
    for candidate in list_of(problem.kernel, gpu.target, problem.dtype):
        reason = why_not(problem, gpu, candidate)
        if reason:
            fallen.append(Fallen(candidate.config, reason))
        else:
            predicted.append(_best_split(problem, gpu, candidate))
    predicted.sort(key=lambda p: p.predicted_us)
    best = predicted[0].predicted_us
    kept = [p for p in predicted[:KEPT] if p.predicted_us <= _HOPELESS * best]
    safe = [p for p in predicted if "planar" not in problem.needs(p.config)]
    if safe[0] not in kept:  # a winner has to beat what is taken without timing
        kept = [*kept[: KEPT - 1], safe[0]]
    for p in predicted:
        if p in kept:
            continue
        share = live_share(problem, p.config)
        fallen.append(
            Fallen(
                p.config,
                f"predicted {p.predicted_us:.1f} us, {p.predicted_us / best:.1f} times the best"
                + (f"; {KEPT} others are timed" if p.predicted_us <= _HOPELESS * best else "")
                + (f"; {1 - share:.0%} of its pixels are dead" if share < 0.75 else ""),
            )
        )
    ranked = tuple(p.config for p in safe)
    return Sieved(tuple(kept), tuple(fallen), floor_us(problem, gpu), ranked)


def why_not(problem: Problem, gpu: GPU, candidate: Candidate) -> str | None:
    """The hard limits: why the GPU or the launcher would refuse, or None."""
    config = candidate.config
    if candidate.shared_bytes > gpu.block_shared_bytes:
        return f"{candidate.shared_bytes} bytes of shared memory, of {gpu.block_shared_bytes}"
    if config.loader == "descriptor" and not gpu.has_descriptors:
        return f"{gpu.name} has no bulk copies"
    unmet = candidate.not_for & problem.needs(config)
    if unmet:
        return f"spills registers for {', '.join(sorted(_WORDS[need] for need in unmet))}"
    return problem.why_not(config)


def serves(problem: Problem, gpu: GPU, config: ConvConfig | WeightGradConfig) -> bool:
    """Whether a config, of any number of splits, is in the committed list and within the limits."""
    plain = config if isinstance(config, ConvConfig) else replace(config, splits=1)
    listed = list_of(problem.kernel, gpu.target, problem.dtype)
    found = [candidate for candidate in listed if candidate.config == plain]
    return bool(found) and why_not(problem, gpu, found[0]) is None


def live_share(problem: Problem, config: ConvConfig | WeightGradConfig) -> float:
    """Pixels of the output over pixels of all boxes."""
    return math.prod(problem.output) / (_count_boxes(problem, config) * config.BLOCK_M)


def floor_us(problem: Problem, gpu: GPU) -> float:
    """The roofline: neither fewer operations nor fewer bytes will do."""
    compute = problem.flops / (gpu.tflops(problem.dtype) * 1e6)
    return max(compute, problem.least_bytes / (gpu.memory_gbs * 1e3))


def unpack_us(problem: Problem, gpu: GPU) -> float:
    """Of unpacking a convolution's centre: a launch that reads a triangle and writes a square."""
    layout = problem.layout
    numbers = 1.5 * layout.groups * layout.group_channels**2
    return _LAUNCH_US + problem.itemsize * numbers / (gpu.memory_gbs * 1e3)


def _best_split(problem: Problem, gpu: GPU, candidate: Candidate) -> Predicted:
    config = candidate.config
    if isinstance(config, ConvConfig):
        return Predicted(config, _predict(problem, gpu, candidate))
    most = min(_MOST_SPLITS, _count_boxes(problem, config))
    programs = _work(problem, config).programs
    # Powers of two, and what just fills the multiprocessors a few times.
    full = [waves * gpu.multiprocessors // programs for waves in range(1, _MOST_WAVES + 1)]
    splits = {2**i for i in range(most.bit_length())} | {s for s in full if 0 < s <= most}
    choices = [replace(config, splits=s) for s in sorted(splits)]
    predicted = [
        Predicted(c, _predict(problem, gpu, candidate._replace(config=c))) for c in choices
    ]
    return min(predicted, key=lambda p: p.predicted_us)


def _predict(problem: Problem, gpu: GPU, candidate: Candidate) -> float:
    """Microseconds: the slowest of the products, the cache, the memory, and a chain of steps; of
    the others the more, the nearer they come, since they overlap imperfectly. Then the splits are
    summed."""
    config = candidate.config
    work = _work(problem, config)
    resident = _resident(gpu, candidate)
    rounds = math.ceil(work.programs / gpu.multiprocessors)  # on the busiest multiprocessor
    rate = gpu.tflops(problem.dtype) * 1e6 / gpu.multiprocessors * _efficiency(problem, config)
    compute = rounds * work.flops / rate
    step = _LATENCY_US / max(config.num_stages - 1, 1)
    chain = math.ceil(rounds / resident) * work.steps * step
    cache = work.programs * work.read_bytes / (gpu.cache_gbs * 1e3)
    memory = (problem.least_bytes + work.scratch_bytes) / (gpu.memory_gbs * 1e3)
    overlapped = math.hypot(*(time**2 for time in (compute, chain, cache, memory))) ** 0.5
    return _LAUNCH_US * work.launches + overlapped + work.scratch_bytes / (gpu.memory_gbs * 1e3)


class _Work(NamedTuple):
    """What a launch does: of one program the steps of its loop, its operations and the bytes that
    it reads, but for dead pixels; of all programs the scratch that is written, and read again by
    the sum that follows."""

    programs: int
    steps: int
    flops: int
    read_bytes: float
    scratch_bytes: int = 0
    launches: int = 1


def _work(problem: Problem, config: ConvConfig | WeightGradConfig) -> _Work:
    layout, m, n, k = problem.layout, config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    n_blocks, k_blocks = (math.ceil(layout.group_channels / b) for b in (n, k))
    boxes, live = _count_boxes(problem, config), live_share(problem, config)
    if isinstance(config, ConvConfig):
        products = layout.taps * k_blocks
        one_tile = k_blocks == 1 and n == k
        tiles = (layout.pairs if one_tile else 2 * layout.pairs) + layout.taps % 2
        read = (live * products * m * k + tiles * k_blocks * n * k) * problem.itemsize
        steps = (layout.pairs + layout.taps % 2) * k_blocks
        return _Work(boxes * n_blocks * layout.groups, steps, 2 * products * m * n * k, read)
    steps = math.ceil(boxes / config.splits)
    matrices = (layout.taps + 1) // 2
    images = 2 * n + (1 if n_blocks == 1 and n == k else 2) * k
    read = live * steps * m * images * problem.itemsize
    programs = matrices * n_blocks * k_blocks * layout.groups * config.splits
    scratch = 4 * layout.size * config.splits if config.splits > 1 else 0
    launches = 1 if config.splits == 1 else 3  # the sum, and its cast
    return _Work(programs, steps, 4 * steps * m * n * k, read, scratch, launches)


def _resident(gpu: GPU, candidate: Candidate) -> int:
    """Programs of one multiprocessor at once."""
    threads = candidate.config.num_warps * gpu.warp_size
    by_registers = gpu.registers // (max(candidate.registers, 16) * threads)
    by_shared = gpu.shared_bytes // max(candidate.shared_bytes, 1)
    return max(1, min(by_registers, by_shared, _MOST_PROGRAMS))


def _efficiency(problem: Problem, config: ConvConfig | WeightGradConfig) -> float:
    """The share of the peak that the products of one tile reach; guessed."""
    rows = config.BLOCK_M if isinstance(config, ConvConfig) else config.BLOCK_K
    size = min(1.0, math.sqrt(rows * config.BLOCK_N) / 128)
    if config.loader == "descriptor":
        return 0.75 * size**0.5
    scattered = problem.memory != "channels_last" or problem.layout.channels % 8
    return (0.2 if scattered else 0.5) * size**0.5


def _count_boxes(problem: Problem, config: ConvConfig | WeightGradConfig) -> int:
    sides = zip(problem.output, config.box, strict=True)
    return math.prod(math.ceil(size / side) for size, side in sides)
