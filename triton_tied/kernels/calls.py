"""What a kernel is asked to compute, and on which tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..memory_format import Memory, empty_image, memory_of
from ..packing import Layout
from .precision import InputPrecision


class Convolution(NamedTuple):
    """``alpha * (conv(x, packed) + bias) + beta * residual`` over ``(N, C, H, W)`` of any strides.

    ``weights`` is what is read of the weight: what :func:`.launch.unpack_matrices` makes of
    ``packed``, or ``packed`` itself in the dtype of ``x``. ``channels_last`` is the memory format
    of the output, ``dtype`` its dtype; None: that of ``x``. ``precision`` is that of products of
    float32; None: as PyTorch's setting says when the kernel is launched.
    """

    x: Tensor
    packed: Tensor
    weights: Tensor
    bias: Tensor | None
    residual: Tensor | None
    layout: Layout
    geometry: Geometry
    alpha: float
    beta: float
    channels_last: bool
    precision: InputPrecision | None = None
    dtype: torch.dtype | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, channels, *image = self.x.shape
        return (n, channels, *self.geometry.output_size(image, self.layout.kernel_size))

    def empty_output(self) -> Tensor:
        """Without memory."""
        return empty_image(self.output_shape, self.x, self.channels_last, "meta", self.dtype)

    @property
    def stored(self) -> int:
        """How many taps of ``weights`` are matrices."""
        return self.layout.pairs if self.weights.dim() == 1 else self.weights.shape[1]

    @property
    def bias_channels(self) -> int:
        return 0 if self.bias is None else self.layout.channels

    @property
    def output_memory(self) -> Memory:
        """Of the output, and of the residual."""
        output: Memory = "channels_last" if self.channels_last else "contiguous"
        strange = self.residual is not None and memory_of(self.residual) != output
        return "strided" if strange else output


class WeightGradient(NamedTuple):
    """``alpha`` times the gradient of the packed vector, for the output gradient ``grad``, in
    ``dtype``; with ``has_bias`` followed by that of a bias. ``precision``: as in
    :class:`Convolution`."""

    x: Tensor
    grad: Tensor
    layout: Layout
    geometry: Geometry
    alpha: float
    dtype: torch.dtype
    has_bias: bool
    precision: InputPrecision | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the convolution."""
        return tuple(self.grad.shape)

    @property
    def bias_channels(self) -> int:
        return self.layout.channels if self.has_bias else 0

    @property
    def output_memory(self) -> Memory:
        """A packed gradient has none of its own."""
        return "channels_last"


def images_of(call: Convolution | WeightGradient) -> list[Tensor]:
    """The images that are read."""
    return [call.x] if isinstance(call, Convolution) else [call.x, call.grad]
