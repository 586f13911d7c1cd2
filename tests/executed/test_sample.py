"""A sample of ``make execute``: others each time, for as long as a test may take."""

import pytest
import torch

from executed.many import drawn, executed
from triton_tied.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SECONDS = 10


def test_drawn_cases_have_no_faults():
    """The seed that the run prints repeats them."""
    outcomes = list(executed(drawn(torch.initial_seed() % 2**32), jobs=2, seconds=SECONDS))
    print(f"{len(outcomes)} cases executed")
    faults = [f"{outcome.case}: {outcome.faults}" for outcome in outcomes if outcome.faults]
    assert outcomes and not faults, "\n".join(faults)
