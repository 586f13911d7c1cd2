"""Draws the newest result of each device, and writes the tables of ``docs/performance.md`` from it.

    python bench/figures.py

Results are ``bench/results/<device>-<date>.json``, as ``python -m triton_tied bench --json`` writes
them. No number between the page's two markers is typed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from triton_tied.benchmark import results
from triton_tied.benchmark.plots import LABELS, PASS_LABELS, draw, machine_name, size_of, sweep
from triton_tied.benchmark.results import BEST_DENSE, Measured, Measurement, Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = PAGE.with_name("images")
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
PASSES = ("forward_backward", "forward", "inference", "weight_build", "input_gradient",
          "weight_gradient", "applications", "evaluation")  # fmt: skip
PEERS = ("averaged", "parametrized", "compiled_averaged", "gathered", "compiled_gathered",
         "assembled")  # fmt: skip
_FORMULAS = (
    "What is built on a layer, against the formula as published and the best that is written by "
    "hand. `over` is the time of triton_tied over theirs: above 1 it loses."
)
_STEADY = 1.5  # a step of a sweep grows as the formula says, if by a factor within this


def main() -> None:
    newest = newest_of(RESULTS)
    for device, path in newest.items():
        for drawn in draw(results.read(path), IMAGES, f"{device}-"):
            print(drawn.relative_to(ROOT))
    PAGE.write_text(replaced(PAGE.read_text(), block(newest)))


def newest_of(folder: Path) -> dict[str, Path]:
    """By device, the CPU last."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d", path.stem)
        if match:
            found[match[1]] = path
    return dict(sorted(found.items(), key=lambda item: item[0] == "cpu"))


def replaced(text: str, new: str) -> str:
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{new}\n{END}{after}"


def block(newest: dict[str, Path]) -> str:
    return "\n\n".join(_section(device, path) for device, path in newest.items())


def _section(device: str, path: Path) -> str:
    result = results.read(path)
    machine = result.machine
    count = len({row.workload for row in result.rows if row.headline})
    commit = machine["commit"] or "unknown"
    commit = commit[:7] + " with changes" * commit.endswith("+")
    parts = [
        f"### {machine_name(result)}",
        f"PyTorch {machine['torch']}, {machine['date']}, commit {commit}. "
        f"Every number is in `{path.relative_to(ROOT)}`.",
        f"Geometric means over {count} layers:",
        _means(result),
        f"![time of triton_tied over that of each peer](images/{device}-ratios.png)",
        _graphs(device, result),
        "One row a layer: milliseconds of a forward and backward on channels-last images.",
        _workloads(result),
        _formulas(result),
        "Each layer against the two limits of the machine, its matrix products and its copies:",
        f"![every workload under the roofline](images/{device}-roofline.png)",
        _growth(device, result),
    ]
    return "\n\n".join(part for part in parts if part)


def _means(result: Result, measured: Measured = "median_ms") -> str:
    """One row for each pass and memory format. The floor is that of a dense weight: copies."""
    memories = dict.fromkeys(row.memory_format for row in result.rows)
    most = len({row.workload for row in result.rows if row.headline})
    lines = [["pass", "images", "dense", *(LABELS[peer] for peer in PEERS), "copies over dense"]]
    for pass_, memory in itertools.product(PASSES, memories):
        pairs = results.pairwise_means(result.rows, memory, pass_, measured)
        floor = results.pairwise_means(result.rows, memory, pass_, measured, of="copied")
        if not pairs:
            continue
        if pass_ == "weight_build":  # a dense weight need not be built
            pairs.pop(BEST_DENSE, None)
            floor.pop(BEST_DENSE, None)
        cells = [
            _ratio(*pairs[peer], most) if peer in pairs else "" for peer in (BEST_DENSE, *PEERS)
        ]
        cells.append(_ratio(*floor[BEST_DENSE], most, bold=False) if BEST_DENSE in floor else "")
        lines.append([PASS_LABELS[pass_], memory.replace("_", "-"), *cells])
    return _markdown(lines)


def _workloads(result: Result) -> str:
    shown = ("dense", "averaged", "tied")
    lines = [["layer", *shown[:2], "triton_tied", "over dense", "over the fastest tied peer"]]
    by_workload: dict[str, dict[str, Measurement]] = {}
    for row in result.rows:
        if row.headline and (row.pass_, row.memory_format) == ("forward_backward", "channels_last"):
            by_workload.setdefault(row.workload, {})[row.peer] = row
    for workload, found in by_workload.items():
        if "tied" not in found:
            continue
        times = {peer: row.median_ms for peer, row in found.items()}
        times["dense"] = min(times[peer] for peer in times if peer.startswith("dense"))
        tied = found["tied"]
        lines.append(
            [workload, *(f"{times[peer]:.3g}" for peer in shown)]
            + [_ratio(ratio) for ratio in (tied.ratio_to_dense, tied.ratio_to_best_tied_peer)]
        )
    return _markdown(lines)


def _formulas(result: Result) -> str:
    lines = results.formula_table(result.rows)
    return f"{_FORMULAS}\n\n{_markdown(lines)}" if lines else ""


def _graphs(device: str, result: Result) -> str:
    if not any(row.graph_ms for row in result.rows):
        return ""
    figure = f"![the same, as CUDA graphs](images/{device}-graph-ratios.png)"
    means = _means(result, "graph_ms")
    return f"The same as CUDA graphs, without the time that launches take:\n\n{means}\n\n{figure}"


def _growth(device: str, result: Result) -> str:
    """Whether the cost grows as the formula says, and where it does not."""
    lines = [["from", "to", "time grows", "arithmetic grows"]]
    steps = 0
    for axis in ("channels", "side", "batch", "kernel"):
        rows = [row for row in sweep(result.rows, axis) if row.peer == "tied"]
        for small, large in zip(rows, rows[1:], strict=False):
            steps += 1
            grown, work = large.median_ms / small.median_ms, large.flops / small.flops
            if not 1 / _STEADY <= grown / work <= _STEADY:
                sizes = (f"{axis} {size_of(small, axis)}", str(size_of(large, axis)))
                lines.append([*sizes, f"{grown:.1f} x", f"{work:.1f} x"])
    if not steps:
        return ""
    steady = steps - len(lines) + 1
    text = (
        f"As one size grows and the others stay, the time of this package grows as the arithmetic "
        f"does, within {_STEADY} x, in {steady} of {steps} steps."
    )
    figure = f"![time and memory as one size grows](images/{device}-scaling.png)"
    if steady == steps:
        return f"{text}\n\n{figure}"
    return f"{text} The other steps:\n\n{_markdown(lines)}\n\n{figure}"


def _ratio(ratio: float | None, count: int = 0, most: int = 0, bold: bool = True) -> str:
    if ratio is None:
        return ""
    text = f"**{ratio:.2f}**" if bold and float(f"{ratio:.2f}") < 1 else f"{ratio:.2f}"
    return f"{text} ({count})" if count < most else text


def _markdown(lines: Iterable[list[str]]) -> str:
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
