"""The weight gradient's bulk copies and products: no copy overwrites what a product has yet to
read, and no register does either. And no copy starts where a GPU takes none."""

import pytest

from executed.cases import Case
from executed.execution import execute
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels import configs
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
# Rows of contiguous images are copied from multiples of 16 bytes on.
APART = Geometry((1, 1), ((1, 1), (8, 8)), (1, 8))
PLANAR, LAST = "planar_descriptor", "channels_last_descriptor"


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize(
    "dtype, config, image",
    [
        # The smallest that raced: the copy of the next pixels overwrote what wgmma was reading.
        ("float32", WeightGradConfig((1, 1, 64), 64, 64, 1, 4, 2, PLANAR), (1, 8, 64)),
        ("float32", WeightGradConfig((1, 1, 64), 64, 64, 2, 4, 2, PLANAR), (1, 8, 64)),
        ("bfloat16", WeightGradConfig((1, 1, 32), 64, 64, 1, 4, 4, PLANAR), (2, 4, 32)),
        ("float16", WeightGradConfig((1, 8, 8), 64, 64, 1, 4, 4, LAST), (2, 16, 16)),
        ("bfloat16", WeightGradConfig((4, 4, 4), 64, 64, 1, 4, 4, LAST), (15, 4, 8)),
    ],
    ids=str,
)
def test_no_weight_gradient_of_one_tile_races(compiler, dtype, config, image, symmetry):
    memory, geometry = ("contiguous", APART) if config.loader == PLANAR else ("channels_last", SAME)
    layout = Layout(config.BLOCK_N, (3, 3), symmetry=symmetry)
    outcome = execute(Case("sm_90", dtype, config, layout, image, geometry, memory))
    assert not outcome.faults


@pytest.mark.parametrize(
    "config",
    [
        ConvConfig((1, 1, 64), 64, 64, 4, 3, PLANAR),
        WeightGradConfig((1, 1, 64), 64, 64, 1, 4, 2, PLANAR),
    ],
    ids=lambda config: config.kind,
)
def test_a_start_between_multiples_of_16_bytes_is_refused_or_found(compiler, monkeypatch, config):
    case = Case("sm_90", "float16", config, Layout(64, (3, 3)), (1, 8, 64), SAME, "contiguous")
    (fault,) = execute(case, to_first_fault=True).faults.values()
    assert "start at columns that are not aligned" in fault
    monkeypatch.setattr(configs, "_starts_within_a_unit", lambda reading: False)
    (fault,) = execute(case, to_first_fault=True).faults.values()
    assert "a box that starts at element" in fault
