"""What is right, written out from the formula, independent of the package.

``packed = [pairs: group, tap, out, in | centre: group, lower triangle by rows]`` and
``W[i, j, tap] = s * W[j, i, opposite tap]`` inside each group.
"""

import itertools

import torch

SIGNS = {"self_adjoint": 1, "skew_adjoint": -1}

# An error is never asked to be below a few roundings of the dtype: where F.conv happens to be
# exact (one product a sum, say), twice its error is zero. float64 is held against float64 itself,
# whose sums of n terms are off by about sqrt(n) roundings of 1.1e-16: 4e-15 is n = 1300, more than
# the sums here have.
FLOORS = {
    torch.float64: 4e-15,
    torch.float32: 2e-7,
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
}


def expand(packed, channels, kernel_size, groups, symmetry):
    """The dense weight, entry by entry; differentiable."""
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
    shape = (channels, c, *kernel_size)
    if not packed.numel():  # a skew-adjoint scalar is zero
        return packed.new_zeros(shape) + packed.sum()
    return (packed[places] * packed.new_tensor(signs)).view(shape)


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth; 0 where they are equal or empty."""
    assert actual.shape == truth.shape, f"{list(actual.shape)}, truth {list(truth.shape)}"
    difference = (actual.double() - truth.double()).norm().item()
    norm = truth.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")


def assert_as_good_as(actual, baseline, truth, dtype):
    """Error at most twice that of the baseline, or the floor of the dtype."""
    error, allowed = relative_error(actual, truth), relative_error(baseline, truth)
    assert error <= max(2 * allowed, FLOORS[dtype]), f"{error:.2e}, baseline {allowed:.2e}"
