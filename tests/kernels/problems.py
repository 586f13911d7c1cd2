"""Drawn problems for the kernels as they are launched, and the truth about them: ``F.conv2d`` with
the weight written out by the oracle."""

import itertools
import math
from dataclasses import dataclass, replace

import oracle
import torch
import torch.nn.functional as F
import triton
from hypothesis import strategies as st

from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.calls import Convolution, WeightGradient
from triton_tied.kernels.configs import WeightGradConfig
from triton_tied.packing import Layout

# The interpreter reads bfloat16 as integers in a matrix product.
KERNEL_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SYMMETRIES = ["self_adjoint", "skew_adjoint"]

SAME = ((1, 1), (1, 1))  # padding that keeps the size, for a 3x3 kernel
KERNELS = [(1, 1), (3, 3), (2, 2), (1, 7), (5, 1), (2, 3), (4, 3), (1, 2)]
# Groups and channels of one. A pixel is a multiple of 16 bytes where descriptors ask for it.
CHANNELS = {
    "pointer": [(1, c) for c in (1, 2, 3, 5, 15, 16, 17, 24, 40)]
    + [(2, 1), (2, 3), (2, 17), (3, 2), (3, 16), (5, 1)],
    "channels_last_descriptor": [(1, 8), (1, 16), (1, 24), (1, 40), (2, 16), (2, 32), (3, 16)],
    "planar_descriptor": [(1, 8), (1, 16), (1, 24), (1, 40), (2, 16), (3, 16)],
    "depthwise": [(1, 1), (3, 1), (8, 1), (17, 1), (1, 2), (5, 2), (1, 4), (3, 4)],
}
# One of the memory layouts below that a loader reads; the pointer reads any.
MEMORY = {
    "pointer": "gapped",
    "channels_last_descriptor": "channels_last",
    "planar_descriptor": "contiguous",
}
SIZES = [1, 2, 3, 4, 5, 7, 8, 9]
UNIT = 8  # columns of 16 bytes or more
BOXES = [
    box
    for box in itertools.product([1, 2, 4, 16], [1, 2, 4, 8], [1, 2, 4, 8, 16, 64])
    if 16 <= math.prod(box) <= 128
]
# How a tensor lies in memory: order of the axes, outermost first, step between elements, offset.
MEMORIES = {
    "contiguous": ((0, 1, 2, 3), 1, 64),
    "channels_last": ((0, 2, 3, 1), 1, 64),
    "unaligned": ((0, 2, 3, 1), 1, 1),
    "gapped": ((0, 1, 2, 3), 2, 1),
    "transposed": ((1, 3, 0, 2), 3, 64),
}
_STEPS = 32  # of a launch, at 3 to 5 ms each in the interpreter


@dataclass(frozen=True)
class DrawnConvolution:
    """A convolution: ``shape`` is that of the input."""

    layout: Layout
    geometry: Geometry
    shape: tuple[int, ...]

    @property
    def out_shape(self):
        return (
            *self.shape[:2],
            *self.geometry.output_size(self.shape[2:], self.layout.kernel_size),
        )

    @property
    def transposed(self):
        """The problem from the output to the input."""
        amounts = self.geometry.window(self.layout.kernel_size), self.geometry.padding
        padding = tuple((w - 1 - p, w - 1 - q) for w, (p, q) in zip(*amounts, strict=True))
        geometry = replace(self.geometry, padding=padding)
        return DrawnConvolution(self.layout, geometry, self.out_shape)


def make_problem(
    shape, kernel, padding=((0, 0), (0, 0)), *, dilation=(1, 1), groups=1, symmetry="self_adjoint"
):
    layout = Layout(shape[1], kernel, groups, symmetry)
    return DrawnConvolution(layout, Geometry((1, 1), padding, dilation), shape)


@st.composite
def problems(draw, loader):
    """Kernels larger than the image, images smaller than a box, paddings of any sign."""
    kernel = draw(st.sampled_from(KERNELS))
    # Rows that are read by bulk copies, and all that taps read of them, start at whole units.
    units = (1, UNIT if loader == "planar_descriptor" else 1)
    dilation = [draw(st.integers(1, 2)) if unit == 1 else unit for unit in units]
    groups, channels = draw(st.sampled_from(CHANNELS[loader]))
    axes = [
        draw(_axes(d * (k - 1) + 1, unit))
        for k, d, unit in zip(kernel, dilation, units, strict=True)
    ]
    image, padding = zip(*axes, strict=True)
    return make_problem(
        (draw(st.integers(1, 3)), groups * channels, *image), kernel, padding,
        dilation=tuple(dilation), groups=groups, symmetry=draw(st.sampled_from(SYMMETRIES)),
    )  # fmt: skip


@st.composite
def _axes(draw, window, unit):
    """(size, (padding before, after)) of one axis, by the size of the output."""
    sizes = SIZES if unit == 1 else [unit, 2 * unit]
    size, out = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    before = draw(st.integers(-2, window + 1))
    if draw(st.booleans()):
        out, before = size, window // 2
    before = before // unit * unit
    return size, (before, out + window - 1 - size - before)


