"""Columns of pixels that are taken as the channels of one: the same convolution, and the same
packed gradient, as of the pixels as they lie."""

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
    integers,
    launch_conv,
    launch_weight_grad,
    make_problem,
    normal,
    packed_truth,
    place,
)

from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.merging import merge, why_unmergeable

KERNELS = [(1, 1), (3, 3), (2, 2), (1, 7), (5, 1), (2, 3), (1, 4)]


@st.composite
def mergeable(draw):
    """A problem of few channels and how many of its columns to merge: paddings of any sign that
    leave opposite taps opposite."""
    merged = draw(st.sampled_from([2, 4, 8]))
    channels = draw(st.sampled_from([c for c in (1, 2, 3, 8, 13, 16) if c * merged <= 64]))
    kernel, dilation = draw(st.sampled_from(KERNELS)), (draw(st.integers(1, 2)),) * 2
    columns, out_columns = (merged * draw(st.integers(1, 3)) for _ in range(2))
    window = dilation[1] * (kernel[1] - 1)
    paddings = [p for p in range(-2, window + 6) if (window - 2 * p) % merged == 0]
    assume(paddings)
    before = draw(st.sampled_from(paddings))
    padding = ((draw(st.integers(-1, 3)), 3), (before, out_columns + window - before - columns))
    rows = dilation[0] * (kernel[0] - 1) + draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 2)), channels, rows, columns)
    symmetry = draw(st.sampled_from(SYMMETRIES))
    problem = make_problem(shape, kernel, padding, dilation=dilation, symmetry=symmetry)
    return problem, merged


