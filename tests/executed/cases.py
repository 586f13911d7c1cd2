"""One launch of the package on a small drawn problem, and the truth about it in float64."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import oracle
import torch
from torch import Tensor

from triton_tied.autotune.candidates import Candidate
from triton_tied.autotune.problem import Centre, Problem, problem_of
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.configs import Config, ConvConfig
from triton_tied.kernels.launch import Convolution, WeightGradient
from triton_tied.packing import Layout

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
        memory: of the images: "channels_last", "contiguous" or "strided".
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
        form = " unpacked" * self.unpacked + " residual" * self.residual
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
    else:
        place = _amid_nan(image, (n, c, h, w, 3))[..., 0]
    return place.copy_(image)


def _amid_nan(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    margin = 128  # elements: the image starts at a multiple of 16 bytes
    size = torch.Size(shape).numel()
    return like.new_full((size + 2 * margin,), torch.nan)[margin : margin + size].view(shape)


def run(case: Case, inputs: Inputs) -> Tensor:
    """Launches it, on Triton's active GPU; what is not written of the result stays NaN."""
    layout, geometry, packed = case.layout, case.geometry, inputs.packed
    precision = "ieee" if case.dtype == "float32_ieee" else "tf32"
    with _precision(precision), _uninitialised_is_nan():
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
def _precision(precision: str) -> Iterator[None]:
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


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
    padding = tuple(before for before, _ in case.geometry.padding)
    options = {"padding": padding, "dilation": case.geometry.dilation}
    convolution = oracle.Convolution(arguments, options, alpha=case.alpha)
    tensors = [inputs.x, inputs.packed, inputs.bias]
    if case.kernel == "weight_grad":
        return oracle.expect(convolution, tensors, inputs.grad, reference=False)[2]
    if case.residual:
        tensors.append(inputs.residual)
    return oracle.expect(convolution, tensors, reference=False)[0]


def draw(key: tuple[str, str, str], candidate: Candidate, chance: random.Random) -> Case:
    """A problem that a config of a list serves: with one tile of channels or several, whole or
    not."""
    kernel, target, list_name = key
    config = candidate.config
    if kernel == "weight_grad":
        config = replace(config, splits=chance.choice((1, 1, 2, 3)))
    while True:
        case = _propose(target, list_name, config, chance)
        if case.layout.size and min(case.output) > 0:
            problem = problem_of_case(case)
            readable = problem.why_unreadable(config) is None
            if readable and not problem.needs(config) & candidate.not_for:
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
    padding = chance.choice(("same", "same", 0, 1, 2))
    rows, columns = (dilation * (k - 1) // 2 if padding == "same" else padding for k in kernel_size)
    symmetry = chance.choice(("self_adjoint", "skew_adjoint"))
    return Case(
        target,
        chance.choice(("float16", "bfloat16")) if list_name == "half" else list_name,
        config,
        Layout(channels * groups, kernel_size, groups, symmetry),
        (
            chance.choice((1, 2, 3)),
            chance.choice((1, 4, 5, 7, 8)),
            chance.choice((2, 7, 8, 16, 24)),
        ),
        Geometry((1, 1), ((rows, rows), (columns, columns)), (dilation, dilation)),
        chance.choice(_MEMORIES[config.loader]),
        unpacked=chance.random() < 0.6,
        residual=isinstance(config, ConvConfig) and chance.random() < 0.3,
        alpha=chance.choice((1.0, 1.0, 0.5, -1.5)),
        seed=chance.randrange(2**31),
    )


def problem_of_case(case: Case) -> Problem:
    """As the choice of a config sees it."""
    inputs = inputs_of(case)
    images = [inputs.x, inputs.grad] if case.kernel == "weight_grad" else [inputs.x]
    centre: Centre = "unpacked" if case.unpacked else "gathered"
    with _precision("ieee" if case.dtype == "float32_ieee" else "tf32"):
        return problem_of(case.kernel, case.layout, case.geometry, centre, *images)
