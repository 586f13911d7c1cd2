"""How long a config should take: a roofline with a few guesses.

Everything here is arithmetic on a :class:`Problem` and a :class:`GPU`; nothing runs. The constants
are guesses until measurements replace them: they rank, they do not predict.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..kernels.configs import Config, ConvConfig, count_boxes
from .candidates import Candidate
from .gpus import GPU
from .problem import Problem

_LAUNCH_US = 3.0
_LATENCY_US = 0.7  # of a load; as many are on their way as there are stages, less the one in use
# Of the peak of the matrix units, by how a tile is read; smaller tiles reach less.
_BULK_COPY_EFFICIENCY = 0.75
_POINTER_EFFICIENCY = 0.5
_SCATTERED_EFFICIENCY = 0.2  # by single elements
_FULL_TILE = 128  # rows and columns from which on a tile is large enough


def live_share(problem: Problem, config: Config) -> float:
    """Pixels of the output over pixels of all boxes."""
    return math.prod(problem.output) / (count_boxes(problem.output, config) * config.BLOCK_M)


def floor_us(problem: Problem, gpu: GPU) -> float:
    """The roofline: neither fewer operations nor fewer bytes will do."""
    compute = problem.flops / (gpu.tflops(problem.dtype) * 1e6)
    return max(compute, problem.least_bytes / (gpu.memory_gbs * 1e3))


def unpack_us(problem: Problem, gpu: GPU) -> float:
    """Of unpacking a convolution's centre: a launch that reads a triangle and writes a square."""
    layout = problem.layout
    numbers = 1.5 * layout.groups * layout.group_channels**2
    return _LAUNCH_US + problem.itemsize * numbers / (gpu.memory_gbs * 1e3)


def copy_us(problem: Problem, gpu: GPU) -> float:
    """Of copying a convolution's image into another memory format."""
    numbers = problem.layout.channels * math.prod(problem.image)
    return _LAUNCH_US + 2 * problem.itemsize * numbers / (gpu.memory_gbs * 1e3)


def predict_us(problem: Problem, gpu: GPU, candidate: Candidate) -> float:
    """Microseconds: the slowest of the products, the cache, the memory, and a chain of steps; of
    the others the more, the nearer they come, since they overlap imperfectly. Then the splits are
    summed."""
    config = candidate.config
    work = _work(problem, config)
    resident = _programs_at_once(gpu, candidate)
    rounds = math.ceil(work.programs / gpu.multiprocessors)  # on the busiest multiprocessor
    rate = gpu.tflops(problem.dtype) * 1e6 / gpu.multiprocessors * _efficiency(problem, config)
    compute = rounds * work.flops / rate
    step = _LATENCY_US / max(config.num_stages - 1, 1)
    chain = math.ceil(rounds / resident) * work.steps * step
    cache = work.programs * work.read_bytes / (gpu.cache_gbs * 1e3)
    memory = (problem.least_bytes + work.scratch_bytes) / (gpu.memory_gbs * 1e3)
    overlapped = sum(t**4 for t in (compute, chain, cache, memory)) ** 0.25  # the 4-norm
    return _LAUNCH_US * work.launches + overlapped + work.scratch_bytes / (gpu.memory_gbs * 1e3)


def count_programs(problem: Problem, config: Config) -> int:
    """Of the launch."""
    return _work(problem, config).programs


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


def _work(problem: Problem, config: Config) -> _Work:
    layout, m, n, k = problem.layout, config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    n_blocks, k_blocks = (math.ceil(layout.group_channels / b) for b in (n, k))
    boxes, live = count_boxes(problem.output, config), live_share(problem, config)
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


def _programs_at_once(gpu: GPU, candidate: Candidate) -> int:
    """Programs of one multiprocessor at once."""
    threads = candidate.config.num_warps * gpu.warp_size
    by_registers = gpu.registers // (max(candidate.registers, 16) * threads)
    by_shared = gpu.shared_bytes // max(candidate.shared_bytes, 1)
    return max(1, min(by_registers, by_shared, gpu.max_programs))


def _efficiency(problem: Problem, config: Config) -> float:
    """The share of the peak that the products of one tile reach; guessed."""
    rows = config.BLOCK_M if isinstance(config, ConvConfig) else config.BLOCK_K
    size = min(1.0, math.sqrt(rows * config.BLOCK_N) / _FULL_TILE)
    if config.loader != "pointer":
        return _BULK_COPY_EFFICIENCY * size**0.5
    scattered = problem.memory != "channels_last" or problem.layout.channels % 8
    return (_SCATTERED_EFFICIENCY if scattered else _POINTER_EFFICIENCY) * size**0.5