@settings(max_examples=12)
@given(drawn=mergeable(), data=st.data())
def test_integers_give_the_truth_to_the_last_bit(device, drawn, data):
    problem, merged = drawn
    dtype, written_as = (data.draw(st.sampled_from(KERNEL_DTYPES)) for _ in range(2))
    seed, splits = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))
    x = place(integers(problem.shape, dtype, device, seed), "channels_last")
    last = place(integers(problem.out_shape, dtype, device, seed + 1), "channels_last")
    packed = integers((problem.layout.size,), dtype, device, seed)
    bias = data.draw(st.sampled_from([None, integers((x.shape[1],), written_as, device, seed)]))
    stored = data.draw(st.sampled_from(["packed", "all"]))
    options = {"bias": bias, "residual": last, "alpha": -0.5, "beta": 2.0, "stored": stored}
    config = ConvConfig((2, 4, 8), 32, 16, splits=splits, merged=merged)
    y = launch_conv(x, packed, problem, config, **options)
    truth = convolve(x.double(), packed.double(), problem, None if bias is None else bias.double())
    assert torch.equal(y, (-0.5 * truth + 2 * last.double()).to(dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)

    config = WeightGradConfig((1, 4, 8), 16, 32, splits, merged=merged)
    found = launch_weight_grad(x, last, problem, config, -2.0, written_as, bias is not None)
    truth = packed_truth(x, last, problem)
    if bias is not None:
        truth = torch.cat([truth, last.double().sum((0, 2, 3))])
    assert found.dtype == written_as
    assert torch.equal(found, (-2 * truth).to(written_as))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("merged", [2, 4])
def test_the_error_is_within_the_bound(device, symmetry, merged):
    problem = make_problem((2, 8, 9, 16), (3, 3), SAME, symmetry=symmetry)
    x, grad = (place(normal(problem.shape, torch.float16, device), "channels_last") for _ in "xg")
    packed, bias = normal((problem.layout.size,), x.dtype, device), normal((8,), x.dtype, device)
    convolution = oracle.Convolution((8, (3, 3), 1, symmetry), {"padding": 1})
    expected, _, *gradients = oracle.expect(convolution, [x, packed, bias], grad, reference=False)
    config = ConvConfig((1, 4, 8), 32, 32, merged=merged)
    oracle.assert_within_bound(launch_conv(x, packed, problem, config, bias=bias), expected)
    config = WeightGradConfig((1, 4, 8), 32, 32, 3, merged=merged)
    found = launch_weight_grad(x, grad, problem, config, has_bias=True)
    both = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    oracle.assert_within_bound(found, oracle.Expected(*both))


@pytest.mark.parametrize("merged", [2, 4, 8])
def test_what_is_not_finite_spreads_no_further_than_the_docs_say(device, merged):
    problem = make_problem((1, 2, 3, 6 * merged), (3, 3), SAME)
    packed, spread = normal((problem.layout.size,), torch.float32, device), 0
    for column in range(2 * merged, 3 * merged):
        x = normal(problem.shape, torch.float32, device).to(memory_format=torch.channels_last)
        x[..., column] = float("inf")
        y = launch_conv(x, packed, problem, ConvConfig((1, 4, 8), 16, 16, merged=merged))
        found = (~y.isfinite()).nonzero()[:, 3].tolist()
        spread = max(spread, max(found) - column - 1, column - 1 - min(found))
        seen = [column - 1, column, column + 1]
        assert set(seen) <= set(found)
    assert spread == 2 * (merged - 1)


@settings(max_examples=15)
@given(drawn=mergeable())
def test_the_merged_weight_is_tied_and_of_the_same_map(drawn):
    """Written out as a matrix from all pixels to all pixels of a few rows."""
    problem, merged = drawn
    layout, geometry = merge(problem.layout, problem.geometry, merged)
    n, c, h, w = problem.shape
    images = torch.eye(c * h * w, dtype=torch.float64).view(-1, h, w, c)
    packed = torch.randn(problem.layout.size, dtype=torch.float64)
    truth = convolve(images.permute(0, 3, 1, 2), packed, problem)
    merged_images = images.view(-1, h, w // merged, merged * c).permute(0, 3, 1, 2)
    # least squares over the free numbers of the merged weight
    of_merged = replace(problem, layout=layout, geometry=geometry, shape=tuple(merged_images.shape))
    rows, columns = truth.shape[2:]
    target = truth.permute(0, 2, 3, 1).reshape(-1, rows, columns // merged, merged * c)
    target = target.permute(0, 3, 1, 2)
    assume(0 < layout.size <= 200)
    units = torch.eye(layout.size, dtype=torch.float64)
    images_of_units = torch.stack([convolve(merged_images, unit, of_merged) for unit in units])
    system = images_of_units.flatten(1).T
    found = torch.linalg.lstsq(system, target.flatten(), driver="gelsd").solution
    torch.testing.assert_close(system @ found, target.flatten())


@pytest.mark.parametrize(
    "channels, groups, kernel, left, columns, merged, words",
    [
        (8, 1, 3, 1, 6, 4, "a multiple of 6 columns"),
        (32, 1, 3, 1, 8, 4, "would have 128 channels"),
        (16, 2, 3, 1, 8, 2, "2 groups"),
        (8, 1, 2, 0, 8, 2, "with left padding 0 opposite taps"),
        (8, 1, 5, 1, 8, 4, "with left padding 1 opposite taps"),
    ],
)
def test_what_cannot_be_merged(device, channels, groups, kernel, left, columns, merged, words):
    padding = ((0, 0), (left, kernel - 1 - left))
    problem = make_problem((1, channels, 4, columns), (1, kernel), padding, groups=groups)
    args = problem.layout, problem.geometry, columns, merged
    assert words in why_unmergeable(*args)
    x = normal(problem.shape, torch.float32, device).to(memory_format=torch.channels_last)
    packed = normal((problem.layout.size,), x.dtype, device)
    with pytest.raises(ValueError, match=words):
        launch_conv(x, packed, problem, ConvConfig((1, 4, 8), 16, 16, merged=merged))


def test_other_memory_is_refused(device):
    problem = make_problem((1, 8, 4, 8), (3, 3), SAME)
    x = normal(problem.shape, torch.float32, device)
    packed = normal((problem.layout.size,), x.dtype, device)
    config = ConvConfig((1, 4, 8), 16, 16, merged=2)
    with pytest.raises(ValueError, match="merged in channels-last memory"):
        launch_conv(x, packed, problem, config)
    x = x.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="merged in channels-last memory"):
        launch_conv(x, packed, problem, config, last=False)
