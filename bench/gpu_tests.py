"""The GPU's tests, spread over processes: most of their time is compilation, on the CPU.

    python bench/gpu_tests.py [--processes N] [--out FOLDER] [PYTEST_OPTION ...]

Each process writes to the folder as it goes. What each printed is shown when it is done, or when
all are ended from outside. The exit status is 1 if a test failed, 2 if there was none to run.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from triton_tied.autotune.compile_ahead import usable_cpus

ROOT = Path(__file__).parent.parent
_GRACE_S = 5.0
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=usable_cpus(), metavar="N")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for what each process prints")
    given, options = parser.parse_known_args()
    tests = collect(options or ["tests", "-m", "gpu"])
    if not tests:
        print("no test was found")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        return run(spread(tests, given.processes), out)


def run(shares: list[list[str]], out: Path) -> int:
    running = [start(share, out / str(i)) for i, share in enumerate(shares)]
    ended = False
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        ended = True
    for i, process in enumerate(running):
        if ended:  # pytest, told as well, says what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            process.wait()
        output = (out / f"{i}.txt").read_text()
        print(f"---- process {i} of {len(running)}\n{output}", flush=True)
    return 1 if ended or any(process.returncode for process in running) else 0


def collect(options: list[str]) -> list[str]:
    """Names of the tests that pytest would run with these options."""
    command = [*PYTEST, "--collect-only", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 5):  # 5: nothing was found
        raise RuntimeError(f"the tests could not be collected:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def spread(tests: list[str], processes: int) -> list[list[str]]:
    """Neighbours, which take about the same time, go to different processes."""
    shares = [tests[i::processes] for i in range(processes)]
    return [share for share in shares if share]


def start(tests: list[str], path: Path) -> subprocess.Popen:
    """A process for these tests, whose output goes to ``path``.txt."""
    names = path.with_suffix(".list")
    names.write_text("\n".join(tests) + "\n")
    with path.with_suffix(".txt").open("w") as log:
        return subprocess.Popen(
            [*PYTEST, f"@{names}"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


if __name__ == "__main__":
    sys.exit(main())
