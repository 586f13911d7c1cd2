"""The convolution kernel, forward and as input gradient, against float64 ``F.conv2d``."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    KERNEL_DTYPES,
    MEMORY,
    SAME,
    SYMMETRIES,
    configs,
    convolve,
    differentiate,
    embed,
    integers,
    launch_conv,
    make_problem,
    memories,
    normal,
    place,
    problems,
)

from triton_tied.kernels.configs import ConvConfig

ROLES = ["pixels_first", "weights_first"]
STORED = ["packed", "half", "all"]


def make_config(loader, box=(1, 8, 8), block_n=16, block_k=16, **options):
    return ConvConfig(box, block_n, block_k, loader=loader, **options)


@st.composite
def cases(draw, loader):
    problem = draw(problems(loader))
    return {
        "problem": problem,
        "config": draw(configs(problem, loader, ConvConfig)),
        "dtype": draw(st.sampled_from(KERNEL_DTYPES)),
        "memory": draw(memories(loader)),
        "bias": draw(st.booleans()),
        "residual": draw(st.none() | memories("pointer")),
        "alpha": draw(st.sampled_from([1.0, -0.5, 4.0, 0.0])),
        "beta": draw(st.sampled_from([1.0, -2.0, 0.5, 0.0])),
        "stored": draw(st.sampled_from(STORED)),
        "last": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def draw_tensors(case, device):
    """x, packed, bias and residual of small integers, each amid NaN."""
    problem, seed, dtype = case["problem"], case["seed"], case["dtype"]
    channels = problem.layout.channels
    x = place(integers(problem.shape, dtype, device, seed), case["memory"])
    packed = integers((problem.layout.size,), dtype, device, seed)
    unaligned = seed % 2 and case["config"].loader == "pointer"
    packed = embed(packed, offset=64 - unaligned)
    bias = residual = None
    if case["bias"]:
        bias = embed(integers((channels,), dtype, device, seed + 1), offset=1)
    if case["residual"]:
        residual = integers(problem.out_shape, dtype, device, seed + 1)
        residual = place(residual, case["residual"])
    return x, packed, bias, residual


@settings(max_examples=30)
@given(data=st.data())
def test_integers_give_the_truth_to_the_last_bit(any_loader, device, data):
    case = data.draw(cases(any_loader))
    problem, options = case["problem"], {k: case[k] for k in ("alpha", "beta", "stored", "last")}
    x, packed, bias, residual = draw_tensors(case, device)
    y = launch_conv(x, packed, problem, case["config"], bias=bias, residual=residual, **options)
    truth = convolve(x.double(), packed.double(), problem, None if bias is None else bias.double())
    truth = case["alpha"] * truth + (0 if residual is None else case["beta"] * residual.double())
    assert y.dtype == case["dtype"]
    assert torch.equal(y, truth.to(y.dtype))


@settings(max_examples=20)
@given(data=st.data())
def test_input_gradient_is_the_transposed_problem_times_the_sign(any_loader, device, data):
    case = data.draw(cases(any_loader))
    grad, packed, _, _ = draw_tensors(case, device)
    options = {k: case[k] for k in ("stored", "last")}
    sign = case["problem"].layout.sign
    dx = launch_conv(grad, packed, case["problem"], case["config"], alpha=float(sign), **options)
    forward = case["problem"].transposed
    x = torch.zeros(forward.shape, dtype=torch.float64, device=device)
    truth, _ = differentiate(x, packed.double(), grad.double(), forward)
    assert torch.equal(dx, truth.to(dx.dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize(
    "options",
    [
        {"roles": "pixels_first", "block_n": 64, "block_k": 64},
        {"roles": "weights_first", "block_n": 32, "block_k": 16, "splits": 2},
    ],
    ids=["one_tile", "many_tiles"],
)
def test_error_is_within_the_bound(loader, device, dtype, symmetry, options):
    problem = make_problem((2, 40, 8, 8), (3, 3), SAME, symmetry=symmetry)
    x = place(normal(problem.shape, dtype, device), MEMORY[loader])
    packed, bias = (normal((size,), dtype, device) for size in (problem.layout.size, 40))
    residual = normal(problem.out_shape, dtype, device)
    y = launch_conv(
        x, packed, problem, make_config(loader, **options), bias=bias, residual=residual, alpha=0.7
    )
    convolution = oracle.Convolution((40, (3, 3), 1, symmetry), {"padding": 1}, alpha=0.7)
    expected = oracle.expect(convolution, [x, packed, bias, residual], reference=False)
    oracle.assert_within_bound(y, *expected)


# Of a kernel and 40 channels, three blocks of 16, the most splits: the steps of the shorter loop.
SPLITS = [
    ((3, 3), "packed", 12),  # 4 stored taps, and their 4 opposites
    ((3, 3), "half", 12),  # 5 stored, 4 opposites
    ((3, 3), "all", 27),
    ((2, 3), "packed", 9),
    ((2, 3), "all", 18),
    ((1, 1), "packed", 1),  # the centre is summed by the first split alone
    ((1, 1), "half", 3),
]


@pytest.mark.parametrize("kernel, stored, most", SPLITS)
@pytest.mark.parametrize("splits", [5, 64])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_splits_share_steps_that_they_do_not_divide(
    device, allocations, kernel, stored, most, splits, symmetry
):
    padding = tuple(((k - 1) // 2, k // 2) for k in kernel)
    problem = make_problem((1, 40, 3, 4), kernel, padding, symmetry=symmetry)
    x, packed, bias, residual = (
        integers(shape, torch.float16, device, seed)
        for seed, shape in enumerate((problem.shape, (problem.layout.size,), (40,), problem.shape))
    )
    config = make_config("pointer", (1, 4, 4), 64, 16, splits=splits)
    y = launch_conv(
        x, packed, problem, config,
        bias=bias, residual=residual, alpha=-0.5, beta=3.0, stored=stored, last=False,
    )  # fmt: skip
    truth = convolve(*(t.double() for t in (x, packed)), problem, bias.double())
    assert torch.equal(y, (-0.5 * truth + 3 * residual.double()).half())
    parts = [memory for memory in allocations if memory.dim() == 3]
    shapes = [(min(splits, most), 12, 40)] if most > 1 else []
    assert [tuple(part.shape) for part in parts] == shapes


def test_splits_are_added_in_float32(device):
    # the first block of 16 channels sums to 4097, which float16 would round, the other to -4096
    problem = make_problem((1, 32, 1, 1), (1, 1))
    x, packed = torch.zeros(problem.shape), torch.zeros(problem.layout.size)
    x[0, [0, 1, 16], 0, 0] = torch.tensor([4096.0, 1.0, -4096.0])
    packed[[0, 1, 136]] = 1  # the weight's first column: rows 0, 1 and 16 of the triangle
    x, packed = (tensor.to(device, torch.float16) for tensor in (x, packed))
    config = make_config("pointer", (1, 4, 4), splits=2)
    y = launch_conv(x, packed, problem, config, stored="half")
    assert y[0, 0].item() == 1


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_bias_and_packed_may_be_wider_than_the_image(device, splits, symmetry):
    # as under autocast: the weight is read in the dtype of the image, the bias as it is
    problem = make_problem((1, 17, 3, 4), (3, 3), SAME, symmetry=symmetry)
    x = integers(problem.shape, torch.float16, device)
    whole = integers((problem.layout.size,), torch.float32, device)
    whole[whole == 0] = 1
    packed, bias = whole * (1 + 2.0**-13), integers((17,), torch.float32, device) * 2.0**-7 + 64
    assert torch.equal(packed.half().float(), whole) and not torch.equal(bias.half().float(), bias)
    config = make_config("pointer", (1, 4, 4), 32, 16, splits=splits)
    y = launch_conv(x, packed, problem, config, bias=bias, stored="half")
    truth = convolve(x.double(), whole.double(), problem, bias.double())
    assert y.dtype == torch.float16 and torch.equal(y, truth.half())
    assert not torch.equal(y, convolve(x, whole.half(), problem, bias.half()))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("roles", ROLES)
def test_one_hot_input_reads_out_single_taps(loader, device, symmetry, roles):
    c, kernel = 16, (3, 3)
    problem = make_problem((c, c, 3, 8), kernel, SAME, symmetry=symmetry)
    x = torch.zeros(problem.shape, device=device)
    x[range(c), range(c), 1, 1] = 1
    packed = normal((problem.layout.size,), torch.float32, device)
    config = make_config(loader, (4, 4, 8), roles=roles)
    y = launch_conv(place(x, MEMORY[loader]), packed, problem, config)
    weight = oracle.expand(packed, c, kernel, 1, symmetry)
    assert torch.equal(y[..., :3].transpose(0, 1).flip(2, 3), weight)
    assert not y[..., 3:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("spot", [(0, 17, 0, 0), (0, 2, 4, 5)], ids=["corner", "middle"])
def test_not_a_number_reaches_only_what_sees_it(loader, device, value, roles, symmetry, spot):
    # boxes beyond the 7 rows, two groups: neither another row nor the other group may see it
    problem = make_problem((1, 32, 7, 8), (3, 3), SAME, groups=2, symmetry=symmetry)
    x = integers(problem.shape, torch.float32, device)
    x[spot] = value
    x = place(x, MEMORY[loader])
    packed = integers((problem.layout.size,), torch.float32, device)
    y = launch_conv(x, packed, problem, make_config(loader, roles=roles))
    truth = convolve(x.double(), packed.double(), problem)
    assert truth.isfinite().any() and not truth.isfinite().all()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_map_is_its_own_transpose_up_to_the_sign(loader, device, symmetry, dilation):
    problem = make_problem(
        (1, 32, 6, 8), (3, 5), ((dilation[0],) * 2, (2, 2)),
        dilation=dilation, groups=2, symmetry=symmetry,
    )  # fmt: skip
    packed = integers((problem.layout.size,), torch.float32, device)
    u, v = (integers(problem.shape, torch.float32, device, seed) for seed in (1, 2))

    def apply(x):
        y = launch_conv(place(x, MEMORY[loader]), packed, problem, make_config(loader))
        return y.double()

    product = (apply(u) * v).sum()
    assert product != 0
    assert product == problem.layout.sign * (u * apply(v)).sum()


def test_two_launches_give_the_same_bits(loader, device):
    problem = make_problem((1, 40, 8, 8), (3, 3), SAME)
    x = place(normal(problem.shape, torch.float32, device), MEMORY[loader])
    packed = normal((problem.layout.size,), torch.float32, device)
    first, second = (launch_conv(x, packed, problem, make_config(loader)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("last", [True, False])
def test_output_lies_in_the_memory_format_asked_for(device, last):
    problem = make_problem((2, 3, 4, 5), (2, 2))
    x, packed = (
        integers(s, torch.float32, device) for s in (problem.shape, (problem.layout.size,))
    )
    y = launch_conv(x, packed, problem, make_config("pointer"), last=last)
    assert y.shape == (2, 3, 3, 4)
    assert y.is_contiguous(memory_format=torch.channels_last) == last
    assert y.is_contiguous() != last


def test_unaligned_memory_after_aligned_memory_gives_the_same(device):
    # Triton compiles apart for pointers that are multiples of 16 bytes
    problem = make_problem((1, 16, 4, 4), (3, 3), SAME)
    values = integers(problem.shape, torch.float16, device)
    packed = integers((problem.layout.size,), torch.float16, device)
    aligned, moved = (
        launch_conv(place(values, memory), packed, problem, make_config("pointer"))
        for memory in ("channels_last", "unaligned")
    )
    assert torch.equal(aligned, moved)
