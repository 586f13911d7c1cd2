"""How long a config should take: arithmetic on what its compiled code moves and multiplies.

Everything here is computed from a :class:`Problem`, a :class:`GPU` and what is known of a
:class:`Candidate`; nothing runs. The terms are guesses until ``python bench/cost_model.py --fit``
has fitted them to measurements: they rank, they do not predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..kernels.configs import (
    ClusteredConfig,
    Config,
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    OnePassConfig,
    OnePassTf32Config,
    RowByRowConfig,
    WeightGradConfig,
    swizzled_channels,
)
from ..kernels.stored_taps import most_splits, stored_taps
from .candidates import Candidate
from .gpus import GPU
from .problem import Problem


@dataclass(frozen=True)
class Terms:
    """What is not in a data sheet. Cycles are those of a multiprocessor.

    Sources: [1] reported speeds of cuBLAS's matrix products on an H100, 800 of 989 and 400 of 494
    TFLOP/s; [2] published microbenchmarks of the H100's caches; [3] CUDA's documentation; [4] a
    guess.
    """

    matrix_share: float = 0.81  # of the peak of the matrix units that products reach [1]
    warp_products_share: float = 0.62  # of that by mma.sync on a GPU that has wgmma [4]
    core_share: float = 0.7  # of the peak of exact float32 that threads' own instructions reach [4]
    cache_bytes: float = 56.0  # a cycle, from the last-level cache into one multiprocessor [2]
    narrow_share: float = 0.2  # of that by loads of single numbers [4]
    shared_bytes: float = 128.0  # a cycle, of shared memory [3]
    bulk_latency: float = 700.0  # cycles of a bulk copy out of the last-level cache [2]
    load_latency: float = 1200.0  # and of loads and asynchronous copies [2]
    start: float = 2200.0  # cycles to fill the pipeline and to write the result [4]
    gather: float = 1200.0  # cycles to gather a tile of the centre [4]
    barrier: float = 30.0  # cycles of each barrier or wait of a loop [4]
    launch_us: float = 2.0  # of a launch [4]


TERMS = Terms()
MAX_SPLITS = 256  # programs that share the pixels of one tile of the weight gradient
MAX_CONV_SPLITS = 16  # programs that share the taps and channels of one tile of the output


class Prediction(NamedTuple):
    """Microseconds of what keeps the launch busy. Those before ``start`` overlap."""

    products: float
    shared: float
    multiprocessor_cache: float
    cache: float
    memory: float
    chain: float
    start: float
    sum: float
    launches: float

    @property
    def bound(self) -> str:
        """Which of those that overlap is the longest."""
        overlapping = self._asdict() | {"start": 0.0, "sum": 0.0, "launches": 0.0}
        return max(overlapping, key=lambda name: overlapping[name])

    @property
    def total(self) -> float:
        """They overlap imperfectly: the nearer they come to the longest, the more is added."""
        overlapped = sum(term**4 for term in self[:6]) ** 0.25
        return overlapped + self.start + self.sum + self.launches


def live_share(problem: Problem, config: Config) -> float:
    """Pixels of the output over pixels of all boxes."""
    problem, config = problem.as_read(config)
    return math.prod(problem.output) / (config.count_boxes(problem.output) * config.BLOCK_M)


def busy_share(problem: Problem, gpu: GPU, config: Config) -> float:
    """Of the multiprocessors, over the rounds that the programs need."""
    programs = count_programs(problem, config)
    return programs / (math.ceil(programs / gpu.multiprocessors) * gpu.multiprocessors)


def floor_us(problem: Problem, gpu: GPU, terms: Terms = TERMS) -> float:
    """The roofline: neither fewer operations nor fewer bytes will do."""
    compute = problem.flops / (gpu.tflops(problem.dtype) * terms.matrix_share * 1e6)
    return max(compute, problem.least_bytes / (gpu.memory_gbs * 1e3))


def copy_us(problem: Problem, gpu: GPU) -> float:
    """Of copying a convolution's image into another memory format."""
    numbers = problem.layout.channels * math.prod(problem.image)
    return TERMS.launch_us + 2 * problem.itemsize * numbers / (gpu.memory_gbs * 1e3)


def predict_us(problem: Problem, gpu: GPU, candidate: Candidate) -> float:
    """Microseconds of a config."""
    return predict(problem, gpu, candidate).total