@st.composite
def configs(draw, problem, loader, kind):
    """A config of a ``kind`` that serves the problem, in few programs."""
    c = problem.layout.group_channels
    blocks = [b for b in (16, 32, 64) if b < 2 * c] or [16]
    if loader != "pointer" and problem.layout.groups > 1:
        blocks = [b for b in blocks if c % b == 0]
    block_n, block_k = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    options = {"loader": loader, "splits": draw(st.integers(1, 4))}
    if kind is not WeightGradConfig:
        options["roles"] = draw(st.sampled_from(["pixels_first", "weights_first"]))
    tiles = problem.layout.groups * triton.cdiv(c, block_n) * triton.cdiv(c, block_k)
    steps = tiles * (problem.layout.taps + 1) // 2
    box = draw(st.sampled_from(_boxes(problem.out_shape, loader, steps)))
    return kind(box, block_n, block_k, **options)


def _boxes(out_shape, loader, steps):
    """The boxes that leave a launch few steps, of which there are ``steps`` in each box."""
    n, _, h, w = out_shape
    counts = {
        box: math.prod(triton.cdiv(s, b) for s, b in zip((n, h, w), box, strict=True))
        for box in BOXES
        if loader != "planar_descriptor" or (box[0] == 1 and box[2] >= 8)
    }
    most = max(_STEPS // steps, min(counts.values()))
    return [box for box, count in counts.items() if count <= most]


def memories(loader):
    """Names of the memory layouts that a loader reads."""
    return st.sampled_from([*MEMORIES, "broadcast"] if loader == "pointer" else [MEMORY[loader]])


def integers(shape, dtype, device, seed=0):
    """Small integers: their products and sums are exact in float32, so results have one rounding
    at most, the cast at the end."""
    # packed and bias are 1-D, images 4-D: they are not to begin alike
    generator = torch.Generator().manual_seed(8 * seed + len(shape))
    return torch.randint(-3, 4, tuple(shape), generator=generator).to(device, dtype)


def normal(shape, dtype, device):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def place(values, memory):
    """The values (for "broadcast", some of them repeated) in memory of a named layout."""
    if memory == "broadcast":
        return embed(values[:1, :, :, :1]).expand(values.shape)
    return embed(values, *MEMORIES[memory])


def embed(values, order=None, step=1, offset=64):
    """The values as a view into a larger buffer that is NaN everywhere else."""
    strides, stride = [0] * values.dim(), step
    for axis in reversed(order or range(values.dim())):
        strides[axis] = stride
        stride *= values.shape[axis] + (step > 1)
    buffer = values.new_full((offset + stride + 64,), torch.nan)
    return buffer.as_strided(values.shape, strides, offset).copy_(values)


def convolve(x, packed, problem, bias=None):
    """The truth for float64 tensors, the baseline for others. Differentiable."""
    layout = problem.layout
    weight = oracle.expand(
        packed, layout.channels, layout.kernel_size, layout.groups, layout.symmetry
    )
    dilation = problem.geometry.dilation
    padded = pad(x, problem.geometry.padding)
    return F.conv2d(padded, weight, bias, dilation=dilation, groups=layout.groups)


def pad(x, padding):
    """Zero padding of any sign: generously, then cropped."""
    (top, bottom), (left, right) = padding
    most = max(top, bottom, left, right, 0)
    h, w = x.shape[2:]
    rows, columns = slice(most - top, most + h + bottom), slice(most - left, most + w + right)
    return F.pad(x, [most] * 4)[:, :, rows, columns]


def differentiate(x, packed, grad, problem):
    """Gradients of x and packed for the output gradient ``grad``, in the dtype of all three."""
    leaves = [x.detach().requires_grad_(), packed.detach().requires_grad_()]
    return torch.autograd.grad(convolve(*leaves, problem), leaves, grad)


def packed_truth(x, grad, problem):
    """The packed gradient in float64."""
    packed = torch.zeros(problem.layout.size, dtype=torch.float64, device=x.device)
    return differentiate(x.double(), packed, grad.double(), problem)[1]


def launch_conv(
    x, packed, problem, config, *,
    bias=None, residual=None, alpha=1.0, beta=1.0, stored="packed", last=True,
):  # fmt: skip
    """The kernel; ``stored``: as in :func:`read_weights`, ``last``: channels-last output."""
    layout, geometry = problem.layout, problem.geometry
    weights = read_weights(packed, layout, stored, x.dtype)
    convolution = Convolution(
        x, packed, weights, bias, residual, layout, geometry, alpha, beta, last
    )
    return launch.conv(convolution, config)


def read_weights(packed, layout, stored, dtype):
    """What a convolution reads: packed as it is, or the matrices of "half" of the taps and the
    centre, or of "all"."""
    count = {"packed": 0, "half": (layout.taps + 1) // 2, "all": layout.taps}[stored]
    if not count:
        return packed.to(dtype)
    return launch.unpack_matrices(packed, layout, count, dtype, "ieee")


def launch_weight_grad(x, grad, problem, config, alpha=1.0, dtype=None, has_bias=False):
    gradient = WeightGradient(
        x, grad, problem.layout, problem.geometry, alpha, dtype or x.dtype, has_bias
    )
    return launch.weight_grad(gradient, config)
