"""Explicit reuse of what a convolution derives from ``packed`` before it can start.

On the reference path that is the dense weight; on the kernels' path it is the cast of a mixed
precision and, where that pays, the unpacked centre tap. It is made anew on every call, so that
nothing can be stale, unless the caller opens a :func:`cached` block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

_Derived = TypeVar("_Derived")


class _Entry(NamedTuple):
    stamp: tuple[int, int]
    derived: Any


# packed -> how it was derived -> the result; forgotten with packed, should it be a temporary
_Entries = WeakTensorKeyDictionary
_entries: ContextVar[_Entries | None] = ContextVar("triton_tied_cached", default=None)


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Inside this block each packed vector is expanded once, however often it is applied.

    Under autograd too: twelve applications then cost one expansion and, in the backward, one fold
    of the summed weight gradient. An in-place update of ``packed``, an optimizer step or a new
    ``packed.data`` is noticed and the weight made anew. A write *through* ``packed.data`` hides
    from autograd's version counter and is not noticed: open a new block after one. Blocks may be
    nested; all end with the outermost. Inside ``torch.compile`` and ``torch.func`` transforms
    nothing is reused. Also usable as a decorator.
    """
    if _entries.get() is not None:
        yield
        return
    entries = _Entries()
    # Fused optimizers do not bump the version counter of what they update.
    hook = register_optimizer_step_post_hook(lambda *_: entries.clear())
    token = _entries.set(entries)
    try:
        yield
    finally:
        _entries.reset(token)
        hook.remove()


def is_caching() -> bool:
    """Whether what is derived now may be used again."""
    return _open_block() is not None


def derived_from(packed: Tensor, how: tuple, make: Callable[[], _Derived]) -> _Derived:
    """What ``make`` makes of ``packed``, or what it made of it before in the same block, where
    ``how`` tells apart what is made."""
    entries = _open_block()
    stamp = None if entries is None else _stamp(packed)
    if entries is None or stamp is None:
        return make()
    tracked = torch.is_grad_enabled() and packed.requires_grad
    key = (*how, tracked, torch.is_inference_mode_enabled())
    known: dict[tuple, _Entry] = entries.setdefault(packed, {})
    entry = known.get(key)
    if entry is None or entry.stamp != stamp:
        entry = _Entry(stamp, make())
        known[key] = entry
    return entry.derived


def _open_block() -> _Entries | None:
    return None if torch.compiler.is_compiling() else _entries.get()


def _stamp(packed: Tensor) -> tuple[int, int] | None:
    """Changes when the values may have; None where PyTorch cannot tell."""
    try:
        return packed._version, packed.data_ptr()
    except RuntimeError:  # inference tensors keep no version, torch.func's wrappers no storage
        return None
