"""What was measured, as rows: written as JSON, summed up in geometric means, shown as a table."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from ..version import __version__
from .formulas import FORMULA_PEERS, OTHERS
from .peers import DENSE, TIED_PEERS
from .roofline import Ceilings
from .workloads import FORMULAS

BEST_DENSE = "best_dense"
Measured = Literal["median_ms", "graph_ms"]
# memory format -> pass -> peer -> mean
Means = dict[str, dict[str, dict[str, dict[str, Any]]]]


@dataclass(frozen=True)
class Measurement:
    """One peer at one pass of one workload.

    Args:
        applications: convolutions with one weight in the call.
        ratio_to_dense: to the faster of the dense layouts.
        ratio_to_best_tied_peer: to the fastest that ties its weight and is not this package.
        roofline_share: the least time over the median, on a GPU that of the graph; above 1 where
            the cache keeps what the formula reads from memory.
        extra_bytes: the peak above what was held at the start.
        kept_bytes: of a forward, what autograd holds until the backward.
        launches, graph_ms: of a GPU only.
    """

    workload: str
    family: str
    shape: tuple[int, ...]
    kernel: int
    dtype: str
    memory_format: str
    symmetry: str
    padding_mode: str
    groups: int
    headline: bool
    pass_: str
    applications: int
    peer: str
    rounds: int
    median_ms: float
    ratio_to_dense: float | None
    ratio_to_best_tied_peer: float | None
    roofline_share: float | None
    flops: int
    least_bytes: int
    extra_bytes: int | None
    launches: int | None = None
    graph_ms: float | None = None
    kept_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name.rstrip("_"): _short(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Measurement:
        return cls(**{**_as_fields(found), "shape": tuple(found["shape"])})


@dataclass(frozen=True)
class LeftOut:
    """What was not timed, and why. An empty name stands for all."""

    reason: str
    workload: str = ""
    memory_format: str = ""
    pass_: str = ""
    peer: str = ""

    def as_json(self) -> dict[str, str]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


@dataclass
class Result:
    """All of one run."""

    machine: dict[str, Any]
    ceilings: Ceilings
    rows: list[Measurement] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """One object a line, so that two runs can be compared line by line."""
        parts = {
            "machine": json.dumps(self.machine, indent=1),
            "ceilings": json.dumps(
                {
                    "tflops": {name: _short(rate) for name, rate in self.ceilings.tflops.items()},
                    "copy_gbs": _short(self.ceilings.copy_gbs),
                }
            ),
            "geometric_means": json.dumps(geometric_means(self.rows), indent=1),
            "faults": json.dumps(self.faults),
            "left_out": _lines(each.as_json() for each in self.left_out),
            "rows": _lines(row.as_json() for row in self.rows),
        }
        body = ",\n".join(f'"{name}": {text}' for name, text in parts.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{{\n{body}\n}}\n")


def read(path: Path) -> Result:
    """What :meth:`Result.write` wrote."""
    found = json.loads(path.read_text())
    return Result(
        found["machine"],
        Ceilings(**found["ceilings"]),
        [Measurement.from_json(row) for row in found["rows"]],
        [LeftOut(**_as_fields(each)) for each in found["left_out"]],
        found["faults"],
    )


def geometric_means(rows: list[Measurement]) -> Means:
    """By memory format, pass and peer, over the headline: the ratios to dense and to the best tied
    peer, this package's time over the peer's, eager and as a CUDA graph, and of how many
    workloads."""
    found: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in rows:
        if row.headline:
            found.setdefault((row.memory_format, row.pass_, row.peer), []).append(row)
    means: Means = {}
    for (memory, pass_, peer), group in found.items():
        means.setdefault(memory, {}).setdefault(pass_, {})[peer] = {
            "ratio_to_dense": _mean_or_none(row.ratio_to_dense for row in group),
            "ratio_to_best_tied_peer": _mean_or_none(row.ratio_to_best_tied_peer for row in group),
            "workloads": len(group),
        }
    for memory, passes in means.items():
        for pass_, peers in passes.items():
            eager = pairwise_means(rows, memory, pass_)
            graph = pairwise_means(rows, memory, pass_, "graph_ms")
            for peer, mean in peers.items():
                mean["tied_over_it"] = _short(eager[peer][0]) if peer in eager else None
                mean["tied_over_it_as_graph"] = _short(graph[peer][0]) if peer in graph else None
    return means


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value]
    return _short(geometric_mean(found)) if found else None


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def pairwise_means(
    rows: Iterable[Measurement],
    memory: str,
    pass_: str,
    measured: Measured = "median_ms",
    of: str = "tied",
) -> dict[str, tuple[float, int]]:
    """One peer's time, by default this package's, over that of each other and of the faster
    :data:`BEST_DENSE`, over the workloads of the headline in which both took part: the geometric
    mean, and of how many."""
    by_workload: dict[str, dict[str, float]] = {}
    for row in rows:
        time = getattr(row, measured)
        if row.headline and (row.memory_format, row.pass_) == (memory, pass_) and time:
            by_workload.setdefault(row.workload, {})[row.peer] = time
    found: dict[str, list[float]] = {}
    for times in by_workload.values():
        dense = [times[peer] for peer in DENSE if peer in times]
        others = {**times, BEST_DENSE: min(dense)} if dense else times
        for peer, time in others.items():
            if peer != of and of in times:
                found.setdefault(peer, []).append(times[of] / time)
    return {peer: (geometric_mean(ratios), len(ratios)) for peer, ratios in found.items()}


def measurements_of(
    medians: dict[str, float], builds: bool, make: Callable[..., Measurement]
) -> list[Measurement]:
    """One row for each peer that was timed, with its ratios to the others; a dense weight need not
    be built, so that nothing has a ratio to that."""
    dense = min((medians[name] for name in DENSE if name in medians and not builds), default=None)
    others = (*TIED_PEERS, *OTHERS)
    tied = min((medians[name] for name in others if name in medians), default=None)
    return [
        make(
            peer=name,
            median_ms=median,
            ratio_to_dense=median / dense if dense else None,
            ratio_to_best_tied_peer=median / tied if tied else None,
        )
        for name, median in medians.items()
    ]


def table(rows: list[Measurement]) -> str:
    """One line for each workload and pass: milliseconds of each peer, and what this package's are
    of the best dense and of the best tied peer's; its share of the roofline, and MB of extra
    memory, its own and those of dense. Formulas have a table of their own."""
    rows = [row for row in rows if row.family not in FORMULAS]
    peers = list(dict.fromkeys(row.peer for row in rows))
    lines: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for row in rows:
        key = (row.workload, row.memory_format, row.pass_)
        lines.setdefault(key, {})[row.peer] = row
    width = max((len(workload) for workload, _, _ in lines), default=0) + 2
    titles = [peer.replace("channels_last", "cl").replace("compiled_", "c_") for peer in peers]
    titles += ["/dense", "/tied", "roofline", "MB", "dense MB"]
    text = [f"{'milliseconds':<{width}}{'memory':<15}{'pass':<18}" + _columns(titles)]
    for (workload, memory, pass_), found in lines.items():
        cells = [f"{found[peer].median_ms:.4g}" if peer in found else "-" for peer in peers]
        cells += _of_tied(found["tied"]) if "tied" in found else ["-"] * 4
        cells.append(_megabytes(found["dense"]) if "dense" in found else "-")
        text.append(f"{workload:<{width}}{memory:<15}{pass_:<18}" + _columns(cells))
    return "\n".join(text)


def formula_table(rows: list[Measurement]) -> list[list[str]]:
    """One line for each formula, memory format and pass: milliseconds of each peer, this package's
    over those of the published formula and of the best by hand, and, of a forward, the MiB that
    each keeps for the backward. Empty where nothing was measured."""
    lines: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for row in rows:
        if row.family in FORMULAS:
            key = (row.workload, row.memory_format.replace("_", "-"), row.pass_.replace("_", " "))
            lines.setdefault(key, {})[row.peer] = row
    if not lines:
        return []
    labels = list(FORMULA_PEERS.values())
    text = [["layer", "images", "pass", *(f"{label}, ms" for label in labels)]]
    text[0] += [f"over {FORMULA_PEERS[name]}" for name in OTHERS]
    text[0] += [f"{label}, MiB kept" for label in labels]
    for key, found in lines.items():
        ours = found.get("tied")
        ratios = [
            f"{ours.median_ms / found[name].median_ms:.2f}" if ours and name in found else ""
            for name in OTHERS
        ]
        peers = [found.get(name) for name in FORMULA_PEERS]
        times = [f"{peer.median_ms:.4g}" if peer else "" for peer in peers]
        kept = [peer.kept_bytes if peer else None for peer in peers]
        shown = ["" if n is None else f"{n / 2**20:.3g}" for n in kept]
        text.append([*key, *times, *ratios, *shown])
    return text


def _of_tied(row: Measurement) -> list[str]:
    ratios = (row.ratio_to_dense, row.ratio_to_best_tied_peer)
    share = "-" if row.roofline_share is None else f"{row.roofline_share:.0%}"
    shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    return [*shown, share, _megabytes(row)]


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>13}" for cell in cells)


def _megabytes(row: Measurement) -> str:
    return "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.3g}"


def means_table(rows: list[Measurement]) -> str:
    """The geometric means of the ratios to dense; a star where a peer took part in fewer
    workloads than this package."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    text = [f"{'geometric means of the ratio to dense':<39}" + "".join(f"{p:>21}" for p in peers)]
    for memory, passes in geometric_means(rows).items():
        for pass_, found in passes.items():
            most = max(mean["workloads"] for mean in found.values())
            cells = (
                f"{found[p]['ratio_to_dense']:.3f}" + " *"[found[p]["workloads"] < most]
                if p in found and found[p]["ratio_to_dense"]
                else "- "
                for p in peers
            )
            text.append(f"{memory:<16}{pass_:<23}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(text) + "\n* of fewer workloads than the others"


def machine_of(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; "load" is how many processes wanted a CPU in the last minute."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "triton_tied": __version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file lies in, with a plus where it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "."],
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.stdout else None


def _as_fields(found: dict[str, Any]) -> dict[str, Any]:
    """A field cannot be called "pass" in Python."""
    return {("pass_" if name == "pass" else name): value for name, value in found.items()}


def _lines(objects: Iterable[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(each) for each in objects) + "\n]"


def _short(value: Any) -> Any:
    """Five digits of a float, more than any median is good for."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
