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
from ..kernels.calls import Convolution, WeightGradient
from ..kernels.configs import Config
from ..kernels.plans import make_plan
from ..kernels.precision import input_precision
from ..kernels.stored_taps import expand_matrices, stored_taps
from ..kernels.toolchain import ToolchainError
from ..memory_format import extent
from ..packing import Layout
from . import tuned_configs
from .problem import Problem
from .tuned_configs import keep_verdict, was_right
from .verdict import excess_of

_VARIABLE = "TRITON_TIED_CHECK"
_ALPHA, _BETA = 0.5, -2.0  # other than 1, so that it shows


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
        return excess_of(small, launch.run(make_plan(small, config), small)) <= 1

    if not len(call.x) or problem.wide:  # nothing is launched; a few images would run other code
        return None
    right = _known_or(is_right, _code_of(problem, call, config), call.x.device)
    return None if right else "its result is not that of the reference"


def unpacks_matrices(packed: Tensor, layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the kernel may unpack the matrices of a convolution in ``dtype``."""
    precision = input_precision(dtype)
    stored = stored_taps(layout, precision)

    def is_right() -> bool:
        random = _Random(packed.device, 0).like(packed)
        matrices = launch.unpack_matrices(random, layout, stored, dtype, precision)
        return torch.equal(matrices, expand_matrices(random, layout, stored, dtype, precision))

    names = [str(each).removeprefix("torch.") for each in (packed.dtype, dtype)]
    code = f"matrices {'_to_'.join(names)} {precision} stored{stored} {layout}"
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
    parts = [problem.code_of(config), *sorted(problem.needs(config))]
    for name, value in call._asdict().items():
        if isinstance(value, Tensor):
            dtype = "" if value.dtype == call.x.dtype else f"_{value.dtype}"
            parts.append(name + dtype + ("_unaligned" if value.data_ptr() % 16 else ""))
    if problem.memory == "strided":
        parts.append(f"strides {call.x.stride()}")
    if isinstance(call, Convolution):
        parts.append(f"stored{call.stored}" + (f" {call.dtype}" if call.dtype else ""))
        if call.residual is not None and problem.output_memory == "strided":
            parts.append(f"residual_strides {call.residual.stride()}")
    else:
        parts.append(f"{call.dtype} {call.has_bias}")
    return " ".join([*parts, repr(config)])


def _small(call: Convolution | WeightGradient, config: Config) -> Convolution | WeightGradient:
    """Two boxes of images, which reach beyond the last one if, and only if, those of all do: so
    sums are split as for all, and the same machine code is taken."""
    n, box = len(call.x), config.box[0]
    random = _Random(call.x.device, min(n, box + 1 if n % box else 2 * box))
    if isinstance(call, WeightGradient):
        return call._replace(x=random.images(call.x), grad=random.images(call.grad), alpha=_ALPHA)
    packed = random.like(call.packed)
    if call.weights.dim() == 1:
        weights = random.like(call.weights).copy_(packed)
    else:
        precision = call.precision or input_precision(call.x.dtype)
        dtype, stored = call.x.dtype, call.stored
        weights = expand_matrices(packed, call.layout, stored, dtype, precision)
    return call._replace(
        x=random.images(call.x),
        packed=packed,
        weights=weights,
        bias=None if call.bias is None else random.like(call.bias),
        residual=None if call.residual is None else random.images(call.residual),
        alpha=_ALPHA,
        beta=_BETA,
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