def predict(problem: Problem, gpu: GPU, candidate: Candidate, terms: Terms = TERMS) -> Prediction:
    """What a config should take, by what it waits for."""
    config = candidate.config
    work = _work(problem, config)
    cycle_us = 1e-3 / gpu.clock_ghz
    rounds = math.ceil(work.programs / gpu.multiprocessors)  # on the busiest multiprocessor
    waves = math.ceil(rounds / _programs_at_once(gpu, candidate))
    by_threads, by_units = _core_flops(gpu, terms), _flops_a_cycle(problem, gpu, candidate, terms)
    flops_a_cycle = by_threads if work.by_threads else by_units
    products = rounds * work.steps * work.step_flops / flops_a_cycle
    shared = rounds * work.steps * work.shared_bytes / terms.shared_bytes
    narrow = terms.narrow_share if "scattered" in problem.needs(config) else 1.0
    through_one = rounds * (work.read_bytes + work.sent_bytes) + work.held_bytes
    through_one /= terms.cache_bytes * narrow
    latency = terms.load_latency if config.loader == "pointer" else terms.bulk_latency
    step = latency / (work.ahead or max(config.num_stages - 1, 1))
    step += (candidate.barriers + candidate.waits) * terms.barrier
    start = terms.start + work.gathers * terms.gather
    held_bytes = min(work.programs, gpu.multiprocessors) * work.held_bytes
    cache_us = (work.programs * work.read_bytes + held_bytes) / (gpu.cache_gbs * 1e3)
    scratch_us = work.scratch_bytes / (gpu.cache_gbs * 1e3)
    return Prediction(
        products * cycle_us,
        shared * cycle_us,
        through_one * cycle_us,
        cache_us + scratch_us,
        problem.least_bytes / (gpu.memory_gbs * 1e3),
        waves * work.steps * step * cycle_us,
        (1 if work.stays else waves) * start * cycle_us,
        scratch_us,
        work.launches * terms.launch_us,
    )


def count_programs(problem: Problem, config: Config) -> int:
    """Of the launch."""
    return _work(problem, config).programs


def limit_splits(problem: Problem, config: Config) -> int:
    """How many programs at most may share a sum."""
    problem, config = problem.as_read(config)
    return _KINDS[type(config)].limit_splits(problem, config)


class _Work(NamedTuple):
    """What a launch does: of one program the steps of its loops, in each its operations and the
    bytes of shared memory that it writes and reads; the bytes that a program reads in all, but for
    dead pixels, and the tiles of the centre that it gathers; of all programs the scratch that is
    written, and read again by the sum that follows. Whether threads multiply by instructions of
    their own, all of which then count as operations; and how many steps are read at once, if
    stages do not say so.

    A kernel that ``stays`` on a multiprocessor does all of its work there. What counts as a program
    is then a box, or one of each consumer, and ``held_bytes`` are read once. ``sent_bytes``: that a
    program gets and, on average, another of its cluster read."""

    programs: int
    steps: int
    step_flops: int
    shared_bytes: float
    read_bytes: float
    gathers: int = 0
    scratch_bytes: int = 0
    launches: int = 1
    by_threads: bool = False
    ahead: int = 0
    stays: bool = False
    held_bytes: int = 0
    sent_bytes: float = 0.0

    def with_splits(self, splits: int, numbers: int) -> _Work:
        """And what several splits write, in float32, for another launch to add."""
        if splits == 1:
            return self
        return self._replace(scratch_bytes=4 * numbers * splits, launches=2)


def _work(problem: Problem, config: Config) -> _Work:
    merges = config.merged > 1
    problem, config = problem.as_read(config)
    work = _KINDS[type(config)].work(problem, config)
    if not merges:
        return work
    if problem.is_weight_grad:  # which always ends with a sum
        return work._replace(launches=2)
    return work._replace(launches=work.launches + 1, gathers=0)


def _conv_work(problem: Problem, config: ConvConfig) -> _Work:
    layout, m, n, k = problem.layout, config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    n_blocks, k_blocks = (math.ceil(layout.group_channels / b) for b in (n, k))
    boxes, live = config.count_boxes(problem.output), live_share(problem, config)
    stored = stored_taps(layout, problem.precision)
    gathers = k_blocks if layout.taps % 2 and stored == layout.pairs else 0
    steps = math.ceil(layout.taps * k_blocks / config.splits)
    first, second = (m, n) if config.roles == "pixels_first" else (n, m)
    return _Work(
        programs=boxes * n_blocks * layout.groups * config.splits,
        steps=steps,
        step_flops=2 * m * n * k,
        shared_bytes=_through_shared(first, second, k, config) * problem.itemsize,
        read_bytes=steps * (live * m + n) * k * problem.itemsize,
        gathers=gathers,
    ).with_splits(config.splits, layout.channels * math.prod(problem.output))


