"""When the centre tap is unpacked before a convolution, instead of gathered inside it.

Gathering it from its triangle costs each program scattered reads; unpacking it costs a launch.
Where the latter begins to pay is a guess, until a table holds both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import Geometry
from ..packing import Layout
from . import gpus
from .cost_model import unpack_us
from .problem import WITH_MEMORY, Centre, Problem, key_of, problem_of
from .tuned_configs import entry_for, remember, remembered

_MIN_CHANNELS = 64  # of a group, for the guess
_MIN_PIXELS = 2**14


def unpacking_pays(x: Tensor, layout: Layout, geometry: Geometry) -> bool:
    """Whether a convolution of ``x`` should unpack its centre first, though nothing else would use
    it: as the tables say where they hold both ways, else by a guess."""
    if torch.compiler.is_compiling() or type(x) not in WITH_MEMORY:
        return guess_unpacking_pays(layout, x.shape[0] * x.shape[2] * x.shape[3])
    call = ("centre", layout, geometry, *key_of(x))
    known = remembered(call)
    if isinstance(known, bool):
        return known
    problem = problem_of("conv", layout, geometry, "gathered", x)
    return remember(call, _is_faster_unpacked(problem, x.device))


def guess_unpacking_pays(layout: Layout, pixels: int) -> bool:
    """Where nothing was timed."""
    return layout.group_channels >= _MIN_CHANNELS and pixels >= _MIN_PIXELS


def guess_centre(layout: Layout, pixels: int) -> Centre:
    """Where a convolution of this size takes its centre from, unless a table knows better."""
    if layout.taps % 2 == 0:
        return "none"
    return "unpacked" if guess_unpacking_pays(layout, pixels) else "gathered"


def both_centres(problems: Iterable[Problem]) -> list[Problem]:
    """Each convolution with its centre tap gathered and unpacked, so that the faster way is taken
    later; the other problems as they are. Each once."""
    found: dict[Problem, None] = {}
    for problem in problems:
        ways: tuple[Centre, ...] = ("gathered", "unpacked")
        if problem.is_weight_grad or problem.layout.taps % 2 == 0:
            ways = ("none",)
        found |= dict.fromkeys(replace(problem, centre=way) for way in ways)
    return list(found)


def _is_faster_unpacked(problem: Problem, device: torch.device) -> bool:
    gathered = entry_for(problem, device)
    unpacked = entry_for(replace(problem, centre="unpacked"), device)
    if gathered is None or unpacked is None:
        return guess_unpacking_pays(problem.layout, math.prod(problem.image))
    return unpacked.median_us + unpack_us(problem, gpus.of_device(device)) < gathered.median_us
