"""One launch of the package on a small drawn problem, and the truth about it in float64."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from ptx_machine.memory import sparse_zeros
from torch import Tensor

from triton_tied.autotune import problem
from triton_tied.autotune.candidates import Candidate
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.configs import Config, ConvConfig
from triton_tied.kernels.launch import Convolution, WeightGradient
from triton_tied.packing import Layout

Key = tuple[str, str, str]  # kernel, target, list
_MEMORIES = {
    "pointer": ("channels_last", "channels_last", "contiguous", "strided"),
    "channels_last_descriptor": ("channels_last",),
    "planar_descriptor": ("contiguous",),
}


@dataclass(frozen=True)
class Case:
    """A launch: of a convolution or a weight gradient, or with no config of the unpacking.

    Args:
        dtype: as the lists of configs name it; "float32" is TF32, "float32_ieee" exact.
        memory: of the images: "channels_last", "contiguous", "strided", or "far_apart": more
            than 2^30 elements from one to the next.
        wide: offsets take 64 bits, as if an image were larger than 2^31.
        seed: of the numbers.
    """

    target: str
    dtype: str
    config: Config | None
    layout: Layout
    image: tuple[int, int, int]
    geometry: Geometry
    memory: str = "channels_last"
    unpacked: bool = True
    residual: bool = False
    alpha: float = 1.0
    wide: bool = False
    seed: int = 0

    @property
    def kernel(self) -> str:
        if self.config is None:
            return "centre"
        return "conv" if isinstance(self.config, ConvConfig) else "weight_grad"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.removesuffix("_ieee"))

    @property
    def output(self) -> tuple[int, int, int]:
        sides = self.geometry.output_size(self.image[1:], self.layout.kernel_size)
        return (self.image[0], *sides)

    def __str__(self) -> str:
        h, w = self.layout.kernel_size
        what = f"{self.kernel} {self.target} {self.dtype} {self.layout.symmetry} {self.memory}"
        form = " unpacked" * self.unpacked + " residual" * self.residual + " wide" * self.wide
        (top, _), (left, _) = self.geometry.padding
        return (
            f"{what} {self.image[0]}x{self.layout.channels}x{self.image[1]}x{self.image[2]} "
            f"kernel {h}x{w} padding {top},{left} dilation {self.geometry.dilation[0]} "
            f"groups {self.layout.groups}{form} alpha {self.alpha} seed {self.seed}: {self.config}"
        )


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    grad: Tensor
    residual: Tensor
    packed: Tensor
    bias: Tensor


def inputs_of(case: Case) -> Inputs:
    """Images lie amid NaN, so that what is read beside them shows."""
    torch.manual_seed(case.seed)
    (n, h, w), channels = case.image, case.layout.channels
    shape, out_shape = (n, channels, h, w), (n, channels, *case.output[1:])
    images = [_place(_numbers(case, s), case.memory) for s in (shape, out_shape, out_shape)]
    return Inputs(*images, _numbers(case, (case.layout.size,)), _numbers(case, (channels,)))


def _numbers(case: Case, shape: tuple[int, ...]) -> Tensor:
    """For TF32 with no more digits than it reads: then products are exact, as those of halves."""
    numbers = torch.randn(shape)
    if case.dtype == "float32":
        numbers = (numbers.view(torch.int32) & -(2**13)).view(torch.float32)
    return numbers.to(case.torch_dtype)


def _place(image: Tensor, memory: str) -> Tensor:
    n, c, h, w = image.shape
    if memory == "channels_last":
        place = _amid_nan(image, (n, h, w, c)).permute(0, 3, 1, 2)
    elif memory == "contiguous":
        place = _amid_nan(image, (n, c, h, w))
    elif memory == "far_apart":
        place = _far_apart(image)
    else:
        place = _amid_nan(image, (n, c, h, w, 3))[..., 0]
    return place.copy_(image)


def _far_apart(images: Tensor) -> Tensor:
    """The step from one to the next takes 31 bits, that to the third does not fit into 32. Of this
    memory only what is near an image is there."""
    n, c, h, w = images.shape
    size, apart, margin = c * h * w, 2**30 + 2**10, 128
    memory = sparse_zeros(images.element_size() * (n - 1) * apart + 2**12 * size, np.uint8)
    elements = torch.from_numpy(memory).view(images.dtype)
    for start in range(0, n * apart, apart):
        elements[start : start + size + 2 * margin] = torch.nan
    return elements.as_strided((n, c, h, w), (apart, 1, w * c, c), margin)


def _amid_nan(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    margin = 128  # elements: the image starts at a multiple of 16 bytes
    size = torch.Size(shape).numel()
    return like.new_full((size + 2 * margin,), torch.nan)[margin : margin + size].view(shape)


def run(case: Case, inputs: Inputs) -> Tensor:
    """Launches it, on Triton's active GPU; what is not written of the result stays NaN."""
    layout, geometry, packed = case.layout, case.geometry, inputs.packed
    with _precision(case), _uninitialised_is_nan(), _offsets(case):
        if case.config is None:
            return launch.unpack_centre(packed, layout, case.torch_dtype)
        if case.kernel == "weight_grad":
            gradient = WeightGradient(inputs.x, inputs.grad, layout, geometry, case.alpha)
            return launch.weight_grad(gradient, case.config)
        centre = None
        if layout.taps % 2 and case.unpacked:
            centre = launch.unpack_centre(packed, layout, case.torch_dtype)
        residual = inputs.residual if case.residual else None
        last = case.memory == "channels_last"
        convolution = Convolution(
            inputs.x, packed, centre, inputs.bias, residual, layout, geometry, case.alpha, last
        )
        return launch.conv(convolution, case.config)


@contextlib.contextmanager
def _precision(case: Case) -> Iterator[None]:
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    setting.fp32_precision = "ieee" if case.dtype == "float32_ieee" else "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextlib.contextmanager
def _offsets(case: Case) -> Iterator[None]:
    before = launch._MAX_OFFSET
    launch._MAX_OFFSET = 0 if case.wide else before
    try:
        yield
    finally:
        launch._MAX_OFFSET = before


@contextlib.contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """PyTorch fills new memory with NaN in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def expected_of(case: Case, inputs: Inputs) -> oracle.Expected:
    """The truth in float64, and how far off each number may be."""
    layout = case.layout
    arguments = (layout.channels, layout.kernel_size, layout.groups, layout.symmetry)
    if case.config is None:
        c = layout.group_channels
        weight = oracle.expand(inputs.packed.double(), *arguments).view(layout.groups, c, c, -1)
        centre = weight[..., layout.taps // 2]
        return oracle.Expected(centre, centre.abs(), torch.zeros_like(centre))
    convolution = oracle.Convolution(
        arguments, {"dilation": case.geometry.dilation}, alpha=case.alpha
    )
    x = torch.nn.functional.pad(inputs.x, case.geometry.flat_padding)
    tensors = [x, inputs.packed, inputs.bias]
    if case.kernel == "weight_grad":
        return oracle.expect(convolution, tensors, inputs.grad, reference=False)[2]
    if case.residual:
        tensors.append(inputs.residual)
    return oracle.expect(convolution, tensors, reference=False)[0]


def draw(
    key: Key, candidate: Candidate, chance: random.Random, needs: frozenset[str] | None = None
) -> Case:
    """A problem that a config of a list serves: with one tile of channels or several, whole or
    not. ``needs``: exactly those that it asks of the compiled code."""
    kernel, target, list_name = key
    config = candidate.config
    if kernel == "weight_grad":
        config = replace(config, splits=chance.choice((1, 1, 2, 3)))
    while True:
        case = _propose(target, list_name, config, chance)
        if case.layout.size and min(case.output) > 0:
            asked = problem_of(case)
            found = asked.needs(config)
            served = not found & candidate.not_for if needs is None else found == needs
            if served and asked.why_unreadable(config) is None:
                return case


def draw_centre(target: str, chance: random.Random) -> Case:
    """A centre tap to be unpacked."""
    dtype = chance.choice(("float32", "float16", "bfloat16"))
    symmetry = chance.choice(("self_adjoint", "skew_adjoint"))
    groups = chance.choice((1, 2, 3))
    layout = Layout(chance.choice((2, 3, 13, 64, 72)) * groups, (3, 3), groups, symmetry)
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    return Case(target, dtype, None, layout, (1, 1, 1), geometry, seed=chance.randrange(2**31))


def _propose(target: str, list_name: str, config: Config, chance: random.Random) -> Case:
    block = max(config.BLOCK_N, config.BLOCK_K)
    channels = chance.choice((block, block, block, 2 * block, block + 8, block - 8, 3, 13, 24, 40))
    groups = chance.choice((1, 1, 1, 2)) if channels <= 80 else 1
    kernel_size = chance.choice(((3, 3), (3, 3), (3, 3), (5, 5), (2, 2), (1, 1), (3, 1), (1, 3)))
    dilation = chance.choice((1, 1, 2))
    whole = chance.random() < 0.5  # the output is made of whole boxes
    padding = "same" if whole else chance.choice(("same", 0, 1, 2))
    sides = [dilation * (k - 1) if padding == "same" else 2 * padding for k in kernel_size]
    pairs = tuple((side // 2, side - side // 2) for side in sides)
    image = (chance.choice((1, 2, 3)), chance.choice((1, 4, 5, 7, 8)), chance.choice((2, 7, 8, 24)))
    if whole:
        image = tuple(_whole(side, chance) for side in config.box)
    return Case(
        target,
        chance.choice(("float16", "bfloat16")) if list_name == "half" else list_name,
        config,
        Layout(
            channels * groups, kernel_size, groups, chance.choice(("self_adjoint", "skew_adjoint"))
        ),
        image,
        Geometry((1, 1), pairs, (dilation, dilation)),
        chance.choice(_MEMORIES[config.loader]),
        unpacked=chance.random() < 0.6,
        residual=isinstance(config, ConvConfig) and chance.random() < 0.3,
        alpha=chance.choice((1.0, 1.0, 0.5, -1.5)),
        wide=chance.random() < 0.2,
        seed=chance.randrange(2**31),
    )


def _whole(side: int, chance: random.Random) -> int:
    """One to five boxes, fewer where they are large."""
    return side * chance.choice((1, 2, 3, 5) if side <= 2 else (1, 1, 2))


def problem_of(case: Case) -> problem.Problem:
    """As the choice of a config sees it."""
    inputs = inputs_of(case)
    images = [inputs.x, inputs.grad] if case.kernel == "weight_grad" else [inputs.x]
    centre: problem.Centre = "unpacked" if case.unpacked else "gathered"
    with _precision(case):
        found = problem.problem_of(case.kernel, case.layout, case.geometry, centre, *images)
    return replace(found, wide=case.wide)