def _conv_splits(problem: Problem, config: ConvConfig) -> int:
    return _splits_of_taps(problem, config.BLOCK_K)


def _splits_of_taps(problem: Problem, block_k: int) -> int:
    """Over the steps of a convolution."""
    stored = stored_taps(problem.layout, problem.precision)
    return min(MAX_CONV_SPLITS, most_splits(problem.layout, stored, block_k))


def _weight_grad_work(problem: Problem, config: WeightGradConfig) -> _Work:
    layout, m, n, k = problem.layout, config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    n_blocks, k_blocks = (math.ceil(layout.group_channels / b) for b in (n, k))
    boxes, live = config.count_boxes(problem.output), live_share(problem, config)
    is_one_tile = n_blocks == 1 and n == k
    steps = math.ceil(boxes / config.splits)
    read = live * steps * m * (3 * n if is_one_tile else 2 * (n + k))
    products = 2 if is_one_tile else 1  # of a step
    return _Work(
        programs=(layout.taps + 1) // 2 * n_blocks * k_blocks * layout.groups * config.splits,
        steps=steps if is_one_tile else 2 * steps,
        step_flops=2 * m * n * k * products,
        shared_bytes=_through_shared(n, k, m, config) * products * problem.itemsize,
        read_bytes=read * problem.itemsize,
    ).with_splits(config.splits, layout.size)


def _weight_grad_splits(problem: Problem, config: WeightGradConfig) -> int:
    return min(MAX_SPLITS, config.count_boxes(problem.output))


