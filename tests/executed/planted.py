"""Kernels of an edited source: faults that a test plants, and what the machine finds of them."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import oracle
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from .cases import expected_of, inputs_of, run
from .execution import KERNELS

_NUMBERS = itertools.count()


def plant(module, edits, folder, monkeypatch):
    """The module's kernel, which is named after it, with each of these texts replaced; in its place
    for this test."""
    text = re.sub(r"from \.(\w+) import", r"from triton_tied.kernels.\1 import", _source(module))
    for old, new in edits.items():
        assert old in text, old
        text = text.replace(old, new)
    name = f"planted_{next(_NUMBERS)}"
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    planted = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    kernel = f"{module.__name__.rpartition('.')[2]}_kernel"
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
    return getattr(planted, kernel)


def fault_of(kernel, case, timing, rewrite=None):
    """What the machine finds, or "error" where the numbers are wrong, or ""."""
    inputs = inputs_of(case)
    with emulated(EmulatedGpu(90, timing, rewrite=rewrite), kernel, *KERNELS):
        try:
            result = run(case, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "" if oracle.worst(result, expected_of(case, inputs)) <= 1 else "error"


def _source(module):
    return Path(module.__file__).read_text()
