"""``python -m triton_tied tune``: pick configs ahead of time, or show what would be tried."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..autotune import disk_cache, gpus, tuned_configs, tuning
from ..autotune.centre_tap import both_centres
from ..autotune.problem import Problem, dtype_of, problems_of_layer
from ..autotune.recording import problems_of
from ..autotune.shortlist import make_shortlist
from ..autotune.tuning import Report
from ..geometry import resolve
from ..packing import SIGNS, Layout
from .arguments import readable_file, seconds, writable_file
from .tune_report import (
    name_of,
    print_reports,
    print_shortlists,
    reports_as_json,
    shortlists_as_json,
)

_DTYPE_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to tune")
    what.add_argument(
        "--shape",
        type=_sizes,
        action="append",
        metavar="N,C,H,W",
        default=[],
        help="a layer's input: images, channels, rows, columns; may be given several times",
    )
    what.add_argument(
        "--kernel-size", type=int, default=3, help="one side, for --shape (default: 3)"
    )
    what.add_argument(
        "--padding",
        type=_padding,
        default="same",
        help="for --shape: a number, same or valid (default: same)",
    )
    what.add_argument("--dilation", type=int, default=1, help="between taps (default: 1)")
    what.add_argument("--groups", type=int, default=1, help="of channels (default: 1)")
    what.add_argument(
        "--symmetry", choices=sorted(SIGNS), default="self_adjoint", help="of the layer's weight"
    )
    what.add_argument(
        "--dtype", choices=_DTYPE_NAMES, default="bf16", help="of the tensors (default: bf16)"
    )
    what.add_argument(
        "--memory",
        choices=("channels_last", "contiguous"),
        default="channels_last",
        help="how images lie in memory",
    )
    what.add_argument("--model", metavar="MODULE:FACTORY", help="a function that makes the model")
    what.add_argument("--input", type=_sizes, metavar="N,C,H,W", help="what the model takes")
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
    problems = [problem for shape in given.shape for problem in _of_shape(shape, given)]
    if given.model:
        if not given.input:
            raise ValueError("--model needs --input N,C,H,W")
        found = _of_model(given.model, given.input, _DTYPE_NAMES[given.dtype], given.memory)
        if not found:
            raise ValueError(f"--model {given.model} ran no tied convolution that has a kernel")
        problems += found
    elif given.input:
        raise ValueError("--input is what --model takes, which is not given")
    if not problems and (given.dry_run or not (given.import_ or given.export)):
        raise ValueError("expected --shape, --model, --import or --export")
    return both_centres(problems)


def _of_shape(shape: Sequence[int], given: argparse.Namespace) -> list[Problem]:
    n, channels, h, w = shape
    layout = Layout(channels, (given.kernel_size,) * 2, given.groups, given.symmetry)
    if isinstance(given.padding, int) and given.padding < 0:
        raise ValueError(f"negative padding is not supported, got {given.padding}")
    geometry = resolve(layout.kernel_size, 1, given.padding, given.dilation)
    if min(geometry.output_size((h, w), layout.kernel_size)) < 1:
        raise ValueError(f"a kernel larger than the padded image: --shape {n},{channels},{h},{w}")
    dtype = dtype_of(_DTYPE_NAMES[given.dtype])
    problem = Problem("conv", dtype, layout, (n, h, w), geometry, given.memory)
    return problems_of_layer(problem)


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
        model = getattr(importlib.import_module(module), factory)()
        if not isinstance(model, torch.nn.Module):
            kind = type(model).__name__
            raise TypeError(f"expected a function that makes a torch.nn.Module, it made a {kind}")
        model.to(device, dtype)
        return problems_of(lambda: _run_both_ways(model, input))
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
            bar.set_description_str(name_of(problem))
            bar.set_postfix_str(text)

        reports: list[Report] = []
        end = time.monotonic() + given.budget
        for problem in problems:
            share = (end - time.monotonic()) / (len(problems) - len(reports))
            reports += tuning.tune([problem], budget_s=share, again=given.again, progress=progress)
            bar.update()
    if given.json:
        print(reports_as_json(reports))
    else:
        print_reports(reports)
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


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected four positive numbers N,C,H,W, got {text!r}")
    return tuple(map(int, parts))


def _padding(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
