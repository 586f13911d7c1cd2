"""``tied_linear`` against ``F.linear`` with the dense matrix, written out."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
SHAPES = [(), (5,), (0,), (2, 3), (2, 1, 4)]


def draw(channels, groups, symmetry, shape=(5,), bias=True, dtype=torch.float64):
    """The input, packed and, if any, the bias."""
    size = tt.packed_size(channels, (1,), groups, symmetry)
    sizes = [(*shape, channels), (size,), (channels,)][: 2 + bias]
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def truth(input, packed, bias=None, *, groups, symmetry):
    channels = input.shape[-1]
    blocks = oracle.expand(packed, channels, (1,), groups, symmetry).squeeze(-1).chunk(groups)
    return F.linear(input, torch.block_diag(*blocks), bias)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_equal_with_gradients(tensors, **options):
    output, expected = tt.tied_linear(*tensors, **options), truth(*tensors, **options)
    close(output, expected)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, grad)
    for one, other in zip(found, torch.autograd.grad(expected, tensors, grad), strict=True):
        close(one, other)


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(SYMMETRIES),
    st.sampled_from(SHAPES),
    st.booleans(),
)
@settings(max_examples=40)
def test_it_is_a_linear_layer_with_the_dense_matrix(width, groups, symmetry, shape, bias):
    tensors = draw(width * groups, groups, symmetry, shape, bias)
    assert_equal_with_gradients(tensors, groups=groups, symmetry=symmetry)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_however_the_matrix_is_expanded(groups, symmetry, expansion):
    assert_equal_with_gradients(draw(14, groups, symmetry), groups=groups, symmetry=symmetry)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_matrix_too_large_for_a_table(symmetry):
    """In the sizes at which this happens; its blocks do not divide it."""
    tensors = draw(515, 1, symmetry, (2,), bias=False)
    output = tt.tied_linear(*tensors, symmetry=symmetry)
    row, column = torch.tril_indices(515, 515, 0 if symmetry == "self_adjoint" else -1)
    lower = torch.zeros(515, 515, dtype=torch.float64)
    lower[row, column] = tensors[1].detach()
    matrix = lower + oracle.SIGNS[symmetry] * lower.tril(-1).T
    close(output, tensors[0] @ matrix.T)
    grad = torch.randn_like(output)
    _, found = torch.autograd.grad(output, tensors, grad)
    dense = grad.T @ tensors[0].detach()
    both = dense + oracle.SIGNS[symmetry] * dense.T
    both.diagonal().copy_(dense.diagonal())
    close(found, both[row, column])


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_first_and_second_derivatives(groups, symmetry):
    tensors = draw(4, groups, symmetry)

    def function(*tensors):
        return tt.tied_linear(*tensors, groups=groups, symmetry=symmetry)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_other_dtypes_and_under_autocast(dtype, symmetry):
    tensors = draw(24, 1, symmetry, dtype=dtype)
    expected = truth(*[t.double() for t in tensors], groups=1, symmetry=symmetry)
    tolerance = 30 * torch.finfo(dtype).eps  # sums of 25 terms, of some size
    output = tt.tied_linear(*tensors, symmetry=symmetry)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.bfloat16:
        for groups in (1, 2):
            tensors = draw(24, groups, symmetry, dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                output = tt.tied_linear(*tensors, groups=groups, symmetry=symmetry)
            expected = truth(*[t.double() for t in tensors], groups=groups, symmetry=symmetry)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_matrix_that_is_made_once_serves_many_applications_and_backwards(symmetry):
    x, packed = draw(5, 1, symmetry, bias=False)
    expected = truth(
        truth(x, packed, groups=1, symmetry=symmetry), packed, groups=1, symmetry=symmetry
    )
    (gradient,) = torch.autograd.grad(expected.sum(), packed)
    prepared = tt.prepare(packed, 5, (1,), symmetry=symmetry)

    def twice(weight):
        output = tt.tied_linear(x, weight, symmetry=symmetry)
        return tt.tied_linear(output, weight, symmetry=symmetry)

    for _ in range(2):
        close(torch.autograd.grad(twice(prepared).sum(), packed)[0], gradient)
    with tt.cached():
        for _ in range(2):
            close(torch.autograd.grad(twice(packed).sum(), packed)[0], gradient)


def test_under_vmap_and_grad():
    x, packed, bias = (t.detach() for t in draw(4, 2, "skew_adjoint"))
    options = {"groups": 2, "symmetry": "skew_adjoint"}
    many = torch.randn(3, len(packed)).double()
    found = torch.vmap(lambda p: tt.tied_linear(x, p, bias, **options))(many)
    close(found, torch.stack([truth(x, p, bias, **options) for p in many]))
    gradient = torch.func.grad(lambda p: tt.tied_linear(x, p, bias, **options).sin().sum())(packed)
    leaf = packed.clone().requires_grad_()
    truth(x, leaf, bias, **options).sin().sum().backward()
    close(gradient, leaf.grad)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_matrix_that_is_gathered_at_once(symmetry):
    """It is the transpose to the bit, with a diagonal of zeros beside infinite numbers, too; and it
    has a gradient where it first was made without."""
    packed = torch.randn(tt.packed_size(7, (1,), symmetry=symmetry))
    packed[::5] = math.inf
    layout = tt.packing.Layout(7, (1,), 1, symmetry)
    tt.packing._matrix_tables.cache_clear()
    with torch.inference_mode():
        tt.packing.transposed_matrix(packed, layout)
    leaf = packed.clone().requires_grad_()
    matrix = tt.packing.transposed_matrix(leaf, layout)
    row, column = torch.tril_indices(7, 7, 0 if symmetry == "self_adjoint" else -1)
    expected = torch.zeros(7, 7)
    expected[row, column] = oracle.SIGNS[symmetry] * packed
    expected[column, row] = packed
    assert torch.equal(matrix, expected)
    grad = torch.randn(7, 7)
    dense = grad.T + oracle.SIGNS[symmetry] * grad
    dense.diagonal().copy_(grad.diagonal())
    close(torch.autograd.grad(matrix, leaf, grad)[0], dense[row, column])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_calls_like_one_that_passed_are_checked_all_the_same():
    x, packed, bias = (t.detach() for t in draw(6, 1, "self_adjoint"))
    for _ in range(2):
        tt.tied_linear(x, packed, bias)
    wrong = [
        ((x, packed[1:], bias), {}, RuntimeError, "21 elements"),
        ((x, packed, bias[1:]), {}, RuntimeError, "6 elements"),
        ((x, packed, bias.float()), {}, RuntimeError, "bias type"),
        ((x, packed, bias), {"groups": True}, TypeError, "groups"),
        ((x, packed, bias), {"groups": 1.0}, TypeError, "groups"),
        ((x, packed, bias), {"symmetry": ["self_adjoint"]}, ValueError, "symmetry"),
        ((x.to_sparse(), packed, bias), {}, NotImplementedError, "sparse"),
        ((torch.nested.nested_tensor([x]), packed, bias), {}, NotImplementedError, "nested"),
    ]
    for tensors, options, error, message in wrong:
        with pytest.raises(error, match=message):
            tt.tied_linear(*tensors, **options)
