"""A problem made real: its tensors, and the precision that it stands for."""

import pytest
import torch
from stand_ins import GEOMETRY

from triton_tied.autotune import trial
from triton_tied.autotune.problem import Problem
from triton_tied.kernels import plans
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.packing import Layout


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
def test_a_trial_leaves_the_random_numbers_of_the_user_alone(kernel):
    before = torch.get_rng_state()
    made = trial.Trial(Problem(kernel, "float32", Layout(8, (2, 2)), (1, 4, 4), GEOMETRY), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    numbers = made.call.grad if kernel == "weight_grad" else made.call.packed
    assert made.call.x.std() > 0.5 and numbers.std() > 0.5


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "tf32"), ("float32_ieee", "ieee")])
def test_a_trial_computes_float32_as_the_problem_says(
    monkeypatch, convolution_precision, kernel, dtype, wanted
):
    other = "ieee" if wanted == "tf32" else "tf32"
    convolution_precision.fp32_precision = other
    problem = Problem(kernel, dtype, Layout(16, (2, 2)), (1, 4, 4), GEOMETRY)
    seen = {}

    class Kernel:
        arg_names = getattr(plans, f"{kernel}_kernel").arg_names

        def run(self, *arguments, **options):
            seen.update(zip(self.arg_names, arguments, strict=True))

    monkeypatch.setattr(plans, f"{kernel}_kernel", Kernel())
    config = {"conv": ConvConfig, "weight_grad": WeightGradConfig}[kernel]((1, 4, 4), 16, 16)
    trial.Trial(problem, "cpu").prepare(config)()
    assert seen["INPUT_PRECISION"] == wanted
    assert convolution_precision.fp32_precision == other


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
def test_a_trial_launches_again_what_it_prepared_once(monkeypatch, kernel):
    problem = Problem(kernel, "float32", Layout(16, (2, 2)), (1, 4, 4), GEOMETRY)
    launched = []

    class Kernel:
        arg_names = getattr(plans, f"{kernel}_kernel").arg_names
        pre_run_hooks = ()

        def run(self, *arguments, **options):
            launched.append(arguments)

    monkeypatch.setattr(plans, f"{kernel}_kernel", Kernel())
    config = {"conv": ConvConfig, "weight_grad": WeightGradConfig}[kernel]((1, 4, 4), 16, 16)
    call = trial.Trial(problem, "cpu").prepare(config)
    assert not launched
    call()
    call()
    first, second = launched
    assert len(first) == len(Kernel.arg_names)
    assert all(one is other for one, other in zip(first, second, strict=True))
