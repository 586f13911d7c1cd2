"""``torch.nn.init`` for tied layers: all of the dense weight gets the distribution asked for.

    tt.init.kaiming_normal_(layer, nonlinearity="relu")

A free number and its partner in the dense weight are equal up to the sign, so that drawing the free
ones from a distribution gives it to all. (Drawing a dense weight and projecting it would not: an
average of two has a smaller deviation.) With "skew_adjoint" the diagonal of the centre tap is zero.
Biases are left alone. Every function returns the layer, and raises TypeError for anything else, and
RuntimeError where ``packed_weight`` is computed from other parameters.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import nn

from .argument_checks import check_holds_its_numbers
from .modules import TiedConv1d, TiedConv2d, TiedConv3d

Mode = Literal["fan_in", "fan_out"]
_Layer = TypeVar("_Layer", TiedConv1d, TiedConv2d, TiedConv3d)


def uniform_(
    layer: _Layer, a: float = 0.0, b: float = 1.0, generator: torch.Generator | None = None
) -> _Layer:
    """U(a, b); with "skew_adjoint" a must be -b."""
    _check_layer(layer)
    _check_symmetric(layer, a + b, f"U({a}, {b})")
    nn.init.uniform_(layer.packed_weight, a, b, generator)
    return layer


def normal_(
    layer: _Layer, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> _Layer:
    """N(mean, std^2); with "skew_adjoint" the mean must be 0."""
    _check_layer(layer)
    _check_symmetric(layer, mean, f"N({mean}, {std}^2)")
    nn.init.normal_(layer.packed_weight, mean, std, generator)
    return layer


def xavier_uniform_(
    layer: _Layer, gain: float = 1.0, generator: torch.Generator | None = None
) -> _Layer:
    """U(-b, b) with b = gain * sqrt(6 / (fan_in + fan_out))."""
    return _uniform(layer, _xavier_std(layer, gain), generator)


def xavier_normal_(
    layer: _Layer, gain: float = 1.0, generator: torch.Generator | None = None
) -> _Layer:
    """N(0, std^2) with std = gain * sqrt(2 / (fan_in + fan_out))."""
    return normal_(layer, 0.0, _xavier_std(layer, gain), generator)


def kaiming_uniform_(
    layer: _Layer,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> _Layer:
    """U(-b, b) with b = sqrt(3 / fan) times the gain of the nonlinearity, whose slope is a."""
    return _uniform(layer, _kaiming_std(layer, a, mode, nonlinearity), generator)


def kaiming_normal_(
    layer: _Layer,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> _Layer:
    """N(0, std^2) with std = sqrt(1 / fan) times the gain of the nonlinearity, whose slope is a."""
    return normal_(layer, 0.0, _kaiming_std(layer, a, mode, nonlinearity), generator)


def _uniform(layer: _Layer, std: float, generator: torch.Generator | None) -> _Layer:
    bound = math.sqrt(3.0) * std
    return uniform_(layer, -bound, bound, generator)


def _xavier_std(layer: _Layer, gain: float) -> float:
    return gain * math.sqrt(2.0 / sum(_fans(layer).values()))


def _kaiming_std(layer: _Layer, a: float, mode: Mode, nonlinearity: str) -> float:
    fans = _fans(layer)
    if mode not in fans:
        raise ValueError(f"mode must be one of {set(fans)}, but got mode={mode!r}")
    return nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fans[mode])  # type: ignore[arg-type]


def _fans(layer: _Layer) -> dict[str, int]:
    """As ``torch.nn.init`` counts them: the outputs of all groups."""
    _check_layer(layer)
    taps = math.prod(layer.kernel_size)
    return {"fan_in": layer.channels // layer.groups * taps, "fan_out": layer.channels * taps}


def _check_layer(layer: _Layer) -> None:
    if not isinstance(layer, TiedConv1d | TiedConv2d | TiedConv3d):
        kind = type(layer).__name__
        raise TypeError(
            f"triton_tied.init takes a TiedConv1d, TiedConv2d or TiedConv3d itself, got {kind}"
        )
    check_holds_its_numbers(layer)


def _check_symmetric(layer: _Layer, mean: float, distribution: str) -> None:
    """Half of a skew-adjoint weight is minus the other half."""
    if layer.symmetry == "skew_adjoint" and mean != 0:
        raise ValueError(
            f"numbers of a skew-adjoint weight come with both signs, "
            f"so they cannot all be drawn from {distribution}"
        )
