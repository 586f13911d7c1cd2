"""Many drawn cases, executed in several processes."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from ptx_machine.triton_gpu import skip_assembler

from triton_tied.autotune import candidates

from .cases import Case, draw, draw_matrices
from .execution import Outcome, execute

TARGETS = ("sm_80", "sm_90")  # that the machine knows
LISTS = {key: found for key, found in candidates.committed().items() if key[1] in TARGETS}


def drawn(seed: int) -> Iterator[Case]:
    """Without end: a case of each list in turn, each of its configs equally often."""
    chance = random.Random(seed)
    lists = {key: list(found) for key, found in LISTS.items()}
    for turn in itertools.count():
        for key, found in lists.items():
            if turn % len(found) == 0:
                chance.shuffle(found)
            yield draw(key, found[turn % len(found)], chance)
        yield draw_matrices(TARGETS[turn % 2], chance)


def executed(cases: Iterator[Case], jobs: int, seconds: float = float("inf")) -> Iterator[Outcome]:
    """In so many processes, in the order of the cases; after some time none starts any more."""
    end = time.monotonic() + seconds
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the matrices are small
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, context, _prepare, (folder,)) as pool,
    ):
        first = itertools.islice(cases, 2 * jobs)
        waiting = collections.deque(pool.submit(execute, case) for case in first)
        while waiting:
            yield waiting.popleft().result()
            if time.monotonic() < end:
                waiting.extend(pool.submit(execute, case) for case in itertools.islice(cases, 1))


def _prepare(folder: str) -> None:
    os.environ.update(skip_assembler(Path(tempfile.mkdtemp(dir=folder))))
    torch.set_num_threads(1)
