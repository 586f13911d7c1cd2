"""A machine without Triton: the reference serves, and what needs kernels says so."""

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import triton_tied as tt

layer = tt.TiedConv2d(4, 3, padding=1)
layer(torch.randn(1, 4, 5, 5)).sum().backward()
assert layer.packed_weight.grad.abs().sum() > 0
assert not {"tune", "Problem", "config_for", "problems_of"} & {*tt.__all__}
try:
    tt.tune
except AttributeError as error:
    print(error)
"""


def test_layers_work_and_tuning_says_what_it_needs():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "triton_tied.tune needs Triton, which is not installed\n"
