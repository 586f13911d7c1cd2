"""The packed gradient of float32 in TF32, all taps in one pass or row by row: as compiled for
sm_90, executed with its copies and products early and late, and with faults planted in it."""

import math
import random
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from ptx_machine.machine import Machine
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from executed.cases import Case, _nearest_tf32, expected_of, inputs_of, run
from executed.checks import assert_exact_of_small_integers, assert_found_out_without_waits
from executed.execution import KERNELS, execute
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import OnePassTf32Config, RowByRowConfig
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SYMMETRIES = ("self_adjoint", "skew_adjoint")
# By channels of a tile and warps: boxes of so many pixels as those are for.
BOXES = {
    (16, 4): ((1, 8, 8), (2, 4, 8), (1, 4, 16), (1, 2, 32), (8, 1, 8), (1, 8, 16)),
    (16, 8): ((1, 8, 16), (2, 8, 8), (1, 4, 32), (1, 1, 128), (4, 1, 32)),
    (32, 4): ((1, 4, 8), (2, 2, 8), (1, 2, 16), (4, 1, 8), (1, 8, 8)),
    (32, 8): ((1, 8, 8), (1, 4, 16), (2, 4, 8), (1, 1, 64), (4, 1, 16)),
    (64, 8): ((1, 4, 32), (4, 2, 8), (2, 3, 16), (8, 4, 4), (1, 1, 32), (16, 2, 2)),
}


def config_of(block, box, taps, warps, stages, splits=1):
    """Tiles of 64 channels have a kernel of their own."""
    kind = RowByRowConfig if block == 64 else OnePassTf32Config
    return kind(box, block, taps, warps, max(stages, 3) if block == 64 else stages, splits)


