"""What type checkers make of a user's script."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_users_script_passes_strict_mypy():
    pytest.importorskip("mypy", reason="needs mypy")
    strict = ("--strict", "--config-file=", "--follow-imports=silent")
    command = [sys.executable, "-m", "mypy", *strict, "tests/typed_script.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
