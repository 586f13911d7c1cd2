"""Convolutions whose weight is tied inside the layer, held without a redundant parameter."""

from . import reference
from .functional import tied_conv1d, tied_conv2d, tied_conv3d
from .modules import TiedConv1d, TiedConv2d, TiedConv3d
from .packing import pack, packed_size, unpack
from .paths import HAS_TRITON
from .preparation import cached

__version__ = "0.1.0"

__all__ = [
    "TiedConv1d",
    "TiedConv2d",
    "TiedConv3d",
    "cached",
    "pack",
    "packed_size",
    "reference",
    "tied_conv1d",
    "tied_conv2d",
    "tied_conv3d",
    "unpack",
]

if HAS_TRITON:
    from .autotune import config_for
    from .problem import Problem
    from .tuning import problems_of, tune

    __all__ += ["Problem", "config_for", "problems_of", "tune"]
