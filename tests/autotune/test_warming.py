"""Which kernels are compiled before a model's first step."""

import pytest
import torch
from stand_ins import GEOMETRY, PROBLEM

from triton_tied.autotune import compile_ahead, warming
from triton_tied.autotune.problem import Problem, problems_of_layer
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.warming import jobs_of, warm
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.packing import Layout

# The 3x3 convolutions of ResNet-18 that keep their channels.
RESNET = [
    Problem("conv", "bfloat16", Layout(channels, (3, 3)), (32, side, side), GEOMETRY)
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    for _ in range(3)
]


def test_layers_of_one_width_and_their_input_gradients_share_their_code():
    jobs = jobs_of([each for layer in RESNET for each in problems_of_layer(layer)], "sm_90")
    assert len(jobs) == 4 + 4
    assert {(job.problem.kernel, job.problem.layout.channels) for job in jobs} == {
        (kernel, channels) for kernel in ("conv", "weight_grad") for channels in (64, 128, 256, 512)
    }


def test_merged_columns_whose_kernel_differs_by_the_padding_do_not_share_their_code():
    problems = []
    for padding, side in ((0, 130), (1, 128), (2, 126)):
        geometry = Geometry((1, 1), ((padding,) * 2,) * 2, (1, 1))
        problems.append(Problem("conv", "bfloat16", Layout(8, (3, 3)), (64, side, side), geometry))
    jobs = jobs_of(problems, "sm_90")
    of_merged = {problem.as_read(job.config)[0].layout for job in jobs for problem in problems}
    assert [job.config.merged for job in jobs] == [2, 2] and len(of_merged) == 2


def test_a_job_is_what_is_taken_where_nothing_was_timed():
    (job,) = jobs_of([PROBLEM], "sm_80")
    gpu = warming.gpus.KNOWN["A100"]
    assert (job.capability, job.config) == (80, make_shortlist(job.problem, gpu).untimed)


def test_what_makes_no_sense_is_refused_before_anything_runs(monkeypatch):
    with pytest.raises(ValueError, match="expected a target of sm_80, sm_90, sm_100, got 'sm_75'"):
        warm([PROBLEM], target="sm_75")
    with pytest.raises(ValueError, match="at least one process, got 0"):
        warm([PROBLEM], target="sm_80", processes=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU here: name a target"):
        warm([PROBLEM])


def test_what_does_not_compile_is_said(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_WORKER", "raise SystemExit")
    with pytest.raises(RuntimeError, match="1 kernels did not compile, .* its process died"):
        warm([PROBLEM], target="sm_80", processes=1)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_kernels_are_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert warm([PROBLEM], target="sm_80", processes=1) == 1
    assert len(list(tmp_path.rglob("*.cubin"))) in (1, 2)  # and that of a sum that is split
