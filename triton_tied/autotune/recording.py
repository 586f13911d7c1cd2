"""Which problems a function meets: collected while it runs, without a GPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from ..dispatch import rehearsing
from ..geometry import Geometry
from ..packing import Layout
from .candidates import Kernel
from .problem import Centre, Problem, problem_of

# With each problem, what its launches had besides: sets of "bias", "residual", and
# "contiguous_output" where the images that are read are channels-last.
Found = dict[Problem, set[frozenset[str]]]

# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_recorded: Found | None = None


def problems_of(function: Callable[[], object]) -> list[Problem]:
    """The problems that a function meets; it may run without a GPU."""
    return list(launches_of(function))


def launches_of(function: Callable[[], object]) -> Found:
    """As :func:`problems_of`, with what the launches had besides."""
    with rehearsing(), recording() as found:
        function()
    return found


@contextlib.contextmanager
def recording() -> Iterator[Found]:
    """Collects the problems that are met inside this block, on any thread, in order, each once."""
    global _recorded
    outer, found = _recorded, Found()
    _recorded = found
    try:
        yield found
    finally:
        _recorded = outer


def is_recording() -> bool:
    return _recorded is not None


def record(
    kernel: Kernel,
    layout: Layout,
    geometry: Geometry,
    centre: Centre,
    *images: Tensor,
    extras: Collection[str] = (),
) -> None:
    """Notes a problem, where a block asked for it."""
    found = _recorded
    if found is not None:
        problem = problem_of(kernel, layout, geometry, centre, *images)
        found.setdefault(problem, set()).add(frozenset(extras))


def extras_of(bias: Tensor | None, residual: Tensor | None, channels_last: bool) -> Collection[str]:
    """What a convolution's launch has besides its problem."""
    names = {"bias": bias is not None, "residual": residual is not None}
    return [
        name for name, given in {**names, "contiguous_output": not channels_last}.items() if given
    ]
