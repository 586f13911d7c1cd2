"""What is wrong with a machine on which Triton can compile nothing, and what mends it."""

from __future__ import annotations

import functools
import os
import subprocess

from ..dispatch import INTERPRETED

# Versions that were tried: Gluon is experimental, and changes.
_GLUON = ("3.6.", "3.7.")
_CLUSTERS = "3.7."


class ToolchainError(RuntimeError):
    """Triton cannot compile here, whatever the kernel."""


@functools.cache
def why_no_gluon() -> str | None:
    """Why a kernel in Gluon cannot be compiled here, or None. Imports Triton."""
    if INTERPRETED:
        return "Triton's interpreter does not run Gluon"
    try:
        from triton import __version__ as version
    except ImportError:
        return "Triton is not installed"
    if not version.startswith(_GLUON):
        return f"it is written in the Gluon of Triton 3.6 and 3.7, and this is {version}"
    return None


@functools.cache
def why_no_clusters() -> str | None:
    """The same of a kernel whose programs form clusters."""
    why = why_no_gluon()
    if why is None:
        from triton import __version__ as version

        if not version.startswith(_CLUSTERS):
            why = f"its clusters need Triton {_CLUSTERS}x, and this is {version}"
    return why


def explain(error: Exception) -> ToolchainError | None:
    """The error as what mends it, where it is the machine's and not one kernel's.

    Triton builds a small C library for its driver, calls NVIDIA's assembler, and keeps all in a
    cache on disk.
    """
    remedy = _remedy(error)
    if remedy is None:
        return None
    return ToolchainError(f"Triton cannot compile on this machine: {error}. {remedy}")


def _names(error: Exception, compiler: str | None) -> bool:
    """Whether a file is missing that the user said was the compiler."""
    return compiler is not None and isinstance(error, OSError) and error.filename == compiler


def _remedy(error: Exception) -> str | None:
    text, compiler = str(error), os.environ.get("CC")
    if isinstance(error, subprocess.CalledProcessError):
        return (
            "Its C compiler failed; most often Python's headers (Python.h) are missing: install "
            "them, as python3-dev or python3-devel, or use a Python that has them"
        )
    if "C compiler" in text or _names(error, compiler):
        return "Install gcc or clang, or name a C compiler in the environment variable CC"
    if isinstance(error, OSError) or "cache dir" in text:
        return "Set TRITON_CACHE_DIR to a folder that can be written and has space"
    if isinstance(error, RuntimeError) and text.startswith("Cannot find ptxas"):
        return "Set TRITON_PTXAS_PATH to NVIDIA's assembler, or install Triton anew"
    if isinstance(error, AssertionError) and "libcuda" in text:
        return "Install NVIDIA's driver, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
    return None
