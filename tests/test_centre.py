"""Where a convolution takes its centre tap from: gathered in the kernel, or unpacked before."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

autotune = pytest.importorskip("triton_tied.autotune", reason="there are no kernels without Triton")

from triton_tied import cost, gpus, table, tuning  # noqa: E402 (after the check for Triton)
from triton_tied.geometry import Geometry  # noqa: E402
from triton_tied.packing import Layout  # noqa: E402
from triton_tied.problem import Problem  # noqa: E402
from triton_tied.table import Entry  # noqa: E402

pytestmark = pytest.mark.usefixtures("absent_h200")
GPU = gpus.KNOWN["H200"]
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SMALL, LARGE = (1, 16, 8, 8), (4, 64, 64, 64)  # on either side of the guess


def image(shape):
    return torch.randn(shape).half().contiguous(memory_format=torch.channels_last)


def unpacks(x):
    return autotune.unpacks_centre(x, Layout(x.shape[1], (3, 3)), GEOMETRY)


@pytest.fixture
def store(absent_h200):
    """Puts into the table what the problem of x took, its centre as the names say."""

    def store(x, **medians_us):
        gathered = autotune.describe("conv", Layout(x.shape[1], (3, 3)), GEOMETRY, "gathered", x)
        entries = {}
        for centre, median_us in medians_us.items():
            problem = replace(gathered, centre=centre)
            config = cost.sieve(problem, GPU).untimed
            entries[problem.key] = Entry(config, median_us, None, 1.0)
        table.save(table.path_of(absent_h200), absent_h200, entries)
        autotune.forget()
        return gathered

    return store


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_table_with_both_ways_decides(shape, store):
    x = image(shape)
    unpack_us = cost.unpack_us(store(x), GPU)
    store(x, gathered=100.0, unpacked=100.0 - 0.9 * unpack_us)
    assert not unpacks(x)  # the unpacking itself takes longer than what it gains
    store(x, gathered=100.0, unpacked=100.0 - 1.1 * unpack_us)
    assert unpacks(x)


@pytest.mark.parametrize("shape, guess", [(SMALL, False), (LARGE, True)])
def test_a_guess_decides_where_no_table_has_both(shape, guess, store):
    x = image(shape)
    assert unpacks(x) is guess
    store(x, gathered=1000.0 if guess else 1.0)
    assert unpacks(x) is guess
    store(image((2, 128, 32, 32)), gathered=1.0, unpacked=2.0)  # of others
    assert unpacks(x) is guess


@pytest.mark.parametrize("shape, guess", [(SMALL, False), (LARGE, True)])
def test_memory_of_a_stand_in_is_not_asked_for(shape, guess):
    with FakeTensorMode():
        x = torch.empty(shape)
    assert unpacks(x) is guess


def test_a_known_answer_is_one_look_up(monkeypatch):
    x = image(SMALL)
    known = unpacks(x)
    monkeypatch.setattr(autotune, "describe", None)
    assert unpacks(x) is known


def test_unpacking_is_a_launch_and_its_bytes():
    slow = replace(GPU, memory_gbs=1e-3)  # one byte takes a microsecond
    c, groups = 32, 2
    problem = Problem("conv", "float16", Layout(c * groups, (3, 3), groups), (1, 8, 8), GEOMETRY)
    read, written = groups * c * c / 2, groups * c * c
    expected = 2 * (read + written) + cost._LAUNCH_US
    assert math.isclose(cost.unpack_us(problem, slow), expected, rel_tol=1e-6)


def test_tuning_times_both_ways_where_there_are_two():
    odd = Problem("conv", "float16", Layout(16, (3, 3)), (1, 8, 8), GEOMETRY)
    even = replace(odd, layout=Layout(16, (2, 2)), centre="none")
    weight = replace(odd, kernel="weight_grad", centre="none")
    unpacked = replace(odd, centre="unpacked")
    assert tuning.both_centres([odd, even, weight]) == [odd, unpacked, even, weight]
    assert tuning.both_centres([unpacked, odd]) == [odd, unpacked]
