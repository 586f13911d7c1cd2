"""The kernels of a model compiled before its first step, side by side, into Triton's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from . import gpus, tuned_configs
from .compile_ahead import Compilers, Job, usable_cpus
from .image_copy import fastest
from .problem import Problem
from .recording import problems_of
from .shortlist import make_shortlist

CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


def warm(
    what: Callable[[], object] | Iterable[Problem],
    *,
    target: str | None = None,
    processes: int | None = None,
) -> int:
    """Compiles all kernels that convolutions need, side by side, so that a first training step
    waits for none: into Triton's cache on disk, from which every process takes them.

    Args:
        what: problems, or a function that is called once and whose convolutions are meant; let it
            run the backward too.
        target: "sm_80", "sm_90" or "sm_100", of a GPU that need not be here; by default the
            current one.
        processes: that compile; by default one for each CPU, at most 16.

    Returns:
        How many kernels with their launches were compiled.

    Raises:
        RuntimeError: something did not compile, or there is no GPU and no target.
        ValueError: an unknown target, or fewer than one process.

    Examples:
        >>> triton_tied.warm(lambda: model(images).sum().backward())  # doctest: +SKIP
    """
    jobs = jobs_of(problems_of(what) if callable(what) else what, target)
    if processes is not None and processes < 1:
        raise ValueError(f"expected at least one process, got {processes}")
    with Compilers(processes or usable_cpus()) as compilers:
        answers = zip(jobs, compilers.compile(jobs), strict=True)
        faults = [f"{job.problem.key}: {answer}" for job, answer in answers if answer]
    if faults:
        raise RuntimeError(f"{len(faults)} kernels did not compile, the first of them {faults[0]}")
    return len(jobs)


def jobs_of(problems: Iterable[Problem], target: str | None) -> list[Job]:
    """What has to be compiled for problems, each code once.

    Raises:
        RuntimeError: there is no GPU and no target.
        ValueError: an unknown target.
    """
    if target is not None and target not in CAPABILITIES:
        raise ValueError(f"expected a target of {', '.join(CAPABILITIES)}, got {target!r}")
    if target is None and not torch.cuda.is_available():
        raise RuntimeError(f"there is no GPU here: name a target of {', '.join(CAPABILITIES)}")
    jobs = (_job(problem, target) for problem in problems)
    return list({_code_of(job): job for job in jobs}.values())


def _job(problem: Problem, target: str | None) -> Job:
    if target is None:
        device = torch.device("cuda", torch.cuda.current_device())
        _, problem = fastest(problem, gpus.of_device(device), device)
        major, minor = torch.cuda.get_device_capability()
        return Job(10 * major + minor, problem, tuned_configs.config_for(problem))
    gpu = gpus.KNOWN[gpus.MODEL_OF[target]]
    _, problem = fastest(problem, gpu)
    return Job(CAPABILITIES[target], problem, make_shortlist(problem, gpu).untimed)


def _code_of(job: Job) -> tuple:
    """What the compiler makes: neither the sizes of images nor the number of splits changes it."""
    splits = min(job.config.splits, 2)
    problem = job.problem
    dtypes = problem.parameters, problem.written
    code, needs = problem.code_of(job.config), problem.needs(job.config)
    return code, dtypes, needs, replace(job.config, splits=splits)
