"""Operations on packed vectors, each against its definition on the dense weight in float64."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
LAYOUTS = [  # channels, kernel_size, groups
    (4, (3, 3), 1),
    (4, (3, 3), 2),
    (3, (2, 3), 1),
    (4, (5,), 2),
    (3, (1,), 3),  # skew-adjoint: no free numbers
    (2, (3, 3, 3), 1),
    (4, (2, 2, 1), 2),
]


@st.composite
def layouts(draw):
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 4))
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return channels, kernel, groups, draw(st.sampled_from(SYMMETRIES))


def random_packed(layout, dtype=torch.float64):
    return torch.randn(tt.packed_size(*layout), dtype=torch.float64).to(dtype)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(layouts())
@settings(max_examples=40)
def test_inner_and_norm_are_those_of_the_dense_weights(layout):
    p, q = random_packed(layout), random_packed(layout)
    V, W = oracle.expand(p, *layout), oracle.expand(q, *layout)
    close(tt.inner(p, q, *layout), (V * W).sum())
    close(tt.norm(p, *layout), V.square().sum().sqrt())


@given(layouts())
@settings(max_examples=40)
def test_scaled_channels_and_groups_are_those_of_the_dense_weight(layout):
    channels, _, groups, _ = layout
    packed, d, f = random_packed(layout), torch.randn(channels).double(), torch.randn(groups)
    blocks = oracle.expand(packed, *layout).unflatten(0, (groups, -1))  # group, out, in, taps
    wide = [1] * (blocks.dim() - 3)
    outputs, inputs = d.view(groups, -1, 1, *wide), d.view(groups, 1, -1, *wide)
    scaled = tt.scale_channels(packed, d, *layout)
    close(oracle.expand(scaled, *layout), (outputs * blocks * inputs).flatten(0, 1))
    scaled = tt.scale_groups(packed, f.double(), *layout)
    by_groups = f.double().view(groups, 1, 1, *wide) * blocks
    close(oracle.expand(scaled, *layout), by_groups.flatten(0, 1))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "channels, kernel, groups", [(4, (3, 5), 2), (3, (1,), 1), (2, (3,) * 3, 1)]
)
def test_a_shifted_diagonal_adds_a_multiple_of_the_identity(channels, kernel, groups, as_tensor):
    layout = (channels, kernel, groups, "self_adjoint")
    packed, gamma = random_packed(layout), torch.randn(()).double()
    shifted = tt.shift_diagonal(packed, gamma if as_tensor else gamma.item(), *layout)
    x = torch.randn(2, channels, *[7] * len(kernel), dtype=torch.float64)
    convolution = oracle.Convolution(layout, {"padding": tuple(k // 2 for k in kernel)})
    close(convolution(x, shifted), convolution(x, packed) + gamma * x)


def test_a_shift_of_the_diagonal_leaves_all_else_as_it_is():
    packed = torch.randn(tt.packed_size(3, 3))
    layout = (3, (3, 3), 1, "self_adjoint")
    weight = oracle.expand(tt.shift_diagonal(packed, math.inf, *layout), *layout)
    expected = oracle.expand(packed, *layout)
    expected[range(3), range(3), 1, 1] = math.inf
    assert torch.equal(weight, expected)


def test_factors_whose_products_a_half_type_does_not_hold():
    packed = 3000 + 1000 * torch.rand(tt.packed_size(5, 3), dtype=torch.float16)
    factors = (1 + torch.rand(5)).div(1000).half()
    found = tt.scale_channels(packed, factors, 5, 3)
    expected = tt.scale_channels(packed.double(), factors.double(), 5, 3)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * 2**-11, atol=0)  # rounded once


def test_a_change_before_the_backward_is_told_as_by_torch():
    packed, factors = torch.randn(18, requires_grad=True), torch.randn(3, requires_grad=True)
    scaled = tt.scale_channels(packed, factors, 3, (2, 2))
    with torch.no_grad():
        packed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scaled.sum().backward()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_first_and_second_derivatives(channels, kernel, groups, symmetry):
    layout = (channels, kernel, groups, symmetry)
    p, q = random_packed(layout).requires_grad_(), random_packed(layout).requires_grad_()
    d, f, gamma = (torch.randn(shape).double().requires_grad_() for shape in (channels, groups, ()))
    functions = [
        (lambda p, q: tt.inner(p, q, *layout), (p, q)),
        (lambda p, d: tt.scale_channels(p, d, *layout), (p, d)),
        (lambda p, f: tt.scale_groups(p, f, *layout), (p, f)),
    ]
    if p.numel():  # at zero the norm has no derivative
        functions.append((lambda p: tt.norm(p, *layout), (p,)))
    if symmetry == "self_adjoint" and all(k % 2 for k in kernel):
        functions.append((lambda p, g: tt.shift_diagonal(p, g, *layout), (p, gamma)))
    for function, arguments in functions:
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_at_zero_the_gradient_of_the_norm_is_zero(symmetry):
    packed = torch.zeros(tt.packed_size(3, 3, symmetry=symmetry), requires_grad=True)
    norm = tt.norm(packed, 3, 3, symmetry=symmetry)
    norm.backward()
    assert norm == 0 and torch.equal(packed.grad, torch.zeros_like(packed))


def test_half_types_are_summed_in_float32():
    """The squares of these numbers overflow float16, and their sum would round away in bfloat16."""
    layout = (32, (3, 3), 1, "skew_adjoint")
    size = tt.packed_size(*layout)
    large = torch.full((size,), 300.0, dtype=torch.float16)
    small = torch.full((size,), 0.25, dtype=torch.bfloat16)
    assert tt.norm(large, *layout) == torch.tensor(300 * math.sqrt(2 * size)).half()
    assert tt.norm(small, *layout) == torch.tensor(0.25 * math.sqrt(2 * size)).bfloat16()
    assert tt.inner(small, small, *layout) == torch.tensor(2 * size / 16).bfloat16()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_under_vmap_and_grad(symmetry):
    layout = (4, (3, 3), 2, symmetry)
    packed = torch.stack([random_packed(layout) for _ in range(3)])
    d = torch.randn(3, 4).double()
    norms = torch.vmap(lambda p: tt.norm(p, *layout))(packed)
    close(norms, torch.stack([oracle.expand(p, *layout).norm() for p in packed]))
    scaled = torch.vmap(lambda p, d: tt.scale_channels(p, d, *layout))(packed, d)
    close(scaled[1], tt.scale_channels(packed[1], d[1], *layout))
    gradient = torch.func.grad(lambda p: tt.inner(p, p, *layout))(packed[0])
    leaf = packed[0].clone().requires_grad_()
    oracle.expand(leaf, *layout).square().sum().backward()
    close(gradient, leaf.grad)


def test_the_compiler_takes_all_in_one_graph():
    layout = (4, (3, 3), 2, "self_adjoint")
    packed, d, x = random_packed(layout), torch.randn(4).double(), torch.randn(3, 4).double()
    triangle = torch.randn(tt.packed_size(4, (1,))).double()
    vector = torch.randn(4, 5, 5, dtype=torch.float64)

    def everything(packed, triangle):
        step = {"vector": vector, "tolerance": 0, "max_steps": 2}
        yield tt.inner(packed, 2 * packed, *layout)
        yield tt.norm(packed, *layout)
        yield tt.scale_channels(packed, d, *layout)
        yield tt.scale_groups(packed, d[:2], *layout)
        yield tt.shift_diagonal(packed, d[0], *layout)
        yield tt.spectral_norm(packed, *layout)
        yield tt.spectral_norm(packed, *layout, "circular", image_size=5)
        yield tt.power_iteration(packed, *layout, image_size=5, **step)[0]
        yield tt.tied_linear(x, triangle)

    def total(packed, triangle):
        return sum([result.sin().sum() for result in everything(packed, triangle)])

    leaves = [packed.requires_grad_(), triangle.requires_grad_()]
    compiled = torch.compile(total, fullgraph=True, backend="eager")(*leaves)
    close(compiled, total(*leaves))
    found, expected = (torch.autograd.grad(y, leaves) for y in (compiled, total(*leaves)))
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_methods_of_the_layers(symmetry):
    kind = {"kernel_size": 3, "groups": 2, "symmetry": symmetry, "dtype": torch.float64}
    layer, other = tt.TiedConv2d(4, **kind), tt.TiedConv2d(4, **kind)
    shape = (4, (3, 3), 2, symmetry)
    V, W = (oracle.expand(each.packed_weight.detach(), *shape) for each in (layer, other))
    close(layer.norm().detach(), V.norm())
    close(layer.inner(other).detach(), (V * W).sum())
    d, f = torch.randn(4).double(), torch.randn(2).double()
    before, parameter = layer.packed_weight.detach().clone(), layer.packed_weight
    assert layer.scale_channels_(d) is layer and layer.scale_groups_(f) is layer
    expected = tt.scale_groups(tt.scale_channels(before, d, *shape), f, *shape)
    close(layer.packed_weight.detach(), expected)
    assert layer.packed_weight is parameter and parameter.grad_fn is None
    if symmetry == "self_adjoint":
        middle = layer.to_conv().weight[:, :, 1, 1].detach()
        layer.shift_diagonal_(0.5)
        shifted = layer.to_conv().weight[:, :, 1, 1].detach()
        close(shifted - middle, torch.eye(2).double().repeat(2, 1) / 2)


def test_layers_of_another_layout_have_no_inner_product():
    layer = tt.TiedConv2d(4, 3)
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\).*kernel_size=\(5, 5\)"):
        layer.inner(tt.TiedConv2d(4, 5))
    with pytest.raises(TypeError, match="other must be a tied layer, not Conv2d"):
        layer.inner(torch.nn.Conv2d(4, 4, 3))
