"""Kinds of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path


def seconds(text: str) -> float:
    """More than none.

    Raises:
        argparse.ArgumentTypeError: it is no such number.
    """
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, more than none, got {text!r}")


def seconds_or_none(text: str) -> float:
    """0 or more; raises as :func:`seconds`."""
    return 0.0 if text == "0" else seconds(text)


def writable_file(text: str) -> Path:
    """Where a file can be written, in a folder that is there or can be made.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    is_writable = os.access(path, os.W_OK) if path.exists() else _takes_files(folder)
    if path.is_dir() or not is_writable:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _takes_files(folder: Path) -> bool:
    """Tried, since a file system may refuse what the permissions allow."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def writable_folder(text: str) -> Path:
    """A folder that is there or can be made; raises as :func:`writable_file`."""
    return writable_file(str(Path(text) / "file")).parent


def readable_file(text: str) -> Path:
    """A file that is there.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)
