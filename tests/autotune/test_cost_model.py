"""Whether the cost model's choices are sensible, where reason says what is."""

from dataclasses import replace

import pytest

from triton_tied.autotune import cost_model, gpus, shortlist
from triton_tied.autotune.candidates import Candidate, list_of
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import ClusteredConfig, HaloConfig, WeightGradConfig
from triton_tied.packing import Layout

GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
GPUS = pytest.mark.parametrize("gpu", gpus.KNOWN.values(), ids=gpus.KNOWN)


def weight_grad(c, image=(32, 28, 28)):
    return Problem("weight_grad", "bfloat16", Layout(c, (3, 3)), image, GEOMETRY)


def splits_of(problem, gpu):
    return make_shortlist(problem, gpu).candidates[0].config.splits


@GPUS
def test_a_large_weight_is_split_less_than_a_small_one(gpu):
    small, large = (splits_of(weight_grad(c), gpu) for c in (32, 512))
    assert small > 2 * large and large < 16


@GPUS
@pytest.mark.parametrize("c", [512, 1024])
def test_splits_of_a_large_weight_take_no_more_memory_than_the_images(gpu, c):
    problem = weight_grad(c)
    scratch = 4 * problem.layout.size * splits_of(problem, gpu)
    assert scratch < 4 * problem.least_bytes


def test_splits_fill_the_multiprocessors(monkeypatch):
    # 80 tiles for 132 multiprocessors: 1 split leaves 52 of them idle in its one wave, 2 leave 104
    # of 264 places, 3 leave 24 of 264, 4 leave 76 of 396.
    monkeypatch.setattr(cost_model, "MAX_SPLITS", 4)
    gpu, problem = gpus.KNOWN["H100"], weight_grad(512)
    (entry,) = (
        candidate
        for candidate in list_of("weight_grad", gpu.target, "bfloat16")
        if isinstance(candidate.config, WeightGradConfig)
        and (candidate.config.BLOCK_N, candidate.config.BLOCK_K) == (128, 128)
        and candidate.config.box == (4, 4, 4)
    )
    unhindered = replace(gpu, cache_gbs=1e9, memory_gbs=1e9)  # arithmetic alone
    assert cost_model.count_programs(problem, entry.config) == 80
    assert shortlist._best_split(problem, unhindered, entry).config.splits == 3


def test_dead_pixels_cost_arithmetic_but_no_traffic():
    whole = Problem("conv", "bfloat16", Layout(64, (3, 3)), (8, 32, 32), GEOMETRY)
    ragged = replace(whole, image=(8, 31, 32))
    config = next(
        candidate.config
        for candidate in list_of("conv", "sm_90", "bfloat16")
        if candidate.config.box == (1, 16, 16)
    )
    a, b = (cost_model._work(problem, config) for problem in (whole, ragged))
    assert a[:4] == b[:4]  # programs, steps, operations, shared memory
    weights = a.steps * config.BLOCK_N * config.BLOCK_K * 2
    assert b.read_bytes - weights == pytest.approx((a.read_bytes - weights) * 31 / 32)


@pytest.mark.parametrize("shared", ["pixels", "weights"])
def test_what_two_programs_share_comes_through_the_cache_once_and_to_each_of_them(shared):
    problem = Problem("conv", "bfloat16", Layout(256, (3, 3)), (4, 32, 32), GEOMETRY)
    config = ClusteredConfig((1, 32, 16), 128, shared=shared)
    work = cost_model._work(problem, config)
    clusters, steps = 4 * 1 * 2 * 2, 9 * 4
    rows, columns = (512, 64) if shared == "pixels" else (256, 128)  # of one program
    assert (work.programs, work.steps) == (2 * clusters, steps)
    assert 2 * work.read_bytes == steps * (512 + 128) * 64 * 2
    assert work.read_bytes + work.sent_bytes == steps * (rows + columns) * 64 * 2
    assert work.step_flops == 2 * rows * columns * 64


@GPUS
def test_a_deeper_pipeline_is_no_worse(gpu):
    problem = Problem("conv", "bfloat16", Layout(64, (3, 3)), (1, 8, 8), GEOMETRY)
    entry = list_of("conv", gpu.target, "bfloat16")[0]
    times = [
        cost_model.predict_us(
            problem, gpu, entry._replace(config=replace(entry.config, num_stages=stages))
        )
        for stages in (2, 3, 4)
    ]
    assert times == sorted(times, reverse=True) and times[0] > times[2]


def test_what_is_well_predicted_but_not_timed_says_why():
    layout = Layout(128, (3, 3))
    problem = Problem("conv", "bfloat16", layout, (32, 28, 28), GEOMETRY)
    found = make_shortlist(problem, gpus.KNOWN["A100"], most=3)
    best = found.candidates[0].predicted_us
    late = [reason for _, reason in found.fallen if reason.startswith("predicted")]
    near = [reason for reason in late if float(reason.split()[1]) <= 4 * best]
    assert near and len(near) < len(late)
    assert all(("; 3 others are timed" in reason) == (reason in near) for reason in late)


@GPUS
@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
@pytest.mark.parametrize("c", [16, 128, 512])
def test_what_is_taken_untimed_is_among_what_is_timed(gpu, kernel, c):
    # Large float32 images in rows: bulk copies are predicted to be many times faster.
    dtype = "float32_ieee" if gpu.target == "gfx942" else "float32"
    for side in (8, 64):
        problem = Problem(
            kernel, dtype, Layout(c, (3, 3)), (8, side, side), GEOMETRY, "contiguous", "none"
        )
        found = make_shortlist(problem, gpu)
        timed = [config for config, _ in found.candidates]
        assert found.untimed in timed and len(timed) == len(set(timed)) <= shortlist.MAX_TIMED
        assert not {*timed} & {config for config, _ in found.fallen}


def test_matrices_that_are_streamed_come_through_the_cache_once_for_all_consumers():
    layout, same = Layout(64, (9, 9)), Geometry((1, 1), ((4, 4), (4, 4)), (1, 1))
    problem = Problem("conv", "bfloat16", layout, (128, 16, 16), same)

    def cache_us(consumers):
        config = HaloConfig((1, 16, 8), 64, 2 * consumers, consumers, streamed=5)
        candidate = Candidate(config, frozenset(), 168, 200_000, 2, 2)
        return cost_model.predict(problem, gpus.KNOWN["H100"], candidate).cache

    weight, pairs_of_boxes = 81 * 64 * 64 * 2, 128
    saved = pairs_of_boxes * weight / gpus.KNOWN["H100"].cache_gbs / 1e3
    assert cache_us(1) - cache_us(2) == pytest.approx(saved)


@pytest.mark.parametrize("dtype, channels, units", [("bfloat16", 48, 3), ("float32", 40, 5)])
def test_channels_in_excess_are_multiplied_up_to_32_bytes(dtype, channels, units):
    config = HaloConfig((1, 16, 8), 64, 2, 1, streamed=2)

    def products(c):
        problem = Problem("conv", dtype, Layout(c, (7, 7)), (32, 28, 28), GEOMETRY)
        candidate = Candidate(config, frozenset(), 168, 200_000, 2, 2)
        return cost_model.predict(problem, gpus.KNOWN["H100"], candidate).products

    whole = 4 if dtype == "bfloat16" else 8
    assert products(channels) / products(64) == pytest.approx(units / whole)
