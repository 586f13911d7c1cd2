"""Everything that wants a GPU, in one go and under nine minutes.

    python bench/gpu.py FOLDER

The GPU's tests, some of them under compute-sanitizer (where it is installed), tuning for the
benchmarks' workloads, how well the cost model ranks what was timed, the benchmarks, and the tuned
table. Each is a process of its own with a share of the time: what one of them dies of, an illegal
memory access say, does not reach the next. Each writes its output to the folder, and
``summary.json`` says how they ended. The exit status is 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from triton_tied.benchmark.results import machine_of

ROOT = Path(__file__).parent.parent
PACKAGE = [sys.executable, "-m", "triton_tied"]
# Every access of a small set of launches, whose shapes fit no tile.
SANITIZER = [
    *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"),
    *(sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
    *("tests/kernels/test_kernel_launch.py", "-k", "allocated_number"),
]
_GRACE_S = 20.0  # to start, to finish what a limit of time does not cut short, and to draw


@dataclass(frozen=True)
class Part:
    """A command, and the seconds after which it is ended."""

    name: str
    command: list[str]
    limit_s: float


def parts(out: Path, device: str) -> list[Part]:
    """520 seconds in all."""
    name = f"{device}-{date.today().isoformat()}.json"
    table, tuned, result = out / "table.json", out / f"tune-{name}", out / name
    bench = [*PACKAGE, "bench", "--device", "cuda"]
    tune, measure = 95.0, 190.0
    scripts = ROOT / "bench"
    return [
        Part("tests", [sys.executable, str(scripts / "gpu_tests.py")], 130.0),
        *([Part("sanitizer", SANITIZER, 45.0)] if shutil.which(SANITIZER[0]) else []),
        Part(
            "tune",
            [*bench, "--tune", str(tune), "--tune-json", str(tuned), "--budget", "0"],
            tune + _GRACE_S,
        ),
        Part("cost_model", [sys.executable, str(scripts / "cost_model.py"), str(tuned)], 10.0),
        Part(
            "bench",
            [*bench, "--budget", str(measure), "--json", str(result), "--plots", str(out)],
            measure + _GRACE_S,
        ),
        Part("table", [*PACKAGE, "tune", "--export", str(table)], 10.0),
    ]


def run(part: Part, out: Path) -> dict[str, object]:
    """How a part ended; its output is in the folder."""
    start = time.monotonic()
    with (out / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            status: int | str = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            status = "out of time"
            _end(process)
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def _end(process: subprocess.Popen) -> None:
    """First as the keyboard does, on which the benchmark writes what it has."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE_S / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(torch.device("cuda"))
    ends = []
    for part in parts(out, slug(machine["device"])):
        ends.append(run(part, out))
        print(ends[-1], flush=True)
        summary = {"machine": machine, "parts": ends}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if any(end["status"] != 0 for end in ends) else 0


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as part of a file's name."""
    return "-".join(device.lower().split())


if __name__ == "__main__":
    sys.exit(main())
