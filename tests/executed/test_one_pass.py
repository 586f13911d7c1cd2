"""The packed gradient of all taps in one pass: as compiled for sm_90, executed with its copies and
products early and late, and with faults planted in it."""

import math
import random
from dataclasses import replace

import pytest
import torch
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from executed.cases import Case, expected_of, inputs_of, run
from executed.checks import assert_exact_of_small_integers, assert_found_out_without_waits
from executed.execution import KERNELS, execute
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import OnePassConfig
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SYMMETRIES = ("self_adjoint", "skew_adjoint")
# Of 64 to 256 pixels; the largest of few channels only, so that a case takes seconds.
BOXES = ((1, 8, 16), (1, 16, 8), (1, 4, 8), (2, 4, 8), (1, 8, 8), (4, 2, 8), (1, 2, 32), (8, 1, 16))
LARGE = ((1, 8, 32), (2, 8, 16))


def draw(**given):
    """A problem of a few boxes that a config serves, with blocks of taps that need not divide the
    kernel."""
    chance = random.Random(int(torch.randint(2**31, ())))
    while True:
        block = chance.choice([16, 32, 64])
        taps = tuple(chance.choice([1, 2, 3, 3, 5]) for _ in range(2))
        box = chance.choice(BOXES if block > 16 else BOXES + LARGE)
        warps, stages, splits = (chance.choice(c) for c in ([4, 8], [2, 3, 4], [1, 2, 7]))
        config = OnePassConfig(box, block, taps, warps, stages, splits)
        groups = chance.choice([1, 1, 1, 2])
        channels = max(8, block + chance.choice([0, 0, 0, -8, 8, block]))
        kernel = tuple(chance.choice([1, 2, 3, 3, 3, 5]) for _ in range(2))
        dilation = tuple(chance.choice([1, 1, 2]) for _ in range(2))
        padding = tuple(
            (chance.choice([-1, 0, d * (k - 1) // 2, d * k]), chance.choice([-1, 0, d * (k - 1)]))
            for d, k in zip(dilation, kernel, strict=True)
        )
        image = tuple(max(1, side * chance.choice([1, 2]) + chance.choice([-1, 0, 1, 3]))
                      for side in config.box)  # fmt: skip
        layout = Layout(channels * groups, kernel, groups, chance.choice(SYMMETRIES))
        case = Case(
            "sm_90", chance.choice(["float16", "bfloat16"]), config, layout, image,
            Geometry((1, 1), padding, dilation), bias=chance.random() < 0.5,
            alpha=chance.choice([1.0, -1.5]), widens=chance.random() < 0.5,
            seed=chance.randrange(2**31),
        )  # fmt: skip
        case = replace(case, **given)
        sums = math.prod(config.taps_of(kernel)) * block**2
        if min(case.output) > 0 and sums <= 128 * 32 * config.num_warps and (
            config.shared_bytes(kernel, dilation) < 2**17
        ):  # fmt: skip
            return case


@pytest.mark.parametrize("number", range(8))
def test_drawn_problems(compiler, number):
    case = draw()
    assert not execute(case).faults, case


@pytest.mark.parametrize("number", range(4))
def test_small_integers_give_equality(compiler, number):
    assert_exact_of_small_integers(draw(widens=True, alpha=1.0), largest=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_no_tap_sees_adds_nothing(compiler, value):
    geometry = Geometry((1, 1), ((0, -4), (-2, -8)), (1, 1))
    layout = Layout(16, (2, 2), symmetry=random.choice(SYMMETRIES))
    config = OnePassConfig((1, 8, 16), 16, (2, 2), 4, 3)
    case = Case("sm_90", "float16", config, layout, (1, 9, 26), geometry, widens=True)
    inputs = inputs_of(case)
    inputs.x[:, :, 5:] = 0
    inputs.x[..., :2] = 0
    inputs.x[..., 18:] = 0
    expected = expected_of(case, inputs)
    inputs.x[:, :, 5:] = value
    inputs.x[..., :2] = value
    inputs.x[..., 18:] = value
    with emulated(EmulatedGpu(90), *KERNELS):
        actual = run(case, inputs)
    assert actual.isfinite().all() and expected.truth.abs().max() > 1
    assert ((actual - expected.truth).abs() <= expected.bound).all()


PROGRAMS = {
    "one block of taps": Case(
        "sm_90", "bfloat16", OnePassConfig((1, 8, 8), 32, (3, 3), 4, 2), Layout(32, (3, 3)),
        (2, 8, 16), SAME,
    ),
    "many": Case(
        "sm_90", "float16", OnePassConfig((1, 4, 8), 64, (2, 2), 8, 3),
        Layout(64, (3, 3), symmetry="skew_adjoint"), (2, 8, 16), SAME,
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_lacks_all_of_its_waits_of_a_kind_is_found_out(program, compiler):
    assert_found_out_without_waits(PROGRAMS[program], least=5)
