"""Reuse of what is made of ``packed`` before a convolution can start: the dense weight of the
reference path, what the kernels read on the kernels' path.

It is made anew on every call, so that nothing can be stale, unless the caller opens a
:class:`cached` block, or prepares the weight and passes it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from .tracing import PLAIN_TENSORS

_Parts = TypeVar("_Parts", bound=tuple[Any, ...])
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class cached:
    """``with cached():`` makes each weight once, however often it is applied inside the block.

    Inside the block what is made of a packed vector at its first application serves the later
    ones, under autograd too, until a backward has computed the vector's gradient or the block ends.
    It is made anew after a change that PyTorch counts: one that raises the vector's version (an
    in-place operation, an optimizer's step, ``load_state_dict``), or ``.data`` in other memory.
    A change that PyTorch does not count is not noticed: a write through ``.data`` or ``.numpy()``,
    by a collective of ``torch.distributed``, or by a fused optimizer without a backward in the
    block; open a block after it.

    A vector is a tensor object: ``2 * packed`` is another one each time. ``unpack`` and ``.weight``
    are served too, with one tensor each time, which must not be written to: that raises. A block
    inside another joins it. It belongs to its thread and to its asyncio task. Under
    ``torch.compile``, ``torch.func``, forward-mode differentiation and tracing nothing is reused.
    Also a decorator, but of no generator or coroutine.
    """

    def __init__(self) -> None:
        self._entered = False
        self._block: _Block | None = None

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if self._entered:
            raise RuntimeError("this block is open already: call cached() once for each block")
        self._entered = True
        if not _is_open(_current.get()):
            self._block = _Block()
            _current.set(self._block)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        block, self._block, self._entered = self._block, None, False
        if block is None:
            return
        if _current.get() is block:  # not in another context or thread than that of its beginning
            _current.set(None)
        made, block.made = block.made, None
        if kind is None and made is not None:
            for derived in list(made.values()):
                for entry in list(derived.values()):
                    _check_unwritten(entry)

    def __call__(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        kinds = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in (*kinds, inspect.iscoroutinefunction)):
            raise TypeError(
                f"cached() cannot decorate {function}, which returns before it has run: "
                f"open the block inside it"
            )

        @functools.wraps(function)
        def inside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            with cached():
                return function(*args, **kwargs)

        return inside


class _Entry(NamedTuple):
    """What was made, and what shows that it may not be used again."""

    parts: tuple[Any, ...]
    packed_version: int
    packed_memory: Tensor  # held, so that no other vector comes to lie at its address
    version: int | None


class _Derived(dict[tuple, _Entry]):
    """What was made of one vector, by how it was made. (A dict has no weak references.)"""


class _Block:
    """What an open block has made; it ends by forgetting it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.capturing = _is_capturing()
        # A vector that is a temporary is forgotten with what was made of it.
        self.made: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()


_current: ContextVar[_Block | None] = ContextVar("triton_tied_cached", default=None)


def is_open() -> bool:
    """Whether there may be a block; if not, nothing is reused."""
    return not torch.compiler.is_compiling() and _current.get() is not None


def is_caching(packed: Tensor) -> bool:
    """Whether what is made of ``packed`` now may be used again."""
    return _made_of(packed) is not None


def derived_from(packed: Tensor, how: tuple, make: Callable[[], _Parts]) -> _Parts:
    """What ``make`` makes of ``packed``, or what it made of it before in the same block, where
    ``how`` tells apart what is made. The gradient goes through the first part alone."""
    derived = _made_of(packed)
    if derived is None:
        return make()
    tracked = torch.is_grad_enabled() and packed.requires_grad
    key = (*how, tracked, torch.is_inference_mode_enabled(), _stream(packed.device))
    entry = derived.get(key)
    if entry is None or _has_changed(packed, entry):
        parts = make()
        entry = _Entry(parts, packed._version, packed.detach(), _version(parts[0]))
        if tracked:
            parts[0].register_hook(functools.partial(_forget, weakref.ref(derived)))
        derived[key] = entry
    _check_unwritten(entry)
    return entry.parts  # type: ignore[return-value]


def forget(packed: Tensor) -> None:
    """What an open block has made of ``packed`` is not used again, and refers to it no more."""
    block = _current.get()
    if block is not None and block.made is not None:
        block.made.pop(packed, None)


def _made_of(packed: Tensor) -> _Derived | None:
    """What the open block has made of ``packed``; None where nothing may be reused: where tensors
    stand for others, or PyTorch does not count their changes."""
    if torch.compiler.is_compiling():
        return None
    block = _current.get()
    if block is None or not _is_open(block) or block.capturing != _is_capturing():
        return None
    if (
        type(packed) not in PLAIN_TENSORS
        or packed.is_inference()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    made = block.made
    return None if made is None else made.setdefault(packed, _Derived())


def _is_open(block: _Block | None) -> bool:
    return block is not None and block.made is not None and block.thread == threading.get_ident()


def _has_changed(packed: Tensor, entry: _Entry) -> bool:
    memory = entry.packed_memory
    return (
        packed._version != entry.packed_version
        or packed.data_ptr() != memory.data_ptr()
        or packed.stride() != memory.stride()
    )


def _forget(made: weakref.ref[_Derived], grad: Tensor) -> None:
    """A backward is what an update follows, and not every update is counted."""
    derived = made()
    if derived is not None:
        derived.clear()


def _check_unwritten(entry: _Entry) -> None:
    if _version(entry.parts[0]) != entry.version and not _has_new_source(entry):
        raise RuntimeError(
            "a weight was written to that unpack() had returned inside a cached() block, where "
            "all applications share it: clone it first"
        )


def _has_new_source(entry: _Entry) -> bool:
    """A part may be a view of packed, which then was written to itself."""
    return entry.packed_memory._version != entry.packed_version


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _stream(device: torch.device) -> object:
    """Another stream does not wait for what this one makes."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _is_capturing() -> bool:
    """What is made while a CUDA graph is captured holds nothing until the graph runs."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
