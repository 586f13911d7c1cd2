"""A command of the package as if an H100 were here, whose clock says what the cost model says.

    python bench/rehearsal.py COMMAND [OPTION ...]

One candidate is compiled for it; nothing is launched.
"""

from __future__ import annotations

import random
import sys

import torch

from triton_tied.autotune import gpus, trial, tuned_configs, tuning
from triton_tied.autotune.disk_cache import Origin
from triton_tied.autotune.race import Outcome, race
from triton_tied.cli import bench, main

_ORIGIN = Origin("rehearsed H100", "9.0", 132, torch.__version__, "", "")


def race_on(device, problem, shortlist, budget_s, progress) -> Outcome:
    predicted = {candidate.config: candidate.predicted_us for candidate in shortlist.candidates}

    def clock(call) -> float:
        return predicted[call()] / 1e3 * random.uniform(0.8, 1.25)

    return race(
        shortlist, lambda config: lambda: config, lambda config: True, clock, budget_s,
        progress=progress,
    )  # fmt: skip


def compile_one(problems, device, seconds, again, compile_all=tuning.compile_candidates) -> None:
    compile_all(problems[:1], device, seconds, again, most=1)


if __name__ == "__main__":
    tuning.compile_candidates = compile_one
    trial.race_on = race_on
    gpus.of_device = lambda device: gpus.KNOWN["H100"]
    tuned_configs.origin_of = lambda device: _ORIGIN
    tuning.gpu_to_time_on = lambda device=None: torch.device("cpu")
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    bench._why_not = lambda given, device: None
    sys.exit(main.main(sys.argv[1:]))
