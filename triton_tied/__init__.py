"""Convolution layers with symmetric weights, held as their free numbers only.

The layers are in ``modules``, the functions in ``functional``, the algebra in ``packing``.
"""

from . import reference
from .cached_weights import cached
from .convert import TieReport, tie, untie
from .dispatch import HAS_TRITON
from .functional import tied_conv1d, tied_conv2d, tied_conv3d
from .modules import TiedConv1d, TiedConv2d, TiedConv3d
from .packing import pack, packed_size, unpack
from .version import __version__ as __version__

__all__ = [
    "TieReport",
    "TiedConv1d",
    "TiedConv2d",
    "TiedConv3d",
    "cached",
    "pack",
    "packed_size",
    "reference",
    "tie",
    "tied_conv1d",
    "tied_conv2d",
    "tied_conv3d",
    "unpack",
    "untie",
]

if HAS_TRITON:
    from .autotune.problem import Problem
    from .autotune.recording import problems_of
    from .autotune.tuned_configs import config_for
    from .autotune.tuning import tune

    __all__ += ["Problem", "config_for", "problems_of", "tune"]
else:

    def __getattr__(name: str) -> object:
        if name in ("Problem", "config_for", "problems_of", "tune"):
            raise AttributeError(f"triton_tied.{name} needs Triton, which is not installed")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
