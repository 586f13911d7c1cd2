"""Kernels on a tensor whose offsets pass 2^31: ``python wide.py ROLE``, for the ROLE of the tensor.

A program of its own, since a wrong offset may end the process. Of the tensor's gigabytes, pages
that hold an element alone are touched.
"""

import resource
import sys

import torch
from problems import (
    SAME,
    convolve,
    differentiate,
    integers,
    launch_conv,
    launch_weight_grad,
    make_problem,
)

from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels import launch, plans
from triton_tied.kernels.calls import Convolution, WeightGradient
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig

FAR = 1_200_000_000  # elements from one to the next of three: a stride that fits 32 bits itself
CONV = ConvConfig((4, 4, 4), 16, 16)
WEIGHT_GRAD = WeightGradConfig((4, 4, 4), 16, 16)
ROLES = ["x", "residual", "y", "grad", "x of weight_grad", "dense", "splits"]
DENSE = (3, 16, 30_000, 2_500)  # channels-last images of FAR elements each


def main(role):
    device = "cpu" if INTERPRETED else "cuda"
    if role == "dense":
        return run_dense(device)
    if role == "splits":
        return run_splits(device)
    memory = torch.empty(2 * FAR + 27, dtype=torch.float16, device=device)
    if INTERPRETED:  # which afterwards copies all memory, here onto itself
        from triton.runtime.interpreter import GridExecutor

        GridExecutor._restore_args_dev = lambda *_: None
    for axis in range(4):
        strides = [1, 3, 9]
        strides.insert(axis, FAR)
        actual, truth = run(role, memory.as_strided((3, 3, 3, 3), strides))
        assert torch.equal(actual.double(), truth), f"{role}, far along axis {axis}"
    if INTERPRETED:
        touched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert touched < memory.nbytes / 2, f"{touched} bytes of memory were touched"


def run(role, far):
    """What a launch gives with the tensor of this role in the memory of ``far``, and the truth."""
    problem = make_problem(tuple(far.shape), (3, 3), SAME)
    x, grad, residual = (integers(far.shape, far.dtype, far.device, seed) for seed in range(3))
    packed = integers((problem.layout.size,), far.dtype, far.device)
    if role in ("grad", "x of weight_grad"):
        _, truth = differentiate(x.double(), packed.double(), grad.double(), problem)
        x, grad = (x, far.copy_(grad)) if role == "grad" else (far.copy_(x), grad)
        return launch_weight_grad(x, grad, problem, WEIGHT_GRAD), truth
    truth = convolve(x.double(), packed.double(), problem) + residual.double()
    if role == "y":
        plans.empty_image = lambda *_: far.fill_(torch.nan)
    elif role == "x":
        x = far.copy_(x)
    else:
        residual = far.copy_(residual)
    return launch_conv(x, packed, problem, CONV, residual=residual), truth


def run_splits(device):
    """Splits that are written, and read by the sum, FAR apart: of three the last beyond 2^31."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        GridExecutor._restore_args_dev = lambda *_: None
    problem = make_problem((2, 3, 3, 3), (3, 3), SAME)
    layout, geometry = problem.layout, problem.geometry
    x, grad = (integers(problem.shape, torch.float16, device, seed) for seed in range(2))
    packed = integers((layout.size,), x.dtype, device)
    conv = Convolution(x, packed, packed, None, grad, layout, geometry, 1.0, 1.0, True)
    gradient = WeightGradient(x, grad, layout, geometry, 1.0, torch.float32, False)
    y = convolve(x.double(), packed.double(), problem) + grad.double()
    _, along_packed = differentiate(x.double(), packed.double(), grad.double(), problem)
    configs = ConvConfig((2, 4, 4), 16, 16, splits=3), WeightGradConfig((1, 2, 4), 16, 16, 3)
    for call, config, truth in zip((conv, gradient), configs, (y, along_packed), strict=True):
        plan = plans.make_plan(call, config)
        give(plan.sum, "stride_split", FAR)
        give(plan.main, "stride_split" if call is conv else "stride_partial", FAR)
        far = plan.partial._replace(strides=(FAR, *plan.partial.strides[1:]))
        assert torch.equal(launch.run(plan._replace(partial=far), call).double(), truth)


def give(made, name, number):
    """Another number to a launch."""
    names = made.kernel.arg_names
    last = names.index("alpha")
    numbers = dict(zip(names[last - len(made.numbers) : last], made.numbers, strict=True))
    assert name in numbers
    made.numbers = tuple({**numbers, name: number}.values())


def run_dense(device):
    """The last box of images whose strides the kernel computes itself."""
    problem = make_problem(DENSE, (3, 3), SAME)
    x = torch.empty(DENSE, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    packed = integers((problem.layout.size,), x.dtype, device)
    corner = x[-1:, :, -5:, -5:].copy_(integers((1, 16, 5, 5), x.dtype, device))
    if INTERPRETED:  # that program alone, and nothing copied afterwards
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        GridExecutor._restore_args_dev = lambda *_: None
        make_launch = plans._launch

        def make_last(kernel, programs, *others):
            def place(builder, *_):
                builder.grid_idx = (programs - 1, 0, 0)

            InterpreterBuilder.set_grid_idx = place
            return make_launch(kernel, 1, *others)

        plans._launch = make_last
    y = launch_conv(x, packed, problem, ConvConfig((1, 4, 4), 16, 16))
    small = make_problem((1, 16, 5, 5), (3, 3), SAME)
    truth = convolve(corner.double(), packed.double(), small)
    assert torch.equal(y[-1:, :, -4:, -4:].double(), truth[..., 1:, 1:])


if __name__ == "__main__":
    main(sys.argv[1])
