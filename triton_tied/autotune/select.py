"""The config of a launch: the caller's, the user's table, the shipped table, the cost model.

With ``torch.backends.cudnn.benchmark`` a problem without an entry is timed on first use, as cuDNN
does; otherwise the cost model chooses, at once and the same way every time. Nothing is timed in
deterministic mode, while a CUDA graph is captured, once torch.distributed is initialised, or on the
CPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..kernels import launch
from ..kernels.base_config import Kernel
from ..kernels.calls import Convolution, WeightGradient
from ..kernels.configs import Config
from ..kernels.plans import Plan, copied_to_output, make_plan
from ..kernels.precision import InputPrecision, input_precision
from . import first_use, gpus, image_copy, tuning
from .choices import Known, remember, remembered
from .problem import Problem, problem_of
from .recording import is_recording, record
from .shortlist import make_shortlist
from .tuned_configs import entry_for, was_timed_in_vain

# Why a config should not serve the tensors at hand, or None: the compiler's word, and the check of
# what it made.
Fault = Callable[[Any], str | None]

# Each is compiled, which takes seconds, while the user waits.
_MAX_TIMED = 6  # on first use
_MAX_COMPILED = 8  # where so many fail, something else is wrong


class Choice(NamedTuple):
    """How calls of one description are launched, or that nothing serves; and whether that was
    timed, if no table knew it, and its kernel checked."""

    plan: Plan | None
    timed: bool
    checked: bool

    def serves(self, device: torch.device) -> bool:
        """Whether it holds for another call of the description now: nobody gives configs or
        records, and it is careful enough."""
        if _given or is_recording():
            return False
        return device.type != "cuda" or self.is_careful(device)

    def is_careful(self, device: torch.device) -> bool:
        """Whether no more timing or checking is asked for now than when it was made."""
        return (self.timed or not times_on_first_use(device)) and (
            self.checked or not first_use.checks(device)
        )


# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_given: dict[str, Config] = {}


@contextlib.contextmanager
def using(*, conv: Config | None = None, weight_grad: Config | None = None) -> Iterator[None]:
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


def conv_plan(convolution: Convolution, known: Known | None = None) -> Plan | None:
    """How a convolution is launched; None: the reference has to serve. What is ``known`` of calls
    of its description saves the look-up, and is kept there.

    Raises:
        ValueError: a config that was given by :func:`using` cannot serve it.
        ToolchainError: Triton can compile nothing on this machine.
    """
    choice = None if known is None else known.choice
    if choice is None or not choice.serves(convolution.x.device):
        *tensors, layout, geometry, _, _, last, precision, dtype = convolution
        key = (layout, geometry, last, dtype, *_places(tensors, precision))
        choice = _choice(convolution, "conv", key, known)
    return choice.plan


def weight_grad_plan(gradient: WeightGradient, known: Known | None = None) -> Plan | None:
    """How a packed weight gradient is launched; as :func:`conv_plan`."""
    choice = None if known is None else known.choice
    if choice is None or not choice.serves(gradient.x.device):
        *tensors, layout, geometry, _, dtype, has_bias, precision = gradient
        key = (layout, geometry, dtype, has_bias, *_places(tensors, precision))
        choice = _choice(gradient, "weight_grad", key, known)
    return choice.plan


def problem_of_call(call: Convolution | WeightGradient) -> Problem:
    """The problem of a launch."""
    if isinstance(call, WeightGradient):
        images = [call.x, call.grad]
        return problem_of(
            "weight_grad", call.layout, call.geometry, images, "channels_last", written=call.dtype
        )
    parameters = (call.packed if call.bias is None else call.bias).dtype
    return problem_of(
        "conv",
        call.layout,
        call.geometry,
        [call.x],
        call.output_memory,
        call.weights,
        parameters,
        call.dtype,
    )


def _places(tensors: Sequence[Any], precision: InputPrecision | None) -> tuple:
    """What of the tensors, of which the first is an image, the plan and the compiled code depend
    on: equal places, equal plans."""
    image = tensors[0]
    places = [
        t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors
    ]
    return image.device, precision or input_precision(image.dtype), *places


def _choice(
    call: Convolution | WeightGradient, kernel: Kernel, key: tuple, keeper: Known | None
) -> Choice:
    if is_recording():
        record(problem_of_call(call))
    by_hand = _given.get(kernel)
    if by_hand is not None:
        return Choice(make_plan(call, by_hand), False, False)
    device, key = call.x.device, (kernel, *key)
    choice: Any = remembered(key)
    if choice is None or not choice.is_careful(device):
        times, checks = times_on_first_use(device), first_use.checks(device)
        as_launched = _as_launched(call, device)
        problem = problem_of_call(as_launched)

        def fault(config: Config) -> str | None:
            found = launch.fault(as_launched, config)
            return found or first_use.why_wrong(problem, as_launched, config)

        config = choose(problem, device, times, fault)
        plan = None if config is None else make_plan(as_launched, config)
        if plan is not None and isinstance(call, Convolution) and as_launched is not call:
            plan = copied_to_output(plan, call)
        choice = remember(key, Choice(plan, times, checks))
    if keeper is not None:
        keeper.choice = choice
    return choice


def _as_launched(
    call: Convolution | WeightGradient, device: torch.device
) -> Convolution | WeightGradient:
    """The call itself, or the same into channels-last memory, where a copy of that pays."""
    if not isinstance(call, Convolution) or call.channels_last or call.residual is not None:
        return call
    pays = image_copy.output_copying_pays(problem_of_call(call), device)
    return call._replace(channels_last=True) if pays else call


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
