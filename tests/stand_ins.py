"""A GPU that is not there, and what is asked of it."""

import torch

from triton_tied.autotune.disk_cache import Entry, Origin, path_of, save
from triton_tied.autotune.gpus import KNOWN
from triton_tied.autotune.problem import Problem
from triton_tied.geometry import Geometry
from triton_tied.packing import Layout

GPU = KNOWN["H200"]
DEVICE = torch.device("cuda", 0)
ORIGIN = Origin("NVIDIA H200", "9.0", 132, torch.__version__, "3.7.1", "12.8")
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))  # "same" for a 3x3 kernel
PROBLEM = Problem("conv", "bfloat16", Layout(64, (3, 3)), (8, 32, 32), GEOMETRY)
OTHER = Problem("conv", "bfloat16", Layout(128, (3, 3)), (8, 32, 32), GEOMETRY)


def others(problem=PROBLEM):
    """Two configs that serve the problem, but that the cost model would not take."""
    from triton_tied.autotune.shortlist import make_shortlist

    return [candidate.config for candidate in make_shortlist(problem, GPU).candidates[1:3]]


def store(config, folder=None, problem=PROBLEM):
    """Puts a winner into a table."""
    from triton_tied.autotune import tuned_configs

    save(path_of(ORIGIN, folder), ORIGIN, {problem.key: Entry(config, 1.0, 2.0, 3.0)})
    tuned_configs.forget()


def convolution_of(x, layout, geometry, channels_last=True):
    """What the kernel is given for an image."""
    from triton_tied.kernels.calls import Convolution

    packed = torch.zeros(layout.size, dtype=x.dtype, device=x.device)
    return Convolution(x, packed, packed, None, None, layout, geometry, 1.0, 1.0, channels_last)


def gradient_of(x, grad, layout, geometry, **options):
    """What the kernel of the weight gradient is given."""
    from triton_tied.kernels.calls import WeightGradient

    gradient = WeightGradient(x, grad, layout, geometry, 1.0, x.dtype, False)
    return gradient._replace(**options)


def config_of(call):
    """The config that a convolution or a weight gradient is launched with, or None."""
    from triton_tied.autotune import select
    from triton_tied.kernels.calls import Convolution

    plan = (select.conv_plan if isinstance(call, Convolution) else select.weight_grad_plan)(call)
    return plan and plan.config
