"""What was measured, on disk: one JSON file for each kind of GPU, in the user's cache directory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import filelock
import platformdirs

from ..kernels.configs import Config, as_json, from_json
from .candidates import source_hash

FORMAT = 4
SHIPPED = Path(__file__).with_name("tables")
_VARIABLE = "TRITON_TIED_CACHE_DIR"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_FIELDS = ("format", "gpu", "capability", "multiprocessors", "torch", "triton", "ptxas", "source")


@dataclass(frozen=True)
class Origin:
    """Where the figures of a table come from. An entry is trusted only where all is the same but
    the version of torch, which compiles nothing."""

    gpu: str
    capability: str
    multiprocessors: int
    torch: str
    triton: str
    ptxas: str
    source: str = field(default_factory=source_hash)
    format: int = FORMAT

    def trusts(self, table: dict[str, Any]) -> bool:
        return all(table[name] == getattr(self, name) for name in _FIELDS if name != "torch")


@dataclass(frozen=True)
class Entry:
    """The winner for one problem, in microseconds; ``predicted_us`` by the cost model, ``first_us``
    of what is taken without timing (None where that was not among those timed)."""

    config: Config
    median_us: float
    first_us: float | None
    predicted_us: float


def directory() -> Path:
    """Where tables are kept: ``TRITON_TIED_CACHE_DIR``, or the user's cache directory; for a user
    without a home, a folder that cannot be made."""
    try:
        return Path(os.environ.get(_VARIABLE) or platformdirs.user_cache_dir("triton_tied"))
    except RuntimeError:
        return Path(os.devnull, "triton_tied")


def path_of(origin: Origin, folder: Path | None = None) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in origin.gpu)
    return (folder or directory()) / f"{name}.json"


class Table(NamedTuple):
    """The winners by :attr:`Problem.key`; and of compiled kernels that were checked on this kind
    of GPU, whether their results were right."""

    entries: dict[str, Entry]
    checked: dict[str, bool]


def load(path: Path, origin: Origin) -> Table:
    """What is there: nothing where there is no table or a stale one; nothing, with a warning,
    where the file is not a table or cannot be read."""
    try:
        return load_for_update(path, origin)
    except FileExistsError as error:
        warnings.warn(str(error), stacklevel=2)
        return Table({}, {})


def load_for_update(path: Path, origin: Origin) -> Table:
    """:func:`load`, but what is not a table raises instead of being overwritten.

    Raises:
        FileExistsError: the file is there but is not a table, or cannot be read.
    """
    try:
        table = json.loads(path.read_text())
        _check(table)
        if not origin.trusts(table):
            return Table({}, {})
        entries = {key: _read(row) for key, row in table["entries"].items()}
        return Table(entries, {key: _verdict(right) for key, right in table["checked"].items()})
    except (FileNotFoundError, NotADirectoryError):
        return Table({}, {})
    except OSError as error:
        raise FileExistsError(f"{path} cannot be read: {error!r}") from None
    # RecursionError: of a file that nests without end.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileExistsError(
            f"{path} is not a table of tuned configs and is left alone: {error!r}"
        ) from None


def save(
    path: Path,
    origin: Origin,
    entries: Mapping[str, Entry] = _NOTHING,
    checked: Mapping[str, bool] = _NOTHING,
) -> None:
    """Adds to the table, replacing what is there for the same keys and a stale table.

    Atomic: a reader sees the old file or the new one. Call it inside :func:`locked`.

    Raises:
        FileExistsError: the file is there but is not a table, or cannot be read.
        OSError: it cannot be written.
    """
    known = load_for_update(path, origin)
    merged = sorted({**known.entries, **entries}.items())
    rows = {key: {**asdict(entry), "config": as_json(entry.config)} for key, entry in merged}
    verdicts = dict(sorted({**known.checked, **checked}.items()))
    table = {**asdict(origin), "entries": rows, "checked": verdicts}
    text = json.dumps(table, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile: a table may be shared, and its files are for one user's eyes.
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, so that all take the choice of the first.

    Where there can be no lock (a folder that cannot be written, a file system without locks) a
    warning says so, and each process is on its own.
    """
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        warnings.warn(
            f"{path} cannot be locked, so processes may tune at once and choose otherwise: "
            f"{error!r}; {_VARIABLE} moves it",
            stacklevel=3,
        )
    try:
        yield
    finally:
        lock.release()


def _check(table: Any) -> None:
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    missing = [name for name in (*_FIELDS, "entries", "checked") if name not in table]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")


def _read(row: dict[str, Any]) -> Entry:
    """An entry. Its numbers are checked, since what is taken from here is launched."""
    config = from_json(row["config"])
    sizes = [(side, 1) for side in config.box]  # with the least that each may be
    integers = (each for each in fields(config) if each.type == "int")
    sizes += [(getattr(config, each.name), 0 if each.default == 0 else 1) for each in integers]
    if not all(type(size) is int and size >= least for size, least in sizes):
        raise ValueError(f"expected integers, positive where 0 is no default, in {config}")
    first_us = None if row["first_us"] is None else _microseconds(row["first_us"])
    median_us, predicted_us = map(_microseconds, (row["median_us"], row["predicted_us"]))
    return Entry(config, median_us, first_us, predicted_us)


def _verdict(right: Any) -> bool:
    if type(right) is not bool:
        raise ValueError(f"expected true or false, got {right!r}")
    return right


def _microseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"expected a time, got {value!r}")
    return float(value)
