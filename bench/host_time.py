"""What a call costs on the CPU before the GPU has anything to do: this package against Triton.

    python bench/host_time.py [--rounds 60] [--json FILE] [--profile]

On a stand-in H100 whose launches do nothing, so that only Python's and PyTorch's time is left. A
layer's forward without gradients is held against Triton's own ``kernel[grid](...)`` of the same
arguments, forward and backward against those of its three launches; in turns, in one process.
Medians over the rounds, in microseconds. What a real GPU adds is left out: PyTorch's calls that
make a device current, or ask whether a graph is being captured. ``--profile`` shows where the time
of a forward goes. Needs Triton, but no GPU.
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

CALLS = 50  # in one round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    pretend_h100()
    layer = tt.TiedConv2d(16, 3, padding=1, dtype=torch.bfloat16)
    x = torch.randn(1, 16, 4, 8, dtype=torch.bfloat16)  # small: the CPU has to make the tensors
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    if given.profile:
        profile(lambda: forward(layer, x))
        return
    calls = {
        "forward": lambda: forward(layer, x),
        "forward and backward": lambda: both(layer, x),
    }
    rows = measure(calls, given.rounds)
    for name, row in rows.items():
        ours, theirs = row["ours_us"], row["triton_us"]
        print(
            f"{name:<22}{ours:7.1f} us, Triton's own {row['launches']} launches {theirs:6.1f} us: "
            f"{ours / theirs:.2f} x"
        )
    if given.json:
        result = {"machine": machine_of(torch.device("cpu")), "host_time": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def both(layer: torch.nn.Module, x: torch.Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, (x, layer.packed_weight, layer.bias), y.detach())


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of ours, and of Triton's own launches of the same kernels, in turns."""
    launches = {name: launches_of(call) for name, call in calls.items()}
    ours: dict[str, list[float]] = {name: [] for name in calls}
    theirs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            ours[name].append(microseconds(call))
            theirs[name].append(microseconds(lambda: launch_all(launches[name])))  # noqa: B023
    return {
        name: {
            "launches": len(launches[name]),
            "ours_us": statistics.median(ours[name]),
            "triton_us": statistics.median(theirs[name]),
        }
        for name in calls
    }


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


def launch_all(launches: list[launch._Call]) -> None:
    """By Triton alone."""
    for each in launches:
        each.kernel[(each.programs,)](**each.arguments)


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


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
