"""The shortlist: closed formulas against counting, and a config for every problem on every GPU."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stand_ins import convolution_of, gradient_of

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
from triton_tied.kernels import configs
from triton_tied.kernels.configs import (
    ClusteredConfig,
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    OnePassConfig,
    OnePassTf32Config,
    RowByRowConfig,
    WeightGradConfig,
    as_listed,
    can_merge,
)
from triton_tied.kernels.plans import make_plan
from triton_tied.kernels.stored_taps import most_splits
from triton_tied.kernels.toolchain import why_no_clusters
from triton_tied.packing import Layout

clustered_only = pytest.mark.skipif(why_no_clusters() is not None, reason=str(why_no_clusters()))
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not run Gluon")
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
    memory = st.sampled_from(["channels_last", "contiguous", "strided"])
    return Problem(
        name,
        draw(st.sampled_from(LIST_DTYPES)),
        layout,
        image,
        geometry,
        draw(memory),
        draw(memory) if name == "conv" else "channels_last",
        draw(st.booleans()),
        draw(st.booleans()),
    )


def made(c=64, image=(8, 32, 32), kernel=(3, 3), name="conv", dtype="bfloat16", **options):
    padding = tuple((k // 2, k // 2) for k in kernel)
    problem = Problem(name, dtype, Layout(c, kernel), image, Geometry((1, 1), padding, (1, 1)))
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
    found = [entry.config for entry in (*shortlist.candidates, *shortlist.fallen)]
    plain = [as_listed(config) for config in found if config.merged == 1]
    assert sorted(map(repr, plain)) == sorted(map(repr, listed))
    for config, _ in shortlist.candidates:
        assert serves(problem, gpu, config)
        assert listed[as_listed(config)].shared_bytes <= gpu.block_shared_bytes
        assert config.loader == "pointer" or gpu.has_descriptors
    assert all(reason for _, reason in shortlist.fallen)
    assert serves(problem, gpu, shortlist.untimed)
    # bulk copies of whole rows are not taken unless they were timed, and so checked
    assert shortlist.untimed.loader != "planar_descriptor"


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


@pytest.mark.parametrize("name", ["conv", "weight_grad"])
@given(
    problem=problems(),
    n=st.sampled_from([16, 64]),
    k=st.sampled_from([16, 32]),
    splits=st.integers(1, 5),
)
def test_programs_are_those_of_the_launch(name, problem, n, k, splits):
    problem = replace(problem, kernel=name)
    layout, geometry, (images, *sides) = problem.layout, problem.geometry, problem.image
    shapes = [(images, layout.channels, *each) for each in (sides, problem.output[1:])]
    x, grad = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
    if name == "conv":
        config = ConvConfig((1, 8, 8), n, k, splits=splits)
        assume(splits <= most_splits(layout, layout.pairs, k))
        call = convolution_of(x, layout, geometry)
    else:
        config = WeightGradConfig((1, 8, 8), n, k, splits)
        assume(layout.size and splits <= config.count_boxes(problem.output))
        call = gradient_of(x, grad, layout, geometry)
    plan = make_plan(call, config)
    assert cost_model.count_programs(problem, config) == plan.main.programs
    assert (plan.sum is None) == (splits == 1)


@pytest.mark.parametrize("name", ["conv", "weight_grad"])
@given(
    c=st.integers(1, 32),
    columns=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7]),
    merged=st.sampled_from([2, 4, 8]),
    splits=st.integers(1, 3),
)
def test_programs_of_merged_columns_are_those_of_the_launch(
    name, c, columns, kernel, merged, splits
):
    problem = made(c, (3, 12, merged * columns), (kernel, kernel), name, "float16")
    shape = (3, c, 12, merged * columns)
    x, grad = (
        torch.empty(shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        for _ in "xg"
    )
    if name == "conv":
        config = ConvConfig((1, 8, 8), 16, 32, splits=splits, merged=merged)
        call = convolution_of(x, problem.layout, problem.geometry)
    else:
        config = WeightGradConfig((1, 8, 8), 16, 32, splits, merged=merged)
        call = gradient_of(x, grad, problem.layout, problem.geometry)
    assume(problem.why_unreadable(config) is None)
    assume(splits <= cost_model.limit_splits(problem, config))
    plan = make_plan(call, config)
    assert cost_model.count_programs(problem, config) == plan.main.programs
    launches = (plan.merging is not None) + 1 + (plan.sum is not None)
    assert cost_model._work(problem, config).launches == launches


@given(problem=problems(), rows=st.sampled_from([1, 4]), splits=st.integers(1, 5))
def test_programs_are_those_of_the_launch_of_few_channels_a_group(problem, rows, splits):
    channels = problem.layout.groups * (4 if rows > 1 else 1)
    layout, geometry = replace(problem.layout, channels=channels), problem.geometry
    problem = replace(problem, layout=layout)
    shapes = [(size[0], channels, *size[1:]) for size in (problem.image, problem.output)]
    x, grad = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
    if problem.kernel == "conv":
        config, call = DepthwiseConfig((1, rows, 32), 16), convolution_of(x, layout, geometry)
        assert cost_model.limit_splits(problem, config) == 1
    else:
        config = DepthwiseGradConfig((1, rows, 32), 16, splits=splits)
        call = gradient_of(x, grad, layout, geometry)
        assume(layout.size and splits <= cost_model.limit_splits(problem, config))
    assume(problem.why_unreadable(config) is None)
    assert cost_model.count_programs(problem, config) == make_plan(call, config).main.programs


@given(
    channels=st.sampled_from([64, 100, 256, 1024]),
    of_group=st.sampled_from([1, 2, 4]),
    side=st.integers(17, 100),
    kernel=st.sampled_from([3, 5, 7]),
    sign=st.sampled_from(["self_adjoint", "skew_adjoint"]),
    name=st.sampled_from(["conv", "weight_grad"]),
    dtype=st.sampled_from(LIST_DTYPES),
    gpu=st.sampled_from(list(gpus.KNOWN.values())),
)
def test_few_channels_a_group_take_no_matrix_products(
    channels, of_group, side, kernel, sign, name, dtype, gpu
):
    assume(lists(gpu, dtype) and (of_group == 1 or kernel == 3))
    layout = Layout(channels, (kernel, kernel), channels // of_group, sign)
    problem = made(image=(16, side, side), kernel=(kernel, kernel), name=name, dtype=dtype)
    problem = replace(problem, layout=layout)
    kind = {"conv": "depthwise", "weight_grad": "depthwise_grad"}[name]
    assert make_shortlist(problem, gpu).untimed.kind == kind


@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize("gpu", gpus.KNOWN.values(), ids=gpus.KNOWN)
@settings(max_examples=2, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_what_is_picked_neither_spills_nor_exceeds_the_limits(gpu, problem):
    # As on a GPU: the first that the compiler speaks for. That has to come soon.
    assume(lists(gpu, problem.dtype))
    found = []
    for config in make_shortlist(problem, gpu).ranked[:4]:
        form = requirements.form_of(problem, config)
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
    peak = 100e12 * cost_model.TERMS.matrix_share
    assert cost_model.floor_us(wide, gpu) == pytest.approx(flops / peak * 1e6)
    least = 2 * (2 * 8 * 64 * 64 * 8 + 4 * 8 * 8 + 36)
    assert cost_model.floor_us(thin, gpu) == pytest.approx(least / 1000e9 * 1e6)


def test_what_does_not_fit_falls_with_its_reason():
    small = replace(gpus.KNOWN["A100"], block_shared_bytes=24 * 1024)
    reasons = [fallen.reason for fallen in make_shortlist(made(256), small).fallen]
    assert any("bytes of shared memory, of 24576" in reason for reason in reasons)
    ungainly = made(36, (1, 9, 9), memory="contiguous")
    reasons = [fallen.reason for fallen in make_shortlist(ungainly, gpus.KNOWN["H100"]).fallen]
    assert any("not aligned to 16 bytes" in reason for reason in reasons)


@compiled_only
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("c", [16, 32, 64])
def test_few_channels_on_hopper_take_the_kernel_that_holds_the_weight(c, dtype, kernel):
    problem = made(c, (32, 56, 56), dtype=dtype, kernel=kernel)
    best = make_shortlist(problem, gpus.KNOWN["H100"]).untimed
    bank = math.prod(kernel) * c * c * problem.itemsize
    assert isinstance(best, HaloConfig)
    assert (best.streamed > 0) == (bank > 2**18)
    assert all(
        not isinstance(candidate.config, HaloConfig)
        for gpu in ("A100", "B200")
        for candidate in list_of("conv", gpus.KNOWN[gpu].target, dtype)
    )


@compiled_only
@pytest.mark.parametrize("channels", [8, 16, 32, 48, 64])
@pytest.mark.parametrize("dtype", LIST_DTYPES)
def test_few_channels_have_their_gradient_in_one_pass(dtype, channels):
    problem = replace(made(channels, (32, 56, 56), dtype=dtype), kernel="weight_grad")
    best = make_shortlist(problem, gpus.KNOWN["H100"]).untimed
    tf32 = "row_by_row" if channels == 64 else "one_pass_tf32"
    assert best.kind == {"float32": tf32, "float32_ieee": "weight_grad"}.get(dtype, "one_pass")
    assert all(
        not isinstance(candidate.config, OnePassConfig)
        for gpu in ("A100", "B200")
        for candidate in list_of("weight_grad", gpus.KNOWN[gpu].target, dtype)
    )


@compiled_only
def test_why_the_gradient_in_one_pass_does_not_serve():
    config = OnePassConfig((1, 8, 16), 64, (3, 3), 8, 3)

    def gradient(*arguments, **given):
        return replace(made(*arguments, **given), kernel="weight_grad")

    assert gradient(64, (32, 56, 56)).why_unreadable(config) is None
    for problem, reason in (
        (gradient(64, (32, 56, 56), dtype="float32"), "half precision only"),
        (gradient(64, (32, 56, 56), memory="contiguous"), "its memory is contiguous"),
        (gradient(20, (32, 56, 56)), "not aligned to 16 bytes"),
        (
            replace(gradient(64), geometry=Geometry((1, 1), ((9, 9), (9, 9)), (9, 9))),
            "bytes of shared memory, of 232448",
        ),
    ):
        assert reason in problem.why_unreadable(config)
    large = OnePassConfig((1, 16, 32), 16, (3, 3), 4, 3)
    assert "a box of 512 pixels" in gradient(16, (32, 56, 56)).why_unreadable(large)


@compiled_only
@pytest.mark.parametrize(
    "tf32",
    [OnePassTf32Config((1, 16, 8), 32, (3, 3), 8, 3), RowByRowConfig((4, 8, 8), 64, (3, 3), 8, 4)],
)
def test_why_the_gradients_of_float32_in_one_pass_do_not_serve(tf32):
    def gradient(*arguments, **given):
        return replace(made(*arguments, **given), kernel="weight_grad")

    assert gradient(64, (32, 56, 56), dtype="float32").why_unreadable(tf32) is None
    odd = gradient(48, (32, 56, 56), dtype="float32").why_unreadable(tf32)
    assert (odd is None) == (tf32.BLOCK_C == 32) and (odd is None or "32 channels at once" in odd)
    for problem, reason in (
        (gradient(64, (32, 56, 56)), "TF32 only"),
        (gradient(64, (32, 56, 56), dtype="float32_ieee"), "TF32 only"),
        (gradient(64, dtype="float32", memory="contiguous"), "its memory is contiguous"),
        (
            replace(
                gradient(64, dtype="float32"), geometry=Geometry((1, 1), ((9, 9), (9, 9)), (19, 9))
            ),
            "bytes of shared memory, of 232448",
        ),
    ):
        assert reason in problem.why_unreadable(tf32)


@compiled_only
def test_why_the_kernel_that_holds_the_weight_does_not_serve():
    config = HaloConfig((1, 8, 16), 64)
    assert made(64, (32, 56, 56)).why_unreadable(config) is None
    for problem, reason in (
        (made(64, (32, 56, 56), kernel=(1, 1)), "one tap"),
        (made(128, (32, 56, 56)), "does not hold the 128 of a group"),
        (made(64, (32, 56, 56), dtype="float32_ieee"), "TF32"),
        (made(64, (32, 56, 56), output_memory="contiguous"), "is contiguous"),
        (made(64, (32, 56, 56), memory="contiguous"), "its memory is contiguous"),
        (made(64, (32, 56, 56), kernel=(9, 9)), "bytes of shared memory, of 232448"),
        (made(20, (32, 56, 56)), "not aligned to 16 bytes"),
        (replace(made(), layout=Layout(96, (3, 3), 2)), "would reach beyond the 48 of a group"),
    ):
        assert reason in problem.why_unreadable(config)
    streamed = replace(config, streamed=2)
    assert made(64, (32, 56, 56), kernel=(9, 9)).why_unreadable(streamed) is None
    assert "shared memory" in made(64, (32, 56, 56), kernel=(29, 29)).why_unreadable(streamed)


def test_without_gluon_its_kernel_is_no_candidate(monkeypatch):
    monkeypatch.setattr(configs, "why_no_gluon", lambda: "there is no Gluon")
    shortlist = make_shortlist(made(64, (32, 56, 56)), gpus.KNOWN["H100"])
    reasons = {fallen.reason for fallen in shortlist.fallen if fallen.config.kind == "halo"}
    assert "there is no Gluon" in reasons
    assert all(config.kind == "conv" for config in shortlist.ranked)


@clustered_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("c", [128, 256, 512])
def test_many_channels_on_hopper_are_shared_by_two_programs(c, dtype):
    problem = made(c, (32, 64, 64), dtype=dtype)
    best = make_shortlist(problem, gpus.KNOWN["H100"]).untimed
    assert best.kind == "clustered" and best.shared == ("weights" if c == 128 else "pixels")
    assert all(
        candidate.config.kind != "clustered"
        for gpu in ("A100", "B200")
        for candidate in list_of("conv", gpus.KNOWN[gpu].target, dtype)
    )


@clustered_only
def test_why_the_kernel_of_clusters_does_not_serve():
    config = ClusteredConfig((1, 16, 16), 256)
    assert made(256).why_unreadable(config) is None
    for problem, reason in (
        (made(120), "of 120 channels a group the centre is not unpacked"),
        (made(256, dtype="float32_ieee"), "TF32"),
        (made(256, output_memory="contiguous"), "is contiguous"),
        (made(256, memory="contiguous"), "its memory is contiguous"),
        (made(132), "not aligned to 16 bytes"),
        (replace(made(), layout=Layout(384, (3, 3), 2)), "would reach beyond the 192 of a group"),
    ):
        assert reason in problem.why_unreadable(config)


def test_without_clusters_their_kernel_is_no_candidate(monkeypatch):
    monkeypatch.setattr(configs, "why_no_clusters", lambda: "there are no clusters")
    shortlist = make_shortlist(made(256, (32, 56, 56)), gpus.KNOWN["H100"])
    reasons = {fallen.reason for fallen in shortlist.fallen if fallen.config.kind == "clustered"}
    assert "there are no clusters" in reasons
    assert all(config.kind == "conv" for config in shortlist.ranked)


@pytest.mark.parametrize("name", ["conv", "weight_grad"])
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (1, 9)])
def test_few_channels_are_merged(name, kernel):
    problem = made(8, (64, 128, 128), kernel, name)
    found = make_shortlist(problem, gpus.KNOWN["H100"])
    alone = min(p.predicted_us for p in found.candidates if p.config.merged == 1)
    assert found.untimed.merged > 1 and found.untimed_us < 0.8 * alone
    assert found.ranked[1].merged == 1  # where the first has a fault
    (only,) = make_shortlist(problem, gpus.KNOWN["H100"], most=1).candidates
    assert only.config == found.untimed
    # not of many channels, of groups, of other memory, or where rows cannot be cut so
    for other in (
        replace(problem, layout=replace(problem.layout, channels=64)),
        replace(problem, layout=replace(problem.layout, channels=32, groups=4)),
        replace(problem, memory="contiguous"),
        replace(problem, image=(64, 128, 127)),
    ):
        configs_of = make_shortlist(other, gpus.KNOWN["H100"]).ranked
        assert all(config.merged == 1 for config in configs_of)


@pytest.mark.parametrize("name", ["conv", "weight_grad"])
def test_merged_columns_cost_what_their_convolution_costs_and_a_launch(name):
    gpu = gpus.KNOWN["H100"]
    problem = made(8, (64, 128, 128), (1, 7), name)
    merged = made(32, (64, 128, 32), (1, 3), name)  # four columns of eight channels
    for candidate in list_of(name, "sm_90", "bfloat16"):
        config = candidate.config
        if not can_merge(config) or merged.why_unreadable(config):
            continue
        alone = cost_model.predict(merged, gpu, candidate)
        config = replace(config, merged=4)
        assert problem.why_unreadable(config) is None
        found = cost_model.predict(problem, gpu, candidate._replace(config=config))
        launches = (
            2 if name == "weight_grad" else 1 + cost_model._work(merged, candidate.config).launches
        )
        assert found.launches == launches * cost_model.TERMS.launch_us
        assert (found.products, found.shared, found.cache) == (
            alone.products,
            alone.shared,
            alone.cache,
        )


@pytest.mark.parametrize("c", [128, 256, 512])
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
