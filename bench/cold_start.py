"""What a first training step waits for the compiler, from an empty cache, on an absent H100.

    python bench/cold_start.py [--json FILE]

Eight layers with the channels and image sizes of ResNet-18's 3x3 convolutions, in bfloat16. Its
kernels are compiled by the real compiler for sm_90; what would be launched does nothing. Once as it
is: each kernel is compiled when it is met, one after another. Once after ``triton_tied.warm``,
which compiles all side by side, as many at once as there are CPUs. ``under autocast``: the same,
with layers and images of float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LAYERS = tuple((channels, side) for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)))
IMAGES = 4  # the number compiles nothing anew
PARTS = ("step", "warmed", "step, under autocast", "warmed, under autocast")
_HERE = Path(__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measure(given.part)))
        return
    rows = {part: _in_a_fresh_cache(part) for part in PARTS}
    for part, row in rows.items():
        print(f"{part:<22}{json.dumps(row)}")
    if given.json:
        from triton_tied.benchmark.results import machine_of

        result = {"machine": machine_of(torch.device("cpu")), "cold_start": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def _in_a_fresh_cache(part: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        environment["TRITON_TIED_CACHE_DIR"] = str(Path(folder) / "tables")
        command = [sys.executable, str(_HERE), "--part", part]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        kernels = len(list(Path(folder).rglob("*.cubin")))
    return {"kernels": kernels, **json.loads(done.stdout.splitlines()[-1])}


def measure(part: str) -> dict[str, float]:
    """Seconds."""
    sys.path.insert(0, str(_HERE.parent))
    from idle_gpu import pretend_h100

    import triton_tied as tt

    autocast = part.endswith("autocast")
    dtype = torch.float32 if autocast else torch.bfloat16
    net = torch.nn.ModuleList(
        tt.TiedConv2d(channels, 3, padding=1, dtype=dtype)
        for channels, _ in LAYERS
        for _ in range(2)
    )
    images = [
        torch.randn(IMAGES, channels, side, side, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for channels, side in LAYERS
        for _ in range(2)
    ]

    def step() -> None:
        for layer, image in zip(net, images, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(image)
            y.sum().backward()

    row = {}
    if part.startswith("warmed"):
        start = time.monotonic()
        tt.warm(step, target="sm_90")
        row["warm_s"] = round(time.monotonic() - start, 1)
    pretend_h100()
    start = time.monotonic()
    step()
    return row | {"first_step_s": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
