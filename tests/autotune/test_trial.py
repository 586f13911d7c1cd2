"""A problem made real: its tensors, and the precision that it stands for."""

import contextlib

import pytest
import torch
from stand_ins import DEVICE, GEOMETRY, GPU, PROBLEM

from triton_tied.autotune import trial
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.packing import Layout


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
def test_a_trial_leaves_the_random_numbers_of_the_user_alone(kernel):
    before = torch.get_rng_state()
    made = trial.Trial(
        Problem(kernel, "float32", Layout(8, (2, 2)), (1, 4, 4), GEOMETRY, centre="none"), "cpu"
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert made.x.std() > 0.5 and made.packed.std() > 0.5
    assert hasattr(made, "grad") == (kernel == "weight_grad")


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "tf32"), ("float32_ieee", "ieee")])
def test_a_trial_computes_float32_as_the_problem_says(
    monkeypatch, convolution_precision, dtype, wanted
):
    convolution_precision.fp32_precision = "ieee" if wanted == "tf32" else "tf32"
    before = convolution_precision.fp32_precision
    problem = Problem(**vars(PROBLEM) | {"dtype": dtype})
    seen = []

    class Spy:
        run = is_right = fault = None

        def __init__(self, *arguments):
            seen.append(convolution_precision.fp32_precision)

    monkeypatch.setattr(trial, "Trial", Spy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        trial, "race", lambda *_, **__: seen.append(convolution_precision.fp32_precision)
    )
    trial.race_on(DEVICE, problem, make_shortlist(problem, GPU), 1.0, print)
    assert seen == [wanted, wanted]
    assert convolution_precision.fp32_precision == before
