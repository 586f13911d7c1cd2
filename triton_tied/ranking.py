"""How well the cost model ranks: predictions against measurements of the same configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[float, float]  # predicted and measured


class Judged(NamedTuple):
    """Spearman's rho of the pairs, and the measured time of the best prediction over the shortest.

    ``rho`` is None where it says nothing: of fewer than two pairs, or all equal on one side.
    """

    rho: float | None
    regret: float


def judge(pairs: Sequence[Pair]) -> Judged:
    """Of the timed configs of one problem. Of equal predictions the first is the choice, as in the
    sieves.

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
