"""Programs that lack one wait, barrier or fence: the machine finds what is wrong with them."""

import random

import pytest
import torch

from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.packing import Layout

from .cases import Case
from .execution import compiled, execute
from .mutants import mutants

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
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
        Layout(64, (3, 3)), (2, 8, 32), SAME,
    ),
}  # fmt: skip
# Others make up for these: see docs/proof.md.
REDUNDANT: dict[str, set[str]] = {}
DRAWN = 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_lacks_a_wait_is_found_out(program, compiler):
    case = PROGRAMS[program]
    assert not execute(case).faults
    chance = random.Random(torch.initial_seed())
    lacking = [m for m in mutants(compiled(case)) if str(m) not in REDUNDANT.get(program, ())]
    for mutant in chance.sample(lacking, DRAWN):
        assert execute(case, rewrite=mutant).faults, mutant
