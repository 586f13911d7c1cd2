"""Where a convolution takes its centre tap from: gathered in the kernel, or unpacked before."""

import math
from dataclasses import replace

import pytest
import torch

autotune = pytest.importorskip("triton_tied.autotune", reason="there are no kernels without Triton")

from triton_tied import cost, gpus, table, tuning  # noqa: E402 (after the check for Triton)
from triton_tied.geometry import Geometry  # noqa: E402
from triton_tied.packing import Layout  # noqa: E402
from triton_tied.problem import Problem  # noqa: E402
from triton_tied.table import Entry, Origin  # noqa: E402

GPU = gpus.KNOWN["H200"]
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
ORIGIN = Origin("NVIDIA H200", "9.0", 132, torch.__version__, "3.7.1", "12.8")
SMALL, LARGE = (1, 16, 8, 8), (4, 64, 64, 64)  # on either side of the guess


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H200 that is not there, with a table of its own."""
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpus, "of_device", lambda device: GPU)
    monkeypatch.setattr(autotune, "origin_of", lambda device: ORIGIN)
    autotune.forget()
    yield
    autotune.forget()


def image(shape):
    return torch.randn(shape).half().contiguous(memory_format=torch.channels_last)


def unpacks(x):
    return autotune.unpacks_centre(x, Layout(x.shape[1], (3, 3)), GEOMETRY)


def store(x, **medians_us):
    """Entries of the table for the problem of x, its centre as the names say."""
    gathered = autotune.describe("conv", Layout(x.shape[1], (3, 3)), GEOMETRY, "gathered", x)
    entries = {}
    for centre, median_us in medians_us.items():
        problem = replace(gathered, centre=centre)
        config = cost.sieve(problem, GPU).untimed
        entries[problem.key] = Entry(config, median_us, None, 1.0)
    table.save(table.path_of(ORIGIN), ORIGIN, entries)
    autotune.forget()
    return gathered


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_table_with_both_ways_decides(shape):
    x = image(shape)
    unpack_us = cost.unpack_us(store(x), GPU)
    store(x, gathered=100.0, unpacked=100.0 - 0.9 * unpack_us)
    assert not unpacks(x)  # the unpacking itself takes longer than what it gains
    store(x, gathered=100.0, unpacked=100.0 - 1.1 * unpack_us)
    assert unpacks(x)


@pytest.mark.parametrize("shape, guess", [(SMALL, False), (LARGE, True)])
def test_a_guess_decides_where_no_table_has_both(shape, guess):
    x = image(shape)
    assert unpacks(x) is guess
    store(x, gathered=1000.0 if guess else 1.0)
    assert unpacks(x) is guess
    store(image((2, 128, 32, 32)), gathered=1.0, unpacked=2.0)  # of others
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
