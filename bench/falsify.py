"""Claims of the cost model and of the kernels' design, each of which one measurement can falsify.

    python bench/falsify.py [--out FILE] [--rehearse]

In the order in which the design rests on them: what the GPU can do, then what single launches
should take, then which way should be the faster. Each kernel is checked against the reference
before it is timed. The exit status is 1 if a claim is falsified. ``--rehearse`` needs no GPU: its
clock says what the cost model says. The claims are those for an H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from triton_tied.autotune import gpus
from triton_tied.autotune.candidates import list_of
from triton_tied.autotune.cost_model import TERMS, predict_us
from triton_tied.autotune.gpus import GPU
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.trial import Trial, clock
from triton_tied.benchmark.results import machine_of
from triton_tied.benchmark.workloads import every
from triton_tied.kernels.configs import Config, as_listed

_MARGIN = 1.5  # of a prediction; the model ranks, it does not predict
_BYTES = 2**30
_CACHED_BYTES = 24 * 2**20  # half of an H100's last-level cache
_SIDE = 8192  # of the matrices of a large product


class Stopwatch(Protocol):
    """Microseconds of a config, and of any call, for which the model says ``predicted_us``."""

    gpu: GPU

    def config(self, problem: Problem, config: Config) -> float: ...

    def call(self, make: Callable[[], Callable[[], object]], predicted_us: float) -> float: ...


class Claim(NamedTuple):
    """What is measured, in ``unit``, and the bounds between which it must lie."""

    name: str
    rests_on_it: str
    measure: Callable[[Stopwatch], float]
    unit: str
    least: float = 0.0
    most: float = float("inf")


def claims(gpu: GPU) -> list[Claim]:
    """In the order of what rests on what."""
    found = [
        Claim(
            "memory copies",
            "every bound by bytes",
            lambda watch: 2 * _BYTES / watch.call(_copy, 2 * _BYTES / gpu.memory_gbs / 1e3) / 1e3,
            "GB/s",
            0.8 * gpu.memory_gbs,
        ),
        Claim(
            "reading what the last-level cache holds",
            "C <= 64, where each pixel is read several times",
            lambda watch: (
                _CACHED_BYTES / watch.call(_sum, _CACHED_BYTES / gpu.cache_gbs / 1e3) / 1e3
            ),
            "GB/s",
            0.6 * gpu.cache_gbs,
        ),
        Claim(
            "a large product in bfloat16",
            "every bound by products",
            lambda watch: _product(watch, gpu.half_tflops),
            "TFLOP/s",
            0.85 * TERMS.matrix_share * gpu.half_tflops,
        ),
    ]
    found += [_takes(gpu, *each) for each in _LAUNCHES]
    return [*found, *(_is_faster(gpu, *each) for each in _WAYS)]


# Family, channels and side of a headline workload, its pass, and what rests on it.
_LAUNCHES = (
    ("lip", 128, 32, "conv", "products in TF32 with all taps rounded and stored"),
    ("resnet", 64, 56, "conv", "a weight that stays in shared memory"),
    ("lca", 64, 16, "conv", "a weight that is streamed through shared memory"),
    ("resnet", 128, 28, "conv", "one sum for both halves of the taps"),
    ("wide", 256, 64, "conv", "tiles of 128 x 256 for both signs"),
    ("soc", 1024, 2, "conv", "sums that several programs share"),
    ("thin", 16, 128, "weight_grad", "many splits of small gradients"),
    ("lip", 256, 16, "weight_grad", "operands of TF32 through registers"),
)


def _takes(gpu: GPU, family: str, channels: int, side: int, kernel: str, rests: str) -> Claim:
    problem = _problem(family, channels, side, kernel)
    config = make_shortlist(problem, gpu).untimed
    most = _MARGIN * _predicted(problem, gpu, config)
    name = f"{family} {channels}@{side} {kernel}"
    return Claim(name, rests, lambda watch: watch.config(problem, config), "us", most=most)


def _pointers(problem: Problem, gpu: GPU) -> tuple[Config, Config]:
    ranked = make_shortlist(problem, gpu).ranked
    return ranked[0], next(config for config in ranked if config.loader == "pointer")


def _other_kind(problem: Problem, gpu: GPU) -> tuple[Config, Config]:
    ranked = make_shortlist(problem, gpu).ranked
    return ranked[0], next(config for config in ranked if config.kind != ranked[0].kind)


def _unsplit(problem: Problem, gpu: GPU) -> tuple[Config, Config]:
    chosen = make_shortlist(problem, gpu).untimed
    return chosen, replace(chosen, splits=1)


def _unmerged(problem: Problem, gpu: GPU) -> tuple[Config, Config]:
    ranked = make_shortlist(problem, gpu).ranked
    return ranked[0], next(config for config in ranked if config.merged == 1)


def _alone(problem: Problem, gpu: GPU) -> tuple[Config, Config]:
    ranked = make_shortlist(problem, gpu).ranked
    first, second = (
        next(config for config in ranked if config.kind == kind) for kind in ("clustered", "conv")
    )
    return first, second


# A workload, its pass, two configs of which the first should be so many times faster, and the name.
_WAYS: tuple[tuple, ...] = (
    (("resnet", 128, 28, "conv"), _pointers, 1.2, "bulk copies against loads by pointers"),
    (("resnet", 64, 56, "conv"), _other_kind, 1.4, "pixels once a column against once a tap"),
    (("thin", 16, 128, "conv"), _other_kind, 1.4, "the same for 16 channels"),
    (("lca", 64, 16, "conv"), _other_kind, 1.3, "the same with a streamed weight"),
    (("resnet", 64, 56, "weight_grad"), _other_kind, 1.2, "all taps in one pass against one pair"),
    (("thin", 16, 128, "weight_grad"), _other_kind, 2.0, "the same for 16 channels"),
    (("thin", 8, 128, "conv"), _unmerged, 1.1, "columns merged against pixels as they lie"),
    (("thin", 8, 128, "weight_grad"), _unmerged, 1.2, "the same for the packed gradient"),
    (("soc", 1024, 2, "conv"), _unsplit, 1.2, "a shared sum against one program's"),
    (("wide", 256, 64, "conv"), _alone, 1.05, "clusters of two programs against one alone"),
)


def _is_faster(gpu: GPU, workload: tuple, ways: Callable, least: float, name: str) -> Claim:
    problem = _problem(*workload)

    def measure(watch: Stopwatch) -> float:
        first, second = ways(problem, gpu)
        return watch.config(problem, second) / watch.config(problem, first)

    return Claim(name, "the order of the shortlist", measure, "times", least)


def _problem(family: str, channels: int, side: int, kernel: str) -> Problem:
    workload = next(
        each
        for each in every()
        if (each.family, each.channels, each.image[0]) == (family, channels, side)
    )
    return replace(workload.problem, kernel=kernel)  # type: ignore[arg-type]


def _predicted(problem: Problem, gpu: GPU, config: Config) -> float:
    listed = list_of(problem.kernel, gpu.target, problem.dtype)
    candidate = next(each for each in listed if each.config == as_listed(config))
    return predict_us(problem, gpu, candidate._replace(config=config))


def _copy() -> Callable[[], object]:
    source = torch.zeros(_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _sum() -> Callable[[], object]:
    numbers = torch.zeros(_CACHED_BYTES // 4, device="cuda")
    return numbers.sum


def _product(watch: Stopwatch, peak: float) -> float:
    flops = 2 * _SIDE**3

    def make() -> Callable[[], object]:
        a, b = (torch.randn(_SIDE, _SIDE, device="cuda").bfloat16() for _ in range(2))
        return lambda: a @ b

    return flops / watch.call(make, flops / (TERMS.matrix_share * peak * 1e6)) / 1e6


class Gpu:
    """The clock of a GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.gpu = gpus.of_device(self.device)

    def config(self, problem: Problem, config: Config) -> float:
        """
        Raises:
            ArithmeticError: its result is not that of the reference.
        """
        trial = Trial(problem, self.device)
        if not trial.is_right(config):
            raise ArithmeticError(f"{config} computes wrongly for {problem.key}")
        return 1e3 * clock(trial.prepare(config))

    def call(self, make: Callable[[], Callable[[], object]], predicted_us: float) -> float:
        return 1e3 * clock(make())


