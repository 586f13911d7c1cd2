"""PyTorch's own samples for conv1d, conv2d and conv3d, made square, forward and backward."""

import oracle
import pytest
import torch

import triton_tied as tt

pytest.importorskip("expecttest", reason="PyTorch's samples import it")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

DIMS = {"nn.functional.conv1d": 1, "nn.functional.conv2d": 2, "nn.functional.conv3d": 3}
OPERATORS = [op for op in op_db if op.name in DIMS and not op.variant_test_name]
NAMES = ("bias", "stride", "padding", "dilation", "groups")


@pytest.fixture(autouse=True)
def one_thread():
    """The samples are tiny: on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def square_samples(op, dtype):
    """Each sample with its weight made C x C/groups: (input, bias?, kernel size, options), and
    why the others were dropped."""
    used, dropped = [], []
    for sample in op.sample_inputs("cpu", dtype):
        weight, *rest = sample.args
        options = {**dict(zip(NAMES, rest, strict=False)), **sample.kwargs}
        has_bias = options.pop("bias", None) is not None
        kernel = tuple(weight.shape[2:])
        channels, groups = sample.input.shape[-len(kernel) - 1], options.get("groups", 1)
        if channels % groups or channels == 0:
            dropped.append(f"groups={groups} do not divide {channels} channels")
            continue
        used.append((sample.input.detach(), has_bias, kernel, options))
    return used, dropped


def run(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output))]


def test_all_three_operators_have_samples_of_every_kind():
    assert sorted(op.name for op in OPERATORS) == sorted(DIMS)
    for op in OPERATORS:
        used, dropped = square_samples(op, torch.float64)
        assert len(used) >= 8
        assert len(dropped) <= len(used) // 10, dropped
        assert {x.dim() - DIMS[op.name] for x, *_ in used} == {1, 2}  # without and with a batch
        assert {has_bias for _, has_bias, *_ in used} == {True, False}
        assert {"same", "valid"} <= {str(options.get("padding")) for *_, options in used}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
def test_samples_are_within_the_bound(op, dtype, symmetry):
    dims = DIMS[op.name]
    for x, has_bias, kernel, options in square_samples(op, dtype)[0]:
        channels, groups = x.shape[-dims - 1], options.get("groups", 1)
        layout = (channels, kernel, groups, symmetry)
        tensors = [x, torch.randn(tt.packed_size(*layout), dtype=dtype)]
        if has_bias:
            tensors.append(torch.randn(channels, dtype=dtype))

        def tied(x, packed, bias=None, kernel=kernel, options=options):
            function = getattr(tt, f"tied_conv{dims}d")
            return function(x, packed, bias, kernel_size=kernel, symmetry=symmetry, **options)

        convolution = oracle.Convolution(layout, options)
        grad = torch.randn_like(convolution(*tensors))
        expected = oracle.expect(convolution, tensors, grad)
        for actual, wanted in zip(run(tied, tensors, grad), expected, strict=True):
            assert actual.dtype == dtype
            oracle.assert_within_bound(actual, wanted)
