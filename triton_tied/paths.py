"""Which path serves a call: the kernels, or the reference in plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# Triton reads the variable once, when a kernel is decorated, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=1024)
def why_reference(
    device: torch.device, dtype: torch.dtype, stride: tuple[int, ...] = (1, 1)
) -> str | None:
    """Why the reference serves tensors of this device and dtype, or None where the kernels do."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cpu" and not INTERPRETED:
        return "kernels run on GPUs (or on the CPU, interpreted, with TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for devices of type {device.type!r}"
    if len(stride) == 3:
        return "there are no kernels for three spatial dimensions"
    if max(stride) > 1:
        return f"there are no kernels for stride={list(stride)}"
    if dtype not in _DTYPES:
        return f"there are no kernels for {dtype}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter computes products of bfloat16 wrongly"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            return f"kernels need compute capability {_CAPABILITY}, this GPU has {capability}"
    return None
