"""How images lie in memory: the formats that are told apart, and how far a tensor reaches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

Memory = Literal["channels_last", "contiguous", "strided"]


def is_channels_last(dims: int, input: Tensor) -> bool:
    """Whether a batched input asks for a channels-last output; one of both formats does not."""
    memory_format = CHANNELS_LAST.get(dims)
    if memory_format is None or input.dim() != dims + 2 or input.is_contiguous():
        return False
    return input.is_contiguous(memory_format=memory_format)


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
) -> Tensor:
    """Memory for a result of ``shape``, of the dtype and, by default, on the device of ``like``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    device = like.device if device is None else device
    return torch.empty(shape, dtype=like.dtype, device=device, memory_format=memory_format)


def extent(tensor: Tensor) -> int:
    """One more than the offset of the last element."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sides) + 1
