"""``AntisymmetricResidual2d`` against its formula, and what is said of its stability."""

import math
from itertools import pairwise

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_tied as tt

DTYPE = torch.float64
SKEW = "skew_adjoint"


def identity(x):
    return x


def norm_of(layer, channels, *sides):
    """Of A, from its matrix."""
    A = oracle.matrix_of(lambda x: layer.conv(x) - layer.conv(0 * x), channels, *sides)
    return torch.linalg.matrix_norm(A, 2).item()


@st.composite
def layers(draw):
    method = draw(st.sampled_from(["euler", "verlet"]))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 3)) * (2 if method == "verlet" else 1)
    options = {
        "method": method,
        "gamma": draw(st.floats(0, 1)) if method == "euler" else None,
        "step": draw(st.floats(0.01, 1)),
        "activation": draw(st.sampled_from([torch.tanh, torch.relu, torch.nn.SiLU()])),
        "groups": groups,
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
    }
    kernel_size = draw(st.sampled_from([1, 3, (3, 1)]))
    layer = tt.AntisymmetricResidual2d(channels, kernel_size, **options, dtype=DTYPE)
    return layer, [draw(st.integers(4, 6)) for _ in range(2)]


def published(layer, x):
    """Forward Euler, or Verlet with K^T as a transposed convolution of the dense weight."""
    conv = layer.conv
    sizes = conv.channels, conv.kernel_size, conv.groups, SKEW
    weight = oracle.expand(conv.packed_weight, *sizes)
    padding = [d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    options = {"padding": padding, "dilation": conv.dilation}
    K = oracle.Convolution(sizes, options, conv.padding_mode)
    bias = 0 if conv.bias is None else conv.bias[:, None, None]

    def transposed(y):
        """Of zero padding; of circular padding by the images' own side by side."""
        if conv.padding_mode == "zeros":
            return F.conv_transpose2d(y, weight, groups=conv.groups, **options)
        h, w = y.shape[2:]
        tiled = y.tile(1, 1, 3, 3)
        whole = F.conv_transpose2d(tiled, weight, groups=conv.groups, **options)
        return whole[:, :, h : 2 * h, w : 2 * w]

    h, activation = layer.step, layer.activation
    if layer.method == "euler":
        return x + h * activation(K.apply(x, weight) - layer.gamma * x + bias)
    y, z = x.chunk(2, 1)
    z = z - h * activation(transposed(y) + bias)
    y = y + h * activation(K.apply(z, weight) + bias)
    return torch.cat([y, z], 1)


@settings(max_examples=25)
@given(layers())
def test_a_step_is_the_published_one(drawn):
    layer, sides = drawn
    x = torch.randn(2, layer.channels, *sides, dtype=DTYPE, requires_grad=True)
    inputs = (x, *(parameter for parameter in layer.parameters() if parameter.numel()))
    expected, found = published(layer, x), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(x)
    want = torch.autograd.grad(expected, inputs, upstream)
    got = torch.autograd.grad(found, inputs, upstream)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer(x[0]), found[0])
    if layer.method == "verlet":
        torch.testing.assert_close(layer.inverse(found), x, rtol=1e-12, atol=1e-12)


def walk(layer, x, steps=1000):
    with torch.no_grad(), tt.cached():
        for _ in range(steps):
            x = layer(x)
            yield x


def test_damped_euler_steps_never_raise_the_energy():
    """The sum of log cosh(A x - gamma x + b), over 1,000 steps of the largest stable size."""
    layer = tt.AntisymmetricResidual2d(3, gamma=0.3, dtype=DTYPE)
    gamma, norm = layer.gamma, norm_of(layer, 3, 4, 4)
    layer.step = 2 * gamma / (gamma**2 + norm**2)
    x = 3 * torch.randn(1, 3, 4, 4, dtype=DTYPE)

    def energy(x):
        return (layer.conv(x) - gamma * x).cosh().log().sum().item()

    energies = [energy(x), *(energy(x) for x in walk(layer, x))]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(energies))
    assert math.isfinite(energies[-1])


@pytest.mark.parametrize(("factor", "grows"), [(0.999, False), (1.1, True)])
def test_the_limit_of_euler_is_sharp(factor, grows):
    """With the identity as activation, in the direction of the largest eigenvalue."""
    layer = tt.AntisymmetricResidual2d(3, gamma=0.3, activation=identity, bias=False, dtype=DTYPE)
    norm = norm_of(layer, 3, 4, 4)
    layer.step = factor * 2 * 0.3 / (0.3**2 + norm**2)
    x = torch.randn(1, 3, 4, 4, dtype=DTYPE)
    norms = [x.norm(), *(x.norm() for x in walk(layer, x))]
    if grows:
        assert norms[-1] > 10 * norms[0]
    else:
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(norms))


