"""Which problems a function meets: collected while it runs, without a GPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from ..dispatch import rehearsing
from ..geometry import Geometry
from ..packing import Layout
from .candidates import Kernel
from .problem import Centre, Problem, problem_of

# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_recorded: dict[Problem, None] | None = None


def problems_of(function: Callable[[], object]) -> list[Problem]:
    """The problems that a function meets; it may run without a GPU."""
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


def record(
    kernel: Kernel, layout: Layout, geometry: Geometry, centre: Centre, *images: Tensor
) -> None:
    """Notes a problem, where a block asked for it."""
    found = _recorded
    if found is not None:
        found[problem_of(kernel, layout, geometry, centre, *images)] = None
