"""What ``torch.jit.trace``, the exporters and the compiler must not see."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    onnx = sys.modules.get("torch.onnx")  # slow to import, and there only if someone exports
    return torch.jit.is_tracing() or (onnx is not None and onnx.is_in_onnx_export())
