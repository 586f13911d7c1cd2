"""``python -m triton_tied info``: versions, devices, and which path serves them and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from ..dispatch import why_no_triton, why_reference
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
        if device.type == "cuda" and why_no_triton() is None:
            _print_checked(device)
    return 0


def _print_checked(device: torch.device) -> None:
    """Of the kernels that were checked when they first served on this GPU."""
    from ..autotune.tuned_configs import verdicts_of

    verdicts = verdicts_of(device)
    wrong = [code for code, right in verdicts.items() if not right]
    print(f"{'':<12} {len(verdicts)} kernels checked on first use, {len(wrong)} wrong")
    for code in wrong:
        print(f"{'':<14} wrong, and not used: {code}")


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
