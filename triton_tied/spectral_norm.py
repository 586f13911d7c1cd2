r"""The largest singular value of a tied convolution, seen as a linear map of images.

With ``W_t`` the matrix of tap t, the map multiplies each frequency w of an infinite image by

.. math:: F(w) = \sum_t W_t \, e^{i \langle w, t \rangle}

On a torus (circular padding that keeps the size) the frequencies are those of the image's size. Any
zero padding and any stride cut rows and columns out of the infinite map, which cannot raise its
norm, the supremum of ``|F(w)|`` over all w. (Reflect and replicate padding are another matter: they
show a pixel several times, and no bound here holds for them.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .packing import Layout, PreparedWeight, Symmetry, dense_weight, make_layout, numbers_of
from .tracing import overridable

Method = Literal["bound"]


@overridable
def spectral_norm(
    packed: Tensor | PreparedWeight,
    channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
    symmetry: Symmetry = "self_adjoint",
    method: Method = "bound",
) -> Tensor:
    r"""The spectral norm of the convolution, or a bound of it. Differentiable.

    "bound" is an upper bound for images of every size, zero padding of any width, circular padding
    that keeps the size, and any stride and dilation: the least of the norms of the matrices into
    which the weight can be reshaped, times the square root of the number of taps,

    .. math:: \|A\| \le \sqrt{K_H K_W} \, \min(\|T\|, \|R\|),
        \quad T_{i, (j, a, b)} = R_{(i, a), (j, b)} = W[i, j, a, b]

    (Singla and Feizi, Fantastic Four: differentiable bounds on singular values of convolution
    layers, ICLR 2021). They have two more matrices, in which rows and columns have changed their
    places; of a tied weight these are the transposes of the two up to sign and order, so that their
    norms are the same. In one dimension there is T alone, in three there are four matrices.

    Args:
        packed, channels, kernel_size, groups, symmetry: as in ``unpack``. With groups it is the
            largest of the groups' norms.
        method: "bound".

    Returns:
        A tensor of no dimension, of the dtype of ``packed``. Half types are computed in float32.
        Its second derivative exists where the largest singular value is simple.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``unpack``; an unknown method.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"method must be one of {set(get_args(Method))}, but got method={method!r}"
        )
    layout = make_layout(channels, kernel_size, groups, symmetry)
    numbers = numbers_of("spectral_norm", packed, layout)
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    weight = dense_weight(packed, layout, dtype, False)
    return _reshaping_bound(weight, layout).to(numbers.dtype)


def _reshaping_bound(weight: Tensor, layout: Layout) -> Tensor:
    c = layout.group_channels
    grouped = weight.reshape(layout.groups, c, c, *layout.kernel_size)
    norms = torch.stack([_largest_singular_values(m) for m in _reshaped(grouped)])
    return math.sqrt(layout.taps) * norms.amin(0).amax()


def _reshaped(grouped: Tensor) -> Iterator[Tensor]:
    """``(group, out, in, *kernel)`` as matrices: some axes of the kernel go with the rows, the
    others with the columns. Since W is tied, each choice has the norm of the opposite one."""
    g, c = grouped.shape[:2]
    long = [axis for axis in range(3, grouped.dim()) if grouped.shape[axis] > 1]
    short = [axis for axis in range(3, grouped.dim()) if grouped.shape[axis] == 1]
    for with_rows in itertools.product((False, True), repeat=max(len(long) - 1, 0)):
        rows = [axis for axis, chosen in zip(long[1:], with_rows, strict=True) if chosen]
        columns = [axis for axis in long if axis not in rows]
        matrix = grouped.permute(0, 1, *rows, 2, *columns, *short)
        yield matrix.reshape(g, c * math.prod(grouped.shape[axis] for axis in rows), -1)


def _largest_singular_values(matrices: Tensor) -> Tensor:
    """Of each matrix the largest, from the eigenvalues of the smaller of ``M M^T`` and ``M^T M``:
    that squares the numbers, which costs the largest no accuracy, and is several times as fast."""
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT)[..., -1]
    positive = squares > 0  # the root has no derivative at zero, where 0 is a subgradient
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
