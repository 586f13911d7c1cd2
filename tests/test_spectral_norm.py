"""Spectral norms against the matrix of the convolution, written out; bounds against their paper."""

import math
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
CASES = [  # channels, kernel_size, groups, image size, dilation
    (3, (3, 3), 1, (6, 5), 1),
    (4, (2, 3), 2, (4, 5), 1),
    (3, (4, 1), 1, (5, 3), (2, 1)),
    (2, (5, 3), 1, (4, 6), (1, 2)),  # the dilated kernel is wider than the image
    (4, (3,), 2, (9,), 2),
    (2, (3, 2, 3), 1, (4, 3, 3), 1),
]


def matrix_norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def matrix_of(packed, layout, size, padding, mode="constant", **options):
    """The matrix of the convolution, column by column."""
    weight = oracle.expand(packed.detach(), *layout)
    images = torch.eye(layout[0] * math.prod(size)).double().view(-1, layout[0], *size)
    flat = [amount for pair in reversed(padding) for amount in pair]
    convolve = oracle.CONVOLUTIONS[len(size)]
    padded = F.pad(images, flat, mode=mode)
    return convolve(padded, weight, groups=layout[2], **options).flatten(1).T


def same(kernel, dilation):
    total = [d * (k - 1) for k, d in zip(kernel, axes(dilation, kernel), strict=True)]
    return [(t // 2, t - t // 2) for t in total]


def axes(value, kernel):
    return (value,) * len(kernel) if isinstance(value, int) else value


def random_packed(layout):
    return torch.randn(tt.packed_size(*layout), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def fantastic_four(weight):
    """The norms of the paper's four matrices of a weight (out, in, height, width)."""
    out, inn, height, width = weight.shape
    return [
        matrix_norm(weight.permute(0, 2, 1, 3).reshape(out * height, inn * width)),
        matrix_norm(weight.permute(0, 3, 1, 2).reshape(out * width, inn * height)),
        matrix_norm(weight.reshape(out, inn * height * width)),
        matrix_norm(weight.permute(0, 2, 3, 1).reshape(out * height * width, inn)),
    ]


@given(
    st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from(SYMMETRIES)
)
@settings(max_examples=30)
def test_the_bound_is_the_least_of_four_of_which_a_tie_leaves_two(channels, kernel, symmetry):
    layout = (channels, kernel, 1, symmetry)
    packed = random_packed(layout)
    norms = fantastic_four(oracle.expand(packed, *layout))
    close(norms[0], norms[1])
    close(norms[2], norms[3])
    expected = math.sqrt(math.prod(kernel)) * min(norms)
    close(tt.spectral_norm(packed, *layout), expected)


def test_a_weight_that_is_not_tied_has_four():
    norms = fantastic_four(torch.randn(3, 3, 3, 2).double())
    assert len({round(norm.item(), 9) for norm in norms}) == 4


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_bound_in_one_and_three_dimensions_and_with_groups(symmetry):
    layout = (3, (4,), 1, symmetry)
    packed = random_packed(layout)
    flat = oracle.expand(packed, *layout).flatten(1)
    close(tt.spectral_norm(packed, *layout), 2 * matrix_norm(flat))

    layout = (2, (3, 2, 2), 1, symmetry)
    packed = random_packed(layout)
    weight = oracle.expand(packed, *layout)  # the axes that go with the rows: none, or one of three
    rows = [(0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 3, 1, 2, 4), (0, 4, 1, 2, 3)]
    sizes = [2, 6, 4, 4]
    matrices = [weight.permute(*r).reshape(n, -1) for r, n in zip(rows, sizes, strict=True)]
    close(tt.spectral_norm(packed, *layout), math.sqrt(12) * min(map(matrix_norm, matrices)))

    layout = (6, (3, 3), 3, symmetry)
    packed = random_packed(layout)
    each = [min(fantastic_four(part)) for part in oracle.expand(packed, *layout).chunk(3)]
    close(tt.spectral_norm(packed, *layout), 3 * max(each))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups, size, dilation", CASES)
def test_the_norm_on_a_torus_is_that_of_the_matrix(
    channels, kernel, groups, size, dilation, symmetry
):
    layout = (channels, kernel, groups, symmetry)
    packed = random_packed(layout)
    matrix = matrix_of(packed, layout, size, same(kernel, dilation), "circular", dilation=dilation)
    found = tt.spectral_norm(packed, *layout, "circular", image_size=size, dilation=dilation)
    close(found, matrix_norm(matrix))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups, size, dilation", CASES)
def test_bounds_hold_for_zero_padding(channels, kernel, groups, size, dilation, symmetry):
    """Those of any width and stride under the reshaped matrices; those of the same size under the
    torus that is larger by the reach of the kernel, which is under them itself."""
    layout = (channels, kernel, groups, symmetry)
    packed = random_packed(layout)
    bound = tt.spectral_norm(packed, *layout)
    reach = [d * (k // 2) for k, d in zip(kernel, axes(dilation, kernel), strict=True)]
    larger = [n + r for n, r in zip(size, reach, strict=True)]
    torus = tt.spectral_norm(packed, *layout, "circular", image_size=larger, dilation=dilation)
    matrix = matrix_of(packed, layout, size, same(kernel, dilation), dilation=dilation)
    assert matrix_norm(matrix) <= torus * (1 + 1e-12) and torus <= bound * (1 + 1e-12)
    wide = [(7, 8)] * len(kernel)
    for stride in (1, 2):
        matrix = matrix_of(packed, layout, size, wide, dilation=dilation, stride=stride)
        assert matrix_norm(matrix) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    "channels, kernel, groups, size, dilation",
    [(3, (3, 3), 1, (5, 4), 1), (4, (3, 1), 2, (7, 3), (2, 1)), (3, (5,), 1, (12,), 1)],
)
def test_power_iteration_comes_to_the_norm_from_below(
    channels, kernel, groups, size, dilation, padding_mode, symmetry
):
    layout = (channels, kernel, groups, symmetry)
    packed = random_packed(layout).requires_grad_()
    mode = "circular" if padding_mode == "circular" else "constant"
    matrix = matrix_of(packed, layout, size, same(kernel, dilation), mode, dilation=dilation)
    options = {"image_size": size, "padding_mode": padding_mode, "dilation": dilation}
    options |= {"tolerance": 0}
    vector, estimates = None, []
    for steps in (1, 1, 1, 20):  # each goes on from the vector of the last
        estimate, vector = tt.power_iteration(
            packed, *layout, **options, vector=vector, max_steps=steps
        )
        estimates.append(estimate.item())
    norm = matrix_norm(matrix).item()
    assert estimates == sorted(estimates) and estimates[-1] <= norm * (1 + 1e-12)
    close(vector.norm(), torch.ones(()).double())
    found, _ = tt.power_iteration(packed, *layout, **options, vector=vector, max_steps=2000)
    assert 0.995 * norm <= found <= norm * (1 + 1e-12)


def test_the_gradient_of_power_iteration_is_that_of_the_norm():
    layout = (2, (3, 3), 1, "self_adjoint")
    while True:  # the norm has a derivative, and the iteration converges, where there is a gap
        packed = random_packed(layout).requires_grad_()
        matrix = matrix_of(packed, layout, (3, 4), [(1, 1)] * 2, "circular")
        values = torch.linalg.svdvals(matrix)
        if values[values < values[0] * (1 - 1e-9)][0] < 0.95 * values[0]:
            break
    exact = tt.spectral_norm(packed, *layout, "circular", image_size=(3, 4))
    options = {"image_size": (3, 4), "padding_mode": "circular", "tolerance": 0}
    estimate, _ = tt.power_iteration(packed, *layout, **options, max_steps=1000)
    (expected,) = torch.autograd.grad(exact, packed)
    (found,) = torch.autograd.grad(estimate, packed)
    close(estimate, exact)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_power_iteration_stops_at_its_tolerance_and_says_if_it_does_not():
    layout = (3, (3, 3), 1, "skew_adjoint")
    packed = random_packed(layout)
    prepared = tt.prepare(packed, *layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose, vector = tt.power_iteration(packed, *layout, image_size=6, tolerance=0.05)
        tight, _ = tt.power_iteration(packed, *layout, image_size=6, vector=vector, tolerance=1e-5)
        again, _ = tt.power_iteration(prepared, *layout, image_size=6, vector=vector, tolerance=0.9)
    assert loose <= again <= tight
    with pytest.warns(UserWarning, match=r"max_steps=3.*tolerance=1e-14"):
        tt.power_iteration(packed, *layout, image_size=6, tolerance=1e-14, max_steps=3)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("method, options", [("bound", {}), ("circular", {"image_size": 4})])
def test_gradients(method, options, symmetry):
    for channels, kernel, groups in [(3, (3, 3), 1), (4, (2, 3), 2), (3, (1, 1), 1)]:
        layout = (channels, kernel, groups, symmetry)
        packed = random_packed(layout).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda p, layout=layout: tt.spectral_norm(p, *layout, method, **options), packed
        )


def test_the_second_derivative_of_the_bound():
    """Where the largest singular value is simple, as it is not for an antisymmetric matrix."""
    layout = (3, (3, 3), 1, "self_adjoint")
    packed = random_packed(layout).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: tt.spectral_norm(p, *layout), packed)


@pytest.mark.parametrize("method, options", [("bound", {}), ("circular", {"image_size": 4})])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_at_zero_norm_and_gradient_are_zero(method, options, symmetry):
    layout = (3, (3, 3), 1, symmetry)
    packed = torch.zeros(tt.packed_size(*layout), requires_grad=True)
    norm = tt.spectral_norm(packed, *layout, method, **options)
    norm.backward()
    assert norm == 0 and torch.equal(packed.grad, torch.zeros_like(packed))
    estimate, vector = tt.power_iteration(packed, *layout, image_size=4)
    assert estimate == 0 and abs(vector.norm() - 1) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_whose_squares_are_no_numbers_have_the_same_bound(scale):
    packed = torch.randn(tt.packed_size(4, 3))
    expected = scale * tt.spectral_norm(packed.double(), 4, 3)
    found = tt.spectral_norm(scale * packed, 4, 3).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    layout = (4, (3, 3), 1, "skew_adjoint")
    packed = random_packed(layout).to(dtype)
    exact = tt.spectral_norm(packed.double(), *layout)
    found = tt.spectral_norm(packed, *layout)
    assert found.dtype == dtype
    assert abs(found.double() / exact - 1) <= torch.finfo(dtype).eps + 1e-5
    estimate, vector = tt.power_iteration(packed, *layout, image_size=5, tolerance=0, max_steps=3)
    assert estimate.dtype == dtype and vector.dtype == torch.float32


@pytest.mark.parametrize("method, options", [("bound", {}), ("circular", {"image_size": 4})])
def test_autocast_changes_nothing(method, options):
    layout = (4, (3, 3), 2, "skew_adjoint")
    packed = random_packed(layout).float()
    vector = torch.randn(4, 5, 5)
    power = {"image_size": 5, "vector": vector, "tolerance": 0, "max_steps": 3}
    with torch.autocast("cpu", torch.bfloat16):
        found = tt.spectral_norm(packed, *layout, method, **options)
        estimate, _ = tt.power_iteration(packed, *layout, **power)
    assert torch.equal(found, tt.spectral_norm(packed, *layout, method, **options))
    assert torch.equal(estimate, tt.power_iteration(packed, *layout, **power)[0])


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_methods_of_the_layers(symmetry):
    layer = tt.TiedConv2d(
        3, 3, padding=2, dilation=2, padding_mode="circular", symmetry=symmetry, dtype=torch.float64
    )
    shape = (3, (3, 3), 1, symmetry)
    packed = layer.packed_weight.detach()
    matrix = matrix_of(packed, shape, (5, 6), [(2, 2)] * 2, "circular", dilation=2)
    close(layer.spectral_norm("circular", image_size=(5, 6)).detach(), matrix_norm(matrix))
    close(layer.spectral_norm().detach(), 3 * min(fantastic_four(oracle.expand(packed, *shape))))
    _, vector = layer.power_iteration((5, 6), tolerance=0, max_steps=9)
    estimate, _ = layer.power_iteration((5, 6), vector, tolerance=0, max_steps=2000)
    assert 0.995 * matrix_norm(matrix) <= estimate <= matrix_norm(matrix) * (1 + 1e-12)


@pytest.mark.parametrize(
    "options, bounded, own_transpose",
    [
        ({"padding": 1}, True, True),
        ({"padding": "same", "dilation": 2}, True, True),
        ({"padding": 1, "padding_mode": "circular"}, True, True),
        ({"padding": 4, "stride": 2}, True, False),
        ({}, True, False),
        ({"padding_mode": "circular"}, True, False),
        ({"padding": 1, "stride": 3, "padding_mode": "circular"}, True, False),
        ({"padding": 2, "padding_mode": "circular"}, False, False),
        ({"padding": 1, "padding_mode": "reflect"}, False, False),
        ({"padding": 1, "padding_mode": "replicate"}, False, False),
        ({"kernel_size": 2, "padding": "same"}, True, False),
    ],
    ids=str,
)
def test_layers_of_which_no_bound_is_known_are_refused(options, bounded, own_transpose):
    layer = tt.TiedConv2d(2, **{"kernel_size": 3, **options}, bias=False, dtype=torch.float64)
    if bounded:
        matrix = layer(torch.eye(72).double().view(72, 2, 6, 6)).flatten(1).T
        assert matrix_norm(matrix) <= layer.spectral_norm()
    else:
        message = f"none for padding_mode='{options['padding_mode']}'"
        with pytest.raises(ValueError, match=message):
            layer.spectral_norm()
    if own_transpose:
        assert layer.power_iteration(6, tolerance=0.5)[0] > 0
    else:
        with pytest.raises(ValueError, match="power_iteration needs.*its own transpose"):
            layer.power_iteration(6)
