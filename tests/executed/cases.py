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

from triton_tied.autotune.candidates import Candidate
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.select import problem_of_call
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch, plans
from triton_tied.kernels.calls import Convolution, WeightGradient
from triton_tied.kernels.configs import (
    ClusteredConfig,
    Config,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    OnePassConfig,
    RowByRowConfig,
    can_merge,
)
from triton_tied.kernels.merging import MERGES
from triton_tied.kernels.stored_taps import expand_matrices
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
        stored: convolution: the taps that are read as matrices, unpacked before; 0: none are. Of
            the unpacking alone, those that it makes.
        to_channels_last: convolution: how the output lies in memory.
        bias: convolution: add one; weight gradient: give its gradient.
        widens: into float32.
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
    stored: int = 0
    to_channels_last: bool = True
    bias: bool = True
    residual: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    widens: bool = False
    wide: bool = False
    seed: int = 0

    @property
    def kernel(self) -> str:
        return self.config.kernel if self.config else "matrices"

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
        names = ("to_channels_last", "bias", "residual", "widens", "wide")
        form = "".join(f" {name}" for name in names if getattr(self, name))
        (top, _), (left, _) = self.geometry.padding
        return (
            f"{what} {self.image[0]}x{self.layout.channels}x{self.image[1]}x{self.image[2]} "
            f"kernel {h}x{w} padding {top},{left} dilation {self.geometry.dilation[0]} "
            f"groups {self.layout.groups} stored {self.stored}{form} alpha {self.alpha} beta "
            f"{self.beta} seed {self.seed}: {self.config}"
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
    packed = torch.randn(case.layout.size).to(case.torch_dtype)
    return Inputs(*images, packed, _numbers(case, (channels,)))


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
    with _precision(case), _uninitialised_is_nan(), _offsets(case):
        weights = inputs.packed
        if case.stored:
            precision = "tf32" if case.dtype == "float32" else "ieee"
            weights = launch.unpack_matrices(
                weights, case.layout, case.stored, case.torch_dtype, precision
            )
        if case.config is None:
            return weights
        call = _call_of(case, inputs, weights)
        return launch.run(plans.make_plan(call, case.config), call)


def _call_of(case: Case, inputs: Inputs, weights: Tensor) -> Convolution | WeightGradient:
    if case.kernel == "weight_grad":
        dtype = torch.float32 if case.widens else case.torch_dtype
        return WeightGradient(
            inputs.x, inputs.grad, case.layout, case.geometry, case.alpha, dtype, case.bias
        )
    return Convolution(
        inputs.x,
        inputs.packed,
        weights,
        inputs.bias if case.bias else None,
        inputs.residual if case.residual else None,
        case.layout,
        case.geometry,
        case.alpha,
        case.beta,
        case.to_channels_last,
        dtype=torch.float32 if case.widens else None,
    )


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
    before = plans._MAX_OFFSET
    plans._MAX_OFFSET = 0 if case.wide else before
    try:
        yield
    finally:
        plans._MAX_OFFSET = before


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
    packed = inputs.packed
    if case.stored and case.dtype == "float32":  # the matrices are rounded
        packed = _nearest_tf32(packed)
    if case.config is None:
        matrices = expand_matrices(packed, layout, case.stored, case.torch_dtype, "ieee").double()
        return oracle.Expected(matrices, matrices.abs(), torch.zeros_like(matrices))
    convolution = oracle.Convolution(
        (layout.channels, layout.kernel_size, layout.groups, layout.symmetry),
        {"dilation": case.geometry.dilation},
        alpha=case.alpha,
    )
    x = torch.nn.functional.pad(inputs.x, case.geometry.flat_padding)
    tensors = [x, packed]
    if case.bias or case.residual:
        tensors.append(inputs.bias if case.bias else torch.zeros_like(inputs.bias))
    if case.kernel == "weight_grad":
        tensors.append(inputs.grad)
        if case.widens:  # nothing is rounded to half
            tensors = [tensor.float() for tensor in tensors]
        *tensors, grad = tensors
        _, _, *expected = oracle.expect(convolution, tensors, grad, reference=False)
        return oracle.Expected(*(torch.cat(parts) for parts in zip(*expected, strict=True)))
    if case.residual:
        tensors.append(inputs.residual)
    if case.widens:
        tensors = [tensor.float() for tensor in tensors]
    if case.residual:
        tensors[-1] = case.beta * tensors[-1]  # beta is a power of two: exact, or rounded as y is
    return oracle.expect(convolution, tensors, reference=False)[0]


def _nearest_tf32(tensor: Tensor) -> Tensor:
    """Half up to the next of 2^13 float32 on, away from zero."""
    return ((tensor.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def draw(
    key: Key, candidate: Candidate, chance: random.Random, needs: frozenset[str] | None = None
) -> Case:
    """A problem that a config of a list serves: with one tile of channels or several, whole or
    not. ``needs``: exactly those that it asks of the compiled code."""
    kernel, target, list_name = key
    while True:
        config = replace(candidate.config, splits=chance.choice((1, 1, 2, 3)))
        if can_merge(config) and chance.random() < 0.25:
            config = replace(config, merged=chance.choice(MERGES))
        case = _propose(target, list_name, config, chance)
        if needs is not None:
            case = _asking_for(needs, case)
        if case.layout.size and min(case.output) > 0:
            asked = problem_of(case)
            found = asked.needs(case.config)
            served = not found & candidate.not_for if needs is None else found == needs
            if served and asked.why_unreadable(config) is None:
                return case


def _asking_for(needs: frozenset[str], case: Case) -> Case:
    """Nearer to a case of exactly these needs, so that one is soon drawn."""
    case = replace(case, wide="wide" in needs)
    if case.kernel == "weight_grad":
        return case
    if "scattered_output" not in needs:
        return replace(case, to_channels_last=True)
    return replace(case, to_channels_last=False, config=replace(case.config, splits=1))


def draw_matrices(target: str, chance: random.Random) -> Case:
    """Taps to be unpacked."""
    dtype = chance.choice(("float32", "float32_ieee", "float16", "bfloat16"))
    symmetry = chance.choice(("self_adjoint", "skew_adjoint"))
    groups = chance.choice((1, 2, 3))
    layout = Layout(chance.choice((2, 3, 13, 64, 72)) * groups, (3, 3), groups, symmetry)
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    stored, seed = chance.choice((5, 9)), chance.randrange(2**31)
    return Case(target, dtype, None, layout, (1, 1, 1), geometry, stored=stored, seed=seed)


def _propose(target: str, list_name: str, config: Config, chance: random.Random) -> Case:
    channels, groups = _channels_and_groups(config, chance)
    kernel_size = chance.choice(((3, 3), (3, 3), (3, 3), (5, 5), (2, 2), (1, 1), (3, 1), (1, 3)))
    dilation = chance.choice((1, 1, 2))
    whole = chance.random() < 0.5  # the output is made of whole boxes
    padding = "same" if whole else chance.choice(("same", 0, 1, 2))
    sides = [dilation * (k - 1) if padding == "same" else 2 * padding for k in kernel_size]
    pairs = tuple((side // 2, side - side // 2) for side in sides)
    image = (chance.choice((1, 2, 3)), chance.choice((1, 4, 5, 7, 8)), chance.choice((2, 7, 8, 24)))
    if whole:
        image = config.box
        if config.kind not in ("clustered", "row_by_row"):  # whose boxes are large
            image = tuple(_whole(side, chance) for side in config.box)
    memory = chance.choice(_MEMORIES[config.loader])
    taps = kernel_size[0] * kernel_size[1]
    stored = chance.choice((0, 0, (taps + 1) // 2, *(() if config.kind == "halo" else (taps,))))
    if config.merged > 1:
        image = (*image[:2], image[2] * config.merged)
        memory, stored = "channels_last", chance.choice((0, taps))
    if config.kind == "clustered" and taps % 2:
        stored = max(stored, (taps + 1) // 2)  # it does not gather the centre
    is_conv = config.kernel == "conv"
    return Case(
        target,
        chance.choice(("float16", "bfloat16")) if list_name == "half" else list_name,
        config,
        Layout(
            channels * groups, kernel_size, groups, chance.choice(("self_adjoint", "skew_adjoint"))
        ),
        image,
        Geometry((1, 1), pairs, (dilation, dilation)),
        memory,
        stored=(taps if list_name == "float32" else stored) if is_conv else 0,
        to_channels_last=chance.random() < 0.6,
        bias=chance.random() < 0.5,
        residual=is_conv and chance.random() < 0.3,
        alpha=chance.choice((1.0, 1.0, 0.5, -1.5)),
        beta=chance.choice((1.0, 1.0, -0.5)),
        widens=chance.random() < 0.3,
        wide=chance.random() < 0.2,
        seed=chance.randrange(2**31),
    )


def _channels_and_groups(config: Config, chance: random.Random) -> tuple[int, int]:
    """Channels of a group, and groups."""
    if config.merged > 1:
        return max(1, chance.choice((8, 16, 24, 32, 48, 64)) // config.merged), 1
    if isinstance(config, DepthwiseConfig | DepthwiseGradConfig):
        block = config.BLOCK_C
        channels = chance.choice((1, 1, 2, 4))
        all_channels = chance.choice((block, block, 2 * block, block + 8, block - 4, 12, 24))
        return channels, all_channels // channels + chance.choice((0, 0, 0, 1))
    if isinstance(config, RowByRowConfig):
        return chance.choice((64, 64, 32, 96)), chance.choice((1, 1, 2))
    if isinstance(config, OnePassConfig):
        return max(8, config.BLOCK_C + chance.choice((0, 0, -8, 8))), chance.choice((1, 1, 2))
    if isinstance(config, HaloConfig):
        channels = chance.choice((8, 8, 7, 6)) * config.BLOCK_C // 8
        return channels, chance.choice((1, 1, 2)) if channels == config.BLOCK_C else 1
    if isinstance(config, ClusteredConfig):
        return chance.choice((128, 128, 136)), 1
    block = max(config.BLOCK_N, config.BLOCK_K)
    channels = chance.choice((block, block, block, 2 * block, block + 8, block - 8, 3, 13, 24, 40))
    return channels, chance.choice((1, 1, 1, 2)) if channels <= 80 else 1


def _whole(side: int, chance: random.Random) -> int:
    """One to five boxes, fewer where they are large."""
    return side * chance.choice((1, 2, 3, 5) if side <= 2 else (1, 1, 2))


def problem_of(case: Case) -> Problem:
    """As the choice of a config sees it, which knows no numbers."""
    (n, h, w), channels, dtype = case.image, case.layout.channels, case.torch_dtype
    shapes = [(n, channels, h, w), (n, channels, *case.output[1:])]
    x, grad = (_place(torch.zeros(shape, dtype=dtype), case.memory) for shape in shapes)
    packed = torch.zeros(case.layout.size, dtype=dtype)
    with _precision(case):
        call = _call_of(case, Inputs(x, grad, grad, packed, packed), packed)
        found = problem_of_call(call)
    return replace(found, wide=case.wide)
