"""Tuned configs on disk: one JSON file for each kind of GPU, in the user's cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from .candidates import source_hash
from .configs import ConvConfig, WeightGradConfig

FORMAT = 1
SHIPPED = Path(__file__).with_name("tables")
_VARIABLE = "TRITON_TIED_CACHE_DIR"
_FIELDS = ("format", "gpu", "capability", "multiprocessors", "torch", "triton", "ptxas", "source")


@dataclass(frozen=True)
class Origin:
    """Where the figures of a table come from. An entry is trusted only where the GPU's name, the
    version of Triton and the kernels' source are the same."""

    gpu: str
    capability: str
    multiprocessors: int
    torch: str
    triton: str
    ptxas: str
    source: str = field(default_factory=source_hash)
    format: int = FORMAT

    def trusts(self, table: dict[str, Any]) -> bool:
        return all(table[name] == getattr(self, name) for name in ("gpu", "triton", "source"))


@dataclass(frozen=True)
class Entry:
    """The winner for one problem, in microseconds; ``predicted_us`` by the cost model, ``first_us``
    of what is taken without timing (None where that was not among those timed)."""

    config: ConvConfig | WeightGradConfig
    median_us: float
    first_us: float | None
    predicted_us: float


def directory() -> Path:
    """Where tables are kept: ``TRITON_TIED_CACHE_DIR``, or the user's cache directory."""
    return Path(os.environ.get(_VARIABLE) or platformdirs.user_cache_dir("triton_tied"))


def path_of(origin: Origin, folder: Path | None = None) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in origin.gpu)
    return (folder or directory()) / f"{name}.json"


def load(path: Path, origin: Origin) -> dict[str, Entry]:
    """The entries by :attr:`Problem.key`: none where there is no table or a stale one; none, with
    a warning, where the file is not a table."""
    try:
        table = json.loads(path.read_text())
        _check(table)
        if not origin.trusts(table):
            return {}
        return {key: _read(key, row) for key, row in table["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a table of tuned configs and is left alone: {error!r}", stacklevel=2
        )
        return {}


def save(path: Path, origin: Origin, entries: dict[str, Entry]) -> None:
    """Adds the entries to the table, replacing those of the same problems and a stale table.

    Atomic: a reader sees the old file or the new one. Call it inside :func:`locked`.

    Raises:
        FileExistsError: the file is there but is not a table.
    """
    known = load_for_update(path, origin)
    rows = {key: _write(entry) for key, entry in sorted({**known, **entries}.items())}
    text = json.dumps({**asdict(origin), "entries": rows}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load_for_update(path: Path, origin: Origin) -> dict[str, Entry]:
    """:func:`load`, but what is not a table raises instead of being overwritten."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return load(path, origin)
        except UserWarning as warning:
            raise FileExistsError(str(warning)) from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, so that all take the choice of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        yield


def _check(table: Any) -> None:
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    missing = [name for name in (*_FIELDS, "entries") if name not in table]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")


def _read(key: str, row: dict[str, Any]) -> Entry:
    kind = WeightGradConfig if key.startswith("weight_grad ") else ConvConfig
    config = kind(**{**row["config"], "box": tuple(row["config"]["box"])})
    first_us = None if row["first_us"] is None else float(row["first_us"])
    return Entry(config, float(row["median_us"]), first_us, float(row["predicted_us"]))


def _write(entry: Entry) -> dict[str, Any]:
    return asdict(entry)
