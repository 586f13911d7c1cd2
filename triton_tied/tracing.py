"""What traces a call, and what it must not see of it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

# Any other class may stand for something else than the numbers in its memory, or have no memory.
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def overridable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """As a function of PyTorch's is: a mode, or a subclass of Tensor or a proxy of ``torch.fx``
    among the arguments, is asked first."""

    @functools.wraps(function)
    def ask(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(ask, given, *args, **kwargs)
        return function(*args, **kwargs)

    return ask


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """``torch.jit.trace`` sees nothing of what happens inside: results are constants, and sizes are
    plain numbers."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


def sizes_of(tensor: Tensor) -> torch.Size:
    """As plain numbers, in place of which ``torch.jit.trace`` has tensors."""
    if not torch.jit.is_tracing():
        return tensor.shape
    with untraced():
        return tensor.shape


def takes_plain_operations_only() -> bool:
    """Whether a call is traced by what takes no operators but PyTorch's own: TorchScript, ONNX, and
    the compiler where it meets a transform of ``torch.func`` or forward mode. (Of other operators
    it takes the reverse mode only, and no autograd.Function with a jvp or a vmap of its own.)"""
    if torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    onnx = sys.modules.get("torch.onnx")  # slow to import, and there only if someone exports
    return torch.jit.is_tracing() or (onnx is not None and onnx.is_in_onnx_export())


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """In which autocast computes on such a device; None where it is off."""
    known = torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers: it is of no other class, does not stand for the many of
    ``autograd.grad(is_grads_batched=True)``, and is no view that negates."""
    return (
        type(tensor) in PLAIN_TENSORS
        and not is_legacy_batchedtensor(tensor)
        and not tensor.is_neg()
    )


def is_plain_here() -> bool:
    """Whether nobody but the kernels sees a call of plain tensors: no compiler, transform, forward
    mode, tracer or profiler, and no mode that listens to the dispatcher."""
    return not (
        is_transformed_here()  # first: the compiler cannot trace the others
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
    )


def is_transformed_here() -> bool:
    """Whether a compiler, a transform, forward mode or a tracer makes something else of a call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
