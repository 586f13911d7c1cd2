"""A peer is timed only if it computes the same convolution as all the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..check import FLOORS
from .passes import Images
from .peers import DENSE, PEERS, Peer
from .workloads import TORCH_DTYPES, Format, Workload

_WORST = 1e-2  # a relative error that no dtype excuses


class Truth:
    """The first and the last image in float64, and how far off dense is, in its worse layout."""

    def __init__(self, workload: Workload, tied: Tensor, images: Images, memory: Format) -> None:
        precise = Images(*(_ends(image).double().detach() for image in images))
        precise.x.requires_grad_()
        self._wanted = _outputs(PEERS["dense"](workload, tied.double(), memory), precise)
        layouts = [PEERS[name] for name in DENSE]
        layouts = [kind for kind in layouts if not kind.why_not(workload, tied.device)]
        errors = [self._errors(kind(workload, tied, memory), images) for kind in layouts]
        # Twice, since an averaged weight is rounded before and after it is averaged.
        floor = 2 * FLOORS[TORCH_DTYPES[workload.dtype]]
        self._allowed = [
            min(max(2 * max(found), floor), _WORST) for found in zip(*errors, strict=True)
        ]

    def why_wrong(self, peer: Peer, images: Images) -> str | None:
        """In its output or its input gradient, which are computed of all images; NaN is wrong."""
        if not peer.same:
            _outputs(peer, images)
            return None
        errors = self._errors(peer, images)
        for what, error, allowed in zip(
            ("output", "input gradient"), errors, self._allowed, strict=True
        ):
            if not error <= allowed:
                return f"the {what} is off by {error:.1e}, where {allowed:.1e} is allowed"
        return None

    def _errors(self, peer: Peer, images: Images) -> list[float]:
        found = [_ends(tensor).double() for tensor in _outputs(peer, images)]
        pairs = zip(found, self._wanted, strict=True)
        return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def _outputs(peer: Peer, images: Images) -> list[Tensor]:
    output = peer.forward(images.x)
    gradients = torch.autograd.grad(output, [images.x, *peer.parameters], images.grad)
    return [output.detach(), gradients[0]]


def _ends(images: Tensor) -> Tensor:
    return images.detach()[[0, -1]] if len(images) > 1 else images.detach()
