"""The config of a launch: the caller's, the user's table, the shipped table, the cost model.

With ``torch.backends.cudnn.benchmark`` a problem without an entry is timed on first use, as cuDNN
does; otherwise the cost model chooses, at once and the same way every time. Nothing is timed in
deterministic mode, while a CUDA graph is captured, or on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..kernels import launch
from ..kernels.configs import Config, ConvConfig, WeightGradConfig
from ..kernels.launch import Convolution, WeightGradient
from . import gpus, tuning
from .problem import Centre, Problem, key_of, problem_of
from .recording import record
from .shortlist import make_shortlist
from .tuned_configs import entry_for, remember, remembered, was_timed_in_vain

# Why a config should not be launched for the tensors at hand, or None: the compiler's word.
Fault = Callable[[Any], str | None]

# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_given: dict[str, Config] = {}


@contextlib.contextmanager
def using(
    *, conv: ConvConfig | None = None, weight_grad: WeightGradConfig | None = None
) -> Iterator[None]:
    """Inside this block the kernels take these configs, whatever the problem, on all threads.

    A config that cannot serve a problem raises ValueError at the launch.
    """
    global _given
    outer, given = _given, {"conv": conv, "weight_grad": weight_grad}
    _given = {**outer, **{name: config for name, config in given.items() if config is not None}}
    try:
        yield
    finally:
        _given = outer


def conv_config(convolution: Convolution) -> ConvConfig:
    """The config that a convolution is launched with."""
    x, packed, centre, bias, residual, layout, geometry, _, channels_last = convolution
    way: Centre = "gathered" if centre is None else "unpacked"
    record("conv", layout, geometry, way, x)
    if "conv" in _given:
        return _given["conv"]  # type: ignore[return-value]
    call = (
        "conv", layout, geometry, way, torch.backends.cudnn.benchmark, *key_of(x),
        # what else the compiled code depends on, and so whether it has a fault
        packed.data_ptr() % 16, bias is None, None if residual is None else residual.stride(),
        channels_last,
    )  # fmt: skip
    known = remembered(call)
    if known is None:
        problem = problem_of("conv", layout, geometry, way, x)
        known = _choose(call, problem, x.device, partial(launch.conv_fault, convolution))
    return known  # type: ignore[return-value]


def weight_grad_config(gradient: WeightGradient) -> WeightGradConfig:
    """The config that a packed weight gradient is launched with."""
    x, grad, layout, geometry, _ = gradient
    record("weight_grad", layout, geometry, "none", x, grad)
    if "weight_grad" in _given:
        return _given["weight_grad"]  # type: ignore[return-value]
    call = (
        "weight_grad", layout, geometry, torch.backends.cudnn.benchmark, *key_of(x, grad)
    )  # fmt: skip
    known = remembered(call)
    if known is None:
        problem = problem_of("weight_grad", layout, geometry, "none", x, grad)
        known = _choose(call, problem, x.device, partial(launch.weight_grad_fault, gradient))
    return known  # type: ignore[return-value]


def _choose(call: tuple, problem: Problem, device: torch.device, fault: Fault) -> Config:
    config, is_final = choose(problem, device, fault)
    return remember(call, config) if is_final else config


def choose(
    problem: Problem, device: torch.device, fault: Fault = lambda config: None
) -> tuple[Config, bool]:
    """The config, and whether that is the last word while tables stay as they are."""
    entry = entry_for(problem, device)
    if entry and fault(entry.config) is None:
        return entry.config, True
    if not torch.backends.cudnn.benchmark or device.type != "cuda":
        return _untimed(problem, device, fault), True
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return _untimed(problem, device, fault), False
    winner = _timed_on_first_use(problem, device)
    if winner is not None and fault(winner) is None:
        return winner, True
    return _untimed(problem, device, fault), True


def _timed_on_first_use(problem: Problem, device: torch.device) -> Config | None:
    if was_timed_in_vain(problem, device):
        return None  # what it won is no good here, or nothing won
    try:
        return tuning.tune_problem(problem, device).winner
    except torch.cuda.OutOfMemoryError:
        # The tensors to time on do not fit beside the user's: no reason to fail, nor to try again.
        tuning.give_up(problem, device)
        return None


def _untimed(problem: Problem, device: torch.device, fault: Fault) -> Config:
    """The first in the order of the cost model that has no fault; the first where all have."""
    ranked = make_shortlist(problem, gpus.of_device(device)).ranked
    return next((config for config in ranked if fault(config) is None), ranked[0])
