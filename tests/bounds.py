"""How near to their bounds errors come: ``python tests/bounds.py --cases 20000``.

Draws convolutions of every option and data whose magnitudes differ by powers of two, runs output
and gradients, and prints for each dtype and result the largest error over its bound (at most 1
where nothing is wrong) and the root mean square error over that of ``F.conv`` in the same dtype.
With TRITON_INTERPRET=1 it is the kernels that run. Exit status 1 if a bound is exceeded.
"""

import argparse
import itertools
import math
import random
import sys
import time
import warnings
from collections import defaultdict
from typing import NamedTuple

import oracle
import torch

import triton_tied as tt
from triton_tied.dispatch import INTERPRETED

TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d, 3: tt.tied_conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
RESULTS = ("output", "input gradient", "packed gradient", "bias gradient", "residual gradient")
REFERENCE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KERNELS = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 wrongly
# Numbers lie between 2^-s and 2^s times a normal one; small ones are 2^-t times that, so that
# products underflow. float16 ends at 65504.
SPREAD = {torch.float64: 9.0, torch.float32: 9.0, torch.float16: 1.5, torch.bfloat16: 9.0}
SMALL = {torch.float64: 515, torch.float32: 67, torch.float16: 10, torch.bfloat16: 67}


class Case(NamedTuple):
    """A convolution, its tensors (x, packed and perhaps bias and residual), the output gradient."""

    convolution: oracle.Convolution
    tensors: list
    grad: torch.Tensor
    is_small: bool

    def tied(self, x, packed, bias=None, residual=None):
        c = self.convolution
        _, kernel, groups, symmetry = c.layout
        return TIED[len(kernel)](
            x, packed, bias, kernel_size=kernel, groups=groups, symmetry=symmetry,
            padding_mode=c.padding_mode, alpha=c.alpha, residual=residual, **c.options,
        )  # fmt: skip

    def run(self, function):
        """Output and gradients."""
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad)]


def draw(rng, dtype, kernels, device="cpu"):
    """A case that the kernels take, or that the reference takes."""
    convolution, shape = _draw_convolution(rng, kernels)
    is_small = rng.random() < 0.1

    def numbers(*size):
        spread = 2.0 ** torch.empty(size).uniform_(-SPREAD[dtype], SPREAD[dtype]).double()
        values = torch.randn(size, dtype=torch.float64) * spread
        return (values * 2.0 ** (-SMALL[dtype] * is_small)).to(device, dtype)

    x, packed = numbers(*shape), numbers(tt.packed_size(*convolution.layout))
    if len(shape) > 3 and rng.random() < 0.5:
        x = x.contiguous(memory_format=FORMATS[len(shape) - 2])
    tensors = [x, packed]
    out_shape = convolution(x.double(), packed.double()).shape
    if rng.random() < 0.6:
        tensors.append(numbers(shape[1]))
        if rng.random() < 0.5:
            tensors.append(numbers(*out_shape))
    return Case(convolution, tensors, numbers(*out_shape), is_small)


def _draw_convolution(rng, kernels):
    # Triton's interpreter is slow: the kernels are given less.
    dims = rng.randint(1, 2 if kernels else 3)
    groups = rng.choice([1, 1, 1, 2] if kernels else [1, 1, 2, 3])
    channels = groups * rng.randint(1, rng.choice([4, 4, 4 if kernels else 12, 20]) // dims)
    sides = [1, 1, 2, 3] if dims == 2 and kernels else [1, 2, 3, 4]
    kernel = tuple(rng.choice(sides) for _ in range(dims))
    dilation = tuple(rng.choice([1, 1, 2]) for _ in kernel)
    window = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    more = 2 if kernels else 4
    shape = (rng.randint(1, 3), channels, *(w + rng.randint(0, more) for w in window))
    options = {"dilation": dilation}
    mode = rng.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    if mode != "zeros":
        options["padding"] = tuple(min(rng.choice([w // 2, 1]), w - 1) for w in window)
    elif rng.random() < 0.4:
        options["padding"] = "same"
    else:
        options["padding"] = tuple(rng.randint(0, w // 2 if kernels else w) for w in window)
        options["stride"] = 1 if kernels else rng.randint(1, 3)
        if oracle.breaks_onednn(shape[-1], kernel, options):
            options["stride"] = 1
    layout = (channels, kernel, groups, rng.choice(list(oracle.SIGNS)))
    alpha = rng.choice([1.0, 1.0, 0.7, -3.0])
    return oracle.Convolution(layout, options, mode, alpha), shape


class Survey(NamedTuple):
    """For each dtype and result: the largest error over its bound, and the mean squares of the
    errors over the sums of their terms' magnitudes, added up over cases, of both."""

    worst: dict
    tied: dict
    dense: dict

    def ratio(self, key):
        """Of the root mean squares, tied over dense. In float64 dense is what the truth is."""
        tied, dense = self.tied[key], self.dense[key]
        if key[0] == torch.float64 or tied == 0:
            return 0.0
        return math.sqrt(tied / dense) if dense else math.inf


def survey(cases, rng, dtypes, kernels, device="cpu"):
    """Of so many cases, of one dtype after the other. Yields after each, the same every time."""
    found = Survey({}, defaultdict(float), defaultdict(float))
    for dtype in itertools.islice(itertools.cycle(dtypes), cases):
        case = draw(rng, dtype, kernels, device)
        expected = oracle.expect(case.convolution, case.tensors, case.grad, reference=not kernels)
        both = case.run(case.tied), case.run(case.convolution)
        for result, tied, dense, truth in zip(RESULTS, *both, expected, strict=False):
            key = dtype, result
            ratio, known = oracle.worst(tied, truth), found.worst.get(key, 0.0)
            found.worst[key] = known if ratio <= known else ratio  # NaN is worse than anything
            if not case.is_small:
                found.tied[key] += oracle.mean_square(tied, truth)
                found.dense[key] += oracle.mean_square(dense, truth)
        yield found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**32)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
    torch.manual_seed(given.seed)
    dtypes = KERNELS if INTERPRETED else REFERENCE
    print(f"{'kernels' if INTERPRETED else 'reference'}, seed {given.seed}", flush=True)
    start = last = time.monotonic()
    for done, found in enumerate(
        survey(given.cases, random.Random(given.seed), dtypes, INTERPRETED), 1
    ):
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"{done} cases, worst {max(found.worst.values()):.3f}", flush=True)
    print(f"{given.cases} cases in {time.monotonic() - start:.0f} s")
    print(f"{'':<10}{'result':<20}{'largest error / bound':>22}{'rms error / dense':>20}")
    for key in sorted(found.worst, key=lambda key: (dtypes.index(key[0]), RESULTS.index(key[1]))):
        name = str(key[0]).removeprefix("torch.")
        print(f"{name:<10}{key[1]:<20}{found.worst[key]:>22.3f}{found.ratio(key):>20.3f}")
    return 0 if all(ratio <= 1 for ratio in found.worst.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
