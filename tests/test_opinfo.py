"""PyTorch's own samples for conv1d, conv2d and conv3d, made square, forward and backward."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import triton_tied as tt

DIMS = {"nn.functional.conv1d": 1, "nn.functional.conv2d": 2, "nn.functional.conv3d": 3}
OPERATORS = [op for op in op_db if op.name in DIMS and not op.variant_test_name]
NAMES = ("bias", "stride", "padding", "dilation", "groups")


def square_samples(op, dtype):
    """(input, bias?, kernel size, options) of each sample, its weight made C x C/groups."""
    for sample in op.sample_inputs("cpu", dtype):
        weight, *rest = sample.args
        options = {**dict(zip(NAMES, rest, strict=False)), **sample.kwargs}
        has_bias = options.pop("bias", None) is not None
        yield sample.input.detach(), has_bias, tuple(weight.shape[2:]), options


def run(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output))]


def test_all_three_operators_have_samples():
    assert sorted(op.name for op in OPERATORS) == sorted(DIMS)
    for op in OPERATORS:
        assert len(list(square_samples(op, torch.float64))) >= 8


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
def test_samples_equal_the_reference(op, dtype, symmetry):
    dims = DIMS[op.name]
    for x, has_bias, kernel, options in square_samples(op, dtype):
        channels, groups = x.shape[-dims - 1], options.get("groups", 1)
        layout = (channels, kernel, groups, symmetry)
        tensors = [x, torch.randn(tt.packed_size(*layout), dtype=dtype)]
        if has_bias:
            tensors.append(torch.randn(channels, dtype=dtype))

        def dense(x, packed, bias=None, layout=layout, options=options):
            return getattr(F, f"conv{dims}d")(x, oracle.expand(packed, *layout), bias, **options)

        def tied(x, packed, bias=None, kernel=kernel, options=options):
            function = getattr(tt, f"tied_conv{dims}d")
            return function(x, packed, bias, kernel_size=kernel, symmetry=symmetry, **options)

        grad = torch.randn_like(dense(*tensors))
        truth = run(dense, [t.double() for t in tensors], grad)
        baseline, actual = run(dense, tensors, grad), run(tied, tensors, grad)
        for a, b, t in zip(actual, baseline, truth, strict=True):
            assert a.shape == t.shape and a.dtype == dtype
            oracle.assert_as_good_as(a, b, t, dtype)
