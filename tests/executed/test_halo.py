"""The kernel that reads a pixel once for each column of taps: as compiled for sm_90, executed with
its copies and products early and late, and with faults planted in it."""

import random
from dataclasses import replace

import pytest
import torch
from ptx_machine import EARLY, LATE
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from executed.cases import Case, inputs_of, run
from executed.checks import assert_exact_of_small_integers
from executed.execution import execute
from executed.planted import fault_of, plant
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels import halo
from triton_tied.kernels.configs import HaloConfig
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SYMMETRIES = ("self_adjoint", "skew_adjoint")
FIRST, SECOND = "pixels_first", "weights_first"
# Box, channels, stages, consumers, roles; of streamed weights the matrices that are copied at once.
CONFIGS = {
    "half": [
        HaloConfig((1, 8, 16), 64, 4, 2, SECOND),
        HaloConfig((2, 8, 8), 64, 6, 2, SECOND),
        HaloConfig((4, 4, 4), 64, 4, 2, SECOND),
        HaloConfig((1, 8, 8), 64, 3, 1, FIRST),
        HaloConfig((1, 16, 16), 32, 4, 2, FIRST),
        HaloConfig((4, 4, 4), 32, 3, 1, FIRST),
        HaloConfig((1, 8, 16), 16, 6, 2, FIRST),
        HaloConfig((1, 2, 32), 16, 2, 1, FIRST),
    ],
    "float32": [
        HaloConfig((1, 8, 8), 64, 3, 1, SECOND),
        HaloConfig((1, 8, 8), 32, 6, 2, FIRST),
        HaloConfig((1, 8, 16), 16, 4, 2, FIRST),
    ],
}
STREAMED = {
    "half": [
        HaloConfig((1, 8, 16), 64, 4, 2, SECOND, 2),
        HaloConfig((2, 8, 8), 64, 4, 2, SECOND, 1),
        HaloConfig((4, 4, 4), 64, 3, 1, SECOND, 3),
        HaloConfig((1, 16, 16), 32, 4, 2, FIRST, 3),
        HaloConfig((1, 8, 8), 32, 2, 1, FIRST, 1),
        HaloConfig((1, 8, 16), 16, 6, 2, FIRST, 2),
    ],
    "float32": [
        HaloConfig((1, 8, 8), 64, 2, 1, SECOND, 1),
        HaloConfig((1, 8, 8), 32, 4, 2, FIRST, 2),
        HaloConfig((1, 8, 16), 16, 4, 2, FIRST, 3),
    ],
}