def test_without_damping_euler_grows_slowly():
    options = {"gamma": 0, "activation": identity, "bias": False, "dtype": DTYPE}
    layer = tt.AntisymmetricResidual2d(3, step=0.1, **options)
    assert layer.stable_step() == 0
    x = torch.randn(1, 3, 4, 4, dtype=DTYPE)
    growth = [after.norm() / x.norm() for after in walk(layer, x)]
    most = math.sqrt(1 + (0.1 * norm_of(layer, 3, 4, 4)) ** 2)
    assert 1 < growth[0] <= most * (1 + 1e-12) and growth[-1] > 2


@pytest.mark.parametrize(("factor", "grows"), [(0.95, False), (1.02, True)])
def test_the_limit_of_verlet_is_sharp(factor, grows):
    options = {"activation": identity, "bias": False, "dtype": DTYPE}
    layer = tt.AntisymmetricResidual2d(6, method="verlet", **options)
    norm = norm_of(layer, 3, 4, 4)
    layer.step = factor * 2 / norm
    x = torch.randn(1, 6, 4, 4, dtype=DTYPE)
    largest = max(after.norm().item() for after in walk(layer, x)) / x.norm().item()
    # A pair of numbers turns on an ellipse: (y, z) -> y*y + z*z - h s y z is kept.
    assert (largest > 1e6) if grows else largest <= math.sqrt((1 + factor) / (1 - factor))


def test_a_thousand_nonlinear_verlet_steps_can_be_undone():
    layer = tt.AntisymmetricResidual2d(6, method="verlet", step=0.2, dtype=DTYPE)
    x = torch.randn(1, 6, 4, 4, dtype=DTYPE)
    *_, last = walk(layer, x)
    with torch.no_grad():
        for _ in range(1000):
            last = layer.inverse(last)
    assert (last - x).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["euler", "verlet"])
def test_the_stable_step_is_on_the_safe_side(method):
    layer = tt.AntisymmetricResidual2d(4, method=method, dtype=DTYPE)
    norm = norm_of(layer, layer.conv.channels, 6, 6)
    limits = {"euler": 2 * layer.gamma / (layer.gamma**2 + norm**2), "verlet": 2 / norm}
    assert 0.1 * limits[method] < layer.stable_step() <= limits[method]
    torch.nn.init.zeros_(layer.conv.packed_weight)
    expected = 2 / layer.gamma if method == "euler" else math.inf
    assert layer.stable_step() == pytest.approx(expected)


def test_it_compiles_as_one_graph():
    for method in ("euler", "verlet"):
        layer = tt.AntisymmetricResidual2d(4, method=method, dtype=DTYPE)
        x = torch.randn(1, 4, 5, 5, dtype=DTYPE)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels should be positive, got channels=0"),
        ({"kernel_size": 2}, ValueError, "needs an odd kernel_size"),
        ({"step": 0}, ValueError, "step should be positive, got step=0"),
        ({"step": -0.1}, ValueError, "step must be finite and not negative, but got step=-0.1"),
        ({"step": "0.1"}, TypeError, "step must be a number, but got '0.1'"),
        ({"gamma": -1}, ValueError, "gamma must be finite and not negative, but got gamma=-1.0"),
        ({"method": "leapfrog"}, ValueError, "method must be one of.*'leapfrog'"),
        ({"method": ["verlet"]}, ValueError, r"method must be one of.*\['verlet'\]"),
        ({"method": "verlet", "gamma": 0.1}, ValueError, "gamma=0 and an even.*gamma=0.1"),
        ({"method": "verlet", "channels": 3}, ValueError, "even number of channels.*channels=3"),
        ({"activation": "tanh"}, TypeError, "activation must be a function.*'tanh'"),
        ({"padding_mode": "replicate"}, ValueError, "'zeros' or 'circular', got 'replicate'"),
        ({"groups": 3}, ValueError, "channels=4, groups=3"),
    ],
    ids=str,
)
def test_mistakes_are_told(wrong, error, message):
    with pytest.raises(error, match=message):
        tt.AntisymmetricResidual2d(**{"channels": 4, **wrong})


def test_images_that_do_not_fit_are_told():
    layer = tt.AntisymmetricResidual2d(4)
    with pytest.raises(RuntimeError, match=r"\[N, 4, H, W\].*\[1, 2, 4, 4\]"):
        layer(torch.zeros(1, 2, 4, 4))
    with pytest.raises(RuntimeError, match="inverse needs method='verlet', got 'euler'"):
        layer.inverse(torch.zeros(1, 4, 4, 4))
