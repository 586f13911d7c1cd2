"""A peer is timed only if it computes the same convolution as all the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import rounding
from .formulas import peers_of
from .passes import Images
from .peers import DENSE, Peer
from .workloads import FORMULAS, TORCH_DTYPES, Format, Workload

_WORST = 1e-2  # a relative error that no dtype excuses


class Truth:
    """The first and the last image in float64, and how far off a peer may be.

    Number by number that is the bound of :mod:`..rounding`. It knows no cuDNN algorithm but plain
    sums: where dense itself needs more than it, that is twice what dense needs. In norm it is twice
    dense's error, in its worse layout, or four roundings: of averaged weights, whose redundant
    parts are rounded before, and of the output.

    A formula of many convolutions is held in norm alone, to twice the error of the published one
    or four roundings for each term or step. In the gradient of an equilibrium a number that is zero
    but for rounding counts or does not: there any error is allowed that a dtype may excuse.
    """

    def __init__(self, workload: Workload, tied: Tensor, images: Images, memory: Format) -> None:
        formula = workload.family in FORMULAS
        kinds = peers_of(workload)
        bars = [kinds[name] for name in (("published",) if formula else DENSE)]
        dtype = TORCH_DTYPES[workload.dtype]
        operand = rounding.TF32 if workload.dtype == "tf32" else 0.0
        u = torch.finfo(dtype).eps / 2

        def exact(weight: Tensor, *ends: Tensor) -> list[Tensor]:
            x, grad = ends
            return _outputs(bars[0](workload, weight, memory), Images(x.requires_grad_(), grad))

        def bounds() -> list[Tensor]:
            magnitudes = [image.abs() for image in ends]
            scales = exact(weight.abs(), *magnitudes)
            # An averaged weight is off by three roundings of a weight and four of what is averaged
            # away, which has its standard deviation: seven of these are never drawn.
            off = 1.1 * u * (3 * weight.abs().max() + 28 * weight.std(correction=0))
            shifts = exact(torch.ones_like(weight), *magnitudes)
            # Where a border is wrapped, the gradients of up to three copies an axis are rounded,
            # then summed in the dtype: twice that many roundings, to be generous.
            copies = 2 * 3 ** len(workload.image) if workload.padding_mode == "circular" else 0
            return [
                off * shift
                + rounding.bound(truth, scale, weight[0].numel(), dtype, copies * scale, operand)
                for truth, scale, shift in zip(self._wanted, scales, shifts, strict=True)
            ]

        ends = [_ends(image).double().detach() for image in images]
        weight = tied.double()
        self._wanted = exact(weight, *ends)
        unknown = [torch.full_like(truth, math.inf) for truth in self._wanted]
        self._bounds = unknown if formula else bounds()
        bars = [kind for kind in bars if not kind.why_not(workload, tied.device)]
        found = [self._errors(kind(workload, tied, memory), images) for kind in bars]
        floor = 4 * (operand or u)
        if formula:
            floor *= workload.applications
        self._allowed = [
            (max(1.0, 2 * max(ratios)), min(max(2 * max(norms), floor), _WORST))
            for ratios, norms in (zip(*errors, strict=True) for errors in zip(*found, strict=True))
        ]
        if workload.family == "mondeq-splitting":
            self._allowed[1] = 1.0, _WORST

    def why_wrong(self, peer: Peer, images: Images) -> str | None:
        """In its output or its input gradient, which are computed of all images; NaN is wrong."""
        if not peer.same:
            _outputs(peer, images)
            return None
        names = "output", "input gradient"
        for what, error, allowed in zip(
            names, self._errors(peer, images), self._allowed, strict=True
        ):
            if not error[1] <= allowed[1]:
                return f"the {what} is off by {error[1]:.1e}, where {allowed[1]:.1e} is allowed"
            if not error[0] <= allowed[0]:
                return f"the {what} is off in places, by {error[0]:.1e} of what rounding explains"
        return None

    def _errors(self, peer: Peer, images: Images) -> list[tuple[float, float]]:
        """For output and input gradient: the largest error over its bound, and that in norm."""
        found = [_ends(tensor).double() for tensor in _outputs(peer, images)]
        return [
            (rounding.worst(tensor, truth, bound), ((tensor - truth).norm() / truth.norm()).item())
            for tensor, truth, bound in zip(found, self._wanted, self._bounds, strict=True)
        ]


def _outputs(peer: Peer, images: Images) -> list[Tensor]:
    output = peer.forward(images.x)
    gradients = torch.autograd.grad(output, [images.x, *peer.parameters], images.grad)
    return [output.detach(), gradients[0]]


def _ends(images: Tensor) -> Tensor:
    return images.detach()[[0, -1]] if len(images) > 1 else images.detach()
