"""Initializations: each number of the dense weight has the distribution that was asked for."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
LAYERS = {
    "2-D": lambda **options: tt.TiedConv2d(48, (3, 5), **options),
    "grouped": lambda **options: tt.TiedConv2d(96, 3, groups=2, **options),
    "even": lambda **options: tt.TiedConv3d(72, 2, **options),
    "1-D": lambda **options: tt.TiedConv1d(96, 4, **options),
}
DRAWS = {
    "xavier_uniform_": {"gain": 1.7},
    "xavier_normal_": {"gain": 0.6},
    "kaiming_uniform_": {"mode": "fan_out", "nonlinearity": "relu"},
    "kaiming_normal_": {"a": 0.5, "mode": "fan_in", "nonlinearity": "leaky_relu"},
    "normal_": {"std": 0.3},
    "uniform_": {"a": -0.2, "b": 0.2},
}


def dense_like(layer):
    return layer.to_conv().weight.detach()


def drawn(layer):
    """All numbers of the dense weight but zeros, the diagonal of a skew-adjoint centre."""
    weight = layer.weight.detach().clone()
    return weight[weight != 0]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("kind", LAYERS)
def test_moments_are_those_of_the_dense_initialization(kind, name, symmetry):
    layer = LAYERS[kind](symmetry=symmetry)
    bias = layer.bias.detach().clone()
    expected = getattr(nn.init, name)(dense_like(layer), **DRAWS[name])
    assert getattr(tt.init, name)(layer, **DRAWS[name]) is layer
    numbers = drawn(layer).double()
    std = expected.double().std()
    # Half of at least 36,864 numbers are free, 18,000: the standard errors of deviation and mean
    # are below 0.8% of the deviation, and those of the dense weight smaller.
    assert abs(numbers.std() / std - 1) < 0.04
    assert abs(numbers.mean()) < 0.04 * std
    fourth = 3 if "normal" in name else 9 / 5  # of a normal and of a uniform distribution
    assert abs(numbers.pow(4).mean() / numbers.var() ** 2 / fourth - 1) < 0.15
    if "uniform" in name:
        bound = math.sqrt(3) * numbers.std()
        assert abs(numbers.abs().max() / bound - 1) < 0.04
    assert torch.equal(layer.bias, bias)


def test_a_generator_makes_it_the_same_again():
    draws = []
    for _ in range(2):
        layer = tt.TiedConv2d(8, 3)
        for name, options in DRAWS.items():
            generator = torch.Generator().manual_seed(7)
            getattr(tt.init, name)(layer, **options, generator=generator)
            draws.append(layer.packed_weight.detach().clone())
    half = len(draws) // 2
    assert all(torch.equal(a, b) for a, b in zip(draws[:half], draws[half:], strict=True))


def test_numbers_that_come_with_both_signs_have_no_mean():
    skew, plain = tt.TiedConv2d(16, 3, symmetry="skew_adjoint"), tt.TiedConv2d(16, 3)
    before = skew.packed_weight.detach().clone()
    with pytest.raises(ValueError, match="both signs"):
        tt.init.normal_(skew, mean=1.0)
    with pytest.raises(ValueError, match=r"both signs.*U\(0.0, 1.0\)"):
        tt.init.uniform_(skew)
    assert torch.equal(skew.packed_weight, before)
    assert abs(tt.init.normal_(plain, 5.0, 0.1).weight.mean() - 5) < 0.02
    assert tt.init.uniform_(plain).weight.min() >= 0 and plain.weight.max() <= 1


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_no_tied_layer_is_refused(name):
    layer, draw = tt.TiedConv2d(4, 3), getattr(tt.init, name)
    for other in (nn.Conv2d(4, 4, 3), layer.packed_weight, layer.weight, None):
        with pytest.raises(TypeError, match=f"TiedConv3d itself, got {type(other).__name__}"):
            draw(other, **DRAWS[name])


@pytest.mark.parametrize("computed_by", [prune.identity, parametrizations.weight_norm])
def test_numbers_that_would_be_lost_are_not_drawn(computed_by):
    layer = tt.TiedConv2d(4, 3)
    computed_by(layer, "packed_weight")
    before = layer.packed_weight.detach().clone()
    draws = [functools.partial(getattr(tt.init, name), layer, **DRAWS[name]) for name in DRAWS]
    for draw in (*draws, layer.reset_parameters):
        with pytest.raises(RuntimeError, match="is computed from other parameters"):
            draw()
    assert torch.equal(layer.packed_weight, before)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of.*'fan_avg'"):
        tt.init.kaiming_normal_(tt.TiedConv2d(4, 3), mode="fan_avg")
