"""A problem made real on a GPU: random tensors, launches, the clock, and the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.testing
from torch import Tensor

from ..kernels import launch
from ..kernels.configs import Config
from ..kernels.launch import Convolution, WeightGradient
from ..kernels.precision import InputPrecision
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
        layout = problem.layout
        dtype = getattr(torch, problem.dtype.removesuffix("_ieee"))
        self.problem = problem
        # Of its own: whether something is tuned must not change the user's random numbers.
        self._generator = torch.Generator(device).manual_seed(0)
        self.x = self._image(problem.image, dtype, device)
        self.packed = self._random(layout.size, dtype, device)
        centre = None
        if problem.centre == "unpacked":
            centre = launch.unpack_centre(self.packed, layout, dtype)
        last, geometry = problem.memory == "channels_last", problem.geometry
        precision: InputPrecision = "tf32" if problem.dtype == "float32" else "ieee"
        self._call: Convolution | WeightGradient
        if problem.is_weight_grad:
            grad = self._image(problem.output, dtype, device)
            self._call = WeightGradient(self.x, grad, layout, geometry, 1.0, precision)
        else:
            self._call = Convolution(
                self.x, self.packed, centre, None, None, layout, geometry, 1.0, last, precision
            )

    def prepare(self, config: Config) -> Callable[[], Tensor]:
        """What launches the config, and returns the result; all else is done once, here, so that
        the clock sees little of Python."""
        return launch.prepared(self._call, config)

    def fault(self, config: Config) -> str | None:
        """Why the config should not be timed, or None."""
        return launch.fault(self._call, config)

    def is_right(self, config: Config) -> bool:
        """Whether the result is that of the reference, to the rounding of the dtype."""
        return excess_of(self._call, self.prepare(config)()) <= 1

    def _image(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        n, h, w = sizes
        memory, channels = self.problem.memory, self.problem.layout.channels
        # Neither format: rows and columns exchanged. Not aligned: one element further on.
        sides = (w, h) if memory == "strided" else (h, w)
        offset = 0 if self.problem.aligned else 1
        order = (*sides, channels) if memory == "channels_last" else (channels, *sides)
        flat = self._random(n * channels * h * w + offset, dtype, device)
        image = flat[offset:].view(n, *order)
        if memory == "channels_last":
            return image.permute(0, 3, 1, 2)
        return image.transpose(2, 3) if memory == "strided" else image

    def _random(self, size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=self._generator)
