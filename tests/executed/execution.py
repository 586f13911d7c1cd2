"""Executes one case in each timing that can matter to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import oracle
import torch
from ptx_machine.machine import EARLY, LATE, LATE_COPIES, LATE_PRODUCTS, Timing
from ptx_machine.matrix import Swizzling
from ptx_machine.parser import Kernel
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.depthwise import depthwise_kernel
from triton_tied.kernels.depthwise_grad import depthwise_grad_kernel
from triton_tied.kernels.halo import halo_kernel
from triton_tied.kernels.matrices import matrices_kernel
from triton_tied.kernels.merge_columns import merge_columns_kernel
from triton_tied.kernels.one_pass import one_pass_kernel
from triton_tied.kernels.one_pass_tf32 import one_pass_tf32_kernel
from triton_tied.kernels.row_by_row import row_by_row_kernel
from triton_tied.kernels.sum_merged import sum_merged_kernel
from triton_tied.kernels.sum_rows import sum_rows_kernel
from triton_tied.kernels.sum_splits import sum_splits_kernel
from triton_tied.kernels.toolchain import why_no_clusters
from triton_tied.kernels.weight_grad import weight_grad_kernel

from .cases import Case, expected_of, inputs_of, run

KERNELS = (
    conv_kernel,
    halo_kernel,
    weight_grad_kernel,
    one_pass_kernel,
    one_pass_tf32_kernel,
    row_by_row_kernel,
    matrices_kernel,
    merge_columns_kernel,
    sum_merged_kernel,
    sum_splits_kernel,
    sum_rows_kernel,
    depthwise_kernel,
    depthwise_grad_kernel,
)
if why_no_clusters() is None:
    from triton_tied.kernels.clustered import clustered_kernel

    KERNELS = (*KERNELS, clustered_kernel)
TIMINGS = {
    "early": EARLY,
    "late copies": LATE_COPIES,
    "late products": LATE_PRODUCTS,
    "late": replace(LATE, reverse_copies=True),
}
# What the manual leaves open is taken one way in these, and the other way in the others.
OTHER_READING = {"late"}


@dataclass
class Outcome:
    """``faults``: what was wrong in each timing; ``excess``: the largest error, of the allowed."""

    case: Case
    faults: dict[str, str] = field(default_factory=dict)
    excess: float = 0.0
    seconds: float = 0.0


def execute(
    case: Case, rewrite: Callable[[str], str] | None = None, to_first_fault: bool = False
) -> Outcome:
    """Compiles the launch as on a GPU of its target and runs it. ``rewrite`` changes the PTX."""
    outcome, start = Outcome(case), time.perf_counter()
    seen: list[Kernel] = []
    gpu = EmulatedGpu(int(case.target[3:]), observe=seen.append, rewrite=rewrite)
    inputs = inputs_of(case)
    expected = expected_of(case, inputs)
    with emulated(gpu, *KERNELS), torch.no_grad():
        for name, gpu.timing in TIMINGS.items():
            if seen and not any(_matters(gpu.timing, kernel) for kernel in seen):
                continue
            if outcome.faults and to_first_fault:
                break
            other = name in OTHER_READING
            gpu.swizzling = Swizzling.BY_BASE_OFFSET if other else Swizzling.BY_ADDRESS
            try:
                excess = oracle.worst(run(case, inputs), expected)
            except Exception as error:
                outcome.faults[name] = f"{type(error).__name__}: {error}"
            else:
                outcome.excess = max(outcome.excess, excess)
                if not excess <= 1:
                    outcome.faults[name] = f"{excess:.3g} times the error that is allowed"
    outcome.seconds = time.perf_counter() - start
    return outcome


def compiled(case: Case) -> str:
    """The PTX of its config's kernel; nothing is run."""
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    gpu = EmulatedGpu(int(case.target[3:]), rewrite=keep, runs=False)
    with emulated(gpu, *KERNELS):
        run(case, inputs_of(case))
    return next(text for text in texts if f".entry {case.config.kind}_kernel(" in text)


def _matters(timing: Timing, kernel: Kernel) -> bool:
    """Whether it shows of the kernel what an earlier timing, with less that is late, did not."""
    copies = any(i.opcode[0] == "cp" for i in kernel.instructions)
    products = any(i.opcode[:2] == ("wgmma", "mma_async") for i in kernel.instructions)
    return timing.late_copies <= copies and timing.late_products <= products
