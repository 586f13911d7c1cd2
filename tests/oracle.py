r"""What is right, written out from the formula, independent of the package; and how far off a
correct result may be.

``packed = [pairs: group, tap, out, in | centre: group, lower triangle by rows]`` and
``W[i, j, tap] = s * W[j, i, opposite tap]`` inside each group.

**The bound.** Output and gradients are sums of products, computed in a precision of unit roundoff u
and then rounded to their dtype, whose unit roundoff is u'. With n the number of terms of a sum and
``scale`` the sum of their magnitudes, summed in any order or in blocks, fused or not,

    |computed - truth| <= gamma_n(u) * scale,    gamma_n(u) = n u / (1 - n u),

since no term meets more than n roundings (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1). A bias and a residual are terms too; alpha is rounded once and multiplied by once,
which makes n + 2. The truth is computed in float64, so its own gamma_n(2^-53) is added. Then:

- *Rounding to the dtype.* float16 and bfloat16 are summed in float32, and the result is rounded
  once: u' |truth|. Whatever else a path rounds to the dtype on its way (``rounded`` below) adds
  u' times its magnitude, and each rounding grows what was there before by 1 + u'.
- *Underflow.* A rounding to the dtype is off by at most u' (|value| + smallest normal). A sum in
  float32 may take what is below its smallest normal for zero, operand or result: that is four times
  an absolute term for each product.
- *Rounded operands* (TF32): each of two operands is off by ``operand``: gamma_2(operand) * scale.

``n`` and ``scale`` are not written down case by case. The same convolution of ones counts the
terms of each of its sums, and that of magnitudes sums them. A packed number's gradient is a sum
over all pixels of both its places (its n is twice the pixels, also where it has one place, since a
kernel may sum that twice and halve it).

The bound is for sums of products as such: Winograd's and Fourier's algorithms compute others. Of
PyTorch's CPU paths NNPACK's does, which float32 batches of 16 and more take where oneDNN is absent
or off; oneDNN's, as PyTorch calls it, does not.
"""

import functools
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

