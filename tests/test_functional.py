"""The convolutions, forward and backward, against float64 ``F.conv{1,2,3}d`` on the formula's W."""

import fractions
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import triton_tied as tt
from triton_tied import dispatch, reference
from triton_tied.geometry import Geometry
from triton_tied.packing import Layout, expand

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
SUPPORTED_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d, 3: tt.tied_conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def problems(draw):
    """(input shape, kernel, options, symmetry, channels-last) with every option drawn."""
    dims = draw(st.integers(1, 3))

    def per_axis(low, high):
        return draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * dims)))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 5))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
    options = {"dilation": per_axis(1, 2), "groups": groups}
    options["padding"] = draw(st.one_of(st.just("same"), st.just("valid"), st.just(None)))
    if options["padding"] is None:
        options["padding"] = per_axis(0, 5)
        options["stride"] = per_axis(1, 3)
    dilation = options["dilation"]
    dilation = (dilation,) * dims if isinstance(dilation, int) else dilation
    # large enough for the kernel without any padding
    spatial = [
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)
    ]
    if "stride" in options and oracle.breaks_onednn(spatial[-1], kernel, options):
        options["stride"] = 1
    shape = (draw(st.integers(0, 3)), channels, *spatial)
    return shape, kernel, options, draw(st.sampled_from(SYMMETRIES)), draw(st.booleans())


