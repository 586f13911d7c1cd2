"""Kernels of an edited source: faults that a test plants."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

_NUMBERS = itertools.count()


def plant(module, edits, folder):
    """The module's kernel, which is named after it, with each of these texts replaced."""
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
    return getattr(planted, f"{module.__name__.rpartition('.')[2]}_kernel")


def _source(module):
    return Path(module.__file__).read_text()
