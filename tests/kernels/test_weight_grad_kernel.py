"""The packed weight gradient against autograd of float64 ``F.conv2d``."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    KERNEL_DTYPES,
    MEMORY,
    SAME,
    SYMMETRIES,
    configs,
    integers,
    launch_weight_grad,
    make_problem,
    memories,
    normal,
    packed_truth,
    pad,
    place,
    problems,
)

from triton_tied.kernels.configs import WeightGradConfig


def make_config(loader, box=(1, 8, 8), block=16, splits=1, **options):
    return WeightGradConfig(box, block, block, splits, loader=loader, **options)


@st.composite
def cases(draw, loader):
    problem = draw(problems(loader))
    return {
        "problem": problem,
        "config": draw(configs(problem, loader, WeightGradConfig)),
        "dtype": draw(st.sampled_from(KERNEL_DTYPES)),
        "memory": draw(memories(loader)),
        "grad_memory": draw(memories(loader)),
        "alpha": draw(st.sampled_from([1.0, -0.5, 4.0])),
        "written_as": draw(st.sampled_from(KERNEL_DTYPES)),
        "has_bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=30)
@given(data=st.data())
def test_integers_give_the_truth_to_the_last_bit(any_loader, device, data):
    case = data.draw(cases(any_loader))
    problem, dtype, seed = case["problem"], case["dtype"], case["seed"]
    x = place(integers(problem.shape, dtype, device, seed), case["memory"])
    grad = place(integers(problem.out_shape, dtype, device, seed + 1), case["grad_memory"])
    written_as, has_bias = case["written_as"], case["has_bias"]
    actual = launch_weight_grad(
        x, grad, problem, case["config"], case["alpha"], written_as, has_bias
    )
    truth = packed_truth(x, grad, problem)
    if has_bias:
        truth = torch.cat([truth, grad.double().sum((0, 2, 3))])
    assert actual.dtype == written_as
    assert torch.equal(actual, (case["alpha"] * truth).to(written_as))


@pytest.mark.parametrize("block, splits, memory", [(16, 3, "gapped"), (64, 1, "channels_last")])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_gradients_that_half_cannot_hold_are_exact_in_float32(
    device, block, splits, memory, symmetry
):
    # groups of 17 channels and images of 3 x 5, which no block and no box divides
    problem = make_problem((3, 51, 3, 5), (2, 1), ((1, 0), (0, 0)), groups=3, symmetry=symmetry)
    x, grad = (integers(problem.shape, torch.float16, device, seed) for seed in (0, 1))
    grad += 1000
    truth = 3 * torch.cat([packed_truth(x, grad, problem), grad.double().sum((0, 2, 3))])
    assert truth[-51:].min() > torch.finfo(torch.float16).max
    x, grad = (place(tensor, memory) for tensor in (x, grad))
    config = make_config("pointer", (1, 2, 8), block, splits)
    both = launch_weight_grad(x, grad, problem, config, 3.0, torch.float32, has_bias=True)
    assert torch.equal(both.double(), truth)


@pytest.mark.parametrize(
    "groups, channels, blocks, splits",
    [(2, 16, (16, 16), 2), (1, 24, (16, 32), 1), (1, 24, (32, 16), 3), (3, 32, (32, 16), 1)],
)
def test_gradient_of_the_bias_by_all_loaders(any_loader, device, groups, channels, blocks, splits):
    # the second tap reads rows from 16 bytes on
    shape, padding = (2, groups * channels, 3, 8), ((0, 0), (0, 8))
    problem = make_problem(shape, (1, 2), padding, dilation=(1, 8), groups=groups)
    x = place(integers(problem.shape, torch.float16, device), MEMORY[any_loader])
    grad = place(integers(problem.out_shape, torch.float16, device, 1), MEMORY[any_loader])
    config = WeightGradConfig((1, 2, 8), *blocks, splits, loader=any_loader)
    both = launch_weight_grad(x, grad, problem, config, -2.0, has_bias=True)
    packed, bias = both.split([problem.layout.size, groups * channels])
    assert torch.equal(packed.double(), -2 * packed_truth(x, grad, problem))
    assert torch.equal(bias.double(), -2 * grad.double().sum((0, 2, 3)))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_weight_without_numbers_has_a_bias_gradient_alone(device, splits):
    # the centre of one antisymmetric channel is zero
    problem = make_problem((2, 3, 2, 4), (1, 1), groups=3, symmetry="skew_adjoint")
    assert problem.layout.size == 0
    x, grad = (integers(problem.shape, torch.float16, device, seed) for seed in (0, 1))
    config = make_config("pointer", (1, 2, 4), splits=splits)
    assert launch_weight_grad(x, grad, problem, config).shape == (0,)
    bias = launch_weight_grad(x, grad, problem, config, has_bias=True)
    assert torch.equal(bias.double(), grad.double().sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("block, splits", [(64, 1), (32, 3)])
def test_error_is_within_the_bound(loader, device, dtype, symmetry, block, splits):
    problem = make_problem((4, 40, 8, 8), (3, 3), SAME, symmetry=symmetry)
    x, grad = (place(normal(problem.shape, dtype, device), MEMORY[loader]) for _ in range(2))
    config = make_config(loader, (1, 8, 8), block, splits)
    actual = launch_weight_grad(x, grad, problem, config)
    convolution = oracle.Convolution((40, (3, 3), 1, symmetry), {"padding": 1})
    packed = torch.zeros(problem.layout.size, dtype=dtype, device=device)
    _, _, expected = oracle.expect(convolution, [x, packed], grad, reference=False)
    oracle.assert_within_bound(actual, expected)


@pytest.mark.parametrize("poisoned", ["x", "grad"])
@pytest.mark.parametrize("spot", [(1, 17, 0, 0), (0, 2, 2, 5)], ids=["corner", "middle"])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_not_a_number_reaches_only_the_taps_that_see_it(loader, device, poisoned, spot, symmetry):
    # no padding: a corner of x is seen by one tap; boxes reach beyond the rows; two groups
    problem = make_problem((2, 32, 7, 10), (3, 3), groups=2, symmetry=symmetry)
    x = integers(problem.shape, torch.float32, device)
    grad = integers(problem.out_shape, torch.float32, device, 1)
    target = x if poisoned == "x" else grad
    target[spot] = 0
    truth = packed_truth(x, grad, problem)
    target[spot] = math.nan
    truth[sees_nan(x, grad, problem)] = math.nan
    x, grad = (place(t, MEMORY[loader]) for t in (x, grad))
    actual = launch_weight_grad(x, grad, problem, make_config(loader))
    assert truth.isfinite().any() and not truth.isfinite().all()
    torch.testing.assert_close(actual.double(), truth, rtol=0, atol=0, equal_nan=True)


def sees_nan(x, grad, problem):
    """Which packed numbers have a place in the dense weight whose gradient is NaN."""
    layout = problem.layout
    packed = torch.zeros(layout.size, dtype=torch.float64, device=x.device, requires_grad=True)
    args = layout.channels, layout.kernel_size, layout.groups, layout.symmetry
    weight = oracle.expand(packed, *args)
    dense = weight.detach().requires_grad_()
    y = F.conv2d(pad(x.double(), problem.geometry.padding), dense, groups=layout.groups)
    (dense_grad,) = torch.autograd.grad(y, dense, grad.double())
    # random, so that no two places of a number cancel
    hit = dense_grad.isnan() * torch.rand_like(dense_grad)
    return torch.autograd.grad(weight, packed, hit)[0] != 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_pixels_beyond_the_output_add_nothing(loader, device, value, symmetry):
    # cropped: the last 8 columns and 4 rows of x are read by dead pixels of a box alone
    problem = make_problem((1, 16, 9, 24), (2, 2), ((0, -4), (1, -8)), symmetry=symmetry)
    assert problem.out_shape == (1, 16, 4, 16)
    x = integers(problem.shape, torch.float32, device)
    grad = integers(problem.out_shape, torch.float32, device, 1)
    truth = packed_truth(x, grad, problem)
    x[:, :, 5:] = value
    x[..., 16:] = value
    x, grad = (place(t, MEMORY[loader]) for t in (x, grad))
    actual = launch_weight_grad(x, grad, problem, make_config(loader, (1, 8, 16)))
    assert torch.equal(actual.double(), truth)


@pytest.mark.parametrize("splits", [1, 3])
def test_two_launches_give_the_same_bits(loader, device, splits):
    problem = make_problem((2, 16, 16, 8), (3, 3), SAME)
    x, grad = (
        place(normal(problem.shape, torch.float32, device), MEMORY[loader]) for _ in range(2)
    )
    config = make_config(loader, (1, 4, 8), splits=splits)
    first, second = (launch_weight_grad(x, grad, problem, config) for _ in range(2))
    assert torch.equal(first, second)


def test_splits_are_added_in_float32(device):
    # one product a pixel, boxes of 16: the first split sums to 4097, which float16 would round
    problem = make_problem((1, 1, 4, 8), (1, 1))
    x = torch.ones(problem.shape, dtype=torch.float16, device=device)
    grad = torch.full_like(x, 256)
    grad[..., 0, 0] = 257
    grad[..., 4:] = -256
    actual = launch_weight_grad(x, grad, problem, make_config("pointer", (1, 4, 4), splits=2))
    assert actual.item() == 1
