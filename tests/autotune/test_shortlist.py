"""The shortlist: closed formulas against counting, and a config for every problem on every GPU."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from triton_tied.autotune import (
    cost_model,
    gpus,
)
from triton_tied.autotune.candidates import list_of
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist, serves
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.inspection import compiled, requirements
from triton_tied.kernels import launch
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.plans import Convolution, WeightGradient
from triton_tied.packing import Layout

LIST_DTYPES = ["float32", "float32_ieee", "float16", "bfloat16"]


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3, 64]))
    c = draw(st.sampled_from([1, 2, 3, 8, 13, 16, 32, 50, 64, 100, 128, 256, 512, 1024]))
    kernel = (draw(st.integers(1, 11)), draw(st.integers(1, 11)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((draw(st.integers(-3, 12)), draw(st.integers(-3, 12))) for _ in range(2))
    geometry = Geometry((1, 1), padding, dilation)
    image = draw(st.tuples(st.integers(1, 300), *[st.integers(1, 1100)] * 2))
    assume(min(geometry.output_size(image[1:], kernel)) > 0)
    layout = Layout(
        groups * c, kernel, groups, draw(st.sampled_from(["self_adjoint", "skew_adjoint"]))
    )
    name = draw(st.sampled_from(["conv", "weight_grad"]))
    centre = draw(st.sampled_from(["gathered", "unpacked"]))
    return Problem(
        name,
        draw(st.sampled_from(LIST_DTYPES)),
        layout,
        image,
        geometry,
        draw(st.sampled_from(["channels_last", "contiguous", "strided"])),
        centre if layout.taps % 2 and name == "conv" else "none",
        draw(st.booleans()),
        draw(st.booleans()),
    )


def made(c=64, image=(8, 32, 32), kernel=(3, 3), name="conv", dtype="bfloat16", **options):
    padding = tuple((k // 2, k // 2) for k in kernel)
    centre = "unpacked" if name == "conv" else "none"
    problem = Problem(
        name, dtype, Layout(c, kernel), image, Geometry((1, 1), padding, (1, 1)), centre=centre
    )
    return replace(problem, **options)


def lists(gpu, dtype):
    """Whether anything is compiled for the dtype: AMD's products know no TF32."""
    return not (gpu.target == "gfx942" and dtype == "float32")


@pytest.mark.parametrize("gpu", gpus.KNOWN.values(), ids=gpus.KNOWN)
@given(problem=problems())
def test_every_problem_keeps_a_config_on_every_gpu(gpu, problem):
    assume(lists(gpu, problem.dtype))
    shortlist = make_shortlist(problem, gpu)
    assert 1 <= len(shortlist.candidates) <= 20
    predicted = [candidate.predicted_us for candidate in shortlist.candidates]
    assert predicted == sorted(predicted)
    assert all(math.isfinite(us) and us > shortlist.floor_us for us in predicted)
    listed = {
        candidate.config: candidate
        for candidate in list_of(problem.kernel, gpu.target, problem.dtype)
    }
    plain = [_unsplit(entry.config) for entry in (*shortlist.candidates, *shortlist.fallen)]
    assert sorted(map(repr, plain)) == sorted(map(repr, listed))
    for config, _ in shortlist.candidates:
        assert serves(problem, gpu, config)
        assert listed[_unsplit(config)].shared_bytes <= gpu.block_shared_bytes
        assert config.loader == "pointer" or gpu.has_descriptors
    assert all(reason for _, reason in shortlist.fallen)
    assert serves(problem, gpu, shortlist.untimed)
    # bulk copies of whole rows are not taken unless they were timed, and so checked
    assert shortlist.untimed.loader != "planar_descriptor"


def _unsplit(config):
    return replace(config, splits=1) if isinstance(config, WeightGradConfig) else config


@given(problem=problems())
def test_choice_is_the_same_every_time(problem):
    gpu = gpus.KNOWN["H100"]
    assert make_shortlist(problem, gpu) == make_shortlist(problem, gpu)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3))
def test_live_share_is_what_counting_gives(image, box):
    problem = made(image=image)
    live = dead = 0
    starts = itertools.product(
        *(range(0, size, side) for size, side in zip(image, box, strict=True))
    )
    for start in starts:
        for step in itertools.product(*map(range, box)):
            inside = all(a + b < size for a, b, size in zip(start, step, image, strict=True))
            live, dead = live + inside, dead + (not inside)
    assert cost_model.live_share(problem, ConvConfig(box, 16, 16)) == live / (live + dead)


