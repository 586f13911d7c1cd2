"""How well the cost model ranks the configs that were timed, from what tuning printed.

    python -m triton_tied tune --shape 32,128,28,28 --again --json > tune.json
    python bench/cost_model.py [tune.json ...]

Without files it reads those of bench/results. For each problem: Spearman's rho of predictions
against medians, and the regret: how much longer the model's first choice took than the best. Only
configs that ran count, and only problems of which two did.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

COMMITTED = Path(__file__).with_name("results")

Pair = tuple[float, float]  # predicted and measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    files = parser.parse_args(arguments).files or sorted(COMMITTED.glob("tune-*.json"))
    if not files:
        print("nothing was measured yet: there is no tune-*.json in bench/results")
        return 0
    try:
        judged = [row for file in files for row in read(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"expected what `tune --json` prints: {error!r}", file=sys.stderr)
        return 2
    for _, name, found in judged:
        print(f"{name:<72} {_line([found])}")
    for kernel in dict.fromkeys(kernel for kernel, _, _ in judged):
        print(f"{f'all of {kernel}':<72} {_line([j for k, _, j in judged if k == kernel])}")
    print(f"{f'all {len(judged)} problems':<72} {_line([j for _, _, j in judged])}")
    return 0


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
