"""Whether products of float32 are exact or TF32: as PyTorch says for its own convolutions."""

from __future__ import annotations

from typing import Literal

import torch

from ..dispatch import INTERPRETED

InputPrecision = Literal["ieee", "tf32"]


def input_precision(dtype: torch.dtype) -> InputPrecision:
    """float32 follows PyTorch's own setting for convolutions."""
    allowed = dtype == torch.float32 and torch.version.hip is None
    tf32 = allowed and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def rounds_operands(precision: InputPrecision) -> bool:
    """Whether kernels round to TF32. The matrix units cut off what is beyond it; interpreted, the
    products of float32 are exact."""
    return precision == "tf32" and not INTERPRETED