def _one_pass_work(problem: Problem, config: OnePassConfig) -> _Work:
    c, m = config.BLOCK_C, config.BLOCK_M
    rows, taps = config.taps_of(problem.layout.kernel_size)
    group = 16 * config.num_warps  # rows of a first operand: columns of taps x channels
    products = rows * sum(
        max(64, group if c * (taps - first) > group // 2 else group // 2)
        for first in range(0, taps, group // c)
    )
    read = products * m * (1 + c / _WARP_GROUP_ROWS)
    return _work_in_one_pass(problem, config, 2 * products * m * c, read)


def _one_pass_tf32_work(problem: Problem, config: OnePassTf32Config) -> _Work:
    """A warp has 16 channels of x and all of the output gradient."""
    c, m = config.BLOCK_C, config.BLOCK_M
    rows, columns = config.taps_of(problem.layout.kernel_size)
    read = m * c * (columns * c / 16 + rows)
    return _work_in_one_pass(problem, config, 2 * rows * columns * m * c * c, read)


def _work_in_one_pass(
    problem: Problem, config: OnePassConfig, step_flops: int, read: float
) -> _Work:
    """``read``: numbers, from shared memory in a step."""
    layout, m = problem.layout, config.BLOCK_M
    (n, out_h, out_w), w = problem.output, problem.image[2]
    (_, dilation), (padding, _) = problem.geometry.dilation, problem.geometry.padding[1]
    _, columns = config.columns_of(out_w, w, layout.kernel_size[1], padding, dilation)
    boxes = config.count_boxes((n, out_h, columns))
    rows, taps = config.taps_of(layout.kernel_size)
    steps = math.ceil(boxes / config.splits)
    live = n * out_h * columns / (boxes * m)
    below = (rows - 1) * problem.geometry.dilation[0] / config.box[1]
    copied = (taps + 1 + below) * m * config.BLOCK_C
    return _Work(
        programs=config.tiles_of(layout) * config.splits,
        steps=steps,
        step_flops=step_flops,
        shared_bytes=(copied + read) * problem.itemsize,
        read_bytes=steps * live * copied * problem.itemsize,
        scratch_bytes=2 * 4 * layout.size * config.splits,
        launches=2,
    )


def _row_by_row_work(problem: Problem, config: RowByRowConfig) -> _Work:
    """A step is a row, of a box or above it. Both warpgroups read grad of a column of taps, and x
    of each tap; x is written twice, and read to be transposed."""
    (_, rows, _), c = config.box, config.BLOCK_C
    taps_h, taps_w = config.taps_of(problem.layout.kernel_size)
    steps = rows + (taps_h - 1) * problem.geometry.dilation[0]
    live = rows / steps  # rows of a box, which are multiplied
    row = config.BLOCK_M // rows * c
    read = row * (2 + live * (2 * taps_w + taps_h * taps_w))
    found = _work_in_one_pass(
        problem, config, round(2 * live * taps_h * taps_w * row * c), read * live
    )
    return found._replace(
        steps=round(found.steps * steps),
        shared_bytes=(row * (1 + live * taps_w) + read) * problem.itemsize,
        ahead=config.num_stages - 2,
    )


def _one_pass_splits(problem: Problem, config: OnePassConfig) -> int:
    return min(MAX_SPLITS, config.count_boxes(problem.output))


def _depthwise_work(problem: Problem, config: DepthwiseConfig) -> _Work:
    layout, (kernel_h, kernel_w) = problem.layout, problem.layout.kernel_size
    steps = _rows_of_tile(problem, config) + kernel_h - 1
    # Of each number that is read: its products; its conversion, address and mask; the end of a sum.
    instructions = layout.taps * layout.group_channels + 4 * kernel_w + 6
    return _Work(
        programs=_count_tiles(problem, config) * math.ceil(layout.channels / config.BLOCK_C),
        steps=steps,
        step_flops=2 * instructions * config.box[2] * config.BLOCK_C,
        shared_bytes=0,
        read_bytes=steps * _row_bytes(problem, config),
        by_threads=True,
        ahead=2,
    )


def _depthwise_grad_work(problem: Problem, config: DepthwiseGradConfig) -> _Work:
    layout, rows = problem.layout, _rows_of_tile(problem, config)
    tiles = math.ceil(_count_tiles(problem, config) / config.splits)
    kept = layout.kernel_size[0] - 1  # rows that are read before the first step
    row_bytes = _row_bytes(problem, config)
    # Of each number its products; for each of them it is converted and moved on.
    instructions = (2 + layout.group_channels) * layout.taps + 10
    return _Work(
        programs=math.ceil(layout.channels / config.BLOCK_C) * config.splits,
        steps=tiles * (rows + 1),
        step_flops=2 * instructions * config.box[2] * config.BLOCK_C,
        shared_bytes=0,
        read_bytes=tiles * (2 * rows + kept) * row_bytes,
        by_threads=True,
        ahead=1,
    ).with_splits(config.splits, layout.size)


def _depthwise_grad_splits(problem: Problem, config: DepthwiseGradConfig) -> int:
    return min(MAX_SPLITS, _count_tiles(problem, config))


def _count_tiles(problem: Problem, config: DepthwiseConfig | DepthwiseGradConfig) -> int:
    return config.count_tiles(problem.output, problem.geometry.dilation[0])


def _rows_of_tile(problem: Problem, config: DepthwiseConfig | DepthwiseGradConfig) -> int:
    """That a program goes down."""
    return min(config.box[1], math.ceil(problem.output[1] / problem.geometry.dilation[0]))


def _row_bytes(problem: Problem, config: DepthwiseConfig | DepthwiseGradConfig) -> int:
    """That a program reads of a row of images."""
    columns = config.box[2] + problem.geometry.window(problem.layout.kernel_size)[1] - 1
    return columns * config.BLOCK_C * problem.itemsize


def _halo_work(problem: Problem, config: HaloConfig) -> _Work:
    """A step is a column of the kernel."""
    layout, m, c = problem.layout, config.BLOCK_M, config.BLOCK_C
    kernel_h, kernel_w = layout.kernel_size
    pixels = config.stage_pixels(kernel_h, problem.geometry.dilation[0])
    first, second = (m, c) if config.roles == "pixels_first" else (c, m)
    channels = layout.group_channels  # of which products take 32 bytes at once
    depth = math.ceil(channels * problem.itemsize / 32) * 32 // problem.itemsize
    reads = first + second * math.ceil(first / _WARP_GROUP_ROWS)  # of a tap and a channel
    is_tf32 = problem.dtype == "float32"
    held = layout.taps if is_tf32 else (layout.taps + 1) // 2
    streamed = kernel_h if config.streamed else 0  # matrices
    at_once = config.boxes_at_once
    read = kernel_w * (at_once * live_share(problem, config) * pixels + streamed * channels)
    through_shared = at_once * (pixels * c + kernel_h * reads * depth) + streamed * c * c
    return _Work(
        programs=math.ceil(config.count_boxes(problem.output) / at_once) * layout.groups,
        steps=kernel_w,
        step_flops=at_once * 2 * m * c * depth * kernel_h,
        shared_bytes=through_shared * problem.itemsize,
        read_bytes=read * channels * problem.itemsize,
        gathers=0 if is_tf32 else layout.taps % 2,
        stays=True,
        held_bytes=0 if config.streamed else held * channels**2 * problem.itemsize,
    )


def _clustered_work(problem: Problem, config: ClusteredConfig) -> _Work:
    layout, (m, n) = problem.layout, config.program
    k = swizzled_channels(problem.itemsize)
    n_blocks, k_blocks = (math.ceil(layout.group_channels / b) for b in (config.BLOCK_N, k))
    steps = math.ceil(layout.taps * k_blocks / config.splits)
    pixels = live_share(problem, config) * m
    sent = (pixels if config.shared == "pixels" else n) / 2
    boxes = config.count_boxes(problem.output)
    return _Work(
        programs=2 * boxes * n_blocks * layout.groups * config.splits,
        steps=steps,
        step_flops=2 * m * n * k,
        shared_bytes=_through_shared(n, m, k, config) * problem.itemsize,
        read_bytes=steps * (pixels + n - sent) * k * problem.itemsize,
        sent_bytes=steps * sent * k * problem.itemsize,
    ).with_splits(config.splits, layout.channels * math.prod(problem.output))


def _clustered_splits(problem: Problem, config: ClusteredConfig) -> int:
    return _splits_of_taps(problem, swizzled_channels(problem.itemsize))


class _Kind(NamedTuple):
    work: Callable[[Problem, Any], _Work]
    limit_splits: Callable[[Problem, Any], int]


_KINDS: dict[type[Config], _Kind] = {
    ConvConfig: _Kind(_conv_work, _conv_splits),
    WeightGradConfig: _Kind(_weight_grad_work, _weight_grad_splits),
    OnePassConfig: _Kind(_one_pass_work, _one_pass_splits),
    OnePassTf32Config: _Kind(_one_pass_tf32_work, _one_pass_splits),
    RowByRowConfig: _Kind(_row_by_row_work, _one_pass_splits),
    DepthwiseConfig: _Kind(_depthwise_work, lambda problem, config: 1),
    DepthwiseGradConfig: _Kind(_depthwise_grad_work, _depthwise_grad_splits),
    HaloConfig: _Kind(_halo_work, lambda problem, config: 1),
    ClusteredConfig: _Kind(_clustered_work, _clustered_splits),
}
_WARP_GROUP_ROWS = 64  # of the first operand, for each of which wgmma reads the second anew


def _through_shared(
    first: int, second: int, depth: int, config: ConvConfig | WeightGradConfig | ClusteredConfig
) -> float:
    """Numbers that a product of first x depth and depth x second writes into shared memory, and
    reads from it."""
    rows = _WARP_GROUP_ROWS if config.loader != "pointer" else 32
    return depth * (2 * first + second + second * math.ceil(first / rows))


def _core_flops(gpu: GPU, terms: Terms) -> float:
    """A cycle, of the threads of one multiprocessor."""
    peak = gpu.float32_tflops * 1e3 / (gpu.clock_ghz * gpu.multiprocessors)
    return peak * terms.core_share


def _flops_a_cycle(problem: Problem, gpu: GPU, candidate: Candidate, terms: Terms) -> float:
    """Of the matrix units of one multiprocessor."""
    peak = gpu.tflops(problem.dtype) * 1e3 / (gpu.clock_ghz * gpu.multiprocessors)
    if problem.dtype == "float32_ieee" and gpu.target != "gfx942":
        return peak * terms.matrix_share
    by_warps = gpu.target == "sm_90" and not candidate.waits
    return peak * terms.matrix_share * (terms.warp_products_share if by_warps else 1.0)


def _programs_at_once(gpu: GPU, candidate: Candidate) -> int:
    """Programs of one multiprocessor at once."""
    threads = candidate.config.num_warps * gpu.warp_size
    by_registers = gpu.registers // (max(candidate.registers, 16) * threads)
    by_shared = gpu.shared_bytes // max(candidate.shared_bytes, 1)
    return max(1, min(by_registers, by_shared, gpu.max_programs))
