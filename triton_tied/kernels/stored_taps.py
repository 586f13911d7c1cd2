"""Which taps of a weight a convolution reads as matrices that lie in memory; the rest it derives."""

from __future__ import annotations

from ..packing import Layout
from .precision import InputPrecision

# Of a group, from which on the centre is unpacked by a launch of its own: each program would gather
# more than one tile of it from its triangle, number by number. A guess until a GPU has timed it.
_UNPACKED_FROM = 128


def stored_taps(layout: Layout, precision: InputPrecision) -> int:
    """How many taps are read as they lie in memory: the first ones of the kernel.

    - Half of them, which is what ``packed`` begins with. The centre is gathered from its triangle.
    - With the centre, unpacked.
    - All: products in TF32 want each matrix rounded, and its rows along the sum.
    """
    if precision == "tf32":
        return layout.taps
    if layout.group_channels >= _UNPACKED_FROM:
        return layout.pairs + layout.taps % 2
    return layout.pairs
