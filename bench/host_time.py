"""What a call costs on the CPU before the GPU has anything to do: this package against Triton.

    python bench/host_time.py [--calls 3000] [--json FILE] [--profile]

On a stand-in H100 whose launches do nothing, so that only Python's and PyTorch's time is left. A
layer's forward without gradients is held against Triton's own ``kernel[grid](...)`` of the same
arguments, by name and by position, forward and backward against those of its three launches: one
call each in turns, in one process. Medians, in microseconds. What a real GPU adds is left out:
PyTorch's calls that ask which device is current, or whether a graph is being captured.
``--profile`` shows where the time of a forward goes. Needs Triton, but no GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from idle_gpu import pretend_h100

import triton_tied as tt
from triton_tied.benchmark.results import machine_of
from triton_tied.kernels import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    pretend_h100()
    layer = tt.TiedConv2d(16, 3, padding=1, dtype=torch.bfloat16)
    x = torch.randn(1, 16, 4, 8, dtype=torch.bfloat16)  # small: the CPU has to make the tensors
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    if given.profile:
        with torch.no_grad():
            profile(lambda: layer(x))
        return
    rows = {}
    with torch.no_grad():
        rows["forward"] = measure(lambda: layer(x), given.calls)
    rows["forward and backward"] = measure(lambda: both(layer, x), given.calls)
    for name, row in rows.items():
        ours = row["ours_us"]
        print(f"{name:<21}{ours:7.1f} us; Triton's own launches, {row['launches']}:", end="")
        for how in ("by_name", "by_position"):
            theirs = row[f"triton_{how}_us"]
            print(f" {theirs:.1f} us {how.replace('_', ' ')}, {ours / theirs:.2f} x;", end="")
        print()
    if given.json:
        result = {"machine": machine_of(torch.device("cpu")), "host_time": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def both(layer: torch.nn.Module, x: torch.Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, (x, layer.packed_weight, layer.bias), y.detach())


def measure(call: Callable[[], object], count: int) -> dict[str, float]:
    """Medians of ours, and of Triton's own launches of the same kernels, in turns."""
    launches = launches_of(call)
    ways = {"ours": call, "triton_by_name": by_name(launches)}
    ways["triton_by_position"] = by_position(launches)
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seen[name].append((time.perf_counter() - start) * 1e6)
    medians = {f"{name}_us": statistics.median(found) for name, found in seen.items()}
    return {"launches": len(launches), **medians}


def launches_of(call: Callable[[], object]) -> list[launch._Call]:
    """What the call launches."""
    call()
    seen: list[launch._Call] = []
    run = launch._Call.run
    launch._Call.run = lambda self: seen.append(self)
    try:
        call()
    finally:
        launch._Call.run = run
    return seen


def by_name(launches: list[launch._Call]) -> Callable[[], None]:
    """By Triton alone, arguments by name."""
    found = [
        (each.kernel, (each.launch.programs,), {**each.arguments, **each.launch.options})
        for each in launches
    ]

    def run() -> None:
        for kernel, grid, arguments in found:
            kernel[grid](**arguments)

    return run


def by_position(launches: list[launch._Call]) -> Callable[[], None]:
    """By Triton alone, arguments by position."""
    found = [
        (each.kernel, (each.launch.programs,), each.values, each.launch.options)
        for each in launches
    ]

    def run() -> None:
        for kernel, grid, values, options in found:
            kernel[grid](*values, **options)

    return run


def profile(call: Callable[[], object]) -> None:
    call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(500):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
