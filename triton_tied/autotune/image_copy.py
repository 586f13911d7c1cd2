"""When an image is copied into channels-last memory before a convolution.

The kernels read 16 bytes at a time where the channels of a pixel lie side by side, and single
numbers elsewhere. The copy is kept for the backward instead of the image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import Geometry
from ..memory_format import Memory, memory_of
from ..packing import Layout
from . import gpus
from .choices import remember, remembered
from .cost_model import copy_us
from .problem import WITH_MEMORY, Problem, key_of, problem_of
from .shortlist import make_shortlist
from .tuned_configs import entry_for

_WIDEST_ACCESS = 16  # bytes


def copying_pays(x: Tensor, layout: Layout, geometry: Geometry, output: Memory) -> bool:
    """Whether a convolution of ``(N, C, H, W)`` into such memory should copy its image first: as
    the tables or the cost model say; only where a pixel then is a multiple of 16 bytes."""
    if torch._C._are_functorch_transforms_active():  # of several images no memory is known
        return False
    if not _helps(memory_of(x), x.shape[1] * x.element_size()):
        return False
    if torch.compiler.is_compiling() or type(x) not in WITH_MEMORY:
        return True
    call = ("copy", layout, geometry, output, *key_of(x))
    known = remembered(call)
    if isinstance(known, bool):
        return known
    problem = problem_of("conv", layout, geometry, [x], output)
    return remember(call, _is_faster_copied(problem, x.device))


def as_copied(problem: Problem) -> Problem:
    """What is left of a problem where no table says otherwise."""
    if _helps(problem.memory, problem.layout.channels * problem.itemsize):
        return replace(problem, memory="channels_last", aligned=True)
    return problem


def _helps(memory: Memory, pixel_bytes: int) -> bool:
    return memory != "channels_last" and pixel_bytes % _WIDEST_ACCESS == 0


def _is_faster_copied(problem: Problem, device: torch.device) -> bool:
    """As the tables say where they hold both ways, else as the cost model does."""
    copied, gpu = as_copied(problem), gpus.of_device(device)
    entries = [entry_for(each, device) for each in (copied, problem)]
    if all(entries):
        after, before = (entry.median_us for entry in entries if entry)
    else:
        after, before = (make_shortlist(each, gpu).untimed_us for each in (copied, problem))
    return after + copy_us(problem, gpu) < before
