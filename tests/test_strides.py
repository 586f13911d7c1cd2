"""Images and output gradients in memory of any strides, those of axes of size 1 included."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_tied as tt
from triton_tied import dispatch

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d, 3: tt.tied_conv3d}
# The kernels have no float64. The interpreter takes its time.
DTYPE = torch.float32 if dispatch.INTERPRETED else torch.float64
MAX_SIDE = 3 if dispatch.INTERPRETED else 5


@st.composite
def strided(draw, shape):
    """Random numbers in memory with its axes in any order, and any stride where an axis is 1."""
    channels_last = (0, *range(2, len(shape)), 1)
    order = draw(st.one_of(st.just(channels_last), st.permutations(range(len(shape)))))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step if shape[axis] > 1 else draw(st.integers(1, 100))
        step *= shape[axis]
    size = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    return torch.randn(size, dtype=DTYPE).as_strided(shape, strides)


@st.composite
def problems(draw):
    """An image, an output gradient of its size, and the groups."""
    dims, groups = draw(st.sampled_from([2, 2, 1, 3])), draw(st.sampled_from([2, 3, 1]))
    sides = [draw(st.integers(1, MAX_SIDE)) for _ in range(dims)]
    shape = [draw(st.integers(1, 2)), groups * draw(st.integers(1, 3)), *sides]
    return draw(strided(shape)), draw(strided(shape)), groups


def gradients(function, x, packed, grad):
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, packed)]
    leaves[0] = x.detach()  # a clone would change the strides of axes of size 1
    y = function(*[leaf.requires_grad_() for leaf in leaves])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_right(x, grad, groups, symmetry="self_adjoint"):
    dims, channels = x.dim() - 2, x.shape[1]
    layout = (channels, (3,) * dims, groups, symmetry)
    packed = torch.randn(tt.packed_size(*layout), dtype=DTYPE)
    options = {"padding": 1, "groups": groups}

    def dense(x, packed):
        return CONVOLUTIONS[dims](x, oracle.expand(packed, *layout), **options)

    def tied(x, packed):
        return TIED[dims](x, packed, kernel_size=3, symmetry=symmetry, **options)

    plain = [t.double().clone(memory_format=torch.contiguous_format) for t in (x, packed, grad)]
    expected = gradients(dense, *plain)
    for actual, truth in zip(gradients(tied, x, packed, grad), expected, strict=True):
        # at most 250 products in a sum: a few roundings
        torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)


@settings(max_examples=10 if dispatch.INTERPRETED else 300)
@given(problems())
def test_any_strides_of_the_image_and_of_its_output_gradient(problem):
    assert_right(*problem)


def test_contiguous_memory_whose_strides_look_like_channels_last():
    """``F.conv1d`` raises for it: "grad_weight must be contiguous"."""
    x = torch.randn(4, dtype=DTYPE).as_strided((1, 4, 1), (2, 1, 2))
    assert_right(x, torch.randn(1, 4, 1, dtype=DTYPE), groups=2)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
def test_image_of_rows_of_pixels_as_a_batch_of_one(groups, symmetry):
    """(H, W, C) memory, as image libraries have it."""
    image, grad = torch.randn(2, 5, 4, 12, dtype=DTYPE).permute(0, 3, 1, 2)
    assert_right(image[None], grad[None], groups, symmetry)
    assert_right(image[None], grad[None].contiguous(), groups, symmetry)
    layer = tt.TiedConv2d(12, 3, padding=1, groups=groups, dtype=DTYPE)
    dense = layer.to_conv()
    assert layer(image[None]).stride() == dense(image[None]).stride()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_vmap_over_any_axis_of_any_memory(dims, channels_last):
    packed = torch.randn(tt.packed_size(4, (3,) * dims, 2), dtype=DTYPE)
    weight = oracle.expand(packed, 4, (3,) * dims, 2, "self_adjoint")
    images = torch.randn(3, 2, 4, *[4] * dims, dtype=DTYPE)
    if channels_last:
        images = images.movedim(2, -1).contiguous().movedim(-1, 2)
    truth = torch.stack([CONVOLUTIONS[dims](x, weight, padding=1, groups=2) for x in images])
    for in_dim in range(dims + 3):
        for batch in (images.movedim(0, in_dim), images.movedim(0, in_dim).contiguous()):
            actual = torch.vmap(
                lambda x: TIED[dims](x, packed, kernel_size=3, padding=1, groups=2), in_dim
            )(batch)
            torch.testing.assert_close(actual, truth)
    turned = torch.vmap(lambda x: TIED[dims](x.mT, packed, kernel_size=3, padding=1, groups=2))
    if dims > 1:
        expected = [CONVOLUTIONS[dims](x.mT, weight, padding=1, groups=2) for x in images[..., ::2]]
        torch.testing.assert_close(turned(images[..., ::2]), torch.stack(expected))
