"""``python -m triton_tied tune``: pick configs ahead of time, or show what would be tried."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..autotune import disk_cache, gpus, tuned_configs, tuning
from ..autotune.image_copy import ways
from ..autotune.problem import Problem
from ..autotune.shortlist import make_shortlist
from .arguments import readable_file, seconds, writable_file
from .problems import add_problem_arguments, problems_asked_for
from .tune_report import (
    name_of,
    print_reports,
    print_shortlists,
    reports_as_json,
    shortlists_as_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem_arguments(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--budget",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="for all problems together (default: no limit)",
    )
    how.add_argument("--again", action="store_true", help="time what the table holds already, too")
    how.add_argument(
        "--dry-run", action="store_true", help="only show what would be timed; needs no GPU"
    )
    how.add_argument("--gpu", help=f"for --dry-run: {', '.join(gpus.KNOWN)}")
    how.add_argument("--json", action="store_true", help="print JSON instead of a table")
    how.add_argument(
        "--export", type=writable_file, metavar="FILE", help="copy the user's table there"
    )
    how.add_argument(
        "--import", dest="import_", type=readable_file, metavar="FILE", help="add its entries"
    )


def run(given: argparse.Namespace) -> int:
    """The exit status: 2 for a request that makes no sense."""
    try:
        if given.gpu and not given.dry_run:
            raise ValueError("--gpu names a GPU for --dry-run; tuning uses the one that is here")
        if given.dry_run and (given.import_ or given.export):
            raise ValueError("--dry-run changes nothing: neither --import nor --export")
        if (given.shape or given.model) and not (given.dry_run or torch.cuda.is_available()):
            raise ValueError(
                "there is no GPU here to time on; --dry-run --gpu NAME shows what would be timed"
            )
        problems = _problems(given)
        if given.dry_run:
            return _show(problems, _gpu(given.gpu), given.json)
        if given.import_:
            _import(given.import_)
        status = _tune(problems, given) if problems else 0
        if given.export:
            _export(given.export)
        return status
    except (ValueError, RuntimeError, OSError) as error:
        print(f"tune: {_in_a_line(error)}", file=sys.stderr)
        return 2


def _problems(given: argparse.Namespace) -> list[Problem]:
    asked = problems_asked_for(given)
    problems = [*dict.fromkeys(each for problem in asked for _, each in ways(problem))]
    if not problems and (given.dry_run or not (given.import_ or given.export)):
        raise ValueError("expected --shape, --model, --import or --export")
    return problems


def _tune(problems: list[Problem], given: argparse.Namespace) -> int:
    device = tuning.gpu_to_time_on()
    with tqdm(total=len(problems), disable=given.json) as bar:

        def progress(problem: Problem, text: str) -> None:
            bar.set_description_str(name_of(problem))
            bar.set_postfix_str(text)

        bar.set_description_str("compiling")
        reports = []
        for report in tuning.tune_each(problems, device, given.budget, given.again, progress):
            reports.append(report)
            bar.update()
    if given.json:
        print(reports_as_json(reports))
    else:
        print_reports(reports)
    if len(reports) < len(problems):
        print(f"no time was left for {len(problems) - len(reports)} problems", file=sys.stderr)
    return 0 if all(report.config for report in reports) else 1


def _show(problems: list[Problem], gpu: gpus.GPU, as_json: bool) -> int:
    problems = [_as_on(gpu, problem) for problem in problems]
    found = [(problem, make_shortlist(problem, gpu)) for problem in problems]
    if as_json:
        print(shortlists_as_json(found))
    else:
        print_shortlists(found, gpu)
    return 0


def _as_on(gpu: gpus.GPU, problem: Problem) -> Problem:
    """There is no TF32 on AMD's GPUs, whatever the one that is here has."""
    if gpu.target == "gfx942" and problem.dtype == "float32":
        return replace(problem, dtype="float32_ieee")
    return problem


def _gpu(name: str | None) -> gpus.GPU:
    if name:
        return gpus.find(name)
    if torch.cuda.is_available():
        return gpus.of_device(torch.device("cuda"))
    raise ValueError(f"there is no GPU here: name one with --gpu {'|'.join(gpus.KNOWN)}")


def _export(path: Path) -> None:
    origin = tuned_configs.origin_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    entries = disk_cache.load(disk_cache.path_of(origin), origin).entries
    if not entries:
        raise ValueError(f"there is no entry for {origin.gpu} in {disk_cache.directory()}")
    disk_cache.save(path, origin, entries)
    print(f"{len(entries)} entries for {origin.gpu} to {path}", file=sys.stderr)


def _import(path: Path) -> None:
    origin = tuned_configs.origin_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    entries = disk_cache.load_for_update(path, origin).entries
    if not entries:
        raise ValueError(f"{path} holds no entry for {origin.gpu} with these versions")
    target = disk_cache.path_of(origin)
    with disk_cache.locked(target):
        disk_cache.save(target, origin, entries)
    tuned_configs.forget()
    print(f"{len(entries)} entries for {origin.gpu} from {path}", file=sys.stderr)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
