"""What a launch does around the kernels: memory it allocates, configs it refuses, matrices."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from problems import (
    KERNEL_DTYPES,
    SAME,
    SYMMETRIES,
    convolve,
    embed,
    integers,
    launch_conv,
    launch_weight_grad,
    make_problem,
    normal,
    place,
)

from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels import launch
from triton_tied.kernels.configs import ClusteredConfig, ConvConfig, HaloConfig, WeightGradConfig
from triton_tied.kernels.precision import input_precision
from triton_tied.kernels.stored_taps import are_matrices, expand_matrices, stored_taps
from triton_tied.operators.definitions import read_weights
from triton_tied.packing import Layout

KERNELS = {
    "conv": ConvConfig((1, 4, 4), 16, 16, loader="channels_last_descriptor"),
    "weight_grad": WeightGradConfig((1, 4, 4), 16, 16, loader="channels_last_descriptor"),
}


def apply(config, x, grad, problem):
    """Launches the kernel that the config is for."""
    if isinstance(config, WeightGradConfig):
        return launch_weight_grad(x, grad, problem, config)
    packed = integers((problem.layout.size,), x.dtype, x.device)
    return launch_conv(x, packed, problem, config)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("shape, groups", [((3, 6, 5, 7), 2), ((1, 17, 9, 3), 1)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_allocated_number_is_written(
    device, allocations, symmetry, shape, groups, splits, has_bias
):
    problem = make_problem(shape, (3, 3), SAME, groups=groups, symmetry=symmetry)
    n, c, h, w = shape
    x, grad = (integers(shape, torch.float32, device, seed) for seed in (0, 1))
    packed = integers((problem.layout.size,), torch.float32, device)
    launch_conv(x, packed, problem, ConvConfig((2, 4, 8), 16, 16, splits=splits), stored="half")
    config = WeightGradConfig((2, 4, 8), 16, 16, splits)
    launch_weight_grad(x, grad, problem, config, has_bias=has_bias)
    size = problem.layout.size + c * has_bias
    parts = [(splits, n * h * w, c), (splits, 1, size)] if splits > 1 else []
    matrices = (groups, 5, c // groups, c // groups)
    shapes = [tuple(memory.shape) for memory in allocations]
    assert sorted(shapes, key=len) == sorted([matrices, shape, (size,), *parts], key=len)
    assert not any(memory.isnan().any() for memory in allocations)


def test_more_splits_than_boxes_are_not_made(device, allocations):
    problem = make_problem((1, 3, 4, 8), (3, 3), SAME)
    x = integers(problem.shape, torch.float32, device)
    launch_weight_grad(x, x, problem, WeightGradConfig((1, 4, 4), 16, 16, splits=7))
    assert [memory.shape for memory in allocations] == [
        (problem.layout.size,),
        (2, 1, problem.layout.size),
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "memory, shape, options, reason",
    [
        ("gapped", (1, 16, 4, 8), {}, "contiguous in neither memory format"),
        ("unaligned", (1, 16, 4, 8), {}, "its pixels, or the weight, are not aligned to 16 bytes"),
        (
            "channels_last",
            (1, 17, 4, 8),
            {},
            "its pixels, or the weight, are not aligned to 16 bytes",
        ),
        ("contiguous", (1, 16, 4, 7), {}, "its rows, or the weight, are not aligned to 16 bytes"),
        ("contiguous", (1, 16, 4, 8), {"box": (1, 4, 4)}, "row of 4 pixels is less than 16 bytes"),
        ("contiguous", (2, 16, 4, 8), {"box": (2, 4, 4)}, "box of 2 images needs channels-last"),
        ("channels_last", (1, 48, 4, 8), {"groups": 2}, "beyond the 24 of a group"),
        ("channels_last", (1, 24, 4, 8), {"groups": 2}, "a matrix of 12 channels are not aligned"),
        (
            "contiguous",
            (1, 12, 4, 8),
            {"box": (1, 2, 8)},
            "a matrix of 12 channels are not aligned",
        ),
        ("contiguous", (1, 16, 4, 8), {"box": (1, 2, 8)}, "start at columns that are not aligned"),
    ],
)
def test_a_descriptor_that_cannot_read_the_image_is_refused(
    device, kernel, memory, shape, options, reason
):
    problem = make_problem(shape, (3, 3), SAME, groups=options.get("groups", 1))
    config = KERNELS[kernel]
    planar = memory == "contiguous"
    config = replace(
        config,
        box=options.get("box", config.box),
        loader="planar_descriptor" if planar else "channels_last_descriptor",
    )
    x = place(integers(shape, torch.float16, device), memory)
    with pytest.raises(ValueError, match=reason):
        apply(config, x, x, problem)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype, unit", [(torch.float16, 8), (torch.float32, 4)], ids=str)
def test_rows_are_read_from_multiples_of_16_bytes_on(device, kernel, dtype, unit):
    """For all taps, of which columns of the kernel lie so far apart."""
    config = replace(KERNELS[kernel], box=(1, 2, 8), loader="planar_descriptor")
    shape = (1, 16, 4, 32)
    x = place(integers(shape, dtype, device), "contiguous")

    def is_read(columns, dilation, left):
        right = dilation * (columns - 1) - left
        geometry = ((1, 1), (left, right))
        problem = make_problem(shape, (3, columns), geometry, dilation=(1, dilation))
        try:
            apply(config, x, x, problem)
        except ValueError as error:
            assert "start at columns that are not aligned to 16 bytes" in str(error)
            return False
        return True

    for shift in range(1, unit):
        assert not is_read(1, 1, shift) and not is_read(2, shift, 0)
        assert not is_read(2, unit, shift - unit)
    assert is_read(1, 3, 0) and is_read(1, 1, -unit) and is_read(3, unit, unit)


@pytest.mark.parametrize(
    "memory, grad_memory, out_width, reason",
    [
        ("channels_last", "contiguous", 8, "contiguous in neither memory format"),
        ("contiguous", "channels_last", 8, "contiguous in neither memory format"),
        ("channels_last", "gapped", 8, "contiguous in neither memory format"),
        ("gapped", "channels_last", 8, "contiguous in neither memory format"),
        ("channels_last", "unaligned", 8, "its pixels, or the weight, are not aligned to 16 bytes"),
        ("contiguous", "channels_last", 1, "its memory is contiguous"),  # the former is both
    ],
)
def test_one_descriptor_has_to_read_both_images_of_a_weight_gradient(
    device, memory, grad_memory, out_width, reason
):
    height = 4 if out_width > 1 else 1
    problem = make_problem((1, 16, height, 8), (1, 1), ((0, 0), (0, out_width - 8)))
    x = place(integers(problem.shape, torch.float16, device), memory)
    grad = place(integers(problem.out_shape, torch.float16, device), grad_memory)
    with pytest.raises(ValueError, match=reason):
        launch_weight_grad(x, grad, problem, KERNELS["weight_grad"])


def test_a_descriptor_does_not_read_a_weight_that_is_not_aligned(device):
    problem = make_problem((1, 16, 4, 8), (3, 3), SAME)
    x = place(integers(problem.shape, torch.float16, device), "channels_last")
    packed = embed(integers((problem.layout.size,), torch.float16, device), offset=1)
    with pytest.raises(ValueError, match="the weight, are not aligned to 16 bytes"):
        launch_conv(x, packed, problem, KERNELS["conv"])


def test_an_empty_batch_launches_nothing(device, monkeypatch):
    problem = make_problem((0, 4, 6, 5), (3, 3), ((0, 1), (2, 0)))
    monkeypatch.setattr(launch._Call, "run", None)
    x, grad = (torch.ones(s, device=device) for s in (problem.shape, problem.out_shape))
    y = apply(ConvConfig((1, 4, 4), 16, 16), x, grad, problem)
    assert y.shape == (0, 4, 5, 5)
    packed_grad = apply(WeightGradConfig((1, 4, 4), 16, 16), x, grad, problem)
    assert torch.equal(packed_grad, torch.zeros(problem.layout.size, device=device))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, groups", [(1, 1), (3, 3), (10, 2), (64, 1), (130, 2)])
@pytest.mark.parametrize("kernel, stored", [((1, 1), 1), ((1, 3), 2), ((1, 3), 3), ((2, 2), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matrices_are_those_of_the_dense_weight(
    device, symmetry, channels, groups, kernel, stored, dtype
):
    layout = Layout(channels, kernel, groups, symmetry)
    packed = normal((layout.size,), torch.float32, device)
    weight = oracle.expand(packed, channels, kernel, groups, symmetry)
    c = channels // groups
    expected = weight.view(groups, c, c, layout.taps).movedim(-1, 1)[:, :stored].to(dtype)
    assert torch.equal(launch.unpack_matrices(packed, layout, stored, dtype, "ieee"), expected)
    assert torch.equal(expand_matrices(packed, layout, stored, dtype, "ieee"), expected)


def test_matrices_in_tf32_are_the_nearest(device):
    layout = Layout(3, (3, 3))
    packed = normal((layout.size,), torch.float32, device)
    packed[:4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    matrices = expand_matrices(packed, layout, 9, torch.float32, "tf32")
    weight = oracle.expand(packed, 3, (3, 3), 1, "self_adjoint").view(3, 3, 9).permute(2, 0, 1)
    assert torch.equal(matrices[0].isfinite(), weight.isfinite())
    special, numbers = ~weight.isfinite(), weight.isfinite()
    torch.testing.assert_close(matrices[0][special], weight[special], equal_nan=True)
    # 11 bits: the spacing below 2^e is 2^(e - 11), and the nearest is off by half of that at most
    found, given = matrices[0][numbers].double(), weight[numbers].double()
    spacing = 2.0 ** (torch.frexp(given).exponent - 11)
    assert torch.equal(torch.round(found / spacing), found / spacing)
    assert ((found - given).abs() <= spacing / 2).all()


@pytest.mark.parametrize(
    "channels, groups, kernel, precision, stored",
    [
        (64, 1, (3, 3), "ieee", 4),
        (127, 1, (3, 3), "ieee", 4),
        (128, 1, (3, 3), "ieee", 5),
        (256, 2, (3, 3), "ieee", 5),
        (256, 4, (3, 3), "ieee", 4),
        (128, 1, (2, 2), "ieee", 2),
        (128, 1, (1, 1), "ieee", 1),
        (64, 1, (1, 1), "ieee", 0),
        (3, 1, (3, 3), "tf32", 9),
        (64, 1, (2, 2), "tf32", 4),
    ],
)
def test_which_taps_are_read_as_matrices(channels, groups, kernel, precision, stored):
    layout = Layout(channels, kernel, groups, "self_adjoint")
    assert stored_taps(layout, precision) == stored
    assert are_matrices(layout, precision) == (precision == "tf32" or stored > layout.pairs)


def test_what_is_read_of_a_weight_that_needs_no_matrices_is_itself(device, allocations):
    layout = Layout(64, (3, 3))
    packed = normal((layout.size,), torch.float32, device)
    half = read_weights(packed, layout, torch.float16)
    assert torch.equal(half, packed.half()) and not allocations
    assert read_weights(half, layout, torch.float16) is half


@pytest.mark.skipif(torch.version.hip is not None, reason="tf32 is NVIDIA's")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_follow_the_setting_for_convolutions(convolution_precision, precision):
    convolution_precision.fp32_precision = precision
    assert input_precision(torch.float32) == precision
    assert input_precision(torch.float16) == "ieee"


@pytest.mark.skipif(torch.version.hip is not None, reason="tf32 is NVIDIA's")
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_products_follow_the_older_setting_too(allowed):
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        assert input_precision(torch.float32) == ("tf32" if allowed else "ieee")


@pytest.mark.skipif(
    INTERPRETED or torch.version.hip is not None, reason="only NVIDIA's GPUs multiply in tf32"
)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_have_the_bits_of_the_setting(device, convolution_precision, precision):
    convolution_precision.fp32_precision = precision
    problem = make_problem((2, 64, 8, 8), (3, 3), SAME)
    x, packed = (normal(s, torch.float32, device) for s in (problem.shape, (problem.layout.size,)))
    y = launch_conv(x, packed, problem, ConvConfig((1, 8, 8), 64, 32))
    error = oracle.relative_error(y, convolve(x.double(), packed.double(), problem))
    # 11 bits of tf32 are off by 2e-4 in a product, 24 of float32 by 3e-8; the sum adds to that
    assert (error > 1e-5) == (precision == "tf32")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_result_has_the_dtype_and_device_of_the_input(device, dtype, kernel):
    problem = make_problem((1, 8, 4, 4), (3, 3), SAME)
    x = place(integers(problem.shape, dtype, device), "channels_last")
    result = apply(KERNELS[kernel], x, x, problem)
    assert (result.dtype, result.device) == (x.dtype, x.device)


@pytest.mark.skipif(not INTERPRETED, reason="where it is compiled, Gluon runs")
@pytest.mark.parametrize(
    "c, config", [(16, HaloConfig((1, 8, 8), 16)), (128, ClusteredConfig((1, 8, 8), 128))]
)
def test_the_interpreter_refuses_a_kernel_in_gluon(c, config):
    problem = make_problem((1, c, 8, 8), (3, 3), SAME)
    x = place(integers((1, c, 8, 8), torch.float16, "cpu"), "channels_last")
    packed = integers((problem.layout.size,), torch.float16, "cpu")
    with pytest.raises(ValueError, match="interpreter does not run Gluon"):
        launch_conv(x, packed, problem, config)
