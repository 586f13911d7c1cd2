"""What the tie costs on a CPU, forward and backward, against its peers in the same process.

    python bench/cpu.py [--rounds 60] [--json FILE]

- dense: ``F.conv2d`` with a free channels-last weight: no tie at all.
- averaged: ``F.conv2d`` with ``(W0 + flip(W0).transpose(0, 1)) / 2``, redundant parameters.
- tied: ``tied_conv2d`` from the packed vector.
- copied: ``F.conv2d`` with ``cat([half, half])``: the floor, a weight made by plain memory copies
  of half as many numbers, with the traffic of the tie but nothing to transpose.

Every round runs each peer once, in an order that rotates; figures are medians over the rounds and
ratios are of medians. "cached" is inference with the weight prepared once, against dense inference.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import triton_tied as tt

SHAPES = [  # N, C, H = W, kernel size
    (1, 64, 32, 3),
    (8, 64, 32, 3),
    (16, 128, 28, 3),
    (4, 256, 14, 3),
    (1, 256, 8, 3),
    (1, 512, 8, 3),
    (16, 32, 64, 3),
    (1, 64, 32, 5),
]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
RATIOS = ("tied/dense", "tied/averaged", "copied/dense", "cached/dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="also write the result there")
    arguments = parser.parse_args()
    rows = []
    for memory_format in FORMATS:
        print(f"\ninput {memory_format}, float32, milliseconds for forward + backward")
        print(f"{'N,C,H,k':<14}{'dense':>9}{'averaged':>10}{'tied':>9}", end="")
        print("".join(f"{name:>15}" for name in RATIOS))
        rows += [measure(shape, memory_format, arguments.rounds) for shape in SHAPES]
    means = {f: {r: geometric_mean(rows, f, r) for r in RATIOS} for f in FORMATS}
    print("\ngeometric means")
    for memory_format, ratios in means.items():
        print(f"{memory_format:<14}", *(f"{name} {value:.3f}  " for name, value in ratios.items()))
    if arguments.json:
        result = {"machine": machine(), "rows": rows, "geometric_means": means}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(shape: tuple[int, int, int, int], memory_format: str, rounds: int) -> dict:
    """One row: medians in milliseconds and their ratios; the peers are first checked to agree."""
    n, channels, side, kernel = shape
    options = {"padding": kernel // 2}
    input, grad = (
        torch.randn(n, channels, side, side).contiguous(memory_format=FORMATS[memory_format])
        for _ in range(2)
    )
    input.requires_grad_()
    free = torch.randn(channels, channels, kernel, kernel)
    packed = tt.pack(free).requires_grad_()
    dense = tt.unpack(packed.detach(), channels, kernel, memory_format=torch.channels_last)
    dense.requires_grad_()
    free.requires_grad_()
    half = dense.detach()[: channels // 2].clone(memory_format=torch.channels_last)
    half.requires_grad_()

    def forward_dense() -> torch.Tensor:
        return F.conv2d(input, dense, **options)

    def forward_averaged() -> torch.Tensor:
        averaged = (free + free.flip(2, 3).transpose(0, 1)) / 2
        return F.conv2d(input, averaged, **options)

    def forward_tied() -> torch.Tensor:
        return tt.tied_conv2d(input, packed, kernel_size=kernel, **options)

    def forward_copied() -> torch.Tensor:
        return F.conv2d(input, torch.cat([half, half]), **options)

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for tensor in (input, free, half, dense, packed):
                tensor.grad = None
            forward().backward(grad)

        return run

    for forward in (forward_averaged, forward_tied):
        torch.testing.assert_close(forward(), forward_dense(), rtol=1e-4, atol=1e-3)
    peers = {
        "dense": forward_dense,
        "averaged": forward_averaged,
        "tied": forward_tied,
        "copied": forward_copied,
    }
    times = interleave({name: step(forward) for name, forward in peers.items()}, rounds)
    with torch.no_grad(), tt.cached():
        inference = interleave({"dense": forward_dense, "cached": forward_tied}, rounds)
    ratios = {
        "tied/dense": times["tied"] / times["dense"],
        "tied/averaged": times["tied"] / times["averaged"],
        "copied/dense": times["copied"] / times["dense"],
        "cached/dense": inference["cached"] / inference["dense"],
    }
    print(
        f"{','.join(map(str, shape)):<14}{times['dense']:>9.3f}{times['averaged']:>10.3f}", end=""
    )
    print(f"{times['tied']:>9.3f}", "".join(f"{v:>15.3f}" for v in ratios.values()), flush=True)
    return {"shape": shape, "memory_format": memory_format, "median_ms": times, "ratios": ratios}


def interleave(peers: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each peer over rounds in which all take turns."""
    names = list(peers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 3):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            peers[name]()
            if turn >= 3:  # the first rounds warm up
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def geometric_mean(rows: list[dict], memory_format: str, ratio: str) -> float:
    values = [row["ratios"][ratio] for row in rows if row["memory_format"] == memory_format]
    return math.exp(sum(map(math.log, values)) / len(values))


def machine() -> dict:
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton_tied": tt.__version__,
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
