"""Which config serves a problem."""

from __future__ import annotations

from torch import Tensor

from .configs import ConvConfig, WeightGradConfig
from .geometry import Geometry
from .packing import Layout


def conv_config(x: Tensor, layout: Layout, geometry: Geometry) -> ConvConfig:
    return ConvConfig((1, 8, 16), 64, 32)


def weight_grad_config(
    x: Tensor, grad: Tensor, layout: Layout, geometry: Geometry
) -> WeightGradConfig:
    return WeightGradConfig((1, 8, 8), 64, 32, splits=4)


def unpacks_centre(layout: Layout, pixels: int) -> bool:
    return layout.group_channels >= 64 and pixels >= 16384
