"""Where a convolution takes its centre tap from: gathered in the kernel, or unpacked before."""

import math
from dataclasses import replace

import pytest
import torch
from stand_ins import GEOMETRY, GPU
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_tied.autotune import centre_tap, cost_model, disk_cache, tuned_configs
from triton_tied.autotune.disk_cache import Entry
from triton_tied.autotune.problem import Problem, problem_of
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.packing import Layout

pytestmark = pytest.mark.usefixtures("absent_h200")
SMALL, LARGE = (1, 16, 8, 8), (4, 64, 64, 64)  # on either side of the guess


def image(shape):
    return torch.randn(shape).half().contiguous(memory_format=torch.channels_last)


def unpacks(x):
    return centre_tap.unpacking_pays(x, Layout(x.shape[1], (3, 3)), GEOMETRY)


@pytest.fixture
def store(absent_h200):
    """Puts into the table what the problem of x took, its centre as the names say."""

    def store(x, **medians_us):
        gathered = problem_of("conv", Layout(x.shape[1], (3, 3)), GEOMETRY, "gathered", x)
        entries = {}
        for centre, median_us in medians_us.items():
            problem = replace(gathered, centre=centre)
            config = make_shortlist(problem, GPU).untimed
            entries[problem.key] = Entry(config, median_us, None, 1.0)
        disk_cache.save(disk_cache.path_of(absent_h200), absent_h200, entries)
        tuned_configs.forget()
        return gathered

    return store


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_table_with_both_ways_decides(shape, store):
    x = image(shape)
    unpack_us = cost_model.unpack_us(store(x), GPU)
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
    monkeypatch.setattr(centre_tap, "problem_of", None)
    assert unpacks(x) is known


def test_unpacking_is_a_launch_and_its_bytes():
    slow = replace(GPU, memory_gbs=1e-3)  # one byte takes a microsecond
    c, groups = 32, 2
    problem = Problem("conv", "float16", Layout(c * groups, (3, 3), groups), (1, 8, 8), GEOMETRY)
    read, written = groups * c * c / 2, groups * c * c
    expected = 2 * (read + written) + cost_model._LAUNCH_US
    assert math.isclose(cost_model.unpack_us(problem, slow), expected, rel_tol=1e-6)


def test_tuning_times_both_ways_where_there_are_two():
    odd = Problem("conv", "float16", Layout(16, (3, 3)), (1, 8, 8), GEOMETRY)
    even = replace(odd, layout=Layout(16, (2, 2)), centre="none")
    weight = replace(odd, kernel="weight_grad", centre="none")
    unpacked = replace(odd, centre="unpacked")
    assert centre_tap.both_centres([odd, even, weight]) == [odd, unpacked, even, weight]
    assert centre_tap.both_centres([unpacked, odd]) == [odd, unpacked]
