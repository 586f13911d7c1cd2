"""Programs that lack waits, barriers or fences: the machine finds what is wrong with them."""

import pytest

from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.packing import Layout

from .cases import Case
from .execution import compiled, execute
from .mutants import mutants

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SAME_ROW = Geometry((1, 1), ((0, 0), (1, 1)), (1, 1))
LAST = "channels_last_descriptor"
PROGRAMS = {
    "conv sm_80": Case(
        "sm_80", "float16", ConvConfig((1, 8, 8), 32, 32, 4, 3), Layout(64, (3, 3)), (1, 8, 8),
        SAME, unpacked=False,
    ),
    "conv sm_90": Case(
        "sm_90", "float16", ConvConfig((1, 8, 16), 64, 64, 4, 3, LAST, "weights_first"),
        Layout(64, (3, 3)), (1, 8, 16), SAME, unpacked=False,
    ),
    "weight_grad sm_90": Case(
        "sm_90", "bfloat16", WeightGradConfig((1, 1, 64), 64, 64, 1, 4, 4, LAST),
        Layout(64, (3, 3)), (1, 8, 64), SAME,
    ),
    "weight_grad, several sides, sm_90": Case(
        "sm_90", "bfloat16", WeightGradConfig((1, 8, 8), 64, 64, 1, 4, 3, LAST),
        Layout(64, (1, 3)), (1, 8, 32), SAME_ROW,
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_lacks_all_of_its_waits_of_a_kind_is_found_out(program, compiler):
    """Of single ones some are redundant: barriers between copies that write apart, waits that a
    later one repeats."""
    case = PROGRAMS[program]
    assert not execute(case).faults
    for mutant in mutants(compiled(case)):
        if mutant.number is None:
            assert execute(case, rewrite=mutant).faults, mutant
