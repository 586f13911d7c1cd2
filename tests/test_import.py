"""What importing the package costs, and that it works whatever is wrong with Triton."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "triton_tied"

# A layer's forward, in a process of its own; prints why the kernels do not serve it.
FORWARD = """
import torch
import triton_tied as tt
from triton_tied.dispatch import why_reference
layer = tt.TiedConv2d(4, 3, padding=1)
x = torch.randn(2, 4, 5, 5)
dense = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
assert torch.equal(layer(x), dense)
layer(x).sum().backward()
print(why_reference(x.device, x.dtype))
"""


def run(code, *, path=PACKAGE.parent, before=(), **environment):
    """What a new interpreter prints, where ``before`` stands before the package on the path."""
    folders = os.pathsep.join(map(str, (*before, path)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": folders, "TRITON_INTERPRET": "1", **environment},
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_neither_the_compiler_nor_triton_is_imported():
    code = """
import sys, torch
before = set(sys.modules)
import triton_tied
print(sorted(name for name in set(sys.modules) - before if "triton_tied" not in name))
"""
    new = run(code)
    for name in ("torch._dynamo", "triton", "sympy", "torch.utils.flop_counter"):
        assert f"'{name}'" not in new


def test_import_takes_little_longer_than_that_of_torch(tmp_path):
    """Three hundredths at most, of processor time, of a copy that is compiled to byte code as torch
    is; it was 0.017 to 0.021 when written. In one process, so that a busy machine slows both."""
    copy = tmp_path / "triton_tied"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copy, quiet=2)
    code = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import triton_tied
print((time.process_time() - middle) / (middle - start))
"""
    assert min(float(run(code, path=tmp_path)) for _ in range(5)) < 0.03


def test_names_of_the_tuner_are_there_before_it_is_imported():
    code = """
import sys
import triton_tied as tt
assert "triton_tied.autotune.tuning" not in sys.modules and "tune" in dir(tt)
from triton_tied import *
print(tt.tune is tune, tt.Problem.__name__, callable(problems_of), callable(config_for))
try:
    tt.absent
except AttributeError as error:
    print(error)
"""
    assert run(code) == "True Problem True True\nmodule 'triton_tied' has no attribute 'absent'\n"


BROKEN = {
    "raises": ("raise RuntimeError('no driver')", "cannot be imported: RuntimeError('no driver')"),
    "lacks a part": ("import absent_library", "cannot be imported: ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_reference_serves_where_triton_cannot_be_imported(name, tmp_path):
    text, reason = BROKEN[name]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text)
    assert reason in run(FORWARD, before=[tmp_path])


def test_a_module_without_a_spec_counts_as_installed():
    code = "import sys, triton; triton.__spec__ = None; import triton_tied as tt"
    assert run(f"{code}; print(tt.HAS_TRITON, tt.tune.__name__)") == "True tune\n"


def test_the_reference_serves_where_the_package_is_byte_code_only(tmp_path):
    copy = tmp_path / "triton_tied"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copy, quiet=2, legacy=True)
    for source in copy.rglob("*.py"):
        source.unlink()
    assert "source code" in run(FORWARD, path=tmp_path)


def test_compiling_a_layer_warns_of_nothing():
    code = """
import warnings, torch
import triton_tied as tt
layer = tt.TiedConv2d(4, 3, padding=1)
x = torch.randn(2, 4, 5, 5)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
torch.testing.assert_close(y, layer(x))
print("compiled")
"""
    for interpreted in ("0", "1"):
        assert "compiled" in run(code, TRITON_INTERPRET=interpreted)


def test_flops_are_counted_by_a_counter_imported_before_or_after():
    count = """
import torch, triton_tied as tt
from torch.utils.flop_counter import FlopCounterMode
x, packed = torch.randn(2, 8, 5, 5), torch.randn(tt.packed_size(8, 3))
with FlopCounterMode(display=False) as counter:
    tt.tied_conv2d(x, packed, kernel_size=3)
print(counter.get_total_flops())
"""
    for code in (count, "import torch.utils.flop_counter\n" + count):
        assert int(run(code)) == 2 * 8 * 8 * 9 * 2 * 3 * 3