SIGNS = {"self_adjoint": 1, "skew_adjoint": -1}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def expand(packed, channels, kernel_size, groups, symmetry, magnitudes=False):
    """The dense weight, entry by entry, or its magnitudes for those of packed; differentiable."""
    places, signs = _places(channels, tuple(kernel_size), groups, symmetry)
    shape = (channels, channels // groups, *kernel_size)
    if not packed.numel():  # a skew-adjoint scalar is zero
        return packed.new_zeros(shape) + packed.sum()
    signs = packed.new_tensor(signs)
    return (packed[places] * (signs.abs() if magnitudes else signs)).view(shape)


@functools.cache
def _places(channels, kernel_size, groups, symmetry):
    """Of each dense entry: where it is in packed, and its sign."""
    sign, c = SIGNS[symmetry], channels // groups
    taps = list(itertools.product(*map(range, kernel_size)))
    pairs = len(taps) // 2
    triangle = c * (c + sign) // 2 if len(taps) % 2 else 0
    places, signs = [], []
    for group, i, j, t in itertools.product(range(groups), range(c), range(c), range(len(taps))):
        opposite = len(taps) - 1 - t
        if t < pairs:
            place, s = ((group * pairs + t) * c + i) * c + j, 1
        elif opposite < pairs:
            place, s = ((group * pairs + opposite) * c + j) * c + i, sign
        elif i == j and sign < 0:
            place, s = 0, 0
        else:
            row, column = max(i, j), min(i, j)
            before = row * (row + sign) // 2  # numbers in the rows above
            place = groups * pairs * c * c + group * triangle + before + column
            s = 1 if i >= j else sign
        places.append(place)
        signs.append(s)
    return places, signs


@dataclass(frozen=True)
class Convolution:
    """``alpha * (conv(x, W) + bias) + residual`` by ``F.conv`` on the dense weight.

    ``layout`` is (channels, kernel size, groups, symmetry); ``options`` are those of ``F.conv``.
    """

    layout: tuple
    options: dict = field(default_factory=dict)
    padding_mode: str = "zeros"
    alpha: float = 1.0

    def __call__(self, x, packed, bias=None, residual=None):
        return self.apply(x, expand(packed, *self.layout), bias, residual)

    def apply(self, x, weight, bias=None, residual=None):
        _, kernel, groups, _ = self.layout
        options = {**self.options, "groups": groups}
        if self.padding_mode != "zeros":
            x = self._pad(x, options.pop("padding"))
        y = CONVOLUTIONS[len(kernel)](x, weight, bias, **options)
        y = y if self.alpha == 1 else y * self.alpha
        return y if residual is None else y + residual

    def copies(self, x):
        """How many times the padding shows the same number of x at most."""
        if self.padding_mode == "zeros" or not x.numel():
            return 1
        ones = torch.ones_like(x, dtype=torch.float64, requires_grad=True)
        padded = self._pad(ones, self.options["padding"])
        return int(torch.autograd.grad(padded.sum(), ones)[0].max())

    def _pad(self, x, padding):
        dims = len(self.layout[1])
        each = (padding,) * dims if isinstance(padding, int) else padding
        return F.pad(x, [p for p in reversed(each) for _ in range(2)], mode=self.padding_mode)


class Expected(NamedTuple):
    """A result in float64, the sum of the magnitudes of its terms, and how far off it may be."""

    truth: torch.Tensor
    scale: torch.Tensor
    bound: torch.Tensor


def expect(convolution, tensors, grad=None, *, reference=True, operand=0.0):
    """What the output is and, for the output gradient ``grad``, the gradient of each of the
    tensors (x, packed and, if any, bias and residual).

    ``reference``: the path through ``F.conv`` in the dtype, and not the kernels, which round to
    float16 and bfloat16 once. ``operand``: the relative roundoff of each operand of a product.
    """
    dtype, alpha = tensors[0].dtype, convolution.alpha
    data = [t.double() for t in (tensors if grad is None else [*tensors, grad])]
    sizes, ones = [t.abs() for t in data], [torch.ones_like(t) for t in data]
    truths, dense_grad = _run(convolution, data, len(tensors))
    scales, _ = _run(replace(convolution, alpha=abs(alpha)), sizes, len(tensors), True)
    terms, _ = _run(replace(convolution, alpha=1.0), ones, len(tensors), True)
    if grad is not None:
        terms[2].fill_(2 * grad.numel() // convolution.layout[0])
    rounded = _rounded(convolution, tensors, truths, scales, dense_grad, reference)

    u, tiny = _accumulates_with(dtype, tensors[0].device, reference)
    operands, u_truth = _gamma(2, operand), 2.0**-53
    tiny *= 4 * max([1.0, *(t.max().item() for t in sizes if t.numel())])
    expected = []
    for truth, scale, n, values in zip(truths, scales, terms, rounded, strict=True):
        n = n + 2 * (alpha != 1)
        relative = operands + _gamma(n, u) * (1 + operands) + _gamma(n, u_truth)
        bound = relative * scale + n * tiny * max(1, abs(alpha))
        if dtype in HALF:
            info = torch.finfo(dtype)
            u_half, absolute = info.eps / 2, info.tiny * max(1, abs(alpha))
            bound = bound + u_half * sum(value.abs() + absolute for value in [truth, *values])
            bound = bound * (1 + u_half) ** (1 + len(values))
        expected.append(Expected(truth, scale, bound))
    return expected


def _run(convolution, data, inputs, magnitudes=False):
    """Output and, if ``data`` goes on after the inputs with that of the output, gradients of the
    inputs; and the gradient of the dense weight."""
    leaves, grad = [t.detach().requires_grad_() for t in data[:inputs]], data[inputs:]
    weight = expand(leaves[1], *convolution.layout, magnitudes)
    output = convolution.apply(leaves[0], weight, *leaves[2:])
    if not grad:
        return [output.detach()], None
    *grads, dense = torch.autograd.grad(output, [*leaves, weight], *grad)
    return [output.detach(), *grads], dense


def _rounded(convolution, tensors, truths, scales, dense_grad, reference):
    """For each result the magnitudes of all that is rounded to the dtype on the way to it."""
    scaled, copies = convolution.alpha != 1, convolution.copies(tensors[0])
    output, x, packed, bias = [], [], [], []
    if reference and len(tensors) == 4:  # the convolution; alpha, and the product with it
        output += [truths[0] - tensors[3]] * (3 if scaled else 1)
    elif reference and scaled:
        output.append(truths[0])
    if dense_grad is None:
        return [output]
    if scaled:  # the output gradient, rounded once it is multiplied by alpha
        bias.append(truths[3] if len(tensors) > 2 else truths[0])
    if scaled and reference:
        x.append(scales[1])
        packed.append(scales[2])
        bias = scales[3:4]
    if reference:  # the gradient of the dense weight, then folded
        zeros = torch.zeros_like(truths[2], requires_grad=True)
        weight = expand(zeros, *convolution.layout, magnitudes=True)
        packed += torch.autograd.grad(weight, zeros, dense_grad.abs())
    if copies > 1:  # the gradient of each copy that a padding makes, then summed one by one
        x += [scales[1]] * copies
    return [output, x, packed, bias, []][: len(truths)]


def _accumulates_with(dtype, device, reference):
    """The unit roundoff of sums, and what they may lose where they underflow.

    Tensor cores cut the products of a block and the running sum to the precision of the largest
    instead of rounding them (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor
    cores, 2021): up to 2^-23 of it for each, so at most 2^-22 for each product, its sums included.
    Without oneDNN's half-precision convolutions PyTorch's own loops round sums to the dtype.
    """
    single, double = torch.finfo(torch.float32).tiny, torch.finfo(torch.float64).tiny
    if dtype == torch.float64:
        return 2.0**-53, double
    if device.type != "cpu":
        return 2.0**-22, single
    if reference and dtype in HALF and not _has_onednn(dtype):
        info = torch.finfo(dtype)
        return info.eps / 2, max(info.eps * info.tiny, single)
    return 2.0**-24, single


def _has_onednn(dtype):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALF[dtype]}_supported")()


def _gamma(n, u):
    """Infinite where sums are too long for a bound to mean anything."""
    nu = torch.as_tensor(n * u, dtype=torch.float64)
    return torch.where(nu < 1, nu / (1 - nu), torch.inf)


def breaks_onednn(columns, kernel, options):
    """Whether oneDNN (that of PyTorch 2.13, with AMX) would read beyond its memory for bfloat16 or
    float16 images of so many columns: where the last axis has a stride and gives one column, or is
    dilated with one tap. Nothing can be held against ``F.conv`` there."""
    stride, padding, dilation, tap = (
        value if isinstance(value, int) else value[-1]
        for value in (options["stride"], options["padding"], options["dilation"], kernel)
    )
    given = (columns + 2 * padding - dilation * (tap - 1) - 1) // stride + 1
    return stride > 1 and (given == 1 or (tap == 1 and dilation > 1))


def worst(actual, expected):
    """The largest error over its bound: at most 1 where nothing is wrong, NaN where NaN is."""
    truth, _, bound = expected
    assert actual.shape == truth.shape, f"{list(actual.shape)}, truth {list(truth.shape)}"
    if not actual.numel():
        return 0.0
    error = (actual.double() - truth).abs()
    return torch.where(error == 0, 0, error / bound).max().item()


def assert_within_bound(actual, expected):
    ratio = worst(actual, expected)
    if not ratio <= 1:
        error = (actual.double() - expected.truth).abs()
        at = (error / expected.bound).argmax().item()
        found, truth, bound = (t.flatten()[at].item() for t in (actual, *expected[::2]))
        raise AssertionError(
            f"{found!r}, truth {truth!r}, off by {ratio:.3g} x the bound {bound!r}"
        )


def mean_square(actual, expected):
    """The mean of the squared errors, each over the sum of the magnitudes of its terms."""
    seen = expected.scale > 0
    error = (actual.double() - expected.truth)[seen] / expected.scale[seen]
    return error.square().mean().item() if error.numel() else 0.0


def matrix_of(function, *shape):
    """The float64 matrix of a linear function of images of this shape, column by column."""
    size = math.prod(shape)
    identity = torch.eye(size, dtype=torch.float64)
    return function(identity.view(size, *shape)).flatten(1).T.detach()


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth; 0 where they are equal or empty."""
    assert actual.shape == truth.shape, f"{list(actual.shape)}, truth {list(truth.shape)}"
    difference = (actual.double() - truth.double()).norm().item()
    norm = truth.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")
