"""Checks of arguments, and of a layer's parameter, that several functions and layers share."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import check_padding_mode
from .packing import check_supported
from .tracing import overridable


def check_odd(function: str, kernel_size: tuple[int, ...]) -> None:
    """Raises ValueError for an even size: only the map of an odd one is its own transpose."""
    if any(size % 2 == 0 for size in kernel_size):
        raise ValueError(f"{function} needs an odd kernel_size, got {kernel_size}")


def check_circular_or_zeros(function: str, padding_mode: str) -> None:
    """Raises ValueError for the others, with which the map is not its own transpose."""
    check_padding_mode(padding_mode)
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"{function} needs padding_mode 'zeros' or 'circular', got {padding_mode!r}"
        )


@overridable
def check_image(function: str, input: Tensor, channels: int) -> None:
    """Raises unless ``input`` is a batch of images of so many channels, or one of them."""
    check_supported(function, "input", input)
    if input.dim() not in (3, 4) or input.shape[-3] != channels:
        raise RuntimeError(
            f"{function} expected input of size [N, {channels}, H, W] or [{channels}, H, W], "
            f"but got input of size {list(input.shape)}"
        )


def check_holds_its_numbers(layer: nn.Module) -> None:
    """Raises RuntimeError where what is stored in ``packed_weight`` would be lost."""
    if "packed_weight" not in layer._parameters:
        raise RuntimeError(packed_is_computed(layer))


def packed_is_computed(layer: nn.Module) -> str:
    return (
        f"packed_weight of this {type(layer).__name__} is computed from other parameters, by a "
        f"parametrization or by pruning, so that a weight stored in it would be lost. Undo that "
        f"first"
    )
