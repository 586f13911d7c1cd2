"""The operators as PyTorch sees them: derivatives, fakes, transforms, counts. On the CPU they
compute the reference, so that float64 holds their formulas to rounding; ``tests/kernels`` holds the
kernels behind them."""

import functools
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import triton_tied as tt
from triton_tied.dispatch import rehearsing
from triton_tied.kernels.stored_taps import expand_matrices
from triton_tied.operators import definitions, flops
from triton_tied.operators.autograd_and_vmap import apply
from triton_tied.packing import Layout

KERNEL, GROUPS, SYMMETRY, ALPHA, BETA = (3, 2), 2, "skew_adjoint", 0.7, -1.3
PADDINGS = {"zeros": [1, 0, 2, -1], "circular": [1, 1, 2, 2]}  # as in F.pad: width, then height


def options(padding="zeros"):
    """kernel_size, padding, dilation, groups, symmetry, circular, alpha of the operators."""
    kernel = KERNEL if padding == "zeros" else (3, 3)
    dilation = [1, 1] if padding == "zeros" else [2, 1]
    circular = padding == "circular"
    return list(kernel), PADDINGS[padding], dilation, GROUPS, SYMMETRY, circular, ALPHA


def tensors(padding="zeros", channels_last=False):
    """x, packed, bias, residual and an output gradient."""
    kernel = options(padding)[0]
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    packed = torch.randn(tt.packed_size(4, kernel, GROUPS, SYMMETRY), dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    residual = torch.randn_like(formula(x, packed, bias, None, padding))
    return x, packed, bias, residual, torch.randn_like(residual)


def formula(x, packed, bias, residual, padding="zeros"):
    kernel, amounts, dilation, groups, symmetry, circular, alpha = options(padding)
    weight = oracle.expand(packed, 4, kernel, groups, symmetry)
    padded = F.pad(x, amounts, mode="circular" if circular else "constant")
    y = alpha * F.conv2d(padded, weight, bias, dilation=dilation, groups=groups)
    return y if residual is None else y + BETA * residual


def conv(x, packed, bias, residual, padding="zeros"):
    return apply(
        definitions.conv,
        x,
        packed,
        None,
        bias,
        residual,
        *options(padding),
        BETA,
        x.is_contiguous() is False,
        None,
    )


def weight_grad(x, grad, padding="zeros", has_bias=False):
    """The gradient of packed or, with ``has_bias``, [that of packed | that of the bias]."""
    return apply(definitions.weight_grad, x, grad, *options(padding), x.dtype, has_bias)


@pytest.mark.parametrize("padding", PADDINGS)
def test_weight_gradient_is_that_of_the_formula_in_any_dtype(padding):
    x, packed, bias, _, grad = tensors(padding)
    leaves = [packed.requires_grad_(), bias.requires_grad_()]
    expected = torch.autograd.grad(formula(x, *leaves, None, padding), leaves, grad)
    torch.testing.assert_close(weight_grad(x, grad, padding), expected[0])
    torch.testing.assert_close(weight_grad(x, grad, padding, True), torch.cat(expected))
    wide = apply(
        definitions.weight_grad, x.float(), grad.float(), *options(padding), torch.float64, True
    )
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, torch.cat(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_output_and_all_gradients_are_those_of_the_formula(padding, channels_last):
    *leaves, grad = tensors(padding, channels_last)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    actual, expected = conv(*leaves, padding), formula(*leaves, padding)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, leaves, grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, grad))
    x, gradient = leaves[0], gradients[0]
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("padding", PADDINGS)
def test_derivatives_of_both_operators_to_the_second_order(padding):
    *leaves, grad = tensors(padding)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    pair = (leaves[0], grad.requires_grad_())
    first = {"check_forward_ad": True, "check_batched_forward_grad": True}
    second = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    with_bias = functools.partial(weight_grad, has_bias=True)
    for operator, inputs in ((conv, leaves), (weight_grad, pair), (with_bias, pair)):
        assert gradcheck(lambda *t, f=operator: f(*t, padding=padding), inputs, **first)
        assert gradgradcheck(lambda *t, f=operator: f(*t, padding=padding), inputs, **second)


def test_third_derivative_is_that_of_the_formula():
    x, packed, bias, residual, _ = tensors()

    def third(function):
        leaf = packed.clone().requires_grad_()
        value = function(x, leaf, bias, residual).pow(4).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.square().sum()
        return value.detach()

    torch.testing.assert_close(third(conv), third(formula))


def test_gradient_goes_past_the_matrices_to_the_packed_vector():
    x, packed, _, _, _ = tensors("circular")
    packed.requires_grad_()
    layout = Layout(4, (3, 3), GROUPS, SYMMETRY)
    weights = expand_matrices(packed.detach(), layout, 5, x.dtype, "ieee")
    y = definitions.conv(x, packed, weights, None, None, *options("circular"), 1.0, False, None)
    (actual,) = torch.autograd.grad(y.square().sum(), packed)
    z = formula(x, packed, None, None, "circular")
    torch.testing.assert_close(actual, torch.autograd.grad(z.square().sum(), packed)[0])


WIDER = {torch.float16: torch.float32, torch.float32: torch.float64}


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("bias_is_wider", [True, False])
def test_gradients_have_the_dtype_of_what_they_are_of(dtype, bias_is_wider):
    x, packed, bias, _, grad = (tensor.to(dtype) for tensor in tensors())
    packed = packed.to(WIDER[dtype]).requires_grad_()
    bias = (bias.to(WIDER[dtype]) if bias_is_wider else bias).requires_grad_()
    y = conv(x.requires_grad_(), packed, bias, None)
    leaves = (x, packed, bias)
    gradients = torch.autograd.grad(y, leaves, grad)
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(formula(*doubles, None), doubles, grad.double())
    tolerance = {torch.float16: 5e-3, torch.float32: 1e-5}[dtype]
    for actual, expected in zip(gradients, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_operators_pass_opcheck(padding, channels_last):
    x, packed, bias, residual, grad = tensors(padding, channels_last)
    for tensor in (x, packed, bias, residual, grad):
        tensor.requires_grad_()
    arguments = (x, packed, None, bias, residual, *options(padding), BETA, channels_last, None)
    torch.library.opcheck(definitions.conv, arguments)
    for has_bias in (False, True):
        arguments = (x, grad, *options(padding), torch.float64, has_bias)
        torch.library.opcheck(definitions.weight_grad, arguments)
    narrow = x.detach().float(), grad.detach().float()
    arguments = (*narrow, *options(padding), torch.float64, True)
    torch.library.opcheck(definitions.weight_grad, arguments)


TRANSFORMED = {
    "grad": lambda f, x, p: torch.func.grad(lambda x: f(x, p).square().sum())(x),
    "vjp": lambda f, x, p: torch.func.vjp(f, x, p)[1](torch.ones_like(f(x, p))),
    "jacrev": lambda f, x, p: torch.func.jacrev(f, (0, 1))(x, p),
    "second": lambda f, x, p: torch.func.jacrev(torch.func.grad(lambda p: f(x, p).pow(3).sum()))(p),
    "vmap over images": lambda f, x, p: torch.func.vmap(f, (0, None))(x.expand(3, *x.shape), p),
    "vmap over a later axis": lambda f, x, p: torch.func.vmap(f, (1, None))(
        torch.stack([x, 2 * x], 1), p
    ),
    "vmap over weights": lambda f, x, p: torch.func.vmap(f, (None, 1))(
        x, torch.stack([p, p.flip(0)], 1)
    ),
    "vmap over both": lambda f, x, p: torch.func.vmap(f)(
        torch.stack([x, -x]), torch.stack([p, p.flip(0)])
    ),
    "gradient of each sample": lambda f, x, p: torch.func.vmap(
        torch.func.grad(lambda p, x: f(x[None], p).square().sum()), (None, 0)
    )(p, x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_gives_what_it_gives_for_the_formula(name):
    x, packed, bias, _, _ = tensors()

    def of(function):
        return TRANSFORMED[name](lambda x, p: function(x, p, bias, None), x, packed)

    torch.testing.assert_close(of(conv), of(formula))


def test_vmap_takes_a_residual_batched_or_not():
    x, packed, bias, residual, _ = tensors()
    images = torch.stack([x, -x])
    residuals = torch.stack([residual, 2 * residual])
    for dim, r in ((None, residual), (0, residuals)):
        actual = torch.func.vmap(conv, (0, None, None, dim))(images, packed, bias, r)
        expected = torch.func.vmap(formula, (0, None, None, dim))(images, packed, bias, r)
        torch.testing.assert_close(actual, expected)


def cube(function):
    return lambda *tensors: function(*tensors).pow(3)


def total(function):
    return lambda *tensors: function(*tensors).pow(3).sum()


def along(function, at, *directions):
    """Derivatives along one direction after the other, the last one outermost."""
    for direction in directions:
        function = derivative_along(function, direction)
    return function(*at)


def derivative_along(function, direction):
    return lambda *at: torch.func.jvp(function, at, direction)[1]


# function, where, two directions: each for x, packed, bias and residual
FORWARD = {
    "along all": lambda f, at, u, v: along(cube(f), at, u),
    "along all, twice": lambda f, at, u, v: along(cube(f), at, u, v),
    "three times": lambda f, at, u, v: along(cube(f), at, u, v, v),
    "over reverse": lambda f, at, u, v: along(torch.func.grad(total(f), (0, 1, 2, 3)), at, u),
    "over reverse, twice": lambda f, at, u, v: along(torch.func.grad(total(f), (0, 1)), at, u, v),
    "under reverse": lambda f, at, u, v: torch.func.grad(
        lambda *at: along(total(f), at, u), (0, 1, 2, 3)
    )(*at),
    "jacfwd": lambda f, at, u, v: torch.func.jacfwd(cube(f), (0, 1, 2))(*at),
    "jacfwd of jacfwd": lambda f, at, u, v: torch.func.jacfwd(torch.func.jacfwd(total(f)), 1)(*at),
    "hessian": lambda f, at, u, v: torch.func.hessian(total(f), (1, 2))(*at),
    "under vmap": lambda f, at, u, v: torch.func.vmap(
        lambda *directions: along(cube(f), at, directions)
    )(*map(torch.stack, zip(u, v, strict=True))),
    "over vmap": lambda f, at, u, v: along(
        torch.func.vmap(cube(f), (0, None, None, None)), (torch.stack([at[0], v[0]]), *at[1:]),
        (torch.stack([u[0], v[0]]), *u[1:]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_of_torch_func_is_that_of_the_formula(name):
    *at, _ = tensors()
    directions = [tuple(map(torch.randn_like, at)) for _ in range(2)]
    actual, expected = (FORWARD[name](f, tuple(at), *directions) for f in (conv, formula))
    torch.testing.assert_close(actual, expected)


def duals(at, direction, which=(0, 1, 2, 3)):
    pairs = enumerate(zip(at, direction, strict=True))
    return [forward_ad.make_dual(t, d) if i in which else t for i, (t, d) in pairs]


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_a_dual_tensor_carries_its_tangent_through(which):
    *at, _ = tensors("circular")
    direction = [*map(torch.randn_like, at)]
    with forward_ad.dual_level():
        actual, expected = (
            tuple(forward_ad.unpack_dual(f(*duals(at, direction, which), "circular")))
            for f in (conv, formula)
        )
    torch.testing.assert_close(actual, expected)


def test_dual_tensors_go_through_the_backward_and_tangents_have_gradients():
    *at, grad = tensors()
    at, direction = [t.requires_grad_() for t in at], [*map(torch.randn_like, at)]
    upstream = torch.randn_like(grad)

    def results(function):
        y = function(*at)
        with forward_ad.dual_level():
            dual = function(*duals(at, direction)).pow(3)
            yield torch.autograd.grad(forward_ad.unpack_dual(dual).tangent.sum(), at)
            gradients = torch.autograd.grad(function(*duals(at, direction)).pow(3).sum(), at)
            gradients += torch.autograd.grad(y, at, forward_ad.make_dual(grad, upstream))
            for gradient in gradients:
                tangent = forward_ad.unpack_dual(gradient).tangent
                yield torch.zeros_like(gradient) if tangent is None else tangent

    for actual, expected in zip(list(results(conv)), list(results(formula)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [3, 8])
def test_many_gradients_at_once_are_those_one_by_one(channels, channels_last):
    with rehearsing():
        x = torch.randn(2, channels, 5, 6)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        packed = torch.randn(tt.packed_size(channels, 3), requires_grad=True)
        x.requires_grad_()
        y = tt.tied_conv2d(x, packed, kernel_size=3)
        grads = torch.randn(3, *y.shape)
        at_once = torch.autograd.grad(y, (x, packed), grads, True, is_grads_batched=True)
        for i, grad in enumerate(grads):
            expected = torch.autograd.grad(y, (x, packed), grad, True)
            for actual, one in zip(at_once, expected, strict=True):
                torch.testing.assert_close(actual[i], one)


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_without_a_break_equals_eager(channels_last):
    *leaves, _ = tensors("circular", channels_last)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loss(*leaves):
        return conv(*leaves, "circular").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


def test_batch_may_be_dynamic_under_compilation():
    x, packed, bias, _, _ = tensors()

    def f(x):
        return definitions.conv(x, packed, None, bias, None, *options(), 1.0, False, None)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3, 5):
        images = torch.randn(n, *x.shape[1:], dtype=x.dtype)
        torch.testing.assert_close(compiled(images), f(images))


def test_operations_are_counted_by_formula():
    x, packed, bias, residual, _ = tensors()
    leaves = [leaf.requires_grad_() for leaf in (x, packed)]
    with FlopCounterMode(display=False) as counter:
        flops.tell_counters()  # as the functions do before they call an operator
        output = definitions.conv(*leaves, None, bias, residual, *options(), BETA, False, None)
        torch.autograd.grad(output.sum(), leaves)
    forward = 2 * output.numel() * (4 // GROUPS) * math.prod(KERNEL)
    gradient_of_x = 2 * x.numel() * (4 // GROUPS) * math.prod(KERNEL)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.triton_tied.conv] == forward + gradient_of_x
    assert counts[torch.ops.triton_tied.weight_grad] == forward


def test_changing_what_was_saved_is_noticed():
    x, packed, bias, _, _ = tensors()
    y = conv(x, packed.requires_grad_(), bias, None)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
