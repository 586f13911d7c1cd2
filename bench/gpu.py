"""Everything that wants a GPU, in one go and under nine minutes.

    python bench/gpu.py FOLDER [--rehearse]

Kernels compiled ahead, the GPU's tests, ``check``, some tests under compute-sanitizer (where it is
installed), the claims that a GPU can falsify, tuning for the benchmarks' workloads, how well the
cost model ranks what was timed, the benchmarks, and the tuned table. Each is a process with a share
of the time and a group of its own: what one of them dies of, an illegal memory access say, does not
reach the next, and what it started ends with it. Each writes its output to the folder as it goes,
and ``summary.json`` says how those ended that have. The exit status is 1 if any of them failed.

``--rehearse`` goes the same way without a GPU, in a few minutes: few tests, in Triton's
interpreter; a clock that says what the cost model says; benchmarks of the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from triton_tied.benchmark.results import machine_of

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "bench"
PACKAGE = [sys.executable, "-m", "triton_tied"]
REHEARSED = [sys.executable, str(SCRIPTS / "rehearsal.py")]
TESTS = [sys.executable, str(SCRIPTS / "gpu_tests.py")]
FALSIFY = [sys.executable, str(SCRIPTS / "falsify.py")]
# Every access of a small set of launches, whose shapes fit no tile.
SANITIZER = [
    *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"),
    *(sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
    *("tests/kernels/test_kernel_launch.py", "-k", "allocated_number"),
]
_FEW_TESTS = ["tests/kernels/test_kernel_launch.py", "-k", "allocated_number and skew_adjoint"]
_NEEDED = ("filelock", "hypothesis", "platformdirs", "pytest", "tqdm", "triton")
_GRACE_S = 20.0  # to start, to finish what a limit of time does not cut short, and to draw


@dataclass(frozen=True)
class Part:
    """A command, and the seconds after which it is ended."""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path, device: str) -> list[Part]:
    """538 seconds in all."""
    name = f"{device}-{date.today().isoformat()}.json"
    tuned, result = out / f"tune-{name}", out / name
    tune, measure = 95.0, 140.0
    bench = [*PACKAGE, "bench", "--device", "cuda"]
    plots = ["--plots", str(out)] if importlib.util.find_spec("matplotlib") else []
    return [
        Part("tests", [*TESTS, "--out", str(out / "tests")], 120.0),
        Part("check", [*PACKAGE, "check"], 40.0),
        # after the tests, which compiled what it runs
        *([Part("sanitizer", SANITIZER, 45.0)] if shutil.which(SANITIZER[0]) else []),
        Part("falsify", [*FALSIFY, "--out", str(out / f"falsify-{name}")], 38.0),
        Part("tune", [*bench, *_tuning(tune, tuned)], tune + _GRACE_S),
        Part("cost_model", [sys.executable, str(SCRIPTS / "cost_model.py"), str(tuned)], 10.0),
        Part(
            "bench",
            [*bench, "--budget", str(measure), "--json", str(result), *plots],
            measure + _GRACE_S,
        ),
        Part("table", [*PACKAGE, "tune", "--export", str(out / "table.json")], 10.0),
    ]


def rehearsed_parts(out: Path) -> list[Part]:
    """The same parts, cut short, on this machine, however busy it is."""
    tuned, here = out / "tune-rehearsal.json", {"TRITON_TIED_CACHE_DIR": str(out / "cache")}
    bench = ["bench", "--device", "cpu", "--quick"]
    interpreted = {"TRITON_INTERPRET": "1"}
    return [
        Part("tests", [*TESTS, "--out", str(out / "tests"), *_FEW_TESTS], 300.0, interpreted),
        Part("check", [*PACKAGE, "check"], 300.0),
        Part("falsify", [*FALSIFY, "--rehearse", "--out", str(out / "falsify.json")], 60.0),
        Part("tune", [*REHEARSED, *bench, *_tuning(300.0, tuned)], 300.0, here),
        Part("cost_model", [sys.executable, str(SCRIPTS / "cost_model.py"), str(tuned)], 60.0),
        Part(
            "bench",
            [*PACKAGE, *bench, "--budget", "8", "--json", str(out / "rehearsal.json")],
            300.0,
        ),
        Part("table", [*REHEARSED, "tune", "--export", str(out / "table.json")], 60.0, here),
    ]


def _tuning(seconds: float, path: Path) -> list[str]:
    return ["--tune", str(seconds), "--tune-json", str(path), "--budget", "0"]


def run(part: Part, out: Path) -> dict[str, object]:
    """How a part ended; its output is in the folder."""
    start = time.monotonic()
    with (out / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen(
            part.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            start_new_session=True,  # a process group of its own
        )
        with _ended_with_its_group(process):
            try:
                status: int | str = process.wait(part.limit_s)
            except subprocess.TimeoutExpired:
                status = "out of time"
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


@contextlib.contextmanager
def _ended_with_its_group(process: subprocess.Popen) -> Iterator[None]:
    """At the end the process, if it still runs, is told as the keyboard does, on which it writes
    what it has; then nothing is left of its group, whatever ended this."""
    try:
        yield
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S / 2)
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, cut short")
    given = parser.parse_args()
    out = given.out.resolve()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"packages are missing: {', '.join(missing)}; install the extra dev")
    if not (given.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU here; --rehearse does without")
    out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(torch.device("cpu" if given.rehearse else "cuda"))
    planned = rehearsed_parts(out) if given.rehearse else parts(out, slug(machine["device"]))
    ends: list[dict[str, object]] = [{"part": part.name, "status": "not run"} for part in planned]
    for i, part in enumerate(planned):
        ends[i] = {"part": part.name, "status": "running"}
        _summarise(out, machine, ends)
        ends[i] = run(part, out)
        print(ends[i], flush=True)
        _summarise(out, machine, ends)
    return 1 if any(end["status"] != 0 for end in ends) else 0


def _summarise(out: Path, machine: dict[str, object], ends: list[dict[str, object]]) -> None:
    summary = {"machine": machine, "parts": ends}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as part of a file's name."""
    return "-".join(device.lower().split())


if __name__ == "__main__":
    sys.exit(main())