def run(function, tensors, generator):
    """Output and gradients, all detached, and a random gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)], grad


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@given(problems(), st.booleans(), st.integers(0, 2**31))
def test_output_and_gradients_are_within_the_bound(dtype, problem, small, seed):
    shape, kernel, options, symmetry, channels_last = problem
    dims = len(kernel)
    generator = torch.Generator().manual_seed(seed)
    layout = (shape[1], kernel, options["groups"], symmetry)
    sizes = [shape, (tt.packed_size(*layout),), (shape[1],)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]
    if channels_last and dims > 1:
        tensors[0] = tensors[0].contiguous(memory_format=FORMATS[dims])

    def tied(x, packed, bias):
        return TIED[dims](x, packed, bias, kernel_size=kernel, symmetry=symmetry, **options)

    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr(tt.packing, "_MAX_GATHERED", 0)
        results, grad = run(tied, tensors, generator)
    expected = oracle.expect(oracle.Convolution(layout, options), tensors, grad)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        oracle.assert_within_bound(actual, wanted)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_reference_is_the_same_function(dims):
    # to the bit in float64, which the reference serves wherever kernels run
    x = torch.randn(2, 6, *[7] * dims, dtype=torch.float64)
    size = tt.packed_size(6, (3,) * dims, 2, "skew_adjoint")
    packed = torch.randn(size, dtype=torch.float64)
    options = {"kernel_size": 3, "padding": 1, "groups": 2, "symmetry": "skew_adjoint"}
    name = f"tied_conv{dims}d"
    bias, residual = torch.randn(6, dtype=torch.float64), torch.randn_like(x)
    more = {"alpha": -0.5, "residual": residual, "padding_mode": "circular"}
    ours = getattr(tt, name)(x, packed, bias, **options, **more)
    assert torch.equal(ours, getattr(reference, name)(x, packed, bias, **options, **more))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel, padding", [((3, 3), 1), ((2, 5), "same"), ((3, 1), (2, 0))])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_modes_are_those_of_the_dense_layer(padding_mode, kernel, padding, batched):
    dense = torch.nn.Conv2d(
        4, 4, kernel, padding=padding, padding_mode=padding_mode, dtype=torch.float64
    )
    tied = tt.pack(dense.weight.detach())
    with torch.no_grad():
        dense.weight.copy_(oracle.expand(tied, 4, kernel, 1, "self_adjoint"))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    x = x if batched else x[0]
    options = {"kernel_size": kernel, "padding": padding, "padding_mode": padding_mode}
    torch.testing.assert_close(tt.tied_conv2d(x, tied, dense.bias, **options), dense(x))


def test_alpha_and_residual():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    packed, bias = torch.randn(tt.packed_size(3, 3)).double(), torch.randn(3).double()
    residual = torch.randn_like(x)
    plain = tt.tied_conv2d(x, packed, bias, kernel_size=3, padding=1)
    for alpha in (0.25, -3, 0, 2**70):
        scaled = tt.tied_conv2d(x, packed, bias, kernel_size=3, padding=1, alpha=alpha)
        torch.testing.assert_close(scaled, float(alpha) * plain)
        both = tt.tied_conv2d(
            x, packed, bias, kernel_size=3, padding=1, alpha=alpha, residual=residual
        )
        torch.testing.assert_close(both, float(alpha) * plain + residual)


# ---- beta: a number that scales the residual

BETAS = [0, 0.0, 1, -1.5, 1e3]


def affine(dims, alpha, beta, stride=1):
    """The formula, and tensors for it: x, packed, bias, residual."""
    sides = range(5, 5 + dims)
    x = torch.randn(2, 4, *sides, dtype=torch.float64)
    packed = torch.randn(tt.packed_size(4, (3,) * dims, 2, "skew_adjoint"), dtype=torch.float64)
    residual = torch.randn(2, 4, *[(side - 1) // stride + 1 for side in sides]).double()
    layout = (4, (3,) * dims, 2, "skew_adjoint")

    def formula(x, packed, bias, residual, alpha=alpha, beta=beta):
        weight = oracle.expand(packed, *layout)
        y = oracle.CONVOLUTIONS[dims](x, weight, bias, stride=stride, padding=1, groups=2)
        return alpha * y + beta * residual

    options = {"kernel_size": 3, "padding": 1, "groups": 2, "symmetry": "skew_adjoint"}
    options |= {"stride": stride, "alpha": alpha, "beta": beta}
    return formula, (x, packed, torch.randn(4, dtype=torch.float64), residual), options


@pytest.mark.parametrize("dims, stride", [(1, 1), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("alpha", [1.0, -0.5, torch.tensor(0.7)], ids=repr)
@pytest.mark.parametrize("module", [tt, reference], ids=lambda module: module.__name__)
def test_beta_scales_the_residual_and_its_gradient(module, dims, stride, beta, alpha):
    formula, tensors, options = affine(dims, alpha, beta, stride)
    function = getattr(module, f"tied_conv{dims}d")

    def tied(x, packed, bias, residual):
        return function(x, packed, bias, residual=residual, **options)

    def prepared(x, packed, bias, residual):
        weight = tt.prepare(packed, 4, (3,) * dims, 2, "skew_adjoint")
        return function(x, weight, bias, residual=residual, **options)

    (truth, *gradients), grad = run(formula, tensors, torch.Generator())
    for each in (tied, prepared):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = each(*leaves)
        torch.testing.assert_close(output, truth)
        torch.testing.assert_close(list(torch.autograd.grad(output, leaves, grad)), gradients)


@pytest.mark.parametrize("alpha", [1.0, 0.5, torch.tensor(0.5)], ids=repr)
@pytest.mark.parametrize("module", [tt, reference], ids=lambda module: module.__name__)
def test_a_residual_of_beta_zero_may_be_anything(module, alpha):
    _, (x, packed, bias, residual), options = affine(2, alpha, 0)
    plain = module.tied_conv2d(x, packed, bias, **options)
    residual.fill_(torch.nan).requires_grad_()
    y = module.tied_conv2d(x, packed, bias, residual=residual, **options)
    assert torch.equal(y, plain)
    (grad,) = torch.autograd.grad(y.sum(), residual)
    assert torch.equal(grad, torch.zeros_like(residual))
    # so does PyTorch's own
    matrix = torch.full((2, 2), torch.nan, requires_grad=True)
    total = torch.addmm(matrix, *torch.eye(2).expand(2, 2, 2), beta=0).sum()
    (grad,) = torch.autograd.grad(total, matrix)
    assert not grad.any()


def test_beta_without_a_residual_does_nothing():
    _, (x, packed, bias, _), options = affine(2, 0.5, -3.0)
    plain = tt.tied_conv2d(x, packed, bias, **{**options, "beta": 1.0})
    assert torch.equal(tt.tied_conv2d(x, packed, bias, **options), plain)


@pytest.mark.parametrize("beta", [np.float32(0.5), np.int64(2), fractions.Fraction(1, 2)])
def test_beta_is_any_real_number(beta):
    formula, tensors, options = affine(2, 1.0, float(beta))
    y = tt.tied_conv2d(*tensors[:3], residual=tensors[3], **{**options, "beta": beta})
    torch.testing.assert_close(y, formula(*tensors))


@pytest.mark.parametrize("beta", [0, -1.5])
@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
def test_derivatives_with_beta_of_first_and_second_order(beta, is_tensor):
    _, tensors, options = affine(2, 0.7, beta)
    alpha = torch.tensor(0.7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*tensors, *([alpha] if is_tensor else []))]

    def tied(x, packed, bias, residual, alpha=0.7):
        return tt.tied_conv2d(
            x, packed, bias, residual=residual, **{**options, "alpha": alpha}
        ).pow(2)

    assert torch.autograd.gradcheck(tied, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(tied, inputs)


def test_transforms_with_beta():
    formula, tensors, options = affine(2, -0.5, 2.5)

    def tied(x, packed, bias, residual):
        return tt.tied_conv2d(x, packed, bias, residual=residual, **options)

    along = tuple(map(torch.randn_like, tensors))
    batch = [torch.stack([t, 2 * t, t.flip(0)]) for t in tensors]
    for transformed in (
        lambda f: torch.func.jvp(f, tensors, along),
        lambda f: torch.vmap(f)(*batch),
        lambda f: torch.vmap(f, (None, None, None, 0))(*tensors[:3], batch[3]),
        lambda f: torch.func.hessian(lambda r: f(*tensors[:3], r).pow(3).sum())(tensors[3]),
        lambda f: torch.vmap(torch.func.grad(lambda *t: f(*t).pow(3).sum(), (0, 1, 2, 3)))(*batch),
    ):
        torch.testing.assert_close(transformed(tied), transformed(formula))


@pytest.mark.parametrize("beta", [0.0, -1.5])
def test_compiled_with_beta_equals_eager(beta):
    torch._dynamo.reset()
    formula, tensors, options = affine(2, 0.5, beta)

    def tied(x, packed, bias, residual):
        return tt.tied_conv2d(x, packed, bias, residual=residual, **options)

    compiled = torch.compile(tied, backend="aot_eager", fullgraph=True)
    (truth, *gradients), grad = run(formula, tensors, torch.Generator())
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = compiled(*leaves)
    torch.testing.assert_close(output, truth)
    torch.testing.assert_close(list(torch.autograd.grad(output, leaves, grad)), gradients)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_map_is_its_own_transpose_up_to_the_sign(symmetry, padding_mode, dilation):
    sign = 1 if symmetry == "self_adjoint" else -1
    packed = torch.randn(tt.packed_size(6, (3, 5), 2, symmetry), dtype=torch.float64)
    x, y = torch.randn(2, 1, 6, 9, 11, dtype=torch.float64)

    def apply(v):
        return tt.tied_conv2d(
            v, packed, kernel_size=(3, 5), padding="same", dilation=dilation, groups=2,
            padding_mode=padding_mode, symmetry=symmetry,
        )  # fmt: skip

    left, right = (apply(x) * y).sum(), sign * (x * apply(y)).sum()
    assert abs(left - right) < 1e-12 * x.norm() * y.norm() * packed.norm()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kernel, padding, dilation", [(3, 1, 1), (4, 1, 2), (2, 0, 1), (3, 5, 1)])
def test_input_gradient_is_the_same_operator(symmetry, kernel, padding, dilation):
    # dx = s * conv(dy) with padding d(K-1) - p, which crops where it is negative
    sign = 1 if symmetry == "self_adjoint" else -1
    layout = Layout(3, (kernel, kernel), 1, symmetry)
    weight = expand(torch.randn(layout.size, dtype=torch.float64), layout)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(x, weight, padding=padding, dilation=dilation)
    dy = torch.randn_like(output)
    (truth,) = torch.autograd.grad(output, x, dy)
    other = dilation * (kernel - 1) - padding
    geometry = Geometry((1, 1), ((other, other),) * 2, (dilation,) * 2)
    ours = sign * reference.convolve(dy, weight, None, geometry, groups=1)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_memory_format_of_the_input(dims, dtype):
    x = torch.randn(2, 8, *[6] * dims, dtype=dtype)
    packed = torch.randn(tt.packed_size(8, (3,) * dims), dtype=dtype)
    layouts = [x, x.contiguous(memory_format=FORMATS[dims]), x[..., ::2], x.transpose(-1, -2)]
    layouts += [x[:1].expand(3, *x.shape[1:]), x[0]]
    layout = (8, (3,) * dims, 1, "self_adjoint")
    weight = oracle.expand(packed, *layout)
    for view in layouts:
        expected = CONVOLUTIONS[dims](view, weight, padding=1)
        actual = TIED[dims](view, packed, kernel_size=3, padding=1)
        assert actual.stride() == expected.stride()
        convolution = oracle.Convolution(layout, {"padding": 1})
        oracle.assert_within_bound(actual, *oracle.expect(convolution, [view, packed]))


@pytest.mark.parametrize("dims", [2, 3])
def test_weight_is_made_in_the_memory_format_of_the_input(dims, monkeypatch):
    convolve, seen = reference.convolve, []

    def spy(input, weight, *rest):
        seen.append(weight.is_contiguous(memory_format=FORMATS[dims]))
        return convolve(input, weight, *rest)

    monkeypatch.setattr(reference, "convolve", spy)
    x = torch.randn(2, 8, *[6] * dims, dtype=torch.float64)
    packed = torch.randn(tt.packed_size(8, (3,) * dims), dtype=torch.float64)
    for memory_format in (torch.contiguous_format, FORMATS[dims]):
        TIED[dims](x.contiguous(memory_format=memory_format), packed, kernel_size=3)
    assert seen == [False, True]


@pytest.mark.parametrize(
    "use",
    [
        lambda y: torch.cat([y, 2 * y], 1).square(),
        lambda y: y.sum(),
        lambda y: y.mean((2, 3)).expand(4, -1, -1).square(),
        lambda y: y.transpose(1, 3).contiguous().square(),
        lambda y: y[..., ::2].square(),
        lambda y: y.contiguous(memory_format=torch.channels_last).square(),
    ],
    ids=["cat", "sum", "expand", "transpose", "slice", "channels_last"],
)
def test_upstream_gradients_of_any_layout(use, expansion):
    packed = torch.randn(tt.packed_size(4, 3), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = oracle.expand(packed, 4, (3, 3), 1, "self_adjoint")
    truth = torch.autograd.grad(use(F.conv2d(x, weight, padding=1)).sum(), [x, packed])
    ours = tt.tied_conv2d(x, packed, kernel_size=3, padding=1)
    torch.testing.assert_close(torch.autograd.grad(use(ours).sum(), [x, packed]), truth)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": 1, "groups": 2, "dilation": 2},
        {"stride": 2, "padding": 1},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "alpha": 0.5},
    ],
    ids=str,
)
def test_gradcheck_of_first_and_second_order(symmetry, options, expansion):
    groups = options.get("groups", 1)
    packed = torch.randn(tt.packed_size(4, (3, 2), groups, symmetry), dtype=torch.float64)
    x, bias = torch.randn(2, 4, 4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, packed, bias)]

    def apply(x, packed, bias):
        return tt.tied_conv2d(x, packed, bias, kernel_size=(3, 2), symmetry=symmetry, **options)

    assert torch.autograd.gradcheck(apply, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(apply, inputs, gen_non_contig_grad_outputs=True)


def test_transforms_of_torch_func(expansion):
    packed = torch.randn(3, tt.packed_size(4, 3, 2), dtype=torch.float64)
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
    close = torch.testing.assert_close

    def ours(x, packed):
        return tt.tied_conv2d(x, packed, kernel_size=3, padding=1, groups=2)

    def truth(x, packed):
        weight = oracle.expand(packed, 4, (3, 3), 2, "self_adjoint")
        return F.conv2d(x, weight, padding=1, groups=2)

    for in_dims, arguments in [
        (0, (x, packed)),
        ((0, None), (x, packed[0])),
        ((None, 0), (x[0], packed)),
    ]:
        close(torch.vmap(ours, in_dims)(*arguments), torch.vmap(truth, in_dims)(*arguments))
    point, tangent = (x[0], packed[0]), (x[1], packed[1])
    close(torch.func.jvp(ours, point, tangent), torch.func.jvp(truth, point, tangent))
    per_sample = [
        torch.vmap(torch.func.grad(lambda p, v, f=f: f(v, p).square().sum()), (None, 0))(
            packed[0], x
        )
        for f in (ours, truth)
    ]
    close(*per_sample)


def test_autocast_gives_the_dtypes_of_the_dense_convolution():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(2, 4, 6, 6, dtype=dtype)
        packed = torch.randn(tt.packed_size(4, 3), dtype=dtype, requires_grad=True)
        bias, residual = torch.randn(4, dtype=dtype), torch.randn(2, 4, 4, 4, dtype=dtype)
        layout = (4, (3, 3), 1, "self_adjoint")
        weight = oracle.expand(packed, *layout)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = F.conv2d(x, weight, bias)
            actual = tt.tied_conv2d(x, packed, bias, kernel_size=3)
            added = tt.tied_conv2d(x, packed, bias, kernel_size=3, residual=residual)
        assert actual.dtype == expected.dtype == added.dtype
        cast = [t.detach().to(expected.dtype) for t in (x, packed, bias)]
        oracle.assert_within_bound(actual, *oracle.expect(oracle.Convolution(layout), cast))
        (grad,) = torch.autograd.grad(actual.sum(), packed)
        assert grad.dtype == dtype


def test_autocast_mixes_dtypes_as_the_dense_convolution_does():
    packed = torch.randn(tt.packed_size(4, 3))
    half = torch.randn(2, 4, 6, 6, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tt.tied_conv2d(half, packed, kernel_size=3).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="float64.*float32"):
            tt.tied_conv2d(half.double(), packed, kernel_size=3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic, expansion):
    torch._dynamo.reset()  # each expansion compiles anew, and PyTorch counts that
    packed = torch.randn(tt.packed_size(4, 3), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def apply(x):
        y = tt.tied_conv2d(x, packed, bias, kernel_size=3, padding=1)
        return tt.tied_conv2d(y, packed, bias, kernel_size=3, padding=1, residual=x)

    compiled = torch.compile(apply, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for side in (5, 8, 6):
        x = torch.randn(2, 4, side, side, dtype=torch.float64, requires_grad=True)
        leaves = [x, packed, bias]
        expected, actual = apply(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


def test_same_bits_from_run_to_run(expansion):
    packed = torch.randn(tt.packed_size(32, 3), requires_grad=True)
    x = torch.randn(2, 32, 16, 16, requires_grad=True)

    def step():
        y = tt.tied_conv2d(x, packed, kernel_size=3, padding=1)
        return y, *torch.autograd.grad(y.square().sum(), [x, packed])

    first = step()
    for _ in range(2 if dispatch.INTERPRETED else 10):  # which takes its time
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_integer_data_is_exact(dtype):
    # sums of at most 4 * 9 products of at most 2 * 2 fit the 8 bits of bfloat16
    x = torch.randint(-2, 3, (2, 4, 5, 5)).to(dtype)
    packed = torch.randint(-2, 3, (tt.packed_size(4, 3),)).to(dtype)
    weight = oracle.expand(packed.double(), 4, (3, 3), 1, "self_adjoint")
    expected = F.conv2d(x.double(), weight, padding=1)
    assert torch.equal(tt.tied_conv2d(x, packed, kernel_size=3, padding=1).double(), expected)


def test_one_hot_input_reads_out_single_taps():
    packed = torch.randn(tt.packed_size(3, 3, symmetry="skew_adjoint"))
    x = torch.zeros(3, 3, 3, 3)
    x[range(3), range(3), 1, 1] = 1
    y = tt.tied_conv2d(x, packed, kernel_size=3, padding=1, symmetry="skew_adjoint")
    weight = oracle.expand(packed, 3, (3, 3), 1, "skew_adjoint")
    assert torch.equal(y.transpose(0, 1).flip(2, 3), weight)


def test_not_a_number_poisons_only_what_sees_it():
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 4, 5] = math.nan
    y = tt.tied_conv2d(x, torch.randn(tt.packed_size(3, 3)), kernel_size=3, padding=1)
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[3:6, 4:7] = True
    assert torch.equal(y.isnan(), seen.expand_as(y))


TRANSFORMS = {
    "grad": lambda f, x, t: torch.func.grad(lambda x: f(x).pow(3).sum())(x),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "vmap": lambda f, x, t: torch.vmap(f)(torch.stack([x, t])),
    "gradient of each": lambda f, x, t: torch.vmap(torch.func.grad(lambda x: f(x).pow(3).sum()))(
        torch.stack([x, t])
    ),
    "jvp of grad": lambda f, x, t: torch.func.jvp(
        torch.func.grad(lambda x: f(x).pow(3).sum()), (x,), (t,)
    )[1],
    "dual": lambda f, x, t: tangent_of(f, x, t),
}


def tangent_of(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("made", ["packed", "prepared"])
def test_transforms_inside_of_compilation_are_right_without_a_break(name, made):
    dtype = torch.float32 if dispatch.INTERPRETED else torch.float64
    layout = (4, (3, 1), 2, "skew_adjoint")
    packed, bias = torch.randn(tt.packed_size(*layout)).to(dtype), torch.randn(4).to(dtype)
    x, t = torch.randn(2, 1, 4, 3, 4).to(dtype)
    weight = packed if made == "packed" else tt.prepare(packed, *layout)
    options = {"kernel_size": (3, 1), "padding": (1, 0), "groups": 2, "symmetry": "skew_adjoint"}

    def ours(x):
        return tt.tied_conv2d(x, weight, bias, **options)

    def truth(x):
        return F.conv2d(x, oracle.expand(packed, *layout), bias, padding=(1, 0), groups=2)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: TRANSFORMS[name](ours, x, t), backend="aot_eager", fullgraph=True
    )
    expected = TRANSFORMS[name](truth, x, t)
    torch.testing.assert_close(compiled(x, t), expected, rtol=1e-4, atol=1e-4)


def test_dual_tensors_go_through_compiled_code():
    """Compiled before without them, as well."""
    dtype = torch.float32 if dispatch.INTERPRETED else torch.float64
    packed, x, t = (torch.randn(*s).to(dtype) for s in ((74,), (1, 4, 4, 3), (1, 4, 4, 3)))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: tt.tied_conv2d(x, packed, kernel_size=3), backend="aot_eager", fullgraph=True
    )
    for _ in range(2):
        torch.testing.assert_close(compiled(x), tt.tied_conv2d(x, packed, kernel_size=3))
        torch.testing.assert_close(
            tangent_of(compiled, x, t), tt.tied_conv2d(t, packed, kernel_size=3)
        )


def test_empty_batch_gives_empty_output_and_zero_gradients(expansion):
    packed = torch.randn(tt.packed_size(4, 3), requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    x = torch.randn(0, 4, 6, 6, requires_grad=True)
    y = tt.tied_conv2d(x, packed, bias, kernel_size=3)
    assert y.shape == (0, 4, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(packed.grad, torch.zeros_like(packed))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("channels_last", [False, True])
def test_changing_a_saved_input_before_the_backward_raises_or_changes_nothing(channels_last):
    x, packed = torch.randn(1, 4, 6, 6), torch.randn(tt.packed_size(4, 3), requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = tt.tied_conv2d(x, packed, kernel_size=3)
    (expected,) = torch.autograd.grad(y.sum(), packed, retain_graph=True)
    x.add_(1)
    try:
        (found,) = torch.autograd.grad(y.sum(), packed)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # the kernels saved a copy in other memory
        assert dispatch.INTERPRETED and not channels_last
        assert torch.equal(found, expected)
