"""``tied_exp`` against the exponential of a matrix, and both its backwards against the series."""

import functools
import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import triton_tied as tt

SKEW = "skew_adjoint"
SYMMETRIES = ["self_adjoint", "skew_adjoint"]


def drawn_packed(layout, norm=1.0):
    """Of about this spectral norm."""
    channels, kernel_size, groups, symmetry = layout
    size = tt.packed_size(channels, kernel_size, groups, symmetry)
    entry = norm / math.sqrt(channels // groups * math.prod(kernel_size)) / 2
    return torch.randn(size, dtype=torch.float64) * entry


def dense_map(packed, layout, dilation=1, padding_mode="zeros"):
    """A, by PyTorch's convolution with the dense weight."""
    padding = [dilation * (k // 2) for k in layout[1]]
    convolution = oracle.Convolution(
        layout, {"padding": padding, "dilation": dilation}, padding_mode
    )
    return lambda x: convolution(x, packed)


def exponential(A, symmetry):
    """By the eigenvalues, which are real or imaginary. (``torch.matrix_exp`` is off by 1e-12.)"""
    factor = -1j if symmetry == SKEW else 1
    values, vectors = torch.linalg.eigh(A.to(torch.complex128) / factor)
    return ((vectors * torch.exp(factor * values)) @ vectors.mH).real


def series(function, x, terms):
    """x + A x + A A x / 2! + ..., as it stands in the textbook."""
    result = power = x
    for n in range(1, terms + 1):
        power = function(power)
        result = result + power / math.factorial(n)
    return result


@st.composite
def problems(draw):
    dims = draw(st.integers(1, 3))
    kernel_size = tuple(draw(st.sampled_from([1, 3])) for _ in range(dims))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 3))
    options = {
        "dilation": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
    }
    sides = [draw(st.integers(3, 5 if dims < 3 else 3)) for _ in range(dims)]
    layout = channels, kernel_size, groups, draw(st.sampled_from(SYMMETRIES))
    return layout, options, sides, draw(st.integers(1, 8)), draw(st.floats(0.1, 3.0))


@settings(max_examples=25)
@given(problems())
def test_it_is_the_exponential_up_to_the_bound(problem):
    layout, options, sides, terms, norm = problem
    channels, kernel_size, groups, symmetry = layout
    packed = drawn_packed(layout, norm)
    A = oracle.matrix_of(dense_map(packed, layout, **options), channels, *sides)
    x = torch.randn(2, channels, *sides, dtype=torch.float64)
    call = {"kernel_size": kernel_size, "groups": groups, "symmetry": symmetry, **options}
    found = tt.tied_exp(x, packed, terms=terms, **call).flatten(1)
    norm = torch.linalg.matrix_norm(A, 2)
    error = (found - x.flatten(1) @ exponential(A, symmetry).T).norm(dim=1) / x.flatten(1).norm(
        dim=1
    )
    assert error.max() <= tt.exp_error_bound(norm, terms, symmetry) + 1e-12 * math.exp(norm)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_both_backwards_are_those_of_the_series(symmetry, recompute):
    layout = 4, (3, 3), 2, symmetry
    packed = drawn_packed(layout).requires_grad_()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    expected = series(dense_map(packed, layout), x, 6)
    options = {"kernel_size": 3, "groups": 2, "symmetry": symmetry, "recompute": recompute}
    for weight in (packed, tt.prepare(packed, 4, 3, 2, symmetry)):
        found = tt.tied_exp(x, weight, terms=6, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        want = torch.autograd.grad(expected, (x, packed), upstream, retain_graph=True)
        got = torch.autograd.grad(found, (x, packed), upstream)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_backwards_have_a_derivative(recompute):
    packed = drawn_packed((2, (3, 3), 1, SKEW)).requires_grad_()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, packed):
        options = {"kernel_size": 3, "symmetry": SKEW, "terms": 4, "recompute": recompute}
        return tt.tied_exp(x, packed, **options)

    assert torch.autograd.gradgradcheck(function, (x, packed))


@pytest.mark.parametrize("recompute", [False, True])
def test_it_compiles_as_one_graph(recompute):
    packed = drawn_packed((2, (3, 3), 1, SKEW)).requires_grad_()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def gradients(function):
        options = {"kernel_size": 3, "symmetry": SKEW, "terms": 3, "recompute": recompute}
        loss = function(x, packed, **options).square().square().sum()
        return torch.autograd.grad(loss, (x, packed))

    torch._dynamo.reset()
    compiled = torch.compile(tt.tied_exp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(tt.tied_exp))
    with pytest.raises(Exception, match="torch.compile.*give terms"):
        compiled(x, packed, kernel_size=3, symmetry=SKEW)


@pytest.mark.parametrize("recompute", [False, True])
def test_transforms_of_functions(recompute):
    packed = drawn_packed((2, (3, 3), 1, SKEW))
    options = {"kernel_size": 3, "symmetry": SKEW, "terms": 5, "recompute": recompute}
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    J = torch.func.jacrev(lambda x: tt.tied_exp(x, packed, **options))(x).view(18, 18)
    expected = oracle.matrix_of(
        lambda x: series(dense_map(packed, (2, (3, 3), 1, SKEW)), x, 5), 2, 3, 3
    )
    torch.testing.assert_close(J, expected)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_term_is_one_convolution_and_one_addition_and_the_weight_is_made_once(recompute):
    packed = drawn_packed((4, (3, 3), 1, SKEW)).requires_grad_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    options = {"kernel_size": 3, "symmetry": SKEW, "terms": 7, "recompute": recompute}
    with Counter() as preparation:
        tt.prepare(packed, 4, 3, symmetry=SKEW)
    with Counter() as forward:
        y = tt.tied_exp(x, packed, **options)
    beyond = {name: n - preparation.calls.get(name, 0) for name, n in forward.calls.items()}
    assert {name: n for name, n in beyond.items() if n} == {"convolution": 7, "add": 7}
    with Counter() as backward:
        y.sum().backward()
    assert backward.calls["convolution_backward"] == 7
    assert backward.calls["index_add_"] == 1  # one gradient of the packed vector
    # The last addition needs not be computed again: nothing of it is kept.
    assert backward.calls.get("convolution", 0) in ((6, 7) if recompute else (0,))


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_the_backward(recompute):
    packed = drawn_packed((4, (3, 3), 1, SKEW)).requires_grad_()
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        if tensor.shape == x.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    options = {"kernel_size": 3, "symmetry": SKEW, "terms": 6, "recompute": recompute}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = tt.tied_exp(x, packed, **options)
    assert len(kept) == (1 if recompute else 6)
    assert y.requires_grad


def test_the_memory_format_stays_and_autocast_rules_the_type():
    packed = drawn_packed((4, (3, 3), 1, SKEW))
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    options = {"kernel_size": 3, "symmetry": SKEW, "terms": 5}
    y = tt.tied_exp(x, packed.float(), **options)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tt.tied_exp(x, packed.float(), **options)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), y, rtol=0.05, atol=0.05)


