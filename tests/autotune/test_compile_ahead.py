"""Kernels that several processes compile ahead, for a GPU that is not there."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from stand_ins import GPU, PROBLEM

from triton_tied.autotune import compile_ahead, tuning
from triton_tied.autotune.compile_ahead import Compilers, Job
from triton_tied.autotune.select import problem_of_call
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.trial import make_call
from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels.configs import ConvConfig
from triton_tied.kernels.stored_taps import expand_matrices
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
CONFIG = ConvConfig((1, 8, 8), 32, 32, 4, 2)


def test_answers_come_in_the_order_of_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    no_power_of_2 = ConvConfig((1, 3, 8), 32, 32)
    too_large = ConvConfig((1, 16, 16), 128, 128, 8, 5)
    jobs = [Job(90, PROBLEM, config) for config in (CONFIG, no_power_of_2, too_large, CONFIG)]
    with Compilers(2) as compilers:
        good, odd, large, again = compilers.compile(jobs)
    assert good is again is None
    assert "Error" in odd and "shared memory" in large
    assert len(list(tmp_path.rglob("*.cubin"))) == 2  # the large one compiles, and does not fit


def test_a_process_that_dies_is_said(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_WORKER", "raise SystemExit")
    with Compilers(1) as compilers:
        assert list(compilers.compile([Job(90, PROBLEM, CONFIG)] * 2)) == ["its process died"] * 2


def test_another_process_takes_the_place_of_one_that_died(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    dies_once = f"""
import pathlib
try:
    pathlib.Path({str(tmp_path / "died")!r}).touch(exist_ok=False)
except FileExistsError:
    {compile_ahead._WORKER}
"""
    monkeypatch.setattr(compile_ahead, "_WORKER", dies_once)
    with Compilers(1) as compilers:
        answers = list(compilers.compile([Job(89, PROBLEM, CONFIG)] * 3))
    assert answers == ["its process died", None, None]


def test_compiling_stops_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_WORKER", "import time; time.sleep(600)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning.gpus, "of_device", lambda device: GPU)
    start = time.monotonic()
    tuning.compile_candidates([PROBLEM], torch.device("cuda"), 0.2, again=True)
    assert time.monotonic() - start < 300


def test_no_process_is_left_and_none_is_started_for_nothing(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_WORKER", "import time; time.sleep(600)")
    with Compilers(3) as compilers:
        assert list(compilers.compile([])) == [] and not compilers._started
        compilers._started.append(compile_ahead._start())
    assert all(process.poll() is not None for process in compilers._started)


def test_cpus_are_those_of_the_affinity_and_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(100)), raising=False)
    monkeypatch.setattr(compile_ahead.Path, "read_text", lambda path: "max 100000")
    assert compile_ahead.usable_cpus() == 16
    monkeypatch.setattr(compile_ahead.Path, "read_text", lambda path: "350000 100000")
    assert compile_ahead.usable_cpus() == 3
    monkeypatch.setattr(compile_ahead.Path, "read_text", lambda path: "50000 100000")
    assert compile_ahead.usable_cpus() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4}, raising=False)
    monkeypatch.setattr(compile_ahead.Path, "read_text", lambda path: "max 100000")
    assert compile_ahead.usable_cpus() == 2


def test_the_best_predictions_of_all_problems_are_compiled_first(monkeypatch):
    asked = []

    class Spy(Compilers):
        def compile(self, jobs):
            for job in jobs:
                asked.append(job)
                yield None

    monkeypatch.setattr(tuning, "Compilers", Spy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning.gpus, "of_device", lambda device: GPU)
    problems = [PROBLEM, replace(PROBLEM, output_memory="contiguous")]
    tuning.compile_candidates(problems, torch.device("cuda"), float("inf"), again=True)
    lists = [make_shortlist(problem, GPU).candidates for problem in problems]
    assert asked[0] == Job(90, PROBLEM, lists[0][0].config)
    assert [job.problem for job in asked[:4]] == 2 * problems
    assert len(asked) == sum(map(len, lists))


@pytest.mark.parametrize("memory", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("output_memory", ["channels_last", "contiguous"])
@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_call_is_that_of_its_problem(memory, output_memory, kernel, channels, dtype):
    layout, is_conv = Layout(channels, (3, 3)), kernel == "conv"
    problem = replace(
        PROBLEM,
        memory=memory,
        kernel=kernel,
        layout=layout,
        output_memory=output_memory if is_conv else "channels_last",
        parameters=dtype if is_conv else None,
        written=dtype,
    )
    call = make_call(problem, lambda size, dtype: torch.randn(size).to(dtype))
    assert problem_of_call(call) == problem
    if kernel == "conv" and channels >= 128:  # half of the taps and the centre
        assert torch.equal(
            call.weights, expand_matrices(call.packed, layout, 5, torch.bfloat16, "ieee")
        )
    elif kernel == "conv":
        assert torch.equal(call.weights, call.packed.to(torch.bfloat16))


WARM = """
from triton_tied.cli.main import main
raise SystemExit(main("warm --shape 2,32,8,8 --target sm_80 --memory contiguous".split()))
"""


def test_warm_compiles_what_a_layer_needs(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WARM], env=environment, capture_output=True, text=True, check=True
    )
    # the forward, as which the input gradient is compiled, and the weight gradient; perhaps a sum
    assert done.stdout.startswith("2 kernels, 0 faults")
    names = [path.stem for path in tmp_path.rglob("*.cubin")]
    assert sorted({*names} - {"sum_splits_kernel"}) == ["conv_kernel", "weight_grad_kernel"]
    assert names.count("conv_kernel") == names.count("weight_grad_kernel") == 1
