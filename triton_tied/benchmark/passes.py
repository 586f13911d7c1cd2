"""What is timed of a peer: one part of a training step or of an inference at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..cached_weights import cached
from .peers import Peer
from .workloads import FORMATS, Format, Workload

# The cost of one more application no longer changes here; users apply up to 800.
_MAX_APPLICATIONS = 20

Call = Callable[[], object]


class Images(NamedTuple):
    """What a layer is given: its input, and the gradient of its output."""

    x: Tensor
    grad: Tensor


def random_images(
    workload: Workload, memory: Format, dtype: torch.dtype, device: torch.device
) -> Images:
    x, grad = (
        torch.randn(workload.shape, device=device, dtype=torch.float32)
        .to(dtype)
        .contiguous(memory_format=FORMATS[memory])
        for _ in range(2)
    )
    return Images(x.requires_grad_(), grad)


@contextlib.contextmanager
def _inferring() -> Iterator[None]:
    with torch.no_grad(), cached():
        yield


@dataclass(frozen=True)
class Pass:
    """One thing to time.

    Args:
        prepare: does what is not timed and returns what is.
        around: all calls run inside this context.
        whole: whether a compiled peer can run it by itself.
        applications: how often it repeats the convolution with one weight, if it does.
        keeps: whether what autograd holds after it is what a training step holds.
    """

    name: str
    prepare: Callable[[Peer, Images, int], Call]
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    whole: bool = True
    applications: Callable[[Workload], int] | None = None
    keeps: bool = False

    def times(self, workload: Workload) -> int:
        """How many convolutions with one weight a call is."""
        return min(self.applications(workload), _MAX_APPLICATIONS) if self.applications else 1

    def applies_to(self, workload: Workload) -> bool:
        """Repeating once is another pass."""
        return self.applications is None or self.times(workload) > 1

    def why_not(self, peer: type[Peer]) -> str | None:
        if peer.whole and not self.whole:
            return "compiled as a whole, it has no such part"
        return None


def _weight_build(peer: Peer, images: Images, times: int) -> Call:
    return peer.weight


def _forward(peer: Peer, images: Images, times: int) -> Call:
    return lambda: peer.forward(images.x)


def _input_gradient(peer: Peer, images: Images, times: int) -> Call:
    with _frozen(peer.parameters):
        output = peer.forward(images.x)
    return lambda: torch.autograd.grad(output, images.x, images.grad, retain_graph=True)


def _weight_gradient(peer: Peer, images: Images, times: int) -> Call:
    output = peer.forward(images.x.detach())
    return lambda: torch.autograd.grad(output, peer.parameters, images.grad, retain_graph=True)


def _forward_backward(peer: Peer, images: Images, times: int) -> Call:
    leaves = [images.x, *peer.parameters]
    return lambda: torch.autograd.grad(peer.forward(images.x), leaves, images.grad)


def _applications(peer: Peer, images: Images, times: int) -> Call:
    leaves = [images.x, *peer.parameters]
    return lambda: torch.autograd.grad(peer.repeat(images.x, times), leaves, images.grad)


def _evaluation(peer: Peer, images: Images, times: int) -> Call:
    return lambda: peer.repeat(images.x, times)


def _inference(peer: Peer, images: Images, times: int) -> Call:
    peer.keep()
    return lambda: peer.infer(images.x)


@contextlib.contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    """What is computed inside has no gradient with respect to these."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


PASSES = {
    each.name: each
    for each in (
        Pass("forward_backward", _forward_backward),
        Pass("forward", _forward, keeps=True),
        Pass("inference", _inference, _inferring, whole=False),
        Pass("weight_build", _weight_build),
        Pass("input_gradient", _input_gradient, whole=False),
        Pass("weight_gradient", _weight_gradient, whole=False),
        Pass("applications", _applications, applications=lambda w: w.applications),
        Pass("evaluation", _evaluation, torch.no_grad, applications=lambda w: w.evaluations),
    )
}
