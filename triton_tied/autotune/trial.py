"""A problem made real on a GPU: random tensors, launches, the clock, and the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.testing
from torch import Tensor

from .. import reference
from ..kernels import launch
from ..kernels.configs import Config, ConvConfig, WeightGradConfig
from ..kernels.launch import Convolution, WeightGradient
from ..packing import expand
from .problem import Problem
from .race import Outcome, race
from .shortlist import Shortlist

# Two roundings of the same sum differ by a few units of the products' last place; a wrong config
# by as much as the sum itself.
_MAX_ERROR = {"float32_ieee": 1e-5, "float32": 5e-3, "float16": 5e-3, "bfloat16": 3e-2}
_WARMUP_MS, _MEASURE_MS = 5, 15  # a config is timed several times, so each time may be short


def race_on(
    device: torch.device,
    problem: Problem,
    shortlist: Shortlist,
    budget_s: float,
    progress: Callable[[str], None],
) -> Outcome:
    """:func:`.race.race` on a GPU, with ``triton.testing.do_bench`` for a clock."""
    with torch.cuda.device(device), torch.no_grad(), precision_of(problem):
        trial = Trial(problem, device)
        return race(
            shortlist,
            trial.run,
            trial.is_right,
            clock,
            budget_s,
            progress=progress,
            fault=trial.fault,
        )


def clock(call: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return triton.testing.do_bench(call, warmup=_WARMUP_MS, rep=_MEASURE_MS, return_mode="median")


@contextlib.contextmanager
def precision_of(problem: Problem) -> Iterator[None]:
    """PyTorch's setting for float32 that the problem stands for: kernel and reference follow it."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if problem.dtype.startswith("float32"):
        setting.fp32_precision = "ieee" if problem.dtype == "float32_ieee" else "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


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
        self._convolution = Convolution(
            self.x, self.packed, centre, None, None, layout, geometry, 1.0, last
        )
        if problem.is_weight_grad:
            self.grad = self._image(problem.output, dtype, device)
            self._gradient = WeightGradient(self.x, self.grad, layout, geometry, 1.0)

    def run(self, config: Config) -> Tensor:
        if isinstance(config, WeightGradConfig):
            return launch.weight_grad(self._gradient, config)
        return launch.conv(self._convolution, config)

    def fault(self, config: Config) -> str | None:
        """Why the config should not be timed, or None."""
        if isinstance(config, WeightGradConfig):
            return launch.weight_grad_fault(self._gradient, config)
        return launch.conv_fault(self._convolution, config)

    def is_right(self, config: Config) -> bool:
        """Whether the result is that of the reference, to the rounding of the dtype."""
        expected = self._expected(isinstance(config, ConvConfig)).double()
        error = (self.run(config).double() - expected).norm()
        return bool(error <= _MAX_ERROR[self.problem.dtype] * expected.norm())

    def _expected(self, is_conv: bool) -> Tensor:
        layout, geometry = self.problem.layout, self.problem.geometry
        if not is_conv:
            return reference.weight_grad(self.x, self.grad, layout, geometry, 1.0)
        weight = expand(self.packed, layout)
        return reference.convolve(self.x, weight, None, geometry, layout.groups)

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
