"""How images lie in memory: the formats that are told apart, and how far a tensor reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .tracing import overridable

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

Memory = Literal["channels_last", "contiguous", "strided"]
_Image = TypeVar("_Image", Tensor, Tensor | None)


def is_channels_last(dims: int, input: Tensor) -> bool:
    """Whether a batched input asks for a channels-last output; one of both formats does not.

    All strides must be the canonical ones. PyTorch itself ignores those of axes of size 1, but with
    others and a channels-last weight its weight gradient can be wrong.
    """
    if input.dim() != dims + 2 or input.is_contiguous():
        return False
    return has_channels_last_strides(dims, input)


def has_channels_last_strides(dims: int, tensor: Tensor) -> bool:
    """Whether an image or a weight has the strides that ``to(memory_format=...)`` would give it."""
    if dims not in CHANNELS_LAST or tensor.dim() != dims + 2:
        return False
    return tuple(tensor.stride()) == _channels_last_strides(tensor.shape)


@overridable
def as_channels_last(dims: int, input: _Image) -> _Image:
    """The input, batched or not, with the strides of channels-last memory: a copy where its memory
    is another, a view where only strides of axes of size 1 differ. None stays None, which a proxy
    of ``torch.fx`` may turn out to be."""
    if input is None:
        return input
    if input.dim() == dims + 1:
        return as_channels_last(dims, input.unsqueeze(0)).squeeze(0)
    if input.dim() != dims + 2 or has_channels_last_strides(dims, input):
        return input
    pixels = input.movedim(1, -1).contiguous()
    return pixels.flatten().view(pixels.shape).movedim(-1, 1)  # as a whole, so that all strides are


def plainly_strided(dims: int, input: Tensor) -> Tensor:
    """The batched input, or a contiguous copy where an axis of size 1 has a stride of its own: with
    such strides in the image and in its gradient PyTorch's grouped weight gradient can raise."""
    if torch.jit.is_tracing():  # sizes are no numbers then
        return input
    if 1 not in input.shape or is_channels_last(dims, input) or _has_contiguous_strides(input):
        return input
    return input.clone(memory_format=torch.contiguous_format)


def _has_contiguous_strides(input: Tensor) -> bool:
    """Those of axes of size 1 too, which ``is_contiguous`` does not look at."""
    step = 1
    for size, stride in zip(reversed(input.shape), reversed(input.stride()), strict=True):
        if stride != step:
            return False
        step = step * size
    return True


def _channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, step, *sides = shape
    strides = []
    for side in reversed(sides):
        strides.append(step)
        step = step * side
    return (step, 1, *reversed(strides))


def memory_of(*images: Tensor) -> Memory:
    """The memory format that all of the ``(N, C, H, W)`` images have; where both would do, the
    former."""
    if all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
        return "channels_last"
    if all(image.is_contiguous() for image in images):
        return "contiguous"
    return "strided"


def empty_image(
    shape: tuple[int, ...],
    like: Tensor,
    channels_last: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Memory for a result of ``shape``; by default on the device and in the dtype of ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    device = like.device if device is None else device
    return torch.empty(shape, dtype=dtype or like.dtype, device=device, memory_format=memory_format)


def extent(tensor: Tensor) -> int:
    """One more than the offset of the last element."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sides) + 1
