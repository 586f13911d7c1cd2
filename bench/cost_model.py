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
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton_tied.ranking import Judged, judge

COMMITTED = Path(__file__).with_name("results")


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
        print(f"{name:<60}{_line([found])}")
    for kernel in dict.fromkeys(kernel for kernel, _, _ in judged):
        print(f"{f'all of {kernel}':<60}{_line([j for k, _, j in judged if k == kernel])}")
    print(f"{f'all {len(judged)} problems':<60}{_line([j for _, _, j in judged])}")
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


def _pair(candidate: dict[str, Any]) -> tuple[float, float]:
    return candidate["predicted_us"], candidate["median_us"]


def _line(judged: list[Judged]) -> str:
    """Medians over the problems, and the worst regret."""
    rhos = [j.rho for j in judged if j.rho is not None]
    rho = f"{statistics.median(rhos):6.2f}" if rhos else "     -"
    regrets = [j.regret for j in judged]
    text = f"rho {rho}   regret {statistics.median(regrets):5.2f} x" if judged else "nothing"
    return text + (f"   worst {max(regrets):5.2f} x" if len(judged) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