class Rehearsal:
    """A clock that says what the cost model says."""

    gpu = gpus.KNOWN["H100"]

    def config(self, problem: Problem, config: Config) -> float:
        return _predicted(problem, self.gpu, config)

    def call(self, make: Callable[[], Callable[[], object]], predicted_us: float) -> float:
        return predicted_us


def judge(watch: Stopwatch) -> list[dict[str, Any]]:
    """Every claim, whatever became of those before."""
    rows = []
    for claim in claims(watch.gpu):
        row = {**claim._asdict(), "measure": None, "stands": False}
        row["most"] = None if claim.most == float("inf") else round(claim.most, 2)
        try:
            measured = claim.measure(watch)
        except Exception as error:  # of a kernel, say: the next claim does not hang on it
            row["error"] = f"{type(error).__name__}: {error}"
        else:
            row |= {"measure": measured, "stands": claim.least <= measured <= claim.most}
        rows.append(row)
        bounds = f"at least {claim.least:.4g}" if claim.least else f"at most {claim.most:.4g}"
        verdict = row.get("error") or f"{row['measure']:.4g} {claim.unit}, {bounds}"
        print(
            f"{'stands   ' if row['stands'] else 'FALSIFIED'} {claim.name}: {verdict}", flush=True
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    given = parser.parse_args(arguments)
    if not (given.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU here; --rehearse does without")
    rows = judge(Rehearsal() if given.rehearse else Gpu())
    if given.out:
        device = torch.device("cpu" if given.rehearse else "cuda")
        result = {"machine": machine_of(device), "rehearsed": given.rehearse, "claims": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["stands"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