class Recorder:
    """Stands in for a kernel and keeps the grid."""

    def __getitem__(self, grid):
        self.programs = math.prod(grid)
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("name", ["conv", "weight_grad"])
@given(problem=problems(), n=st.sampled_from([16, 64]), k=st.sampled_from([16, 32]))
def test_programs_are_those_of_the_launch(name, problem, n, k):
    problem = replace(problem, kernel=name)
    layout, recorder = problem.layout, Recorder()
    assume(math.prod(problem.image) * layout.channels < 2**27 and layout.size < 2**22)
    x = torch.empty(1, dtype=torch.float16).expand(
        problem.image[0], layout.channels, *problem.image[1:]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, f"{name}_kernel", recorder)
        patch.setattr(
            torch,
            "empty",
            lambda *shape, **options: torch.zeros(()).expand(
                *shape[:1] if len(shape) == 1 else shape
            ),
        )
        if name == "conv":
            config = ConvConfig((1, 8, 8), n, k)
            launch.conv(
                Convolution(x, x, None, None, None, layout, problem.geometry, 1.0, False), config
            )
        else:
            config = WeightGradConfig((1, 8, 8), n, k)
            shape = (problem.image[0], layout.channels, *problem.output[1:])
            grad = torch.zeros(1, dtype=torch.float16).expand(shape)
            launch.weight_grad(WeightGradient(x, grad, layout, problem.geometry, 1.0), config)
            assume(layout.size)
    assert cost_model.count_programs(problem, config) == recorder.programs


@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize("gpu", gpus.KNOWN.values(), ids=gpus.KNOWN)
@settings(max_examples=2, suppress_health_check=list(HealthCheck))
@given(problem=problems(), residual=st.booleans())
def test_what_is_picked_neither_spills_nor_exceeds_the_limits(gpu, problem, residual):
    # As on a GPU: the first that the compiler speaks for. That has to come soon.
    assume(lists(gpu, problem.dtype))
    found = []
    for config in make_shortlist(problem, gpu).ranked[:4]:
        form = requirements.form_of(problem, config, residual)
        try:
            code = compiled.compile_config(config, gpu.target, problem.dtype, form).resources
        except compiled.DoesNotCompile as error:
            found.append(str(error))
            continue
        found.append(code)
        if not code.spill_bytes and code.shared_bytes <= gpu.block_shared_bytes:
            return
    pytest.fail(f"{problem}: {found}")


def test_floor_is_the_larger_of_arithmetic_and_memory():
    gpu = replace(gpus.KNOWN["A100"], half_tflops=100, memory_gbs=1000)
    wide, thin = made(1024, (8, 64, 64)), made(8, (8, 64, 64))
    flops = 2 * 9 * 8 * 64 * 64 * 1024 * 1024
    assert cost_model.floor_us(wide, gpu) == pytest.approx(flops / 100e12 * 1e6)
    least = 2 * (2 * 8 * 64 * 64 * 8 + 4 * 8 * 8 + 36)
    assert cost_model.floor_us(thin, gpu) == pytest.approx(least / 1000e9 * 1e6)


def test_what_does_not_fit_falls_with_its_reason():
    small = replace(gpus.KNOWN["A100"], block_shared_bytes=48 * 1024)
    reasons = [fallen.reason for fallen in make_shortlist(made(256), small).fallen]
    assert any("bytes of shared memory, of 49152" in reason for reason in reasons)
    ungainly = made(36, (1, 9, 9), memory="contiguous")
    reasons = [fallen.reason for fallen in make_shortlist(ungainly, gpus.KNOWN["H100"]).fallen]
    assert any("not aligned to 16 bytes" in reason for reason in reasons)


@pytest.mark.parametrize("c", [64, 128, 256, 512])
def test_large_problems_on_hopper_take_bulk_copies_and_large_tiles(c):
    best = make_shortlist(made(c, (32, 56, 56)), gpus.KNOWN["H200"]).candidates[0].config
    assert best.loader == "channels_last_descriptor"
    assert best.BLOCK_M * best.BLOCK_N >= 64 * 128


@pytest.mark.parametrize("side", [2, 4, 7])
def test_small_maps_take_boxes_with_few_dead_pixels(side):
    problem = made(512, (128, side, side))
    for gpu in (gpus.KNOWN["H100"], gpus.KNOWN["A100"]):
        best = make_shortlist(problem, gpu).candidates[0].config
        shares = [
            cost_model.live_share(problem, candidate.config)
            for candidate in list_of("conv", gpu.target, "bfloat16")
        ]
        assert cost_model.live_share(problem, best) >= max(shares) / 2


def test_few_tiles_are_split_and_many_are_not():
    gpu = gpus.KNOWN["H100"]
    few = make_shortlist(made(32, (64, 64, 64), name="weight_grad"), gpu).candidates[0].config
    many = make_shortlist(made(1024, (2, 8, 8), name="weight_grad"), gpu).candidates[0].config
    assert few.splits >= 8 > many.splits


@pytest.mark.parametrize("name", ["h200", "RTX4090", "mi300x"])
def test_gpus_are_found_by_name_in_any_case(name):
    assert gpus.find(name).name.lower() == name.lower()


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown GPU 'V100': expected one of H200"):
        gpus.find("V100")
