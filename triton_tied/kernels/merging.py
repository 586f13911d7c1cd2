r"""Neighbouring columns of pixels as the channels of one.

In channels-last memory ``m`` columns side by side, of ``C`` channels each, are one column of
``m C`` channels, without a copy. A tied convolution is one there too. With ``W_b`` the matrix of
column ``b`` of the kernel, a left padding ``P`` and a dilation ``d``, column ``p`` of an output
pixel sees column ``q`` of the input pixel that lies ``B`` merged columns further right through

.. math:: W'_B[(p, i), (q, j)] = W_b[i, j] \quad\text{where}\quad m B + q - p = b d - P

and through zero where no column of the kernel does it. Fewer and larger products then do the same,
some of them with zeros: for few channels these fill the matrix units better.
"""

from __future__ import annotations

from dataclasses import replace

from ..geometry import Geometry
from ..packing import Layout

MERGES = (2, 4, 8, 16)  # columns that may be merged
MAX_CHANNELS = 64  # of a merged pixel


def merge(layout: Layout, geometry: Geometry, merged: int) -> tuple[Layout, Geometry]:
    """The convolution of merged columns; see :func:`why_unmergeable`."""
    kernel_h, kernel_w = layout.kernel_size
    rows, (before, after) = geometry.padding
    window = geometry.dilation[1] * (kernel_w - 1)
    first = -before // merged  # the merged columns that a kernel's first and last column reach
    last = (merged - 1 + window - before) // merged
    columns = last - first + 1
    grows = (before + after - window) // merged
    padding = rows, (-first, grows + columns - 1 + first)
    return (
        replace(layout, channels=layout.channels * merged, kernel_size=(kernel_h, columns)),
        Geometry((1, 1), padding, (geometry.dilation[0], 1)),
    )


def why_unmergeable(layout: Layout, geometry: Geometry, columns: int, merged: int) -> str | None:
    """Why so many columns cannot be merged, or None; ``columns``: the greatest common divisor of
    those of the input and of the output."""
    channels = layout.channels * merged
    if channels > MAX_CHANNELS:
        return f"a merged pixel would have {channels} channels, and {MAX_CHANNELS} are the most"
    if layout.groups > 1:
        return f"the channels of {layout.groups} groups would mix"
    if columns % merged:
        return f"rows of a multiple of {columns} columns are not made of {merged} each"
    before = geometry.padding[1][0]
    if (geometry.dilation[1] * (layout.kernel_size[1] - 1) - 2 * before) % merged:
        return f"with left padding {before} opposite taps do not stay opposite"
    return None