def test_in_a_cached_block_the_gradients_are_the_same():
    packed = drawn_packed((4, (3, 3), 1, SKEW)).requires_grad_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def gradient(recompute):
        y = x
        for _ in range(2):
            options = {"kernel_size": 3, "symmetry": SKEW, "terms": 5, "recompute": recompute}
            y = tt.tied_exp(y, packed, **options)
        return torch.autograd.grad(y.pow(4).sum(), packed)

    expected = gradient(False)
    with tt.cached():
        for recompute in (False, True, True):
            torch.testing.assert_close(gradient(recompute), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("terms", [1, 4, 9])
def test_the_bound_holds_and_is_no_larger_than_need_be(symmetry, terms):
    """One number: A = i norm or A = norm."""
    for norm in torch.rand(20).mul(terms + 2).tolist():
        number = complex(0, norm) if symmetry == SKEW else norm
        total = sum(number**n / math.factorial(n) for n in range(terms + 1))
        exact = math.e**number
        bound = tt.exp_error_bound(norm, terms, symmetry)
        assert abs(exact - total) <= bound * (1 + 1e-9) + 1e-13
        small = tt.exp_error_bound(norm / 100, terms, symmetry)
        power = (norm / 100) ** (terms + 1) / math.factorial(terms + 1)
        assert power <= small * (1 + 1e-12) and small <= 1.05 * power
    assert tt.exp_error_bound(0.0, terms, symmetry) == 0
    assert tt.exp_error_bound(torch.tensor(1e300, dtype=torch.float64), terms, symmetry) == math.inf


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_number_of_terms_is_the_least_that_is_enough(symmetry):
    for norm in torch.rand(20).mul(8).tolist():
        terms = tt.exp_terms(norm, 1e-5, symmetry)
        assert tt.exp_error_bound(norm, terms, symmetry) <= 1e-5
        assert terms == 1 or tt.exp_error_bound(norm, terms - 1, symmetry) > 1e-5


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("norm", [0.3, 2.0])
def test_terms_of_none_reach_the_tolerance(symmetry, norm):
    layout = 3, (3, 3), 1, symmetry
    packed = drawn_packed(layout, norm)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    A = oracle.matrix_of(dense_map(packed, layout), 3, 5, 5)
    exact = (exponential(A, symmetry) @ x.flatten()).view(x.shape)
    options = {"kernel_size": 3, "symmetry": symmetry}
    for tolerance in (1e-3, 1e-8, None):
        y = tt.tied_exp(x, packed, tolerance=tolerance, **options)
        assert (y - exact).norm() <= (tolerance or 1e-13) * x.norm() + 1e-13 * exact.norm()
    bound = tt.spectral_norm(packed.requires_grad_(), *layout)
    by_hand = tt.tied_exp(x, packed, terms=tt.exp_terms(bound, 1e-3, symmetry), **options)
    assert torch.equal(by_hand, tt.tied_exp(x, packed, tolerance=1e-3, **options))


PACKED = torch.zeros(tt.packed_size(4, 3, symmetry=SKEW))
IMAGE = torch.zeros(1, 4, 5, 5)
WRONG = [
    ({"terms": 0}, ValueError, "terms should be positive, got terms=0"),
    ({"terms": 2.5}, TypeError, "terms must be an int.*2.5"),
    ({"terms": "many"}, TypeError, "terms must be an int.*'many'"),
    ({"terms": 3, "tolerance": 1e-3}, ValueError, "terms or a tolerance.*terms=3.*0.001"),
    ({"tolerance": 0}, ValueError, "tolerance should be positive, got tolerance=0"),
    ({"tolerance": -1e-3}, ValueError, "tolerance must be finite and not negative.*-0.001"),
    ({"tolerance": "small"}, TypeError, "tolerance must be a number, but got 'small'"),
    ({"tolerance": [1]}, TypeError, r"tolerance must be a number, but got \[1\]"),
    ({"kernel_size": 4}, ValueError, r"tied_exp needs an odd kernel_size, got \(4, 4\)"),
    ({"kernel_size": ()}, ValueError, r"one to three numbers, got \(\)"),
    ({"kernel_size": 5}, ValueError, r"expected packed to be 1-dimensional with \d+ elements"),
    ({"padding_mode": "reflect"}, ValueError, "'zeros' or 'circular', got 'reflect'"),
    ({"padding_mode": "zero"}, ValueError, "padding_mode must be one of"),
    ({"symmetry": "skew"}, ValueError, "symmetry must be one of"),
    ({"groups": 3}, ValueError, "divisible by groups"),
    ({"input": IMAGE[0, 0]}, RuntimeError, r"Expected 3D.*4D.*tied_exp.*\[5, 5\]"),
    ({"input": IMAGE[:, :3]}, ValueError, "packed.*channels=3"),
    ({"input": IMAGE.double()}, RuntimeError, "should be the same"),
    ({"input": IMAGE.tolist()}, TypeError, "'input' must be Tensor, not list"),
    ({"packed": PACKED[1:]}, ValueError, r"packed of size \[\d+\]"),
    ({"packed": None}, TypeError, "'packed' must be Tensor, not NoneType"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=str)
def test_mistakes_are_told(wrong, error, message):
    right = {"input": IMAGE, "packed": PACKED, "kernel_size": 3, "symmetry": SKEW}
    with pytest.raises(error, match=message):
        tt.tied_exp(**{**right, **wrong})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0, 3), ValueError, "norm must be finite and not negative, but got norm=-1.0"),
        ((math.nan, 3), ValueError, "norm must be finite and not negative, but got norm=nan"),
        ((math.inf, 3), ValueError, "norm must be finite and not negative, but got norm=inf"),
        (("1", 3), TypeError, "norm must be a number, but got '1'"),
        ((True, 3), TypeError, "norm must be a number, but got True"),
        ((torch.tensor(True), 3), TypeError, r"norm must be a number, but got tensor\(True\)"),
        pytest.param((10**400, 3), TypeError, "norm must be a number, but got 10", id="huge"),
        ((1.0, 0), ValueError, "terms should be positive"),
        ((1.0, 3, "skew"), ValueError, "symmetry must be one of"),
    ],
    ids=str,
)
def test_mistakes_in_the_bound_are_told(arguments, error, message):
    with pytest.raises(error, match=message):
        tt.exp_error_bound(*arguments)


def test_terms_of_none_need_a_norm_that_has_a_value():
    x, packed = torch.randn(1, 3, 4, 4), torch.randn(2, tt.packed_size(3, 3))
    apply = functools.partial(tt.tied_exp, kernel_size=3)
    with pytest.raises(RuntimeError, match="meta tensors: give terms"):
        apply(x.to("meta"), packed[0].to("meta"))
    with pytest.raises(RuntimeError, match="torch.vmap of the weight.*give terms"):
        torch.vmap(functools.partial(apply, x))(packed)


def test_a_norm_that_no_series_serves_is_refused():
    with pytest.raises(ValueError, match="100 terms.*norm=60.*scale the weight down"):
        tt.exp_terms(60.0, 1e-6)
    with pytest.raises(ValueError, match="scale the weight down"):
        tt.tied_exp(IMAGE, PACKED + 100, kernel_size=3, symmetry=SKEW)