def draw(dtype, configs):
    """A problem of a few boxes that a config serves, with the taps stored in any way."""
    chance = random.Random(int(torch.randint(2**31, ())))
    of_list = "float32" if dtype == "float32" else "half"
    while True:
        config = chance.choice(configs[of_list])
        kernel = chance.choice([(3, 3), (3, 3), (5, 5), (2, 2), (1, 3), (3, 1), (7, 5), (4, 3)])
        channels = chance.choice([8, 8, 7, 6, 3]) * config.BLOCK_C // 8
        groups = chance.choice([1, 1, 2]) if channels == config.BLOCK_C else 1
        layout = Layout(channels * groups, kernel, groups, chance.choice(SYMMETRIES))
        dilation = tuple(chance.choice([1, 1, 2]) for _ in kernel)
        padding = tuple(
            (chance.choice([-1, 0, d * (k - 1) // 2, d * k]), chance.choice([0, 1, d * (k - 1)]))
            for d, k in zip(dilation, kernel, strict=True)
        )
        sides = [side * chance.choice([1, 1, 2]) for side in config.box]
        image = tuple(side + chance.choice([0, 0, 1, 3]) for side in sides)
        stored = {(layout.taps + 1) // 2, layout.taps, 0}
        case = Case(
            "sm_90", dtype, config, layout, image, Geometry((1, 1), padding, dilation),
            stored=layout.taps if dtype == "float32" else chance.choice(sorted(stored)),
            bias=chance.random() < 0.5, residual=chance.random() < 0.5,
            alpha=chance.choice([1.0, -1.5]), beta=chance.choice([1.0, -0.5]),
            widens=chance.random() < 0.3, wide=chance.random() < 0.2, seed=chance.randrange(2**31),
        )  # fmt: skip
        if min(case.output) <= 0 or channels * (4 if dtype == "float32" else 2) % 16:
            continue
        if config.shared_bytes(layout, case.geometry, 4) < 2**17:
            return case


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("configs", [CONFIGS, STREAMED], ids=["resident", "streamed"])
def test_drawn_problems(compiler, dtype, number, configs):
    outcome = execute(draw(dtype, configs))
    assert not outcome.faults, outcome


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_large_kernel_of_64_channels(compiler, symmetry):
    config = HaloConfig((1, 16, 8), 64, 4, 2, SECOND, 5)
    layout = Layout(64, (9, 9), symmetry=symmetry)
    same = Geometry((1, 1), ((4, 4), (4, 4)), (1, 1))
    outcome = execute(Case("sm_90", "bfloat16", config, layout, (2, 16, 11), same))
    assert not outcome.faults, outcome


@pytest.mark.parametrize("side", [5, 7, 9])
def test_large_kernels_of_few_channels(compiler, side):
    config = HaloConfig((1, 8, 8), 16, 6, 2, FIRST)
    layout = Layout(16, (side, side), symmetry=SYMMETRIES[side % 4 == 1])
    half = side // 2
    same = Geometry((1, 1), ((half, half), (half, half)), (1, 1))
    outcome = execute(Case("sm_90", "bfloat16", config, layout, (2, 9, 17), same))
    assert not outcome.faults, outcome


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize(
    "config",
    [CONFIGS["half"][0], CONFIGS["half"][4], STREAMED["half"][0], STREAMED["half"][3]],
    ids=str,
)
def test_small_integers_are_exact(compiler, config, symmetry):
    case = Case(
        "sm_90", "float16", config, Layout(config.BLOCK_C, (3, 3), symmetry=symmetry), (2, 17, 19),
        SAME, residual=True, alpha=0.5, beta=-2.0,
    )  # fmt: skip
    assert_exact_of_small_integers(case, largest=1)


# What is planted: edits of the source, the fault that is found, and the number of stages. A program
# has eight boxes.
OWN_RING, ONE_RING = "which * STAGES + use % STAGES", "use % STAGES"
PLANTED = {
    "a tap reads beyond its stage": (
        {"+ row * DILATION_H)": "+ (row + 1) * DILATION_H)"}, "race|error", 4,
    ),
    "two consumers share an odd ring": (
        {
            "use = number * KERNEL_W +": "use = (2 * number + which) * KERNEL_W +",
            "number // CONSUMERS * KERNEL_W + column": "number * KERNEL_W + column",
            "number % CONSUMERS * STAGES + use % STAGES": ONE_RING,
            OWN_RING: ONE_RING,
            "which * STAGES + (use + STAGES - 1) % STAGES": "(use + STAGES - 1) % STAGES",
        },
        "race|phase|error|deadlock", 6,
    ),
    "one stage": ({"gl.static_assert(STAGES > 1 or KERNEL_W == 1)": "pass"}, "deadlock", 2),
    "rows are not copied": (
        {
            "gl.static_range(BLOCK_H, ROWS, TAIL)": "gl.static_range(BLOCK_H + TAIL, ROWS, TAIL)",
            "K_BLOCKS * ROWS * BLOCK_I": "K_BLOCKS * BLOCK_H * BLOCK_I",
        },
        "error|race", 4,
    ),
    "fewer bytes are expected": (
        {"K_BLOCKS * ROWS * BLOCK_I": "K_BLOCKS * BLOCK_H * BLOCK_I"}, "race|deadlock|mbarrier", 4,
    ),
    "a stage is left too early": (
        {"KERNEL_H - part * AT_ONCE) * PRODUCTS": "2 * KERNEL_H) * 2 * PRODUCTS"},
        "race", 4,
    ),
    "the last stage is left too early": (
        {"wait(acc, opposite, 0, TWO_SUMS)": "wait(acc, opposite, 1, TWO_SUMS)"}, "race|use", 4,
    ),
    "no wait for an empty stage": (
        {"mbarrier.wait(empty.index(stage)": "empty.index(stage); (0"}, "race|mbarrier|arriv", 4,
    ),
    "no wait for a full stage": (
        {"mbarrier.wait(full.index(stage), use // STAGES & 1)": "pass"}, "race|deadlock", 4,
    ),
    "no wait for the matrices": ({"mbarrier.wait(ready, 0)": "pass"}, "race", 4),
    # With fewer stages the second consumer gets pixels only once the first has multiplied, for
    # which the compiler gives that one a fence.
    "no fence behind the centre": ({"    fence_async_shared()\n": ""}, "fence.proxy.async", 6),
    "a stage is never left": (
        {"mbarrier.arrive(empty.index(before), count=1, pred=column > 0)": "pass"},
        "deadlock", 4,
    ),
}  # fmt: skip
# The same where so many rows of a column are copied at once.
PLANTED_STREAMED = {
    "no wait for empty matrices": (
        {"mbarrier.wait(empty.index(RING + stage), (turn // 2 & 1) ^ 1)": "pass"},
        "race|mbarrier|arriv", 2,
    ),
    "no wait for full matrices": (
        {"mbarrier.wait(full.index(RING + turn % 2), turn // 2 & 1)": "pass"}, "race|deadlock", 2,
    ),
    "matrices are left too early": (
        {"KERNEL_H - part * AT_ONCE) * PRODUCTS": "2 * KERNEL_H) * 2 * PRODUCTS"},
        "race", 2,
    ),
    "the last matrices are left too early": (
        {"wait(acc, opposite, 0, TWO_SUMS)": "wait(acc, opposite, 1, TWO_SUMS)"}, "race|use", 2,
    ),
    "matrices are left by one consumer for both": (
        {"(empty.index(i), count=CONSUMERS)": "(empty.index(i), count=1)"},
        "race|mbarrier|arriv|deadlock", 2,
    ),
    "matrices are never left": (
        {"mbarrier.arrive(empty.index(left), count=1, pred=column + part > 0)": "pass"},
        "deadlock", 2,
    ),
    "matrices are full when one has landed": (
        {"mbarrier.init(full.index(i), count=PART)": "mbarrier.init(full.index(i), count=1)"},
        "race|mbarrier|arriv", 2,
    ),
    "a consumer without a box leaves": (
        {"boxes - (start if PART == 0 else first)": "boxes - start"}, "deadlock", 2,
    ),
    # With fewer rows the second consumer comes to the centre only once the first has multiplied.
    "the centre is not waited for": ({"mbarrier.wait(ready, 0)": "pass"}, "race", 3),
    "no fence behind the centre": ({"    fence_async_shared()\n": ""}, "fence.proxy.async", 3),
}  # fmt: skip


def planted_case(stages, streamed=0):
    config = HaloConfig((1, 8, 8), 16, stages, 2, FIRST, streamed)
    layout = Layout(16, (3, 3), symmetry=random.choice(SYMMETRIES))
    rows = 8 if streamed else 16  # streamed: 15 boxes for two consumers
    return Case("sm_90", "bfloat16", config, layout, (15 if streamed else 6, rows, rows), SAME)


def faults_of(kernel, case):
    """In both timings."""
    found = [fault_of(kernel, case, timing) for timing in (LATE, EARLY)]
    return "; ".join(each for each in found if each)


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found(compiler, monkeypatch, tmp_path, what):
    edits, message, stages = PLANTED[what]
    found = faults_of(plant(halo, edits, tmp_path, monkeypatch), planted_case(stages))
    assert found and any(word in found for word in message.split("|")), found


@pytest.mark.parametrize("what", PLANTED_STREAMED)
def test_a_planted_fault_of_streamed_weights_is_found(compiler, monkeypatch, tmp_path, what):
    edits, message, streamed = PLANTED_STREAMED[what]
    found = faults_of(plant(halo, edits, tmp_path, monkeypatch), planted_case(4, streamed))
    assert found and any(word in found for word in message.split("|")), found


def test_with_nothing_planted_no_fault_is_found(compiler, monkeypatch, tmp_path):
    kernel = plant(halo, {}, tmp_path, monkeypatch)
    for case in (planted_case(4), planted_case(6), planted_case(4, streamed=2)):
        assert not faults_of(kernel, case)


def test_one_stage_for_each_consumer_does_not_compile(compiler):
    case = replace(planted_case(4), config=HaloConfig((1, 8, 8), 16, 2, 2, FIRST))
    with pytest.raises(Exception) as raised:
        inputs = inputs_of(case)
        with emulated(EmulatedGpu(90), halo.halo_kernel):
            run(case, inputs)
    assert "static_assert" in str(raised.value)
