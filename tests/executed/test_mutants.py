"""Programs that lack waits, barriers or fences: the machine finds what is wrong with them."""

import pytest
import torch

from triton_tied.dispatch import INTERPRETED

from .checks import assert_found_out_without_waits
from .execution import compiled
from .mutants import PROGRAMS, mutants
from .redundancy import logs_of, verdict_on

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
DRAWN = 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_lacks_all_of_its_waits_of_a_kind_is_found_out(program, compiler):
    assert_found_out_without_waits(PROGRAMS[program])


@pytest.mark.parametrize("program", PROGRAMS)
def test_of_a_program_that_lacks_one_it_is_known_why(program, compiler):
    """It is found out, or what it lacks is proved to be redundant. Of those of a weight gradient
    two are neither: barriers that order the threads of one warp among themselves."""
    case = PROGRAMS[program]
    single = [mutant for mutant in mutants(compiled(case)) if mutant.number is not None]
    logs = logs_of(case)
    drawn = [single[i] for i in torch.randperm(len(single))[:DRAWN]]
    verdicts = {str(mutant): verdict_on(mutant, case, logs) for mutant in drawn}
    print(verdicts)
    unknown = list(verdicts.values()).count("unknown")
    assert unknown <= (2 if case.kernel == "weight_grad" else 0)
