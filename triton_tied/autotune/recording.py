"""Which problems a function meets: collected while it runs, without a GPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..dispatch import rehearsing
from .problem import Problem

# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_recorded: dict[Problem, None] | None = None


def problems_of(function: Callable[[], object]) -> list[Problem]:
    """The problems that a function meets, in order, each once; it may run without a GPU."""
    with rehearsing(), recording() as found:
        function()
    return list(found)


@contextlib.contextmanager
def recording() -> Iterator[dict[Problem, None]]:
    """Collects the problems that are met inside this block, on any thread, in order, each once."""
    global _recorded
    outer, found = _recorded, dict[Problem, None]()
    _recorded = found
    try:
        yield found
    finally:
        _recorded = outer


def is_recording() -> bool:
    return _recorded is not None


def record(problem: Problem) -> None:
    """Notes a problem, where a block asked for it."""
    if _recorded is not None:
        _recorded[problem] = None
