"""One launch of the package on a small drawn problem, and the truth about it in float64."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_tied.autotune.candidates import Candidate
from triton_tied.autotune.problem import Centre, Problem, problem_of
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.configs import Config, ConvConfig
from triton_tied.kernels.launch import Convolution, WeightGradient
from triton_tied.packing import Layout, unpack

# Relative roundoffs: of the result's one rounding, and of a float32 sum for each of its terms.
_RESULT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_TERM = 2.0**-24
_SMALLEST = {torch.float16: 2.0**-25}  # half the step of numbers too small for their exponent
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


@dataclass(frozen=True)
class Truth:
    """The result in float64, and how far each of its numbers may be off."""

    result: Tensor
    allowed: Tensor

    def excess(self, actual: Tensor) -> float:
        """The largest error, of what is allowed; 1 is the most that is right."""
        assert actual.shape == self.result.shape
        error = (actual.double() - self.result).abs() / self.allowed
        if error.isnan().any():
            return float("inf")
        return error.max().item() if error.numel() else 0.0


def truth_of(case: Case, inputs: Inputs) -> Truth:
    """Each error is at most a roundoff of float32 for each term of a sum of absolute terms, and
    one of the dtype for the result."""
    layout, packed = case.layout, inputs.packed.double()
    arguments = (layout.channels, layout.kernel_size, layout.groups, layout.symmetry)
    weight = unpack(packed, *arguments)
    if case.config is None:
        c = layout.group_channels
        centre = weight.view(layout.groups, c, c, -1)[..., layout.taps // 2]
        return Truth(centre, torch.full_like(centre, 1e-300))
    x, grad = inputs.x.double(), inputs.grad.double()
    if case.kernel == "weight_grad":
        places = unpack(torch.arange(1, layout.size + 1).double(), *arguments)  # 0: nowhere
        index = places.abs().long().flatten()

        def folded(dense: Tensor) -> Tensor:
            return dense.new_zeros(layout.size + 1).index_add(0, index, dense.flatten())[1:]

        result = folded(_dense_gradient(case, x, grad, weight) * places.sign())
        absolute = folded(_dense_gradient(case, x.abs(), grad.abs(), weight))
        terms = 2 * torch.tensor(case.output).prod().item()
    else:
        result = _convolve(case, x, weight) + inputs.bias.double()[:, None, None]
        absolute = (
            _convolve(case, x.abs(), weight.abs()) + inputs.bias.double().abs()[:, None, None]
        )
        terms = layout.group_channels * layout.taps + 1
    result, absolute = case.alpha * result, abs(case.alpha) * absolute
    if case.kernel == "conv" and case.residual:
        result = result + inputs.residual.double()
        absolute = absolute + inputs.residual.double().abs()
    dtype = case.torch_dtype
    allowed = (terms + 3) * _TERM * absolute + 1.01 * _RESULT[dtype] * result.abs()
    return Truth(result, allowed + _SMALLEST.get(dtype, 0) + 1e-300)


def _convolve(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x, case.geometry.flat_padding)
    return F.conv2d(padded, weight, dilation=case.geometry.dilation, groups=case.layout.groups)


def _dense_gradient(case: Case, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(_convolve(case, x, weight), weight, grad)[0]


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
    groups = chance.choice((1, 1, 1, 2))
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
