"""How well the cost model ranks the configs that were timed, from what tuning printed.

    python -m triton_tied tune --shape 32,128,28,28 --again --json > tune.json
    python bench/cost_model.py [--fit] [tune.json ...]

``--fit`` prints the terms of the cost model that would have predicted best. Without files it reads
those of bench/results. For each problem: Spearman's rho of predictions against medians, and the
regret: how much longer the model's first choice took than the best. Only configs that ran count,
and only problems of which two did.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from triton_tied.autotune.candidates import Candidate, list_of
from triton_tied.autotune.cost_model import TERMS, Terms, predict
from triton_tied.autotune.gpus import GPU, KNOWN
from triton_tied.autotune.problem import Problem
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import as_listed, from_json
from triton_tied.packing import Layout

COMMITTED = Path(__file__).with_name("results")

Pair = tuple[float, float]  # predicted and measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--fit", action="store_true", help="fit the terms of the cost model")
    given = parser.parse_args(arguments)
    files = given.files or sorted(COMMITTED.glob("tune-*.json"))
    if not files:
        print("nothing was measured yet: there is no tune-*.json in bench/results")
        return 0
    try:
        judged = [row for file in files for row in read(file)]
        timed = [each for file in files for each in timed_in(file)] if given.fit else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"expected what `tune --json` prints: {error!r}", file=sys.stderr)
        return 2
    for _, name, found in judged:
        print(f"{name:<72} {_line([found])}")
    for kernel in dict.fromkeys(kernel for kernel, _, _ in judged):
        print(f"{f'all of {kernel}':<72} {_line([j for k, _, j in judged if k == kernel])}")
    print(f"{f'all {len(judged)} problems':<72} {_line([j for _, _, j in judged])}")
    if timed:
        fitted = fit(timed)
        print(f"off by a factor of {math.exp(error_of(timed, TERMS) ** 0.5):.2f}, of ", end="")
        print(f"{math.exp(error_of(timed, fitted) ** 0.5):.2f} with")
        for name, value in asdict(fitted).items():
            print(f"    {name}: float = {value:.3g}")
    return 0


class Timed(NamedTuple):
    """A config that was timed, and the median in microseconds."""

    problem: Problem
    gpu: GPU
    candidate: Candidate
    median_us: float


def timed_in(file: Path) -> list[Timed]:
    """Those of the committed list, on GPUs that the cost model knows."""
    found = []
    for row in json.loads(file.read_text()):
        problem, gpu = _problem_of(row["problem"]), _gpu_named(row["origin"]["gpu"])
        listed = list_of(problem.kernel, gpu.target, problem.dtype) if gpu else ()
        known = {candidate.config: candidate for candidate in listed}
        for timed in row["candidates"]:
            config = from_json(timed["config"])
            candidate = known.get(as_listed(config))
            if gpu and candidate and timed["median_us"]:
                candidate = candidate._replace(config=config)
                found.append(Timed(problem, gpu, candidate, timed["median_us"]))
    return found


def error_of(timed: Sequence[Timed], terms: Terms) -> float:
    """The mean square of the logarithms of prediction over median."""
    ratios = (predict(t.problem, t.gpu, t.candidate, terms).total / t.median_us for t in timed)
    return statistics.fmean(math.log(ratio) ** 2 for ratio in ratios)


def fit(timed: Sequence[Timed]) -> Terms:
    """The terms with the least error, found by changing one after another by less and less."""
    best, least = TERMS, error_of(timed, TERMS)
    for factor in (3.0, 1.5, 1.2, 1.05, 1.01):
        improved = True
        while improved:
            improved = False
            for name, value in asdict(best).items():
                for scaled in (value * factor, value / factor):
                    terms = replace(best, **{name: scaled})
                    now = error_of(timed, terms)
                    if now < least * (1 - 1e-6):
                        best, least, improved = terms, now, True
    return best


def _problem_of(row: dict[str, Any]) -> Problem:
    row = {name: value for name, value in row.items() if name not in ("key", "name")}
    layout, geometry = row.pop("layout"), row.pop("geometry")
    layout["kernel_size"] = tuple(layout["kernel_size"])
    axes = {name: tuple(geometry[name]) for name in ("stride", "dilation")}
    padding = tuple(tuple(pair) for pair in geometry["padding"])
    image = tuple(row.pop("image"))
    return Problem(
        layout=Layout(**layout), geometry=Geometry(padding=padding, **axes), image=image, **row
    )


def _gpu_named(name: str) -> GPU | None:
    plain = name.replace(" ", "").lower()
    return next((gpu for known, gpu in KNOWN.items() if known.lower() in plain), None)


def read(file: Path) -> list[tuple[str, str, Judged]]:
    """Kernel, name and verdict of each problem in a file, of which two configs or more ran."""
    found = []
    for row in json.loads(file.read_text()):
        pairs = [_pair(c) for c in row["candidates"] if c["median_us"] is not None]
        if len(pairs) > 1:
            name = f"{row['origin']['gpu']}: {row['problem']['name']}"
            found.append((row["problem"]["kernel"], name, judge(pairs)))
    return found


def _pair(candidate: dict[str, Any]) -> Pair:
    return candidate["predicted_us"], candidate["median_us"]


def _line(judged: list[Judged]) -> str:
    """Medians over the problems, and the worst regret."""
    rhos = [j.rho for j in judged if j.rho is not None]
    rho = f"{statistics.median(rhos):6.2f}" if rhos else "     -"
    regrets = [j.regret for j in judged]
    text = f"rho {rho}   regret {statistics.median(regrets):5.2f} x" if judged else "nothing"
    return text + (f"   worst {max(regrets):5.2f} x" if len(judged) > 1 else "")


class Judged(NamedTuple):
    """Spearman's rho of the pairs, and the measured time of the best prediction over the shortest.

    ``rho`` is None where it says nothing: of fewer than two pairs, or all equal on one side.
    """

    rho: float | None
    regret: float


def judge(pairs: Sequence[Pair]) -> Judged:
    """Of the timed configs of one problem. Of equal predictions the first is the choice, as in the
    shortlist.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("expected at least one config that was timed")
    predicted, measured = zip(*pairs, strict=True)
    chosen = min(pairs, key=lambda pair: pair[0])
    return Judged(spearman(predicted, measured), chosen[1] / min(measured))


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, or None where one side does not vary."""
    a, b = (_centred(ranks(values)) for values in (xs, ys))
    scale = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else None


def ranks(values: Sequence[float]) -> list[float]:
    """From 1 up; equal values share the mean of their ranks."""
    below = [sum(other < value for other in values) for value in values]
    return [n + (1 + values.count(v)) / 2 for n, v in zip(below, values, strict=True)]


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


if __name__ == "__main__":
    sys.exit(main())
