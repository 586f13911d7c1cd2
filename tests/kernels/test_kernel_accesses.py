"""What the programs of a launch read and write: their own memory, each its own part."""

import pytest
import torch
from problems import (
    SYMMETRIES,
    embed,
    integers,
    launch_conv,
    launch_weight_grad,
    make_problem,
    place,
)

from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels import launch
from triton_tied.kernels.configs import (
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    WeightGradConfig,
)

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="watches the interpreter; on a GPU compute-sanitizer does"
)
BOX = (2, 4, 4)  # divides no side of 3 images of 5 x 6
KERNELS = ["conv", "split conv", "weight_grad", "matrices", "depthwise", "depthwise_grad"]


def run(kernel, symmetry, device):
    """A launch whose blocks divide nothing; all that it is given is finite and lies amid NaN."""
    groups = 34 if kernel.startswith("depthwise") else 2
    padding = ((1, 1), (0, 0))
    problem = make_problem((3, 34, 5, 6), (3, 1), padding, groups=groups, symmetry=symmetry)
    layout = problem.layout
    x, grad = (place(integers(problem.shape, torch.float32, device, s), "gapped") for s in (0, 1))
    packed, bias = (embed(integers((size,), torch.float32, device)) for size in (layout.size, 34))
    if kernel == "matrices":
        return launch.unpack_matrices(packed, layout, layout.taps, torch.float32, "ieee")
    if kernel == "weight_grad":
        config = WeightGradConfig(BOX, 16, 32, splits=2)
        return launch_weight_grad(x, grad, problem, config, has_bias=True)
    if kernel == "depthwise_grad":
        config = DepthwiseGradConfig((1, 4, 4), 16, splits=2)
        return launch_weight_grad(x, grad, problem, config, has_bias=True)
    if kernel == "depthwise":
        config = DepthwiseConfig((1, 4, 4), 16)
        return launch_conv(x, packed, problem, config, bias=bias, residual=grad, last=False)
    config = ConvConfig(BOX, 16, 32, splits=3 if kernel == "split conv" else 1)
    return launch_conv(x, packed, problem, config, bias=bias, residual=grad, last=False)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_beyond_a_tensor_is_read(device, monkeypatch, kernel, symmetry):
    load, loads = InterpreterBuilder.create_masked_load, []

    def watched(self, ptrs, mask, *rest, **options):
        values = load(self, ptrs, mask, *rest, **options)
        loads.append(values.data[mask.data])
        return values

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    run(kernel, symmetry, device)
    assert loads
    assert not any(torch.from_numpy(values).isnan().any() for values in loads)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_program_writes_where_another_does(device, monkeypatch, kernel, symmetry):
    # a wrong number written over a right one shows in one of two orders at least
    in_order = run(kernel, symmetry, device)
    place_program = InterpreterBuilder.set_grid_idx

    def reversed_order(self, x, y, z):
        place_program(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_order)
    assert torch.equal(run(kernel, symmetry, device), in_order)
