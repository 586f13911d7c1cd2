"""The least time that a pass can take: its arithmetic and its bytes, counted by formula, over what
this machine reaches in a large matrix product and a large copy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .clocks import Clock
from .workloads import FORMULAS, TORCH_DTYPES, Dtype, Workload


class Work(NamedTuple):
    """Of one call: sums and products, and bytes that must be read or written once."""

    flops: int
    least_bytes: int


class Ceilings(NamedTuple):
    """Rates in 10^12 operations and 10^9 bytes a second."""

    tflops: dict[str, float]  # by dtype
    copy_gbs: float

    def least_ms(self, work: Work, dtype: Dtype) -> float:
        arithmetic = work.flops / (self.tflops[dtype] * 1e9)
        return max(arithmetic, work.least_bytes / (self.copy_gbs * 1e6))


def work_of(workload: Workload, pass_name: str, times: int) -> Work:
    """What a pass must do, whoever does it. Each convolution of a backward costs a forward; its
    images are read and written once in each direction, and the free numbers once each way."""
    problem = workload.problem
    images = problem.least_bytes - problem.itemsize * workload.layout.size
    packed = problem.itemsize * workload.layout.size
    dense = problem.itemsize * math.prod(workload.layout.weight_shape)
    image = images // 2  # the output is as large as the input
    work = {
        "weight_build": Work(0, packed + dense),
        "forward": Work(problem.flops, problem.least_bytes),
        "inference": Work(problem.flops, problem.least_bytes),
        "input_gradient": Work(problem.flops, problem.least_bytes),
        "weight_gradient": Work(problem.flops, problem.least_bytes),
        "forward_backward": Work(3 * problem.flops, 5 * image + 3 * packed),
        "applications": Work(3 * problem.flops * times, 5 * image * times + 3 * packed),
        "evaluation": Work(problem.flops * times, 2 * image * times + packed),
    }
    if workload.family not in FORMULAS:
        return work[pass_name]
    # Of a formula only what goes in and comes out must be read and written.
    least_bytes = work["forward" if pass_name == "evaluation" else pass_name].least_bytes
    return Work(problem.flops * _convolutions(workload, pass_name, times), least_bytes)


def _convolutions(workload: Workload, pass_name: str, times: int) -> int:
    if pass_name == "evaluation":
        return workload.convolutions(times)
    forward = workload.convolutions(workload.applications)
    if pass_name == "forward":
        return forward
    # The splitting's backward finds another equilibrium, and has the gradients of one application.
    return 2 * forward + 6 if workload.family == "mondeq-splitting" else 3 * forward


def measure(clock: Clock, dtypes: set[Dtype]) -> Ceilings:
    """What the device reaches, with values that are random, since zeros run faster."""
    side, numbers = (8192, 2**29) if clock.on_gpu else (1536, 2**26)
    source = torch.randn(numbers // 4, device=clock.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / 1e6 / _least(clock, lambda: target.copy_(source))
    tflops: dict[str, float] = {}
    for dtype in sorted(dtypes):
        a, b = (
            torch.randn(side, side, device=clock.device).to(TORCH_DTYPES[dtype]) for _ in range(2)
        )
        with precision(dtype):
            milliseconds = _least(clock, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        tflops[dtype] = 2 * side**3 / 1e9 / milliseconds
    return Ceilings(tflops, copied)


def _least(clock: Clock, call: Callable[[], object], times: int = 12) -> float:
    """The best of some: a ceiling is what was reached once."""
    call()
    return min(clock.eager(call) for _ in range(times))


@contextlib.contextmanager
def precision(dtype: Dtype) -> Iterator[None]:
    """Inside, float32 products on a GPU are TF32 or not, as the dtype says."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting
