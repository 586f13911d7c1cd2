"""That the oracle passes what is right and reports what is wrong.

A bound of n terms is at most ``(gamma_n(u) + u') * scale`` (see the oracle; u' is 0 for float32 and
float64), and the largest of n products is at least ``scale / n``. So an error of that product by a
factor ``1 + d`` has to be reported, whatever the rounding errors of the rest, where
``d > 2 n (gamma_n(u) + u')``: d = 8 u for one product in float32, 2 n^2 u for n of them. A product
that is left out, d = 1, has to be reported up to about 2,900 products in float32, 1,000 in float16
and 120 in bfloat16.
"""

import random

import bounds
import oracle
import pytest
import torch

SUPPORTED_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
# n = 27 products for each output, twice 50 for each packed number
CONVOLUTION = oracle.Convolution((3, (3, 3), 1, "self_adjoint"), {"padding": 1})
SHAPE = (2, 3, 5, 5)


def draw(dtype):
    """x, packed, bias and the output gradient."""
    sizes = SHAPE, (3 * 3 * 4 + 6,), (3,), SHAPE
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def results(x, weight, bias, grad):
    """Output, and gradients of x, of the packed vector and of bias, for a dense weight."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = CONVOLUTION.apply(x, weight, bias)
    dx, dense, dbias = torch.autograd.grad(y, [x, weight, bias], grad)
    packed = torch.zeros(42, dtype=x.dtype, requires_grad=True)
    (dpacked,) = torch.autograd.grad(oracle.expand(packed, *CONVOLUTION.layout), packed, dense)
    return y.detach(), dx, dpacked, dbias


def is_reported(actual, expected):
    try:
        oracle.assert_within_bound(actual, expected)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_what_is_right_passes_and_not_a_number_does_not(dtype):
    x, packed, bias, grad = draw(dtype)
    expected = oracle.expect(CONVOLUTION, [x, packed, bias], grad)
    weight = oracle.expand(packed, *CONVOLUTION.layout)
    for actual, wanted in zip(results(x, weight, bias, grad), expected, strict=True):
        assert not is_reported(actual, wanted)
        actual.view(-1)[-1] = torch.nan
        assert is_reported(actual, wanted)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("channels, kernel", [(1, 1), (2, 1), (1, 3), (4, 3), (8, 3)])
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_an_error_of_one_product_is_reported_from_the_size_that_was_derived(
    dtype, channels, kernel, sign
):
    convolution = oracle.Convolution((channels, (kernel, kernel), 1, "self_adjoint"))
    n = channels * kernel**2
    x = torch.randn(1, channels, kernel, kernel, dtype=torch.float64).to(dtype)
    weight = oracle.expand(torch.arange(n * (channels + 1)), *convolution.layout)
    packed = torch.randn(weight.unique().numel(), dtype=torch.float64).to(dtype)
    (expected,) = oracle.expect(convolution, [x, packed])
    weight = oracle.expand(packed, *convolution.layout)
    products = x[0].double() * weight[0].double()
    largest = products.flatten()[products.abs().argmax()]
    y = convolution(x, packed)
    half = torch.finfo(dtype).eps / 2 if dtype in oracle.HALF else 0.0
    u = U.get(dtype, 2.0**-24)
    # One rounding more, since a result of the dtype is what the error is added to.
    d = 2.01 * n * ((n + 1) * u / (1 - (n + 1) * u) + 1.5 * half) / (1 - n * half)
    if dtype == torch.float64:  # where the truth may be off as much
        d *= 2
    assert not is_reported(y, expected)
    assert is_reported_with(y, sign * d * largest, expected)


def is_reported_with(y, error, expected):
    wrong = y.clone()
    wrong[0, 0] = (y[0, 0].double() + error).to(y.dtype)
    return is_reported(wrong, expected)


def leave_out(weight):
    """The product with the largest weight: |x| there is at least the mean of some 27."""
    weight.view(-1)[weight.abs().argmax()] = 0


def exchange_taps(weight):
    """The largest and the smallest of one pair of channels."""
    taps = weight[0, 1].view(-1)
    high, low = taps.argmax().item(), taps.argmin().item()
    taps[[high, low]] = taps[[low, high]]


def transpose_only(weight):
    """Tied to the transposed kernel, without the turn."""
    weight[1, 0] = weight[0, 1]


@pytest.mark.parametrize("fault", [leave_out, exchange_taps, transpose_only])
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_a_wrong_tap_is_reported_in_output_and_input_gradient(dtype, fault):
    x, packed, bias, grad = draw(dtype)
    expected = oracle.expect(CONVOLUTION, [x, packed, bias], grad)
    weight = oracle.expand(packed, *CONVOLUTION.layout)
    fault(weight)
    y, dx, *_ = results(x, weight, bias, grad)
    assert is_reported(y, expected[0]) and is_reported(dx, expected[1])


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_a_pixel_left_out_is_reported_in_the_gradients_of_parameters(dtype):
    x, packed, bias, grad = draw(dtype)
    expected = oracle.expect(CONVOLUTION, [x, packed, bias], grad)
    weight = oracle.expand(packed, *CONVOLUTION.layout)
    grad.view(-1)[grad.abs().argmax()] = 0
    *_, dpacked, dbias = results(x, weight, bias, grad)
    assert is_reported(dpacked, expected[2]) and is_reported(dbias, expected[3])


def shorten(tensor, bits):
    """Its mantissa truncated to so many bits below the leading one."""
    return (tensor.view(torch.int32) >> (23 - bits) << (23 - bits)).view(torch.float32)


def test_one_weight_of_a_shorter_mantissa_is_reported():
    # 2 n^2 u = 8.7e-5 for n = 27, and the worst of 81 truncated to 8 bits is off by far more
    x, packed, bias, grad = draw(torch.float32)
    expected = oracle.expect(CONVOLUTION, [x, packed, bias], grad)
    weight = oracle.expand(packed, *CONVOLUTION.layout)
    short = shorten(weight, 8)
    worst = (weight - short).abs().argmax()
    weight.view(-1)[worst] = short.view(-1)[worst]
    y, dx, *_ = results(x, weight, bias, grad)
    assert is_reported(y, expected[0]) and is_reported(dx, expected[1])


def test_products_of_truncated_operands_need_a_bound_of_their_own():
    x, packed, bias, grad = draw(torch.float32)
    exact, tf32 = (
        oracle.expect(CONVOLUTION, [x, packed, bias], grad, operand=operand)
        for operand in (0.0, 2.0**-10)
    )
    weight = oracle.expand(packed, *CONVOLUTION.layout)
    rough = results(shorten(x, 10), shorten(weight, 10), bias, shorten(grad, 10))[:3]
    rougher = results(shorten(x, 7), shorten(weight, 7), bias, shorten(grad, 7))[:3]
    for result, worse, one, other in zip(rough, rougher, exact, tf32, strict=False):
        assert is_reported(result, one) and not is_reported(result, other)
        assert oracle.worst(worse, other) > 4 * oracle.worst(result, other)


@pytest.mark.parametrize("dtype", oracle.HALF)
def test_sums_in_half_precision_are_reported(dtype):
    convolution = oracle.Convolution((96, (1, 1), 1, "self_adjoint"))
    x = torch.randn(1, 96, 4, 4, dtype=torch.float64).to(dtype)
    packed = torch.randn(96 * 97 // 2, dtype=torch.float64).to(dtype)
    (expected,) = oracle.expect(convolution, [x, packed], reference=False)
    weight = oracle.expand(packed, *convolution.layout)[..., 0, 0]
    total = torch.zeros(96, 4, 4, dtype=dtype)
    for column, image in zip(weight.T, x[0], strict=True):
        total += (column[:, None, None].float() * image.float()).to(dtype)
    assert is_reported(total[None], expected)
    assert not is_reported(convolution(x, packed), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_errors_of_the_reference_are_at_most_twice_those_of_dense():
    """Over 300 problems, as root mean squares of the errors over the magnitudes of their terms.

    It cannot fail by luck: a mean over so many problems, most of them of hundreds of numbers, is
    not zero where one of them is exact. The reference sums as dense does, but for the memory format
    of its weight and the order of two additions, so that the ratio is 0.98 to 1.06.
    """
    rng = random.Random(torch.randint(2**31, ()).item())
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    *_, found = bounds.survey(300, rng, dtypes, kernels=False)
    assert all(ratio <= 1 for ratio in found.worst.values()), found.worst
    for dtype in dtypes:
        for result in bounds.RESULTS[:3]:
            assert 0.5 < found.ratio((dtype, result)) <= 2
