"""How far a dense weight is from the nearest tied one, and whether that is rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import Layout, check_supported, expand, pack

# A weight whose entries were summed in another order than their partners is tied to this many
# roundings (machine epsilons of its dtype) of its largest entry; a weight that is not tied is far.
MAX_ROUNDINGS = 4


def pack_tied(weight: Tensor, layout: Layout, remedy: str) -> Tensor:
    """The packed vector of a weight that is tied to rounding.

    Raises:
        TypeError, NotImplementedError: no tensor, or one that is not supported.
        ValueError: a weight of another size, without values, or further from the nearest tied one
            than ``MAX_ROUNDINGS``; the message ends with the remedy.
    """
    check_supported("a tied layer", "weight", weight)
    if weight.shape != layout.weight_shape:
        raise ValueError(
            f"expected weight of size {list(layout.weight_shape)}, "
            f"but got weight of size {list(weight.shape)}"
        )
    if weight.is_meta:
        raise ValueError("a weight on the meta device has no values, so it cannot be packed")
    weight = weight.detach()
    packed = pack(weight, layout.groups, layout.symmetry)
    deviation = (weight - expand(packed, layout)).abs()
    bound = MAX_ROUNDINGS * torch.finfo(weight.dtype).eps * weight.abs().max()
    if bool((deviation <= bound).all()):  # not so where there are NaNs
        return packed
    worst = [int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape)]
    raise ValueError(
        f"the weight is not tied ({layout.symmetry}): it deviates from the nearest tied weight by "
        f"up to {deviation.max().item():.3g}, at {worst}, where rounding explains "
        f"{bound.item():.3g}. {remedy}"
    )
