"""``python -m triton_tied warm``: compile ahead what a model needs, side by side."""

from __future__ import annotations

import argparse
import sys
import time

from tqdm import tqdm
from triton import knobs

from ..autotune.compile_ahead import Compilers, usable_cpus
from ..autotune.warming import CAPABILITIES, jobs_of
from .problems import add_problem_arguments, problems_asked_for
from .tune_report import name_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem_arguments(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--target", choices=CAPABILITIES, help="of a GPU that need not be here (default: this one)"
    )
    how.add_argument(
        "--processes", type=int, metavar="N", help="that compile (default: one for each CPU)"
    )


def run(given: argparse.Namespace) -> int:
    """The exit status: 1 if something did not compile, 2 for a request that makes no sense."""
    try:
        if not (given.shape or given.model):
            raise ValueError("expected --shape or --model")
        jobs = jobs_of(problems_asked_for(given), given.target)
        if given.processes is not None and given.processes < 1:
            raise ValueError(f"expected at least one process, got {given.processes}")
    except (ValueError, RuntimeError) as error:
        print(f"warm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    processes, start, faults = given.processes or usable_cpus(), time.monotonic(), 0
    with Compilers(processes) as compilers, tqdm(total=len(jobs)) as bar:
        for job, fault in zip(jobs, compilers.compile(jobs), strict=True):
            bar.update()
            if fault:
                faults += 1
                bar.write(f"{name_of(job.problem)}: {fault}")
    seconds = time.monotonic() - start
    print(
        f"{len(jobs)} kernels, {faults} faults, {seconds:.0f} s with {processes} processes, in "
        f"{knobs.cache.dir}"
    )
    return 1 if faults else 0
