"""What a convolution derives from ``packed`` before it can start, and its explicit reuse.

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

from . import paths
from .packing import Layout, expand

if paths.HAS_TRITON:
    from . import ops


class _Entry(NamedTuple):
    stamp: tuple[int, int]
    prepared: Any


# packed -> how it was prepared -> the result; forgotten with packed, should it be a temporary
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


def prepare(packed: Tensor, layout: Layout, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The dense weight in the compute dtype and the memory order of the input."""
    key = (layout, dtype, channels_last)
    return _reuse(packed, key, lambda: expand(packed.to(dtype), layout, channels_last))


def prepare_for_kernels(
    packed: Tensor, layout: Layout, dtype: torch.dtype, pays: Callable[[], bool]
) -> tuple[Tensor, Tensor | None]:
    """``packed`` in the compute dtype, and its unpacked centre, where that ``pays`` for one
    application or more may follow."""

    reused = _known_entries() is not None

    def make() -> tuple[Tensor, Tensor | None]:
        cast = packed.to(dtype)
        if layout.taps % 2 == 0 or torch._C._are_functorch_transforms_active():
            return cast, None
        if not reused and not pays():
            return cast, None
        # Derived from packed, so no gradient goes through it; saved, it serves the backward too.
        c, groups = layout.group_channels, layout.groups
        return cast, ops.unpack_centre(cast.detach(), c, groups, layout.pairs, layout.symmetry)

    return _reuse(packed, (layout, dtype, "kernels"), make)


def _known_entries() -> _Entries | None:
    return None if torch.compiler.is_compiling() else _entries.get()


_Prepared = TypeVar("_Prepared")


def _reuse(packed: Tensor, how: tuple, make: Callable[[], _Prepared]) -> _Prepared:
    """What ``make`` makes of ``packed``, or what it made of it before in the same block."""
    entries = _known_entries()
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
    return entry.prepared


def _stamp(packed: Tensor) -> tuple[int, int] | None:
    """Changes when the values may have; None where PyTorch cannot tell."""
    try:
        return packed._version, packed.data_ptr()
    except RuntimeError:  # inference tensors keep no version, torch.func's wrappers no storage
        return None
