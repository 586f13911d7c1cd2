"""When an image is copied into channels-last memory before the convolution."""

from dataclasses import replace

import pytest
import torch
from stand_ins import GEOMETRY, GPU
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_tied.autotune import cost_model, disk_cache, image_copy, tuned_configs
from triton_tied.autotune.disk_cache import Entry
from triton_tied.autotune.problem import problem_of
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.geometry import resolve
from triton_tied.packing import Layout

pytestmark = pytest.mark.usefixtures("absent_h200")


def copies(x):
    layout = Layout(x.shape[1], (3, 3))
    return image_copy.copying_pays(x, layout, GEOMETRY, "contiguous", may_copy_output=False)


@pytest.mark.parametrize(
    "x, expected",
    [
        (torch.empty(16, 64, 64, 64), True),
        (torch.empty(16, 64, 64, 64).transpose(2, 3), True),
        (torch.empty(16, 64, 64, 65)[..., 1:], True),
        (torch.empty(16, 64, 1, 4096), True),  # one dimension
        (torch.empty(16, 68, 64, 64), True),
        (torch.empty(16, 68, 64, 64, dtype=torch.float16), False),  # 136 bytes a pixel
        (torch.empty(16, 3, 64, 64), False),
        (torch.empty(16, 64, 64, 64, memory_format=torch.channels_last), False),
        (torch.empty(16, 64, 1, 1), False),  # it is of both formats
        (torch.empty(1, 64, 4, 4), False),  # a launch takes longer than what it saves
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else str(list(value.shape)),
)
def test_large_images_are_copied_where_that_gives_pixels_of_16_bytes(x, expected):
    assert copies(x) is expected


def test_a_table_with_both_ways_decides(absent_h200):
    x = torch.randn(4, 64, 16, 16).half()
    there = problem_of("conv", Layout(64, (3, 3)), GEOMETRY, [x], "contiguous")
    copied = replace(there, memory="channels_last")
    copy_us = cost_model.copy_us(there, GPU)

    def store(**medians):
        entries = {
            problem.key: Entry(make_shortlist(problem, GPU).untimed, medians[name], None, 1.0)
            for name, problem in {"there": there, "copied": copied}.items()
            if name in medians
        }
        disk_cache.save(disk_cache.path_of(absent_h200), absent_h200, entries)
        tuned_configs.forget()

    store(there=1.0)
    assert copies(x)
    store(there=100.0, copied=100.0 - 0.9 * copy_us)
    assert not copies(x)
    store(there=100.0, copied=100.0 - 1.1 * copy_us)
    assert copies(x)


def test_ways_of_a_problem():
    x = torch.empty(2, 8, 6, 6, dtype=torch.float16)

    def memories(x, output, **options):
        problem = problem_of("conv", Layout(x.shape[1], (3, 3)), GEOMETRY, [x], output)
        found = image_copy.ways(problem, **options)
        return [(*copies, each.memory, each.output_memory) for copies, each in found]

    alone, image, both = (
        (False, False, "contiguous", "contiguous"),
        (True, False, "channels_last", "contiguous"),
        (True, True, "channels_last", "channels_last"),
    )
    assert memories(x, "contiguous") == [alone, image, both]
    assert memories(x, "contiguous", may_copy_output=False) == [alone, image]
    assert memories(x[:, :3], "contiguous") == [(False, False, "strided", "contiguous")]
    x = x.contiguous(memory_format=torch.channels_last)
    assert memories(x, "channels_last") == [(False, False, "channels_last", "channels_last")]


def test_an_output_is_copied_where_other_kernels_are_faster_by_more(monkeypatch):
    x = torch.empty(64, 8, 128, 128, dtype=torch.float16, memory_format=torch.channels_last)
    layout, geometry = Layout(8, (7, 7)), resolve((7, 7), 1, 3, 1)
    problem = problem_of("conv", layout, geometry, [x], "contiguous")
    assert image_copy.output_copying_pays(problem, x.device)
    slow = replace(GPU, memory_gbs=10)
    monkeypatch.setattr(image_copy.gpus, "of_device", lambda device: slow)
    assert not image_copy.output_copying_pays(problem, x.device)
    assert not image_copy.output_copying_pays(replace(problem, memory="contiguous"), x.device)


def test_a_weight_gradient_reads_the_copies_that_convolutions_made():
    x = torch.empty(1, 64, 4, 4, dtype=torch.float16)  # too small for a copy of its own
    conv = problem_of("conv", Layout(64, (3, 3)), GEOMETRY, [x], "contiguous")
    gradient = replace(conv, kernel="weight_grad", output_memory="channels_last")
    assert image_copy.fastest(conv, GPU)[0] == (False, False)
    assert image_copy.fastest(gradient, GPU)[0] == (True, False)


def test_a_copy_is_a_launch_and_its_bytes():
    x = torch.randn(4, 64, 16, 16).half()
    problem = problem_of("conv", Layout(64, (3, 3)), GEOMETRY, [x], "contiguous")
    slow = replace(GPU, memory_gbs=1e-3)  # one byte takes a microsecond
    expected = 2 * 2 * x.numel() + cost_model.TERMS.launch_us
    assert cost_model.copy_us(problem, slow) == pytest.approx(expected)


def test_memory_of_a_stand_in_is_not_asked_for():
    with FakeTensorMode():
        x = torch.empty(2, 16, 6, 8)
    assert copies(x)


def test_a_known_answer_is_one_look_up(monkeypatch):
    x = torch.randn(2, 16, 6, 8)
    known = copies(x)
    monkeypatch.setattr(image_copy, "problem_of", None)
    assert copies(x) is known
