"""What ``tied_linear`` takes on the CPU against a matrix that is made by hand.

    python bench/linear_time.py [--rounds 101] [--json FILE]

By hand a full ``W0`` is held, each call makes ``W = W0 + W0.T`` (or minus) of it, and then takes
``x @ W + b`` or ``F.linear(x, W, b)``. All three in one process, each with tensors of its own, so
that none finds them in the cache by another's doing, in an order that is drawn anew in each round;
forward alone and with all gradients. Medians over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import random
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
    sign = SIGNS[symmetry]

    def by_hand(W0: torch.Tensor) -> torch.Tensor:
        return W0 + W0.T if sign > 0 else W0 - W0.T

    packed_shape = (tt.packed_size(channels, (1,), symmetry=symmetry),)
    square = (channels, channels)
    return {
        "tied_us": call(
            lambda x, packed, bias: tt.tied_linear(x, packed, bias, symmetry=symmetry),
            (size, channels),
            packed_shape,
            backward,
        ),
        "product_us": call(
            lambda x, W0, bias: x @ by_hand(W0) + bias, (size, channels), square, backward
        ),
        "linear_us": call(
            lambda x, W0, bias: F.linear(x, by_hand(W0), bias), (size, channels), square, backward
        ),
    }


def call(
    layer: Callable[..., torch.Tensor],
    shape: tuple[int, int],
    weight_shape: tuple[int, ...],
    backward: bool,
) -> Callable[[], object]:
    """The layer applied to tensors of its own."""
    x, weight, bias = (
        torch.randn(s, requires_grad=backward) for s in (shape, weight_shape, shape[1:])
    )
    grad = torch.randn(shape)
    if backward:
        return lambda: torch.autograd.grad(layer(x, weight, bias), (x, weight, bias), grad)
    return lambda: layer(x, weight, bias)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    names, samples = list(calls), {name: [] for name in calls}
    for _ in range(rounds + 2):  # the first two warm up
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(found[2:]) for name, found in samples.items()}


if __name__ == "__main__":
    main()
