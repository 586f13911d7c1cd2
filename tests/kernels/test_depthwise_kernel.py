"""The kernels for few channels a group against float64 ``F.conv2d`` and its autograd."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import (
    KERNEL_DTYPES,
    SAME,
    SYMMETRIES,
    convolve,
    differentiate,
    embed,
    integers,
    launch_conv,
    launch_weight_grad,
    make_problem,
    memories,
    normal,
    packed_truth,
    place,
    problems,
)

import triton_tied
from triton_tied.autotune import select
from triton_tied.kernels.base_config import Reading
from triton_tied.kernels.configs import DepthwiseConfig, DepthwiseGradConfig

SIDES = [1, 2, 4, 8, 16, 32]


@st.composite
def cases(draw, kind):
    """A problem, a config in few programs, and all else that a launch depends on."""
    problem = draw(problems("depthwise"))
    n, channels, rows, columns = problem.out_shape
    fewest = [math.ceil(size / 3) for size in (rows, n * columns, channels)]  # up to three tiles
    box = [draw(st.sampled_from([side for side in SIDES if side >= least])) for least in fewest]
    columns, block = max(box[1], 16), max(box[2], 8)
    config = kind((1, box[0], columns), block, columns * block // 128)  # 4 numbers a thread
    if kind is DepthwiseGradConfig:
        config = replace(config, splits=draw(st.integers(1, 4)))
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    reading = Reading(
        problem.layout, problem.geometry, "strided", 1, dtype.itemsize, True, "ieee", "strided", 1
    )
    assume(config.why_unreadable(reading) is None)
    return {
        "problem": problem,
        "config": config,
        "dtype": dtype,
        "memory": draw(memories("pointer")),
        "other_memory": draw(memories("pointer")),
        "alpha": draw(st.sampled_from([1.0, -0.5, 4.0])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=12)
@given(
    case=cases(DepthwiseConfig),
    beta=st.sampled_from([0.0, 1.0, -2.0]),
    has_bias=st.booleans(),
    stored=st.sampled_from(["packed", "packed", "half", "all"]),
    last=st.booleans(),
)
def test_integers_give_the_truth_to_the_last_bit(device, case, beta, has_bias, stored, last):
    problem, dtype, alpha, seed = (case[name] for name in ("problem", "dtype", "alpha", "seed"))
    x = place(integers(problem.shape, dtype, device, seed), case["memory"])
    packed = embed(integers((problem.layout.size,), dtype, device, seed), offset=64 - seed % 2)
    bias = residual = None
    if has_bias:
        bias = embed(integers((problem.layout.channels,), dtype, device, seed + 1), offset=1)
    if beta:
        values = integers(problem.out_shape, dtype, device, seed + 1)
        residual = place(values, case["other_memory"])
    y = launch_conv(
        x, packed, problem, case["config"],
        bias=bias, residual=residual, alpha=alpha, beta=beta, stored=stored, last=last,
    )  # fmt: skip
    truth = convolve(x.double(), packed.double(), problem, bias.double() if has_bias else None)
    truth = alpha * truth + (beta * residual.double() if beta else 0)
    assert y.dtype == dtype
    assert torch.equal(y, truth.to(dtype))


@settings(max_examples=12)
@given(
    case=cases(DepthwiseGradConfig),
    written_as=st.sampled_from(KERNEL_DTYPES),
    has_bias=st.booleans(),
)
def test_integers_give_the_gradient_to_the_last_bit(device, case, written_as, has_bias):
    problem, dtype, alpha, seed = (case[name] for name in ("problem", "dtype", "alpha", "seed"))
    x = place(integers(problem.shape, dtype, device, seed), case["memory"])
    grad = place(integers(problem.out_shape, dtype, device, seed + 1), case["other_memory"])
    actual = launch_weight_grad(x, grad, problem, case["config"], alpha, written_as, has_bias)
    truth = packed_truth(x, grad, problem)
    if has_bias:
        truth = torch.cat([truth, grad.double().sum((0, 2, 3))])
    assert actual.dtype == written_as
    assert torch.equal(actual, (alpha * truth).to(written_as))


@settings(max_examples=6)
@given(case=cases(DepthwiseConfig))
def test_input_gradient_is_the_transposed_problem_times_the_sign(device, case):
    problem, dtype, seed = case["problem"], case["dtype"], case["seed"]
    grad = place(integers(problem.shape, dtype, device, seed), case["memory"])
    packed = integers((problem.layout.size,), dtype, device, seed)
    dx = launch_conv(grad, packed, problem, case["config"], alpha=float(problem.layout.sign))
    x = torch.zeros(problem.transposed.shape, dtype=torch.float64, device=device)
    truth, _ = differentiate(x, packed.double(), grad.double(), problem.transposed)
    assert torch.equal(dx, truth.to(dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kernel, groups", [((3, 5), 24), ((2, 4), 12), ((3, 3), 6)], ids=str)
def test_errors_are_within_the_bounds(device, dtype, symmetry, kernel, groups):
    channels, padding = 24, [k // 2 for k in kernel]
    problem = make_problem(
        (2, channels, 9, 10), kernel, [(p, p) for p in padding], groups=groups, symmetry=symmetry
    )
    x, residual, grad = (
        normal(shape, dtype, device).contiguous(memory_format=torch.channels_last)
        for shape in (problem.shape, problem.out_shape, problem.out_shape)
    )
    packed, bias = (normal((size,), dtype, device) for size in (problem.layout.size, channels))
    layout = (channels, kernel, groups, symmetry)
    convolution = oracle.Convolution(layout, {"padding": tuple(padding)}, alpha=0.7)
    y = launch_conv(
        x, packed, problem, DepthwiseConfig((1, 8, 16), 32),
        bias=bias, residual=residual, alpha=0.7,
    )  # fmt: skip
    tensors = [x, packed, bias, residual]
    oracle.assert_within_bound(y, *oracle.expect(convolution, tensors, reference=False))
    config = DepthwiseGradConfig((1, 8, 16), 32, splits=3)
    gradients = launch_weight_grad(x, grad, problem, config, 0.7, has_bias=True)
    expected = oracle.expect(convolution, tensors[:3], grad, reference=False)[2:]
    sizes = [problem.layout.size, channels]
    for actual, each in zip(gradients.split(sizes), expected, strict=True):
        oracle.assert_within_bound(actual, each)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("spot", [(0, 17, 0, 0), (1, 2, 4, 5)], ids=["corner", "middle"])
def test_not_a_number_reaches_only_what_sees_it(device, value, symmetry, spot):
    # tiles of 16 columns go on from one image of 10 to the next, and rows beyond the 7
    problem = make_problem((2, 20, 7, 10), (3, 3), SAME, groups=20, symmetry=symmetry)
    x = integers(problem.shape, torch.float32, device)
    x[spot] = value
    packed = integers((problem.layout.size,), torch.float32, device)
    packed[packed == 0] = 1
    y = launch_conv(x, packed, problem, DepthwiseConfig((1, 4, 16), 16))
    seen = torch.zeros(problem.shape, dtype=torch.bool, device=device)
    image, channel, row, column = spot
    seen[image, channel, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    if symmetry == "skew_adjoint":  # whose centre is zero: nothing is read there
        seen[spot] = y[spot].isnan()
    x[spot] = 0
    truth = convolve(x.double(), packed.double(), problem)
    assert not y[seen & (torch.arange(10, device=device) != column)].isfinite().any()
    assert torch.equal(y[~seen].double(), truth[~seen])


@pytest.mark.parametrize("poisoned", ["x", "grad"])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_not_a_number_reaches_only_the_gradients_that_see_it(device, poisoned, symmetry):
    # no padding: a corner of x is seen by one tap, one of grad by all
    problem = make_problem((2, 5, 7, 10), (3, 3), groups=5, symmetry=symmetry)
    x = integers(problem.shape, torch.float32, device)
    grad = integers(problem.out_shape, torch.float32, device, 1)
    target = x if poisoned == "x" else grad
    target[1, 2, 0, 0] = 0
    truth = packed_truth(x, grad, problem)
    target[1, 2, 0, 0] = math.nan
    seen = slice(8, 9) if poisoned == "x" else slice(8, 12)
    truth[seen] = math.nan
    if poisoned == "grad" and symmetry == "self_adjoint":
        truth[20 + 2] = math.nan
    actual = launch_weight_grad(x, grad, problem, DepthwiseGradConfig((1, 4, 16), 8, splits=2))
    torch.testing.assert_close(actual.double(), truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_pixels_beyond_the_output_add_nothing(device, value, symmetry):
    # cropped: the last columns and rows of x are read by nothing that is live
    problem = make_problem((1, 6, 9, 24), (2, 2), ((0, -4), (1, -8)), groups=6, symmetry=symmetry)
    x = integers(problem.shape, torch.float32, device)
    grad = integers(problem.out_shape, torch.float32, device, 1)
    packed = integers((problem.layout.size,), torch.float32, device)
    truth, gradient = convolve(x.double(), packed.double(), problem), packed_truth(x, grad, problem)
    x[:, :, 5:] = value
    x[..., 16:] = value
    y = launch_conv(x, packed, problem, DepthwiseConfig((1, 8, 32), 8))
    assert torch.equal(y.double(), truth)
    actual = launch_weight_grad(x, grad, problem, DepthwiseGradConfig((1, 8, 32), 8))
    assert torch.equal(actual.double(), gradient)


def test_bias_may_be_wider_than_the_image(device):
    problem = make_problem((1, 8, 3, 4), (3, 3), SAME, groups=8)
    x = integers(problem.shape, torch.float16, device)
    packed = integers((problem.layout.size,), torch.float16, device)
    bias = integers((8,), torch.float32, device) * 2.0**-7 + 64
    assert not torch.equal(bias.half().float(), bias)
    y = launch_conv(x, packed, problem, DepthwiseConfig((1, 4, 4), 8), bias=bias)
    truth = convolve(x.double(), packed.double(), problem, bias.double())
    assert y.dtype == torch.float16 and torch.equal(y, truth.half())


@pytest.mark.parametrize("splits", [1, 2])
def test_a_weight_without_numbers_has_a_bias_gradient_alone(device, splits):
    # the centre of one antisymmetric channel is zero
    problem = make_problem((2, 3, 2, 4), (1, 1), groups=3, symmetry="skew_adjoint")
    assert problem.layout.size == 0
    x, grad = (integers(problem.shape, torch.float16, device, seed) for seed in (0, 1))
    config = DepthwiseGradConfig((1, 2, 4), 4, splits=splits)
    assert launch_weight_grad(x, grad, problem, config).shape == (0,)
    bias = launch_weight_grad(x, grad, problem, config, has_bias=True)
    assert torch.equal(bias.double(), grad.double().sum((0, 2, 3)))
    y = launch_conv(x, x.new_empty(0), problem, DepthwiseConfig((1, 2, 4), 4))
    assert torch.equal(y, torch.zeros_like(x))


def test_gradients_that_half_cannot_hold_are_exact_in_float32(device):
    problem = make_problem((3, 17, 3, 5), (2, 1), ((1, 0), (0, 0)), groups=17)
    x, grad = (integers(problem.shape, torch.float16, device, seed) for seed in (0, 1))
    grad += 1000
    truth = 3 * torch.cat([packed_truth(x, grad, problem), grad.double().sum((0, 2, 3))])
    assert truth.max() > torch.finfo(torch.float16).max
    config = DepthwiseGradConfig((1, 2, 8), 8, splits=3)
    both = launch_weight_grad(x, grad, problem, config, 3.0, torch.float32, has_bias=True)
    assert torch.equal(both.double(), truth)


def test_two_launches_give_the_same_bits(device):
    problem = make_problem((2, 16, 16, 8), (3, 3), SAME, groups=16)
    x, grad = (normal(problem.shape, torch.float32, device) for _ in range(2))
    config = DepthwiseGradConfig((1, 4, 8), 8, splits=3)
    first, second = (launch_weight_grad(x, grad, problem, config) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "channels, groups, kernel, reason",
    [
        (6, 2, (3, 3), "groups of 1, 2 or 4 channels, and these have 3"),
        (8, 1, (3, 3), "and these have 8"),
        (8, 2, (3, 3), "not read all 4 channels of a group at once"),
        (4, 4, (16, 16), "a thread would hold"),
    ],
)
def test_what_it_cannot_serve_is_refused(device, channels, groups, kernel, reason):
    problem = make_problem((1, channels, 20, 20), kernel, groups=groups)
    x = integers(problem.shape, torch.float16, device)
    packed = integers((problem.layout.size,), torch.float16, device)
    with pytest.raises(ValueError, match=reason):
        launch_conv(x, packed, problem, DepthwiseConfig((1, 4, 4), 8))
    grad = integers(problem.out_shape, torch.float16, device)
    with pytest.raises(ValueError, match=reason):
        launch_weight_grad(x, grad, problem, DepthwiseGradConfig((1, 4, 4), 8))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_layer_and_its_gradients(device, symmetry, mode):
    layer = triton_tied.TiedConv2d(
        12, 3, padding=1, groups=12, padding_mode=mode, symmetry=symmetry, device=device
    )
    dense = layer.to_conv().double()
    x, grad = (normal((2, 12, 6, 7), torch.float32, device) for _ in range(2))
    exact = x.double().requires_grad_()
    x.requires_grad_()
    with select.using(
        conv=DepthwiseConfig((1, 4, 16), 16),
        weight_grad=DepthwiseGradConfig((1, 4, 16), 16, splits=2),
    ):
        y = layer(x)
        y.backward(grad)
    dense(exact).backward(grad.double())
    packed_grad = triton_tied.pack(dense.weight.grad, 12, symmetry)
    centres = layer.packed_weight.numel() - 12 * 4
    factors = torch.cat([torch.full((12 * 4,), 2.0), torch.ones(centres)]).double()  # of places
    pairs = [
        (y, dense(exact)),
        (x.grad, exact.grad),
        (layer.packed_weight.grad, factors.to(device) * packed_grad),
        (layer.bias.grad, dense.bias.grad),
    ]
    for actual, truth in pairs:
        torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)
