"""Which path serves a call: the kernels, or the reference in plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .tracing import takes_plain_operations_only

# Triton reads the variable once, when a kernel is decorated, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
_rehearsing: ContextVar[bool] = ContextVar("triton_tied_rehearsing", default=False)


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # it is there, made by something that gave it no __spec__
        return True


HAS_TRITON = _is_installed()


def why_reference(
    device: torch.device, dtype: torch.dtype, stride: tuple[int, ...] = (1, 1)
) -> str | None:
    """Why the reference serves tensors of this device and dtype, or None where the kernels do."""
    return _why_reference(device, dtype, stride)


# What torch.compiler.assume_constant_result does, and for that imports the compiler.
why_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _why_reference(device: torch.device, dtype: torch.dtype, stride: tuple[int, ...]) -> str | None:
    return _why_no_kernel(dtype, stride) or _why_not_here(device, dtype) or why_no_triton()


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton cannot compile the kernels, or None. Imports Triton."""
    if not HAS_TRITON:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a driver's, say: whatever it is, the call is served
        return f"Triton cannot be imported: {error!r}"
    try:
        inspect.getsource(why_no_triton)
    except OSError:
        return "Triton compiles from source code, and the package was installed without its own"
    return None


def takes_operators(device: torch.device, dtype: torch.dtype, stride: tuple[int, ...]) -> bool:
    """Whether a call goes through the operators of the kernels."""
    if why_reference(device, dtype, stride) is None:
        return not takes_plain_operations_only()
    if torch.compiler.is_compiling() or not _rehearsing.get():
        return False
    return _why_no_kernel(dtype, stride) is None


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Inside this block calls go through the operators as if a GPU were there, so that the
    problems which it would meet can be listed; the operators themselves compute the reference."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def _why_no_kernel(dtype: torch.dtype, stride: tuple[int, ...]) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if len(stride) == 3:
        return "there are no kernels for three spatial dimensions"
    if max(stride) > 1:
        return f"there are no kernels for stride={list(stride)}"
    if dtype not in _KERNEL_DTYPES:
        return f"there are no kernels for {dtype}"
    return None


def _why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        if not INTERPRETED:
            return "kernels run on GPUs (or on the CPU, interpreted, with TRITON_INTERPRET=1)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes products of bfloat16 wrongly"
    elif device.type != "cuda":
        return f"there are no kernels for devices of type {device.type!r}"
    elif torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"kernels need compute capability {_MIN_CAPABILITY}, this GPU has {capability}"
    return None
