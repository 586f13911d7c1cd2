"""Pictures of a result: where each workload stands under the roofline, how much time this package
takes of each peer's, and how its cost grows."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no screen is asked for

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

from .peers import PEERS  # noqa: E402
from .results import Measured, Measurement, Result, pairwise_means  # noqa: E402
from .workloads import FORMULAS, TORCH_DTYPES  # noqa: E402

COLOURS = {name: peer.colour for name, peer in PEERS.items()}
LABELS = {name: peer.label for name, peer in PEERS.items()}
PASS_LABELS = {
    "forward_backward": "forward and backward",
    "forward": "forward",
    "inference": "inference, weight kept",
    "weight_build": "weight build",
    "input_gradient": "input gradient",
    "weight_gradient": "weight gradient",
    "applications": "n applications, forward and backward",
    "evaluation": "n applications, forward only",
}
_STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "triton_tied",  # the same picture is the same file
    "svg.fonttype": "none",
}
_MARKERS = "s^Dv<>PXph*d8H"  # circles stand for any
_BARS = ("forward_backward", "forward", "inference")
_AXES = {"channels": 1, "side": 2, "batch": 0, "kernel": None}


def draw(result: Result, folder: Path, stem: str = "") -> list[Path]:
    """Writes each picture as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "roofline": roofline,
        "ratios": ratios,
        "graph-ratios": graph_ratios,
        "scaling": scaling,
    }
    paths = []
    for name, picture in pictures.items():
        with plt.rc_context(_STYLE):
            figure = picture(result)
            if figure is None:
                continue
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{stem}{name}.{suffix}"
                figure.savefig(path, dpi=130, metadata=metadata)
                paths.append(path)
            plt.close(figure)
    return paths