def draw(**given):
    """A problem of a few boxes that a config serves, with blocks of taps that need not divide the
    kernel."""
    chance = random.Random(int(torch.randint(2**31, ())))
    while True:
        block, warps = chance.choice(list(BOXES))
        box = chance.choice(BOXES[block, warps])
        taps = tuple(chance.choice([1, 2, 3, 3, 5, 7]) for _ in range(2))
        stages, splits = chance.choice([2, 3, 4]), chance.choice([1, 2, 7])
        config = config_of(block, box, taps, warps, stages, splits)
        groups = chance.choice([1, 1, 1, 2])
        if block == 64:
            channels = chance.choice([64, 64, 32, 96])
        else:
            channels = max(4, block + chance.choice([0, 0, 0, -12, -8, 8, block]))
        kernel = tuple(chance.choice([1, 2, 3, 3, 3, 4, 5, 7]) for _ in range(2))
        dilation = tuple(chance.choice([1, 1, 2]) for _ in range(2))
        padding = tuple(
            (chance.choice([-1, 0, d * (k - 1) // 2, d * k]), chance.choice([-1, 0, d * (k - 1)]))
            for d, k in zip(dilation, kernel, strict=True)
        )
        image = tuple(max(1, side * chance.choice([1, 2]) + chance.choice([-1, 0, 1, 3]))
                      for side in config.box)  # fmt: skip
        layout = Layout(channels * groups, kernel, groups, chance.choice(SYMMETRIES))
        case = Case(
            "sm_90", "float32", config, layout, image, Geometry((1, 1), padding, dilation),
            bias=chance.random() < 0.5, alpha=chance.choice([1.0, -1.5]),
            seed=chance.randrange(2**31),
        )  # fmt: skip
        case = replace(case, **given)
        rows, columns = config.taps_of(kernel)
        # Registers of a thread: sums, x of all rows, grad of one column.
        held = (rows * columns + 1) * min(block, 32) // 2 + rows * 8
        if min(case.output) > 0 and held <= 220 and config.tiles_of(layout) <= 16 and (
            config.shared_bytes(kernel, dilation) < 2**17 and layout.size
        ):  # fmt: skip
            return case


@pytest.mark.parametrize("number", range(8))
def test_drawn_problems(compiler, number):
    case = draw()
    assert not execute(case).faults, case


@pytest.mark.parametrize("number", range(4))
def test_small_integers_give_equality(compiler, number):
    assert_exact_of_small_integers(draw(alpha=1.0), largest=3)


@pytest.mark.parametrize("number", range(3))
def test_both_operands_are_rounded_to_the_nearest_and_the_bias_adds_what_is_not(compiler, number):
    case = draw(bias=True)
    inputs = inputs_of(case)
    for image in (inputs.x, inputs.grad):
        image.add_(torch.randn(image.shape))
    nearest = replace(
        inputs, x=_nearest_tf32(inputs.x.contiguous()), grad=_nearest_tf32(inputs.grad.contiguous())
    )
    with emulated(EmulatedGpu(90), *KERNELS):
        actual = run(case, inputs)
    rounded, plain = expected_of(case, nearest), expected_of(case, inputs)
    packed, bias = slice(case.layout.size), slice(case.layout.size, None)
    for part, expected in ((packed, rounded), (bias, plain)):
        oracle.assert_within_bound(
            actual[part], oracle.Expected(*(each[part] for each in expected))
        )
    # Sums are off by multiples of 2^-24; rounding one operand only would show, at 2^-12.
    ours, theirs = ((actual - each.truth)[packed].norm() for each in (rounded, plain))
    assert ours <= theirs / 50  # 0, where no tap sees the image


@pytest.mark.parametrize("block, box", [(16, (1, 8, 16)), (64, (1, 8, 32))])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_no_tap_sees_adds_nothing(compiler, value, block, box):
    geometry = Geometry((1, 1), ((0, -4), (-2, -8)), (1, 1))
    layout = Layout(block, (2, 2), symmetry=random.choice(SYMMETRIES))
    config = config_of(block, box, (2, 2), 8, 3)
    case = Case("sm_90", "float32", config, layout, (1, 9, 26), geometry)
    inputs = inputs_of(case)
    unseen = torch.ones_like(inputs.x, dtype=torch.bool)
    unseen[:, :, :5, 2:18] = False
    inputs.x[unseen] = 0
    expected = expected_of(case, inputs)
    inputs.x[unseen] = value
    with emulated(EmulatedGpu(90), *KERNELS):
        actual = run(case, inputs)
    assert actual.isfinite().all() and expected.truth.abs().max() > 1
    assert ((actual - expected.truth).abs() <= expected.bound).all()


@pytest.mark.parametrize("block, warps", BOXES)
def test_a_warp_meets_no_bank_of_shared_memory_twice_at_a_time(block, warps, compiler, monkeypatch):
    """32 banks of 4 bytes: of 4 bytes all threads of a warp are served at a time, of 8 a half of
    them, of 16 a quarter."""
    config = config_of(block, BOXES[block, warps][0], (3, 3), warps, 2)
    case = Case("sm_90", "float32", config, Layout(block, (3, 3)), config.box, SAME, bias=False)
    load, store, seen = Machine.load_shared, Machine.store_shared, set()

    def look(machine, what, lanes, addresses, count):
        code = machine.kernel.instructions
        products = [i for i, each in enumerate(code) if {"mma", "wgmma"} & set(each.opcode)]
        # The sum over warps that share pixels comes after all products.
        if len(lanes) % 32 == 0 and products and (block == 64 or machine.pc < products[-1]):
            words = np.asarray(addresses)[:, None] // 4 + np.arange(count, dtype=np.uint64)
            for at_a_time in words.reshape(-1, 32):
                met = np.unique(at_a_time)
                assert len(np.unique(met % 32)) == len(met)
                if len(met) == 32:
                    seen.add((what, count))

    def watched_load(machine, lanes, addresses, size, count, in_cluster=False):
        if size == 4:
            look(machine, "load", lanes, addresses, count)
        return load(machine, lanes, addresses, size, count, in_cluster)

    def watched_store(machine, lanes, addresses, words, in_cluster=False):
        if words.dtype.itemsize == 4:
            look(machine, "store", lanes, addresses, words.shape[1])
        store(machine, lanes, addresses, words, in_cluster)

    monkeypatch.setattr(Machine, "load_shared", watched_load)
    monkeypatch.setattr(Machine, "store_shared", watched_store)
    with emulated(EmulatedGpu(90), *KERNELS):
        run(case, inputs_of(case))
    if block == 64:
        assert seen == {("load", 1), ("load", 4), ("store", 2)}
    else:
        assert seen == {("load", 1), ("load", 2)}


PROGRAMS = {
    "warps that share pixels": Case(
        "sm_90", "float32", OnePassTf32Config((1, 4, 8), 32, (3, 3), 4, 2), Layout(32, (3, 3)),
        (2, 8, 16), SAME,
    ),
    "row by row, many blocks of taps": Case(
        "sm_90", "float32", RowByRowConfig((4, 4, 8), 64, (2, 2), 8, 3),
        Layout(64, (3, 3), symmetry="skew_adjoint"), (4, 8, 8), SAME,
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_lacks_all_of_its_waits_of_a_kind_is_found_out(program, compiler):
    assert_found_out_without_waits(PROGRAMS[program], least=3)
