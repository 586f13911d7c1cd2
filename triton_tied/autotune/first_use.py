"""A compiled kernel is checked when it first serves on a GPU: nobody may have run it there before.

It is launched once more, on a few images of random numbers that lie in memory as the caller's do.
Sizes of images are arguments, so that is the same machine code, and the reference in float64 says
whether its result is right. One that is wrong never serves again. Nothing is checked on the CPU,
nor while a CUDA graph is captured, nor where the environment variable ``TRITON_TIED_CHECK`` is 0.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import launch
from ..kernels.configs import Config
from ..kernels.launch import Convolution, WeightGradient
from ..kernels.toolchain import ToolchainError
from ..memory_format import extent
from ..packing import Layout, expand_centre
from . import tuned_configs
from .problem import Problem
from .tuned_configs import keep_verdict, was_right
from .verdict import excess_of

_VARIABLE = "TRITON_TIED_CHECK"
_ALPHA = 0.5  # other than 1, so that it shows


def checks(device: torch.device) -> bool:
    """Whether kernels are checked here and now."""
    return (
        device.type == "cuda"
        and os.environ.get(_VARIABLE) != "0"
        and not torch.cuda.is_current_stream_capturing()
    )


def why_wrong(problem: Problem, call: Convolution | WeightGradient, config: Config) -> str | None:
    """Why the config must not serve, or None."""

    def is_right() -> bool:
        small = _small(call, config)
        return excess_of(small, launch.run(launch.make_plan(small, config), small)) <= 1

    if not len(call.x) or problem.wide:  # nothing is launched; a few images would run other code
        return None
    right = _known_or(is_right, _code_of(problem, call, config), call.x.device)
    return None if right else "its result is not that of the reference"


def unpacks_centre(packed: Tensor, layout: Layout) -> bool:
    """Whether the kernel may unpack the centre tap."""

    def is_right() -> bool:
        random = _Random(packed.device, 0).like(packed)
        centre = launch.unpack_centre(random, layout, random.dtype)
        return torch.equal(centre, expand_centre(random, layout))

    dtype = str(packed.dtype).removeprefix("torch.")
    code = f"centre {dtype} c{layout.group_channels} g{layout.groups} {layout.symmetry}"
    return _known_or(is_right, code, packed.device)


def _known_or(is_right: Callable[[], bool], code: str, device: torch.device) -> bool:
    """What is known of compiled code, or comes out now. Where nothing is checked, or memory is too
    short for it, as a warning says, what is unknown serves."""
    right = was_right(code, device)
    if right is not None or not checks(device):
        return right is not False
    try:
        with torch.no_grad():
            right = is_right()
    except torch.cuda.OutOfMemoryError:
        warnings.warn(f"there is no memory to check a kernel: {code}", stacklevel=2)
        return True
    except ToolchainError:
        raise
    except RuntimeError as error:  # the launch was refused: the next may be taken
        warnings.warn(f"a kernel cannot be launched and is not used: {code}: {error}", stacklevel=2)
        return False
    keep_verdict(code, right, device)
    if not right:
        name = tuned_configs.origin_of(device).gpu
        text = f"a kernel computes wrongly on {name} and is not used: {code}. Please report it"
        warnings.warn(text, stacklevel=2)
    return right


def _code_of(problem: Problem, call: Convolution | WeightGradient, config: Config) -> str:
    """What the machine code depends on, in words."""
    parts = [problem.code, *sorted(problem.needs(config))]
    for name, value in call._asdict().items():
        if isinstance(value, Tensor):
            parts.append(name if value.data_ptr() % 16 == 0 else f"{name}_unaligned")
    if problem.memory == "strided":
        parts.append(f"strides {call.x.stride()}")
    if isinstance(call, Convolution):
        parts.append("to_channels_last" if call.channels_last else "to_contiguous")
        if call.residual is not None and not call.residual.is_contiguous():
            parts.append(f"residual_strides {call.residual.stride()}")
    return " ".join([*parts, repr(config)])


def _small(call: Convolution | WeightGradient, config: Config) -> Convolution | WeightGradient:
    """Two boxes of images, which reach beyond the last one if, and only if, those of all do: so
    sums are split as for all, and the same machine code is taken."""
    n, box = len(call.x), config.box[0]
    random = _Random(call.x.device, min(n, box + 1 if n % box else 2 * box))
    if isinstance(call, WeightGradient):
        return call._replace(x=random.images(call.x), grad=random.images(call.grad), alpha=_ALPHA)
    packed = random.like(call.packed)
    return call._replace(
        x=random.images(call.x),
        packed=packed,
        centre=None if call.centre is None else expand_centre(packed, call.layout).contiguous(),
        bias=None if call.bias is None else random.like(call.bias),
        residual=None if call.residual is None else random.images(call.residual),
        alpha=_ALPHA,
    )


class _Random:
    """Random numbers of their own: that something is checked must not change the user's."""

    def __init__(self, device: torch.device, images: int) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._images = images

    def images(self, all_images: Tensor) -> Tensor:
        return self.like(all_images[: self._images])

    def like(self, tensor: Tensor) -> Tensor:
        """With the strides of a tensor, and as far from a multiple of 16 bytes."""
        shift = tensor.data_ptr() % 16 // tensor.element_size()
        numbers = torch.randn(
            extent(tensor) + shift,
            dtype=tensor.dtype,
            device=tensor.device,
            generator=self._generator,
        )
        return numbers.as_strided(tensor.shape, tensor.stride(), shift)
