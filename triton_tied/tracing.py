"""What ``torch.jit.trace`` and the exporters must not see."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
    """Whether a call is traced for TorchScript or ONNX, which know no operators but PyTorch's."""
    if torch.compiler.is_dynamo_compiling():
        return False
    onnx = sys.modules.get("torch.onnx")  # slow to import, and there only if someone exports
    return torch.jit.is_tracing() or (onnx is not None and onnx.is_in_onnx_export())
