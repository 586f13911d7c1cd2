"""``python -m triton_tied info``: versions, devices, and which path serves them and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from ..dispatch import why_reference
from ..version import __version__
from .devices import devices


def run(given: argparse.Namespace) -> int:
    """The exit status."""
    versions = {"triton_tied": __version__, "torch": torch.__version__, "triton": _triton_version()}
    for package, version in versions.items():
        print(f"{package:<12} {version}")
    print(f"{'python':<12} {platform.python_version()} on {platform.system()}")
    for device in devices():
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        print(f"{device.type:<12} {name}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            reason = why_reference(device, dtype)
            path = f"reference: {reason}" if reason else "kernels"
            print(f"{'':<12} {str(dtype).removeprefix('torch.'):<9}{path}")
    return 0


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
