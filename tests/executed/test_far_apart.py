"""Images so far apart that offsets to them do need 64 bits."""

import pytest

from executed.cases import Case
from executed.execution import execute
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels import plans
from triton_tied.kernels.configs import (
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    WeightGradConfig,
)
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
CONV, WEIGHT_GRAD = (
    ConvConfig((1, 4, 8), 32, 32, 4, 2),
    WeightGradConfig((1, 4, 8), 32, 32, 1, 4, 2),
)
CASES = [
    Case("sm_80", "float16", CONV, Layout(24, (3, 3)), (3, 4, 5), SAME, "far_apart", residual=True),
    Case("sm_90", "bfloat16", WEIGHT_GRAD, Layout(32, (3, 3)), (3, 4, 8), SAME, "far_apart"),
    Case(
        "sm_90", "bfloat16", DepthwiseConfig((1, 4, 16), 16), Layout(16, (3, 3), 16), (3, 4, 8),
        SAME, "far_apart", residual=True,
    ),
    Case(
        "sm_80", "float16", DepthwiseGradConfig((1, 4, 16), 16), Layout(16, (3, 3), 16), (3, 4, 8),
        SAME, "far_apart",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config.kind)
def test_offsets_of_more_than_32_bits(case, compiler, monkeypatch):
    assert not execute(case).faults
    monkeypatch.setattr(plans, "_MAX_OFFSET", 2**62)  # as if 32 bits were enough
    assert execute(case).faults
