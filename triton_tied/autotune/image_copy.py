"""When an image is copied into channels-last memory before a convolution, and its output out of it
after.

The kernels read 16 bytes at a time where the channels of a pixel lie side by side, and single
numbers elsewhere; some write such memory only. The copy of an image is kept for the backward
instead of the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..memory_format import Memory, memory_of
from ..packing import Layout
from ..tracing import PLAIN_TENSORS
from . import gpus
from .choices import remember, remembered
from .cost_model import copy_us
from .gpus import GPU
from .problem import Problem, key_of, problem_of
from .shortlist import make_shortlist
from .tuned_configs import entry_for

_WIDEST_ACCESS = 16  # bytes


class Copies(NamedTuple):
    """Whether an image is copied, and an output."""

    image: bool
    output: bool


def copying_pays(
    x: Tensor, layout: Layout, geometry: Geometry, output: Memory, may_copy_output: bool
) -> bool:
    """Whether a convolution of ``(N, C, H, W)`` into such memory should copy its image first: as
    the tables or the cost model say; only where a pixel then is a multiple of 16 bytes.
    ``may_copy_output``: it has no residual, see :func:`output_copying_pays`."""
    if torch._C._are_functorch_transforms_active():  # of several images no memory is known
        return False
    if not _helps(memory_of(x), x.shape[1] * x.element_size()):
        return False
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        return True
    call = ("copy", layout, geometry, output, may_copy_output, *key_of(x))
    known = remembered(call)
    if isinstance(known, bool):
        return known
    problem = problem_of("conv", layout, geometry, [x], output)
    gpu = gpus.of_device(x.device)
    return remember(call, fastest(problem, gpu, x.device, may_copy_output)[0].image)


def output_copying_pays(problem: Problem, device: torch.device) -> bool:
    """Whether a convolution should write channels-last memory, which is copied to where its output
    is wanted."""
    copies, _ = fastest(problem, gpus.of_device(device), device, may_copy_image=False)
    return copies.output


def ways(
    problem: Problem, may_copy_output: bool = True, may_copy_image: bool = True
) -> list[tuple[Copies, Problem]]:
    """What may be copied, and the problem that is left: as it is, and with its image copied; and
    with channels-last images also its output."""
    found = [(Copies(False, False), problem)]
    if may_copy_image and _helps(problem.memory, problem.layout.channels * problem.itemsize):
        copied = replace(problem, memory="channels_last", aligned=True)
        found.append((Copies(True, False), copied))
    if may_copy_output and problem.output_memory == "contiguous":
        found += [
            (Copies(copies.image, True), replace(each, output_memory="channels_last"))
            for copies, each in found
            if each.memory == "channels_last"
        ]
    return found


def fastest(
    problem: Problem,
    gpu: GPU,
    device: torch.device | None = None,
    may_copy_output: bool = True,
    may_copy_image: bool = True,
) -> tuple[Copies, Problem]:
    """The fastest of the :func:`ways`: by the tables of a device where they hold all of them, else
    by the cost model."""
    found = ways(problem, may_copy_output, may_copy_image)
    if len(found) == 1:
        return found[0]
    entries = [entry_for(each, device) for _, each in found] if device else []
    if entries and all(entries):
        times = [entry.median_us for entry in entries if entry]
    else:
        times = [make_shortlist(each, gpu).untimed_us for _, each in found]
    written = replace(problem, image=problem.output)
    costs = copy_us(problem, gpu), copy_us(written, gpu)
    if problem.is_weight_grad:  # it reads the copies that the convolutions made
        costs = 0.0, 0.0
    totals = [
        time + sum(cost for cost, is_copied in zip(costs, copies, strict=True) if is_copied)
        for time, (copies, _) in zip(times, found, strict=True)
    ]
    return found[totals.index(min(totals))]


def _helps(memory: Memory, pixel_bytes: int) -> bool:
    return memory != "channels_last" and pixel_bytes % _WIDEST_ACCESS == 0
