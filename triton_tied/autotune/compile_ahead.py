"""Kernels compiled ahead of their use, side by side, into Triton's cache on disk.

Each of several processes compiles for a GPU of a compute capability that need not be there: the
kernel that its launch asks for later is the same. (Triton parses kernels with Python's own parser,
which on some versions of Python fails in several threads at once: hence processes.)
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

from ..kernels.configs import Config
from .candidates import target_of
from .gpus import KNOWN, MODEL_OF
from .problem import Problem

_MAX_PROCESSES = 16
_WORKER = "from triton_tied.autotune.compile_ahead import serve; serve()"


class Job(NamedTuple):
    """A config for a problem on a GPU of a compute capability, 90 say."""

    capability: int
    problem: Problem
    config: Config


class Compilers:
    """Processes that compile. A context: they end with it."""

    def __init__(self, processes: int | None = None) -> None:
        self._count = processes or usable_cpus()
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._started: list[subprocess.Popen] = []
        self._has_ended = False

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Now, whatever is being compiled. Nothing is compiled from then on."""
        self._has_ended = True
        for process in list(self._started):
            process.kill()
            process.wait()

    def compile(self, jobs: Iterable[Job]) -> Iterator[str | None]:
        """Why each did not compile, or None; in the order of the jobs."""
        jobs = list(jobs)
        for _ in range(min(self._count, len(jobs)) - len(self._started)):
            self._started.append(_start())
            self._idle.put(self._started[-1])
        with ThreadPoolExecutor(max(len(self._started), 1)) as threads:
            try:
                yield from threads.map(self._one, jobs)
            except GeneratorExit:  # nobody wants the rest
                self.end()
                raise

    def _one(self, job: Job) -> str | None:
        if self._has_ended:
            return "no time was left"
        process = self._idle.get()
        answer = _ask(process, job)
        if not answer and not self._has_ended:  # killed for memory, say: another takes its place
            process = _start()
            self._started.append(process)
        self._idle.put(process)
        return pickle.loads(base64.b64decode(answer)) if answer else "its process died"


def usable_cpus() -> int:
    """That this process may use, by its affinity and its container's quota; at most 16."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count or 1, max(1, int(quota) // int(period)))
    return max(1, min(count or 1, _MAX_PROCESSES))


def serve() -> None:
    """What a process does: jobs in, answers out, a line each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what others print must not get between
    for line in sys.stdin:
        answer = pickle.dumps(_compile(pickle.loads(base64.b64decode(line))))
        print(base64.b64encode(answer).decode(), file=answers, flush=True)


def _ask(process: subprocess.Popen, job: Job) -> bytes:
    """The answer; nothing where the process is dead."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(base64.b64encode(pickle.dumps(job)) + b"\n")
        process.stdin.flush()
        return process.stdout.readline()
    except (OSError, ValueError):
        return b""


def _start() -> subprocess.Popen:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _compile(job: Job) -> str | None:
    import torch
    from triton.runtime import driver

    from ..kernels import launch
    from ..kernels.calls import Convolution
    from .trial import make_call

    def numbers(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    driver.set_active(AbsentGpu(job.capability))
    try:
        call = make_call(job.problem, numbers)
        if isinstance(call, Convolution) and call.weights.dim() > 1:
            launch.compile_matrices(
                call.packed, call.layout, call.stored, call.x.dtype, call.precision or "ieee"
            )
        return launch.fault(call, job.config)
    except Exception as error:  # whatever it is, the launch will say it again
        return f"{type(error).__name__}: {error}"


class AbsentGpu:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        target = target_of(divmod(capability, 10)) or "sm_80"
        limit = KNOWN[MODEL_OF[target]].block_shared_bytes
        self.utils = SimpleNamespace(
            load_binary=lambda *program: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": limit},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
