"""A problem made real on a GPU: random tensors, launches, the clock, and the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.testing
from torch import Tensor

from ..kernels import launch
from ..kernels.calls import Convolution, WeightGradient
from ..kernels.configs import Config
from ..kernels.plans import make_plan
from ..kernels.stored_taps import are_matrices, expand_matrices, stored_taps
from .problem import Problem
from .race import Outcome, race
from .shortlist import Shortlist
from .verdict import excess_of

_WARMUP_MS, _MEASURE_MS = 5, 15  # a config is timed several times, so each time may be short


def race_on(
    device: torch.device,
    problem: Problem,
    shortlist: Shortlist,
    budget_s: float,
    progress: Callable[[str], None],
) -> Outcome:
    """:func:`.race.race` on a GPU, with ``triton.testing.do_bench`` for a clock."""
    with torch.cuda.device(device), torch.no_grad():
        trial = Trial(problem, device)
        return race(
            shortlist,
            trial.prepare,
            trial.is_right,
            clock,
            budget_s,
            progress=progress,
            fault=trial.fault,
        )


def clock(call: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return triton.testing.do_bench(call, warmup=_WARMUP_MS, rep=_MEASURE_MS, return_mode="median")


class Trial:
    """Random tensors for a problem, and what its kernel makes of them."""

    def __init__(self, problem: Problem, device: torch.device | str) -> None:
        # Of its own: whether something is tuned must not change the user's random numbers.
        generator = torch.Generator(device).manual_seed(0)

        def numbers(size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        self.call = make_call(problem, numbers)

    def prepare(self, config: Config) -> Callable[[], Tensor]:
        """What launches the config, and returns the result; all else is done once, here, so that
        the clock sees little of Python."""
        return launch.prepared(make_plan(self.call, config), self.call)

    def fault(self, config: Config) -> str | None:
        """Why the config should not be timed, or None."""
        return launch.fault(self.call, config)

    def is_right(self, config: Config) -> bool:
        """Whether the result is that of the reference, to the rounding of the dtype."""
        return excess_of(self.call, self.prepare(config)()) <= 1


def make_call(
    problem: Problem, numbers: Callable[[int, torch.dtype], Tensor]
) -> Convolution | WeightGradient:
    """A launch of the problem on tensors made of so many numbers."""
    layout, geometry = problem.layout, problem.geometry
    dtype = getattr(torch, problem.dtype.removesuffix("_ieee"))
    written = getattr(torch, problem.written) if problem.written else None
    precision = problem.precision
    x = _image(problem, problem.image, dtype, numbers)
    if problem.is_weight_grad:
        grad = _image(problem, problem.output, dtype, numbers)
        return WeightGradient(x, grad, layout, geometry, 1.0, written or dtype, False, precision)
    parameters = getattr(torch, problem.parameters) if problem.parameters else dtype
    packed = numbers(layout.size, parameters)
    if are_matrices(layout, precision):
        weights = expand_matrices(packed, layout, stored_taps(layout, precision), dtype, precision)
    else:
        weights = packed.to(dtype)
    channels_last = problem.output_memory == "channels_last"
    return Convolution(
        x,
        packed,
        weights,
        None,
        None,
        layout,
        geometry,
        1.0,
        1.0,
        channels_last,
        precision,
        written,
    )


def _image(
    problem: Problem,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    numbers: Callable[[int, torch.dtype], Tensor],
) -> Tensor:
    n, h, w = sizes
    memory, channels = problem.memory, problem.layout.channels
    # Neither format: rows and columns exchanged. Not aligned: one element further on.
    sides = (w, h) if memory == "strided" else (h, w)
    offset = 0 if problem.aligned else 1
    order = (*sides, channels) if memory == "channels_last" else (channels, *sides)
    image = numbers(n * channels * h * w + offset, dtype)[offset:].view(n, *order)
    if memory == "channels_last":
        return image.permute(0, 3, 1, 2)
    return image.transpose(2, 3) if memory == "strided" else image
