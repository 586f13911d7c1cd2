"""Tensors of more than 2^31 elements."""

import os
import subprocess
import sys

import pytest
import wide


@pytest.mark.parametrize("role", wide.ROLES)
def test_offsets_pass_32_bits(role):
    # with launch.extent 0, so that no kernel is WIDE, all of these end by a signal
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, wide.__file__, role]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-2000:]}"