def roofline(result: Result) -> Figure | None:
    """One panel a dtype: the rate over FLOPs per byte, forward and backward, of every workload;
    on a GPU of CUDA graphs, where no launch is seen."""
    rows = [row for row in result.rows if row.pass_ == "forward_backward"]
    rows = [row for row in rows if not row.family.startswith("scaling")]
    rows = [row for row in rows if row.family not in FORMULAS]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    if not rows:
        return None
    lines, columns = -(-len(dtypes) // 2), min(len(dtypes), 2)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.5 + 6.5 * columns, 0.5 + 6 * lines), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    panels = list(grid.flat)
    for unused in panels[len(dtypes) :]:
        unused.remove()
    unit, scale = ("TFLOP/s", 1.0) if min(result.ceilings.tflops.values()) > 1 else ("GFLOP/s", 1e3)
    families = dict(zip(dict.fromkeys(row.family for row in rows), itertools.cycle(_MARKERS)))
    for axes, dtype in zip(panels, dtypes, strict=False):
        found = [row for row in rows if row.dtype == dtype]
        _roofline_of(found, result, dtype, scale, families, axes)
    for line in grid:
        line[0].set_ylabel(f"{unit}, forward and backward")
    figure.legend(handles=_legend_of(families), loc="outside right center", frameon=False)
    figure.suptitle(f"Every workload under the roofline: {machine_name(result)}")
    return figure


def _roofline_of(
    rows: list[Measurement],
    result: Result,
    dtype: str,
    scale: float,
    families: dict[str, str],
    axes: Axes,
) -> None:
    peak = result.ceilings.tflops[dtype] * scale
    slope = result.ceilings.copy_gbs / 1e3 * scale
    tied = [row for row in rows if row.peer == "tied"]
    dense = _fastest([row for row in rows if row.peer.startswith("dense")])
    places = [_intensity(row) for row in tied]
    left, right = min([*places, peak / slope]) / 2, max([*places, peak / slope]) * 2
    corners = [left, peak / slope, right]
    axes.plot(corners, [min(peak, slope * x) for x in corners], color="black", linewidth=2)
    axes.annotate(f"matrix product: {peak:.3g}", (peak / slope, peak), (0, 6),
                  textcoords="offset points")  # fmt: skip
    axes.annotate(f"copy: {result.ceilings.copy_gbs:.0f} GB/s", (left, slope * left), (10, 0),
                  textcoords="offset points", va="top")  # fmt: skip
    for row in tied:
        bar = dense.get((row.workload, row.memory_format))
        if bar:
            ends = [_rate(bar) * scale, _rate(row) * scale]
            axes.plot([_intensity(row)] * 2, ends, color="#bbbbbb", linewidth=1, zorder=1)
    for row in [*dense.values(), *tied]:
        colour = COLOURS["tied" if row.peer == "tied" else "dense"]
        axes.plot(
            _intensity(row), _rate(row) * scale, families[row.family], markersize=8, color=colour,
            markerfacecolor=colour if row.memory_format == "channels_last" else "white",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", title=dtype)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.grid(True, alpha=0.25)


def _legend_of(families: dict[str, str]) -> list[Line2D]:
    def entry(label: str, marker: str, colour: str, face: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, label=label, color=colour,
                      markerfacecolor=face, markersize=8)  # fmt: skip

    dense, tied = COLOURS["dense"], COLOURS["tied"]
    return [
        entry(LABELS["tied"], "o", tied, tied),
        entry("dense, the faster layout", "o", dense, dense),
        entry("channels-last images", "o", "black", "black"),
        entry("contiguous images", "o", "black", "white"),
        *(entry(family, marker, "black", "white") for family, marker in families.items()),
    ]


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def ratios(result: Result) -> Figure | None:
    """Geometric means of this package's time over each peer's, workload by workload."""
    return _ratios_of(result, "median_ms", "as Python calls them")


def graph_ratios(result: Result) -> Figure | None:
    """The same, replayed as CUDA graphs."""
    return _ratios_of(result, "graph_ms", "as CUDA graphs")


def _ratios_of(result: Result, measured: Measured, how: str) -> Figure | None:
    memories = dict.fromkeys(row.memory_format for row in result.rows if row.headline)
    means = {
        (memory, pass_): pairwise_means(result.rows, memory, pass_, measured)
        for memory in memories
        for pass_ in _BARS
    }
    peers = {memory: [p for p in COLOURS if any(p in means[memory, b] for b in _BARS)]
             for memory in memories}  # fmt: skip
    peers = {memory: names for memory, names in peers.items() if names}
    if not peers:
        return None
    heights = [len(names) + 1.5 for names in peers.values()]
    figure, panels = plt.subplots(
        len(peers), len(_BARS), figsize=(15, 1.2 + 0.42 * sum(heights)), sharex=True,
        sharey="row", squeeze=False, layout="constrained", height_ratios=heights,
    )  # fmt: skip
    most = len({row.workload for row in result.rows if row.headline})
    span = 1.3 * max(
        abs(math.log2(ratio)) for found in means.values() for ratio, _ in found.values()
    )
    for line, memory in zip(panels, peers, strict=True):
        for axes, pass_ in zip(line, _BARS, strict=True):
            _bars_of(means[memory, pass_], peers[memory], most, max(span, 1.0), axes)
            axes.set_title(f"{PASS_LABELS[pass_]}, {memory.replace('_', '-')}")
    for axes in panels[-1]:
        axes.set_xlabel("← triton_tied faster      slower →")
    figure.suptitle(f"Time of triton_tied over that of each peer, {how}: {machine_name(result)}")
    return figure


def _bars_of(
    means: dict[str, tuple[float, int]], peers: list[str], most: int, span: float, axes: Axes
) -> None:
    """Numbers stand on the side of the line that their bar leaves free."""
    low, high = 2.0**-span, 2.0**span
    axes.axvspan(low, 1, color="#2ca02c", alpha=0.07, linewidth=0)
    axes.axvspan(1, high, color="#d62728", alpha=0.07, linewidth=0)
    for place, peer in enumerate(peers):
        if peer not in means:
            continue
        ratio, count = means[peer]
        axes.barh(place, ratio - 1, left=1, color=COLOURS[peer], height=0.7)
        axes.annotate(
            f"{ratio:.2f}" + f" ({count} of {most})" * (count < most), (1, place),
            (6 if ratio < 1 else -6, 0), textcoords="offset points", va="center",
            ha="left" if ratio < 1 else "right",
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_yticks(range(len(peers)), [LABELS[peer] for peer in peers])
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")


def scaling(result: Result) -> Figure | None:
    """Time and extra memory over each size, and how the formula says that they grow."""
    found = {axis: sweep(result.rows, axis) for axis in _AXES}
    found = {axis: rows for axis, rows in found.items() if rows}
    if not found:
        return None
    figure, panels = plt.subplots(
        2, len(found), figsize=(2 + 4.2 * len(found), 8.5), squeeze=False, layout="constrained"
    )
    for (axis, rows), above, below in zip(found.items(), *panels, strict=True):
        _scaling_of(axis, rows, above, below)
    panels[0][0].set_ylabel("milliseconds")
    panels[1][0].set_ylabel("extra memory, MB")
    for line in panels:
        line[0].legend(fontsize=10)
    figure.suptitle(f"Forward and backward as one size grows: {machine_name(result)}")
    return figure


def _scaling_of(axis: str, rows: list[Measurement], above: Axes, below: Axes) -> None:
    """Of one size: the time above, the memory below."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    for peer in sorted(peers, key=list(COLOURS).index):
        mine = [row for row in rows if row.peer == peer]
        sizes = [size_of(row, axis) for row in mine]
        style: dict[str, Any] = {
            "color": COLOURS[peer], "label": LABELS[peer], "marker": "o",
            "linewidth": 3 if peer == "tied" else 1.8,
        }  # fmt: skip
        above.plot(sizes, [row.median_ms for row in mine], **style)
        below.plot(sizes, [(row.extra_bytes or 0) / 1e6 for row in mine], **style)
    tied = [row for row in rows if row.peer == "tied"]
    times = [row.median_ms for row in tied]
    sizes = [size_of(row, axis) for row in tied]
    dashes: dict[str, Any] = {"linestyle": "--", "color": "black", "linewidth": 1.2}
    grown = [times[-1] * row.flops / tied[-1].flops for row in tied]
    above.plot(sizes, grown, label="growth of the FLOPs", **dashes)
    least = [least_extra_bytes(row) / 1e6 for row in tied]
    below.plot(sizes, least, label="output and gradients alone", **dashes)
    for axes in (above, below):
        axes.set(xscale="log", yscale="log")
        _plain_numbers(axes.yaxis)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, alpha=0.25)
    above.set_title(f"{axis} (else {_others(tied, axis)})", fontsize=11)
    below.set_xlabel(axis)


def least_extra_bytes(row: Measurement) -> int:
    """Of a forward and backward: the output, the input's gradient and that of the free numbers."""
    image = math.prod(row.shape) * TORCH_DTYPES[row.dtype].itemsize
    packed = (row.least_bytes - 5 * image) // 3
    return 2 * image + packed


def sweep(rows: list[Measurement], axis: str) -> list[Measurement]:
    """The rows of one sweep, from small to large."""
    found = [row for row in rows if row.family == f"scaling {axis}"]
    return sorted(found, key=lambda row: size_of(row, axis))


def size_of(row: Measurement, axis: str) -> int:
    place = _AXES[axis]
    return row.kernel if place is None else row.shape[place]


def machine_name(result: Result) -> str:
    machine = result.machine
    if machine["device"] != "cpu":
        return machine["device"]
    plural = "s" * (machine["threads"] != 1)
    return f"{machine['processor']}, {machine['threads']} thread{plural}"


def _others(rows: list[Measurement], axis: str) -> str:
    n, channels, side, _ = rows[0].shape
    sizes = {"batch": n, "channels": channels, "side": side, "kernel": rows[0].kernel}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if name != axis)


def _fastest(rows: list[Measurement]) -> dict[tuple[str, str], Measurement]:
    found: dict[tuple[str, str], Measurement] = {}
    for row in rows:
        key = (row.workload, row.memory_format)
        if key not in found or _rate(row) > _rate(found[key]):
            found[key] = row
    return found


def _rate(row: Measurement) -> float:
    """In 10^12 operations a second."""
    return row.flops / (row.graph_ms or row.median_ms) / 1e9


def _intensity(row: Measurement) -> float:
    return row.flops / row.least_bytes
