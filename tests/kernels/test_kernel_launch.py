"""What a launch does around the kernels: memory it allocates, configs it refuses, the centre."""

from dataclasses import replace

import oracle
import pytest
import torch
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
    place,
)

from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels import launch
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.precision import input_precision
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
def test_every_allocated_number_is_written(device, allocations, symmetry, shape, groups, splits):
    problem = make_problem(shape, (3, 3), SAME, groups=groups, symmetry=symmetry)
    x, grad = (integers(shape, torch.float32, device, seed) for seed in (0, 1))
    packed = integers((problem.layout.size,), torch.float32, device)
    launch_conv(x, packed, problem, ConvConfig((2, 4, 8), 16, 16), unpacked=True)
    launch_weight_grad(x, grad, problem, WeightGradConfig((2, 4, 8), 16, 16, splits))
    shapes = [tuple(memory.shape) for memory in allocations]
    centre = (groups, shape[1] // groups, shape[1] // groups)
    assert shapes == [centre, shape, (splits, problem.layout.size)]
    assert not any(memory.isnan().any() for memory in allocations)


def test_more_splits_than_boxes_are_not_made(device, allocations):
    problem = make_problem((1, 3, 4, 8), (3, 3), SAME)
    x = integers(problem.shape, torch.float32, device)
    launch_weight_grad(x, x, problem, WeightGradConfig((1, 4, 4), 16, 16, splits=7))
    assert allocations[0].shape == (2, problem.layout.size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "memory, shape, options, reason",
    [
        ("gapped", (1, 16, 4, 8), {}, "contiguous in neither memory format"),
        ("unaligned", (1, 16, 4, 8), {}, "pixels are not aligned to 16 bytes"),
        ("channels_last", (1, 17, 4, 8), {}, "pixels are not aligned to 16 bytes"),
        ("contiguous", (1, 16, 4, 7), {}, "rows are not aligned to 16 bytes"),
        ("contiguous", (1, 16, 4, 8), {"box": (1, 4, 4)}, "row of 4 pixels is less than 16 bytes"),
        ("contiguous", (2, 16, 4, 8), {"box": (2, 4, 4)}, "box of 2 images needs channels-last"),
        ("channels_last", (1, 48, 4, 8), {"groups": 2}, "beyond the 24 of a group"),
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
    assert reason in launch.why_unreadable(problem.layout, config, x)
    with pytest.raises(ValueError, match=reason):
        apply(config, x, x, problem)


@pytest.mark.parametrize(
    "memory, grad_memory, out_width, reason",
    [
        ("channels_last", "contiguous", 8, "contiguous in neither memory format"),
        ("contiguous", "channels_last", 8, "contiguous in neither memory format"),
        ("channels_last", "gapped", 8, "contiguous in neither memory format"),
        ("gapped", "channels_last", 8, "contiguous in neither memory format"),
        ("channels_last", "unaligned", 8, "pixels are not aligned to 16 bytes"),
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


def test_a_descriptor_serves_equal_blocks_only(device):
    problem = make_problem((1, 32, 4, 8), (3, 3), SAME)
    x = place(integers(problem.shape, torch.float16, device), "channels_last")
    config = WeightGradConfig((1, 4, 4), 16, 32, loader="channels_last_descriptor")
    with pytest.raises(ValueError, match="BLOCK_N must equal BLOCK_K"):
        launch_weight_grad(x, x, problem, config)


def test_an_empty_batch_launches_nothing(device, monkeypatch):
    problem = make_problem((0, 4, 6, 5), (3, 3), ((0, 1), (2, 0)))
    for kernel in ("conv_kernel", "weight_grad_kernel"):
        monkeypatch.setattr(launch, kernel, None)
    x, grad = (torch.ones(s, device=device) for s in (problem.shape, problem.out_shape))
    y = apply(ConvConfig((1, 4, 4), 16, 16), x, grad, problem)
    assert y.shape == (0, 4, 5, 5)
    packed_grad = apply(WeightGradConfig((1, 4, 4), 16, 16), x, grad, problem)
    assert torch.equal(packed_grad, torch.zeros(problem.layout.size, device=device))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, groups", [(1, 1), (3, 3), (10, 2), (64, 1), (130, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_centre_is_that_of_the_dense_weight(device, symmetry, channels, groups, kernel, dtype):
    layout = Layout(channels, kernel, groups, symmetry)
    packed = normal((layout.size,), torch.float32, device)
    centre = launch.unpack_centre(packed, layout, dtype)
    weight = oracle.expand(packed, channels, kernel, groups, symmetry)
    expected = weight[:, :, 0, kernel[1] // 2].view(groups, *[channels // groups] * 2)
    assert torch.equal(centre, expected.to(dtype))


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
