"""What the cost model predicts for the headline workloads on a GPU that need not be there.

    python bench/static.py [--gpu H100] [--before FILE] [--out FILE]

For each workload, forward and weight gradient: the config that is taken where nothing was timed,
what it should take and wait for, how many of the multiprocessors are busy, and the share of the
practical roofline (the products at the speed of large matrix products, or the least bytes at that
of the memory). Predicted, never timed. ``--before``: an earlier such file to compare with.
``--table``: the rows for a page, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from triton_tied.autotune import gpus
from triton_tied.autotune.candidates import Candidate, list_of, read_file
from triton_tied.autotune.cost_model import TERMS, busy_share, floor_us, predict
from triton_tied.autotune.gpus import GPU
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.benchmark.workloads import every
from triton_tied.kernels.configs import Config, as_json, as_listed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(gpus.KNOWN)}")
    parser.add_argument("--before", type=Path, metavar="FILE", help="an earlier prediction")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--table", action="store_true", help="print Markdown")
    given = parser.parse_args(arguments)
    gpu = gpus.find(given.gpu)
    rows = list(predicted(gpu))
    before = _times(json.loads(given.before.read_text())["rows"]) if given.before else {}
    summary = summary_of(rows, before)
    if given.table:
        print("\n".join(table(rows, before)))
    else:
        for row in rows:
            _print(row, before)
        print(json.dumps(summary, indent=1))
    if given.out:
        head = {"predicted": "never timed", "gpu": asdict(gpu), "terms": asdict(TERMS)}
        head |= {"sources": read_file()["sources"], "triton": read_file()["triton"]}
        given.out.write_text(
            json.dumps({**head, "summary": summary, "rows": rows}, indent=1) + "\n"
        )
    return 0


def predicted(gpu: GPU) -> Iterator[dict[str, Any]]:
    """A row for each pass of each headline workload in channels-last memory."""
    for workload in every():
        if not workload.headline or len(workload.image) != 2:
            continue
        forward = workload.problem
        for problem in (forward, replace(forward, kernel="weight_grad")):
            yield {"workload": workload.name, "pass": problem.kernel, **_row(problem, gpu)}


def _row(problem: Problem, gpu: GPU) -> dict[str, Any]:
    config = make_shortlist(problem, gpu).untimed
    candidate = _candidate_of(problem, gpu, config)
    found = predict(problem, gpu, candidate)
    return {
        "config": as_json(config),
        "registers": candidate.registers,
        "shared_bytes": candidate.shared_bytes,
        "barriers": candidate.barriers,
        "waits": candidate.waits,
        "terms_us": {name: round(term, 2) for name, term in found._asdict().items()},
        "bound": found.bound,
        "us": round(found.total, 2),
        "roofline_us": round(floor_us(problem, gpu), 2),
        "percent": round(100 * floor_us(problem, gpu) / found.total, 1),
        "limit_percent": round(100 * floor_us(problem, gpu) / _least_us(problem, gpu), 1),
        "busy": round(busy_share(problem, gpu, config), 2),
    }


def _least_us(problem: Problem, gpu: GPU) -> float:
    """Of a kernel at the roofline, with the launch and the start that every kernel has."""
    return floor_us(problem, gpu) + TERMS.launch_us + TERMS.start * 1e-3 / gpu.clock_ghz


def _candidate_of(problem: Problem, gpu: GPU, config: Config) -> Candidate:
    for candidate in list_of(problem.kernel, gpu.target, problem.dtype):
        if candidate.config == as_listed(config):
            return candidate._replace(config=config)
    raise LookupError(f"{config} is not in the committed list")


def summary_of(
    rows: Sequence[dict[str, Any]], before: dict[tuple[str, str], float]
) -> dict[str, dict[str, float | int]]:
    """By pass: geometric means, the worst, and how much faster than before."""
    found: dict[str, dict[str, float | int]] = {}
    for kernel in ("conv", "weight_grad"):
        mine = [row for row in rows if row["pass"] == kernel]
        gains = [
            before[row["workload"], kernel] / row["us"]
            for row in mine
            if (row["workload"], kernel) in before
        ]
        found[kernel] = {
            "workloads": len(mine),
            "percent_of_roofline": round(_mean([row["percent"] for row in mine]), 1),
            "least_percent": min(row["percent"] for row in mine),
            "limit_percent": round(_mean([row["limit_percent"] for row in mine]), 1),
            "fewest_busy": min(row["busy"] for row in mine),
            "under_75_percent_busy": sum(row["busy"] < 0.75 for row in mine),
        }
        if gains:
            found[kernel] |= {"compared": len(gains), "times_faster": round(_mean(gains), 3)}
    return found


def _mean(values: Sequence[float]) -> float:
    """The geometric one."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _times(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(row["workload"], row["pass"]): row["us"] for row in rows}


def table(rows: Sequence[dict[str, Any]], before: dict[tuple[str, str], float]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| layer | pass | tile | before us | us | of the roofline | busy | bound |"
    yield "|---|---|---|--:|--:|--:|--:|---|"
    for row in rows:
        earlier = before.get((row["workload"], row["pass"]))
        was = f"{earlier:.1f}" if earlier else "-"
        name = "forward" if row["pass"] == "conv" else "weight gradient"
        yield (
            f"| {row['workload']} | {name} | {_tile(row['config'])} | {was} | {row['us']:.1f} | "
            f"{row['percent']:.0f}% | {row['busy']:.2f} | {row['bound']} |"
        )


def _tile(config: dict[str, Any]) -> str:
    box = "x".join(map(str, config["box"]))
    blocks = "x".join(str(size) for name, size in config.items() if name.startswith("BLOCK"))
    warps = f" w{config['num_warps']}" if "num_warps" in config else ""
    by = " pointers" if config.get("loader") == "pointer" else ""
    by += f" merged {config['merged']}" if config.get("merged", 1) > 1 else ""
    by += " streamed" if config.get("streamed") else ""
    kind = "" if config["kind"] in ("conv", "weight_grad") else f"{config['kind']} "
    return f"{kind}{box} {blocks}{warps} s{config['num_stages']} /{config['splits']}{by}"


def _print(row: dict[str, Any], before: dict[tuple[str, str], float]) -> None:
    earlier = before.get((row["workload"], row["pass"]))
    was = f"{earlier:8.1f}" if earlier else " " * 8
    print(
        f"{row['workload']:<34}{row['pass']:<12}{_tile(row['config']):<40}{was}{row['us']:8.1f} us "
        f"{row['percent']:5.1f}% busy {row['busy']:4.2f} {row['bound']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
