"""What ``tied_linear`` takes on the CPU against a matrix that is made by hand.

    python bench/linear_time.py [--rounds 101] [--json FILE]

By hand a full ``W0`` is held, each call makes ``W = W0 + W0.T`` (or minus) of it, and then takes
``x @ W + b`` or ``F.linear(x, W, b)``. All three in turns, in one process, forward alone and with
all gradients. Medians over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import triton_tied as tt
from triton_tied.benchmark.results import machine_of

# rows and channels: few of both, a recurrent net, the nodes of a graph, the head of a SOC net
SHAPES = [(64, 64), (256, 256), (2708, 64), (2708, 128), (2708, 256), (128, 1024), (128, 2048)]
SIGNS = {"self_adjoint": 1, "skew_adjoint": -1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows = []
    for size, channels in SHAPES:
        for symmetry in SIGNS:
            for backward in (False, True):
                row = {"rows": size, "channels": channels, "symmetry": symmetry}
                row |= {"pass": "forward_backward" if backward else "forward"}
                row |= medians(calls(size, channels, symmetry, backward), given.rounds)
                rows.append(row)
                ours = row["tied_us"]
                print(
                    f"{size:5} x {channels:4} {symmetry:13} {row['pass']:17} {ours:8.0f} us: "
                    f"{ours / row['product_us']:.2f} x @, {ours / row['linear_us']:.2f} x F.linear",
                    flush=True,
                )
    if given.json:
        result = {"machine": machine_of(torch.device("cpu")), "linear_time": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def calls(
    size: int, channels: int, symmetry: str, backward: bool
) -> dict[str, Callable[[], object]]:
    x, grad, W0 = (torch.randn(n, channels) for n in (size, size, channels))
    bias = torch.randn(channels)
    packed = torch.randn(tt.packed_size(channels, (1,), symmetry=symmetry))
    for tensor in (x, W0, bias, packed):
        tensor.requires_grad_(backward)
    sign = SIGNS[symmetry]

    def by_hand() -> torch.Tensor:
        return W0 + W0.T if sign > 0 else W0 - W0.T

    forward = {
        "tied_us": (lambda: tt.tied_linear(x, packed, bias, symmetry=symmetry), packed),
        "product_us": (lambda: x @ by_hand() + bias, W0),
        "linear_us": (lambda: F.linear(x, by_hand(), bias), W0),
    }

    def both(call: Callable[[], torch.Tensor], weight: torch.Tensor) -> object:
        return torch.autograd.grad(call(), (x, weight, bias), grad)

    if not backward:
        return {name: call for name, (call, _) in forward.items()}
    return {
        name: lambda call=call, weight=weight: both(call, weight)
        for name, (call, weight) in forward.items()
    }


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """In turns, in an order that rotates."""
    names, samples = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 2):  # the first two warm up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name]()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(found[2:]) for name, found in samples.items()}


if __name__ == "__main__":
    main()
