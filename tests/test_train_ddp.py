"""The example of several processes: one training, whatever their number."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch without distributed"
)


def train(processes, steps, folder):
    """The losses that the example prints, by step."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={processes}",
        *("examples/train_ddp.py", f"--steps={steps}", "--report=1", f"--checkpoint={folder}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"{steps}/{steps}" in done.stderr, "a progress bar"
    return {int(k): float(loss) for k, loss in re.findall(r"step (\d+) .*loss (\S+)", done.stdout)}


def test_example_goes_on_with_another_number_of_processes(tmp_path):
    expected = train(1, 6, tmp_path / "one")
    assert expected[6] < 0.9 * expected[1]
    first = train(2, 3, tmp_path / "several")
    second = train(3, 6, tmp_path / "several")
    assert list(first) == [1, 2, 3] and list(second) == [4, 5, 6]
    assert first | second == pytest.approx(expected, rel=1e-4)  # float32, in another order
