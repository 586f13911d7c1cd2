"""``python -m triton_tied tune``: pick configs ahead of time, or show what would be tried."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from . import autotune, gpus, table, tuning
from .cost import Sieved, sieve
from .geometry import resolve
from .packing import SIGNS, Layout
from .problem import Problem
from .tuning import Report

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_MOST_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to tune")
    what.add_argument("--shape", type=_sizes, action="append", metavar="N,C,H,W", default=[])
    what.add_argument("--kernel-size", type=int, default=3)
    what.add_argument("--padding", type=_padding, default="same")
    what.add_argument("--dilation", type=int, default=1)
    what.add_argument("--groups", type=int, default=1)
    what.add_argument("--symmetry", choices=sorted(SIGNS), default="self_adjoint")
    what.add_argument("--dtype", choices=_DTYPES, default="bf16")
    what.add_argument("--memory", choices=("channels_last", "contiguous"), default="channels_last")
    what.add_argument("--model", metavar="MODULE:FACTORY", help="a function that makes the model")
    what.add_argument("--input", type=_sizes, metavar="N,C,H,W", help="what the model takes")
    how = parser.add_argument_group("how")
    how.add_argument("--budget", type=_seconds, default=math.inf, metavar="SECONDS")
    how.add_argument("--again", action="store_true", help="time what the table holds already, too")
    how.add_argument("--dry-run", action="store_true", help="only show the sieves; needs no GPU")
    how.add_argument("--gpu", help=f"for --dry-run: {', '.join(gpus.KNOWN)}")
    how.add_argument("--json", action="store_true")
    how.add_argument("--export", type=Path, metavar="FILE", help="copy the user's table there")
    how.add_argument("--import", dest="import_", type=Path, metavar="FILE", help="add its entries")


def run(given: argparse.Namespace) -> int:
    """The exit status: 2 for a request that makes no sense."""
    try:
        if given.gpu and not given.dry_run:
            raise ValueError("--gpu names a GPU for --dry-run; tuning uses the one that is here")
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
    problems = [problem for shape in given.shape for problem in _of_shape(shape, given)]
    if given.model:
        if not given.input:
            raise ValueError("--model needs --input N,C,H,W")
        found = _of_model(given.model, given.input, _DTYPES[given.dtype], given.memory)
        if not found:
            raise ValueError(f"--model {given.model} ran no tied convolution that has a kernel")
        problems += found
    elif given.input:
        raise ValueError("--input is what --model takes, which is not given")
    if not problems and (given.dry_run or not (given.import_ or given.export)):
        raise ValueError("expected --shape, --model, --import or --export")
    return tuning.both_centres(problems)


def _of_shape(shape: Sequence[int], given: argparse.Namespace) -> list[Problem]:
    n, channels, h, w = shape
    layout = Layout(channels, (given.kernel_size,) * 2, given.groups, given.symmetry)
    if isinstance(given.padding, int) and given.padding < 0:
        raise ValueError(f"negative padding is not supported, got {given.padding}")
    geometry = resolve(layout.kernel_size, 1, given.padding, given.dilation)
    if min(geometry.output_size((h, w), layout.kernel_size)) < 1:
        raise ValueError(f"a kernel larger than the padded image: --shape {n},{channels},{h},{w}")
    dtype = autotune.dtype_of(_DTYPES[given.dtype])
    problem = Problem("conv", dtype, layout, (n, h, w), geometry, given.memory)
    return tuning.problems_of_layer(problem)


def _of_model(name: str, shape: Sequence[int], dtype: torch.dtype, memory: str) -> list[Problem]:
    module, _, factory = name.partition(":")
    if not (module and factory):
        raise ValueError(f"expected --model MODULE:FACTORY, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    input = torch.randn(*shape, device=device, dtype=dtype).contiguous(
        memory_format=formats[memory]
    )
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), factory)().to(device, dtype)
        return tuning.problems_of(lambda: _run_both_ways(model, input))
    except Exception as error:  # it is the user's code that runs here
        raise ValueError(f"--model {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")


def _run_both_ways(model: torch.nn.Module, input: Tensor) -> None:
    """The backward is that of all that has one, whatever the model returns."""
    leaves = [leaf for leaf in tree_leaves(model(input)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.requires_grad:
            leaf.float().square().sum().backward(retain_graph=True)


def _tune(problems: list[Problem], given: argparse.Namespace) -> int:
    tuning.gpu_to_time_on()
    with tqdm(total=len(problems), disable=given.json) as bar:

        def progress(problem: Problem, text: str) -> None:
            bar.set_description_str(_name(problem))
            bar.set_postfix_str(text)

        reports: list[Report] = []
        end = time.monotonic() + given.budget
        for problem in problems:
            share = (end - time.monotonic()) / (len(problems) - len(reports))
            reports += tuning.tune([problem], budget_s=share, again=given.again, progress=progress)
            bar.update()
    if given.json:
        print(as_json(reports))
    else:
        _print_reports(reports)
    return 0 if all(report.config for report in reports) else 1


def _print_reports(reports: list[Report]) -> None:
    print(
        f"{'problem':<52}{'before us':>10}{'after us':>10}{'ratio':>7}{'of roofline':>13}", end=""
    )
    print(f"{'timed':>9}")
    for r in reports:
        before = f"{r.before:.1f}" if r.before else "-"
        after = f"{r.after:.1f}" if r.after else "-"
        ratio = f"{r.before / r.after:.2f}" if r.before and r.after else "-"
        share = f"{r.floor / r.after:.0%}" if r.after else "-"
        timed = f"{sum(c.median_us is not None for c in r.candidates)}/{len(r.candidates)}"
        print(f"{_name(r.problem):<52}{before:>10}{after:>10}{ratio:>7}{share:>13}{timed:>9}")
        for failure in r.failures:
            print(f"    failed: {failure.config}: {failure.reason}")


def _show(problems: list[Problem], gpu: gpus.GPU, as_json: bool) -> int:
    problems = [_as_on(gpu, problem) for problem in problems]
    found = [(problem, sieve(problem, gpu)) for problem in problems]
    if as_json:
        print(json.dumps([_sieved_as_json(*pair) for pair in found], indent=1))
        return 0
    for problem, sieved in found:
        print(f"{_name(problem)} on {gpu.name}: floor {sieved.floor_us:.1f} us")
        for config, predicted in sieved.candidates[:_MOST_SHOWN]:
            print(f"    {predicted:>8.1f} us  {_short(config)}")
        more = len(sieved.candidates) - _MOST_SHOWN
        if more > 0:
            print(f"    and {more} more")
        if sieved.untimed != sieved.candidates[0].config:
            print(f"    taken if nothing is timed: {_short(sieved.untimed)}")
        for config, reason in sieved.fallen:
            print(f"    fell: {_short(config)}: {reason}")
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
    origin = autotune.origin_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    entries = table.load(table.path_of(origin), origin)
    if not entries:
        raise ValueError(f"there is no entry for {origin.gpu} in {table.directory()}")
    table.save(path, origin, entries)
    print(f"{len(entries)} entries for {origin.gpu} to {path}", file=sys.stderr)


def _import(path: Path) -> None:
    origin = autotune.origin_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    entries = table.load_for_update(path, origin)
    if not entries:
        raise ValueError(f"{path} holds no entry for {origin.gpu} with these versions")
    target = table.path_of(origin)
    with table.locked(target):
        table.save(target, origin, entries)
    autotune.forget()
    print(f"{len(entries)} entries for {origin.gpu} from {path}", file=sys.stderr)


def _name(problem: Problem) -> str:
    layout, times = problem.layout, "x"
    image = times.join(map(str, (problem.image[0], layout.channels, *problem.image[1:])))
    kernel = times.join(map(str, layout.kernel_size))
    groups = f" g{layout.groups}" if layout.groups > 1 else ""
    sign = " skew" if layout.sign < 0 else ""
    padding = "" if problem.is_weight_grad else f" p{problem.geometry.padding[0][0]}"
    centre = "" if problem.centre == "none" else f" {problem.centre}"
    return f"{problem.kernel} {image} k{kernel}{padding}{groups}{sign}{centre} {problem.dtype}"


def _short(config: autotune.Config) -> str:
    return ", ".join(
        f"{name}={'x'.join(map(str, value)) if name == 'box' else value}"
        for name, value in asdict(config).items()
    )


def _problem_as_json(problem: Problem) -> dict[str, Any]:
    return {"key": problem.key, "name": _name(problem), **asdict(problem)}


def _sieved_as_json(problem: Problem, sieved: Sieved) -> dict[str, Any]:
    return {
        "problem": _problem_as_json(problem),
        "floor_us": sieved.floor_us,
        "candidates": [
            {"config": asdict(config), "predicted_us": predicted}
            for config, predicted in sieved.candidates
        ],
        "fallen": [
            {"config": asdict(config), "reason": reason} for config, reason in sieved.fallen
        ],
    }


def as_json(reports: Sequence[Report]) -> str:
    """What tuning on the current GPU gave."""
    origin = asdict(autotune.origin_of(torch.device("cuda")))
    return json.dumps([{"origin": origin, **_as_json(report)} for report in reports], indent=1)


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "problem": _problem_as_json(report.problem),
        "config": asdict(report.config) if report.config else None,
        "before_us": report.before,
        "after_us": report.after,
        "floor_us": report.floor,
        "candidates": [
            {"config": asdict(config), "predicted_us": predicted, "median_us": median}
            for config, predicted, median in report.candidates
        ],
        "failures": [
            {"config": asdict(config), "reason": reason} for config, reason in report.failures
        ],
    }


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected four positive numbers N,C,H,W, got {text!r}")
    return tuple(map(int, parts))


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, more than none, got {text!r}")


def _padding(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
