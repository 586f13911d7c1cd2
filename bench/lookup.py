"""What it costs in Python to find the config of a known call, here and in ``triton.autotune``.

    python bench/lookup.py [--rounds 100]

They take turns, without a launch. Needs Triton, but no GPU. Both are given one call of the
convolution kernel; ``triton.autotune``'s key are the sizes and the constants that tell our problems
apart. Figures are medians over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from triton_tied.autotune import select
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.launch import Convolution
from triton_tied.packing import Layout

LAYOUT = Layout(64, (3, 3))
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
KEY = (
    ["n", "h", "w", "out_h", "out_w", "CHANNELS", "GROUPS", "SIGN"]
    + ["KERNEL_H", "KERNEL_W", "DILATION_H", "DILATION_W", "INPUT_PRECISION", "DENSE", "WIDE"]
)  # fmt: skip
CALLS = 200  # in one round


class Silent:
    """Stands in for the kernel under ``triton.autotune``: it is found, but not launched."""

    def run(self, *arguments: Any, **constants: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    launch.fault = lambda call, config: None  # no compiler is asked
    x = torch.zeros(8, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    packed = torch.zeros(LAYOUT.size)
    ours, theirs = ours_for(x, packed), theirs_for(x, packed)
    samples: dict[str, list[float]] = {"triton_tied": [], "triton.autotune": []}
    for _ in range(rounds):
        samples["triton_tied"].append(microseconds(ours))
        samples["triton.autotune"].append(microseconds(theirs))
    for name, times in samples.items():
        print(f"{name:<16}{statistics.median(times):6.2f} us a call")


def ours_for(x: torch.Tensor, packed: torch.Tensor) -> Callable[[], object]:
    """As the operator asks."""
    return lambda: select.conv_plan(
        Convolution(x, packed, packed, None, None, LAYOUT, GEOMETRY, 1.0, 1.0, channels_last=True)
    )


def theirs_for(x: torch.Tensor, packed: torch.Tensor) -> Callable[[], object]:
    configs = [triton.Config({"BLOCK_N": n}) for n in (32, 64)]
    tuner = triton.autotune(configs, key=KEY)(conv_kernel)
    tuner.fn = Silent()
    tuner._bench = lambda *arguments, **options: [1.0]
    images = {"x": x, "packed": packed, "y": x, "centre": None, "bias": None, "residual": None}
    names = [name for name in conv_kernel.arg_names if name != "BLOCK_N"]
    arguments = [images.get(name, 64) for name in names if name.islower()]
    look_up = partial(tuner.run, *arguments, **{name: 1 for name in names if name.isupper()})
    look_up()
    assert len(tuner.cache) == 1
    return look_up


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    main()
