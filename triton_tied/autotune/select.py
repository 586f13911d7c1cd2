"""The config of a launch: the caller's, the user's table, the shipped table, the cost model.

With ``torch.backends.cudnn.benchmark`` a problem without an entry is timed on first use, as cuDNN
does; otherwise the cost model chooses, at once and the same way every time. Nothing is timed in
deterministic mode, while a CUDA graph is captured, once torch.distributed is initialised, or on the
CPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import launch
from ..kernels.configs import Config, ConvConfig, WeightGradConfig
from ..kernels.launch import Convolution, Plan, WeightGradient, make_plan
from . import first_use, gpus, tuning
from .candidates import Kernel
from .problem import Centre, Problem, key_of, problem_of
from .recording import extras_of, is_recording, record
from .shortlist import make_shortlist
from .tuned_configs import entry_for, remember, remembered, was_timed_in_vain

# Why a config should not serve the tensors at hand, or None: the compiler's word, and the check of
# what it made.
Fault = Callable[[Any], str | None]

# Each is compiled, which takes seconds, while the user waits.
_MAX_TIMED = 6  # on first use
_MAX_COMPILED = 8  # where so many fail, something else is wrong


class Choice(NamedTuple):
    """What is remembered of a call's description: how it is launched, or that nothing serves."""

    plan: Plan | None


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


def conv_plan(convolution: Convolution) -> Plan | None:
    """How a convolution is launched; None: the reference has to serve.

    Raises:
        ValueError: a config that was given by :func:`using` cannot serve it.
        ToolchainError: Triton can compile nothing on this machine.
    """
    x, packed, centre, bias, residual, *_, channels_last, _ = convolution
    # What else than the problem the compiled code depends on, and so whether it has a fault.
    code = (
        packed.data_ptr() % 16,
        None if centre is None else centre.data_ptr() % 16,
        None if bias is None else bias.data_ptr() % 16,
        None if residual is None else (residual.data_ptr() % 16, residual.stride()),
        channels_last,
    )
    way: Centre = "gathered" if centre is None else "unpacked"
    return _plan("conv", convolution, way, code, x)


def weight_grad_plan(gradient: WeightGradient) -> Plan | None:
    """How a packed weight gradient is launched; as :func:`conv_plan`."""
    return _plan("weight_grad", gradient, "none", (), gradient.x, gradient.grad)


def _plan(
    kernel: Kernel, call: Convolution | WeightGradient, way: Centre, code: tuple, *images: Tensor
) -> Plan | None:
    layout, geometry, device = call.layout, call.geometry, call.x.device
    if is_recording():
        extras: Collection[str] = ()
        if isinstance(call, Convolution):
            extras = extras_of(call.bias, call.residual, call.channels_last)
        record(kernel, layout, geometry, way, *images, extras=extras)
    by_hand = _given.get(kernel)
    if by_hand is not None:
        return make_plan(call, by_hand)
    times, checks = times_on_first_use(device), first_use.checks(device)
    key = (kernel, layout, geometry, way, times, checks, *key_of(*images), *code)
    known = remembered(key)
    if known is None:
        problem = problem_of(kernel, layout, geometry, way, *images)

        def fault(config: Config) -> str | None:
            return launch.fault(call, config) or first_use.why_wrong(problem, call, config)

        config = choose(problem, device, times, fault)
        known = remember(key, Choice(None if config is None else make_plan(call, config)))
    return known.plan  # type: ignore[attr-defined]


def times_on_first_use(device: torch.device) -> bool:
    """Whether a problem that no table knows is timed when it first comes.

    Among several processes it is not: while one waits for its GPU, which waits for a collective of
    all, another could wait for the first to be done; and each should take the same config.
    """
    return (
        torch.backends.cudnn.benchmark
        and device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not torch.cuda.is_current_stream_capturing()
    )


def choose(
    problem: Problem,
    device: torch.device,
    times: bool = False,
    fault: Fault = lambda config: None,
) -> Config | None:
    """The config for a problem; None, with a warning, where all that were tried have a fault.
    ``times``: a problem without an entry is timed now."""
    entry = entry_for(problem, device)
    if entry and fault(entry.config) is None:
        return entry.config
    winner = _timed_on_first_use(problem, device) if times else None
    if winner is not None and fault(winner) is None:
        return winner
    return _untimed(problem, device, fault)


def _timed_on_first_use(problem: Problem, device: torch.device) -> Config | None:
    if was_timed_in_vain(problem, device):
        return None  # what it won is no good here, or nothing won
    try:
        return tuning.tune_problem(problem, device, most=_MAX_TIMED).winner
    except torch.cuda.OutOfMemoryError:
        # The tensors to time on do not fit beside the user's: no reason to fail, nor to try again.
        tuning.give_up(problem, device)
        return None


def _untimed(problem: Problem, device: torch.device, fault: Fault) -> Config | None:
    """The first in the order of the cost model that has no fault."""
    faults = []
    for config in make_shortlist(problem, gpus.of_device(device)).ranked[:_MAX_COMPILED]:
        reason = fault(config)
        if reason is None:
            return config
        faults.append(f"{config}: {reason}")
    warnings.warn(
        f"plain PyTorch serves {problem.key}, since no kernel does; {faults[0]}", stacklevel=2
    )
    return None
