"""What was tuned: the user's table, the shipped one, and what this process could not save.

Both tables are read once; choices that were made by them are forgotten when they are read anew.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path

import torch

from ..kernels.configs import Config
from . import choices, disk_cache, gpus
from .disk_cache import Entry, Origin, Table
from .problem import Problem
from .shortlist import make_shortlist, serves

_tables: dict[str, Table] = {}
# What this process timed but no table holds, by GPU and problem: a winner that could not be saved,
# or None, since nothing worked. It need not be timed again.
_unsaved: dict[tuple[str, str], Entry | None] = {}
# What this process checked, by GPU and compiled kernel.
_verdicts: dict[tuple[str, str], bool] = {}


def config_for(problem: Problem, device: torch.device | str | None = None) -> Config:
    """The config that serves a problem on a device, by default the current GPU. Nothing is timed.

    Raises:
        KeyError: no kernel was compiled for a problem like this.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    entry = entry_for(problem, device)
    return entry.config if entry else make_shortlist(problem, gpus.of_device(device)).untimed


def entry_for(problem: Problem, device: torch.device) -> Entry | None:
    """What is known for the problem's key, if it serves this very problem."""
    origin = origin_of(device)
    entry = _unsaved.get((origin.gpu, problem.key)) or _table_of(origin).entries.get(problem.key)
    if entry is None or not serves(problem, gpus.of_device(device), entry.config):
        return None
    return entry


def was_right(code: str, device: torch.device) -> bool | None:
    """Whether a compiled kernel's result was right when it was checked, or None: it never was."""
    origin = origin_of(device)
    known = _verdicts.get((origin.gpu, code))
    return _table_of(origin).checked.get(code) if known is None else known


def verdicts_of(device: torch.device) -> dict[str, bool]:
    """All that were checked on this kind of GPU."""
    origin = origin_of(device)
    unsaved = {code: right for (gpu, code), right in _verdicts.items() if gpu == origin.gpu}
    return {**_table_of(origin).checked, **unsaved}


def keep_verdict(code: str, right: bool, device: torch.device) -> None:
    """In the user's table if possible; in any case for this process."""
    origin = origin_of(device)
    path = disk_cache.path_of(origin)
    _verdicts[origin.gpu, code] = right
    with contextlib.suppress(OSError), disk_cache.locked(path):
        disk_cache.save(path, origin, checked={code: right})


def _table_of(origin: Origin) -> Table:
    """The user's table over the shipped one."""
    table = _tables.get(origin.gpu)
    if table is None:
        shipped = disk_cache.load(disk_cache.path_of(origin, disk_cache.SHIPPED), origin)
        own = disk_cache.load(disk_cache.path_of(origin), origin)
        table = Table({**shipped.entries, **own.entries}, {**shipped.checked, **own.checked})
        _tables[origin.gpu] = table
    return table


def was_timed_in_vain(problem: Problem, device: torch.device) -> bool:
    """Whether this process timed the problem, and its winner is in no table or there was none."""
    return (origin_of(device).gpu, problem.key) in _unsaved


def keep(path: Path, origin: Origin, problem: Problem, entry: Entry | None) -> None:
    """In the user's table if possible, which is then written at once; else in memory. None says
    that nothing worked."""
    _unsaved[origin.gpu, problem.key] = entry
    if entry is not None:
        try:
            disk_cache.save(path, origin, {problem.key: entry})
        except OSError as error:
            text = f"a tuned config is kept for this process only: {error}"
            warnings.warn(text, stacklevel=2)
        else:
            del _unsaved[origin.gpu, problem.key]
    read_again()


def read_again() -> None:
    """Reads the tables at the next choice."""
    _tables.clear()
    choices.forget_all()


def forget() -> None:
    """As :func:`read_again`, and what was timed or checked but not saved is gone."""
    _unsaved.clear()
    _verdicts.clear()
    read_again()


@functools.lru_cache(maxsize=16)
def origin_of(device: torch.device) -> Origin:
    """What the figures of a device's table depend on."""
    import triton  # slow, and not needed before something is launched

    if device.type != "cuda":
        return Origin("cpu", "", 0, torch.__version__, triton.__version__, "")
    properties = torch.cuda.get_device_properties(device)
    return Origin(
        properties.name,
        f"{properties.major}.{properties.minor}",
        properties.multi_processor_count,
        torch.__version__,
        triton.__version__,
        _assembler_version(),
    )


def _assembler_version() -> str:
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    from triton import knobs

    return knobs.nvidia.ptxas.version
