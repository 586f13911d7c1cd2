"""Convolution layers with symmetric weights, held as their free numbers only.

The layers are in ``modules``, the functions in ``functional``, the algebra in ``packing``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import init, reference
from .antisymmetric import AntisymmetricResidual2d
from .cached_weights import cached
from .convert import TieReport, tie, untie
from .dispatch import HAS_TRITON
from .exponential import exp_error_bound, exp_terms, tied_exp
from .functional import tied_conv1d, tied_conv2d, tied_conv3d
from .linear import tied_linear
from .modules import TiedConv1d, TiedConv2d, TiedConv3d
from .operations import inner, norm, scale_channels, scale_groups, shift_diagonal
from .packing import PreparedWeight, pack, packed_size, unpack
from .prepare import prepare
from .skew_orthogonal import SkewOrthogonalConv2d
from .spectral_norm import power_iteration, spectral_norm
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .autotune.problem import Problem as Problem
    from .autotune.recording import problems_of as problems_of
    from .autotune.tuned_configs import config_for as config_for
    from .autotune.tuning import tune as tune
    from .autotune.warming import warm as warm

__all__ = [
    "AntisymmetricResidual2d",
    "PreparedWeight",
    "SkewOrthogonalConv2d",
    "TieReport",
    "TiedConv1d",
    "TiedConv2d",
    "TiedConv3d",
    "cached",
    "exp_error_bound",
    "exp_terms",
    "init",
    "inner",
    "norm",
    "pack",
    "packed_size",
    "power_iteration",
    "prepare",
    "reference",
    "scale_channels",
    "scale_groups",
    "shift_diagonal",
    "spectral_norm",
    "tie",
    "tied_conv1d",
    "tied_conv2d",
    "tied_conv3d",
    "tied_exp",
    "tied_linear",
    "unpack",
    "untie",
]

# Public where Triton is installed, and imported with it on first use.
_TUNER = {
    "Problem": ".autotune.problem",
    "config_for": ".autotune.tuned_configs",
    "problems_of": ".autotune.recording",
    "tune": ".autotune.tuning",
    "warm": ".autotune.warming",
}
if HAS_TRITON:
    __all__ += list(_TUNER)


def __getattr__(name: str) -> Any:
    if name not in _TUNER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not HAS_TRITON:
        raise AttributeError(f"{__name__}.{name} needs Triton, which is not installed")
    return getattr(importlib.import_module(_TUNER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
