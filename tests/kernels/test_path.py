"""The whole way through the kernels: functions and layers, as users call them."""

import collections

import oracle
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from problems import DTYPES, INTERPRETED, SYMMETRIES
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

import triton_tied as tt
from triton_tied.autotune import centre_tap
from triton_tied.kernels import launch

CONVOLUTIONS = {1: (tt.tied_conv1d, F.conv1d), 2: (tt.tied_conv2d, F.conv2d)}


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel is launched."""
    seen = collections.Counter()

    def counted(name, function):
        def call(*arguments):
            seen[name] += 1
            return function(*arguments)

        return call

    for name in ("conv", "weight_grad", "unpack_centre"):
        monkeypatch.setattr(launch, name, counted(name, getattr(launch, name)))
    return seen


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def run(function, tensors):
    """Output and gradients of every tensor, for an upstream gradient fixed by the shape."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grad = grad.to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


CASES = {
    "same": {"padding": "same"},
    "even kernel, same": {"padding": "same", "kernel_size": 2},
    "more padding than kernel": {"padding": 4},
    "valid, dilated": {"padding": "valid", "dilation": 2},
    "grouped": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 6},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular, larger": {"padding": 2, "padding_mode": "circular"},
}


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_function_is_as_good_as_dense(dims, case, symmetry, device, launches):
    options = {"kernel_size": 3, "groups": 1, "padding_mode": "zeros"} | CASES[case]
    kernel, mode = (options.pop("kernel_size"),) * dims, options.pop("padding_mode")
    layout = (6, kernel, options["groups"], symmetry)
    dtype = DTYPES[dims % 2]
    x = randn(2, 6, *[9] * dims, device=device, dtype=dtype)
    packed = randn(tt.packed_size(*layout), device=device, dtype=dtype)
    bias = randn(6, device=device, dtype=dtype)
    tied, conv = CONVOLUTIONS[dims]

    def dense(x, packed, bias):
        more = dict(options)
        if mode != "zeros":
            x = F.pad(x, [more.pop("padding")] * 2 * dims, mode=mode)
        return conv(x, oracle.expand(packed, *layout), bias, **more)

    def ours(x, packed, bias):
        more = {"kernel_size": kernel, "padding_mode": mode, "symmetry": symmetry}
        return tied(x, packed, bias, **more, **options)

    tensors = (x, packed, bias)
    truth, baseline = run(dense, [t.double() for t in tensors]), run(dense, tensors)
    for actual, b, t in zip(run(ours, tensors), baseline, truth, strict=True):
        assert actual.dtype == dtype
        oracle.assert_as_good_as(actual, b, t, dtype)
    assert launches["conv"] == 2 and launches["weight_grad"] == 1


def test_no_dense_convolution_runs_forward_or_backward(device, launches):
    layer = tt.TiedConv2d(8, 3, padding=1, device=device)
    x = randn(2, 8, 6, 6, device=device).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        layer(x).square().sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert "triton_tied::conv" in names
    assert not [name for name in names if "convolution" in name or "conv2d" in name]
    assert launches == {"conv": 2, "weight_grad": 1}


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        ((1, 4, 6, 6), {}, torch.float64),
        ((1, 4, 6, 6), {"stride": 2}, torch.float32),
        ((1, 4, 3, 3, 3), {}, torch.float32),
    ],
    ids=["float64", "stride", "3-D"],
)
def test_what_has_no_kernel_goes_to_the_reference(shape, options, dtype, device, launches):
    dims = len(shape) - 2
    x = torch.randn(shape, device=device, dtype=dtype)
    packed = torch.randn(tt.packed_size(4, (3,) * dims), device=device, dtype=dtype)
    name = f"tied_conv{dims}d"
    actual = getattr(tt, name)(x, packed, kernel_size=3, **options)
    expected = getattr(tt.reference, name)(x, packed, kernel_size=3, **options)
    assert torch.equal(actual, expected) and not launches


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter computes bfloat16 wrongly")
def test_interpreter_is_not_asked_for_bfloat16(launches):
    x, packed = torch.randn(1, 4, 5, 5).bfloat16(), torch.randn(tt.packed_size(4, 3)).bfloat16()
    actual = tt.tied_conv2d(x, packed, kernel_size=3)
    assert torch.equal(actual, tt.reference.tied_conv2d(x, packed, kernel_size=3))
    assert not launches


def test_twelve_applications_prepare_once_under_autograd(device, launches, monkeypatch):
    packed = randn(tt.packed_size(4, 3), device=device) / 6
    packed.requires_grad_()
    x = randn(1, 4, 6, 6, device=device)

    def gradient(weight):
        y = x
        for _ in range(12):
            y = tt.tied_conv2d(y, weight, kernel_size=3, padding=1)
        (grad,) = torch.autograd.grad(y.square().sum(), packed)
        return grad

    monkeypatch.setattr(centre_tap, "unpacking_pays", lambda *_: True)
    expected = gradient(packed)
    assert launches == {"unpack_centre": 12, "conv": 12 + 11, "weight_grad": 12}
    launches.clear()
    with tt.cached():
        actual = gradient(packed)
    assert launches == {"unpack_centre": 1, "conv": 12 + 11, "weight_grad": 12}
    assert torch.equal(actual, expected)
    launches.clear()
    prepared = tt.prepare(packed, 4, 3)
    assert launches == {"unpack_centre": 1}
    assert torch.equal(gradient(prepared), expected)
    assert launches == {"unpack_centre": 1, "conv": 12 + 11, "weight_grad": 12}


def test_prepared_centre_is_never_stale(device, launches):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = randn(1, 4, 6, 6, device=device)
    with tt.cached():
        for step in range(3):
            loss = layer(x).square().sum()
            y = tt.reference.tied_conv2d(x, layer.packed, layer.bias, kernel_size=3, padding=1)
            torch.testing.assert_close(loss, y.square().sum())
            assert launches["unpack_centre"] == step + 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_autocast_computes_in_half_from_a_float32_packed_vector(device, launches):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    x = randn(2, 4, 6, 6, device=device)
    with torch.autocast(device, torch.float16), tt.cached():
        y = layer(layer(x))
        assert y.dtype == torch.float16
        y.float().square().sum().backward()
    half = layer.packed.detach().half().requires_grad_()
    bias = layer.bias.detach().half()
    z = x.half()
    for _ in range(2):
        z = tt.tied_conv2d(z, half, bias, kernel_size=3, padding=1)
    assert torch.equal(y, z)
    assert layer.packed.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(z.float().square().sum(), half)
    torch.testing.assert_close(layer.packed.grad, expected.float(), rtol=2e-3, atol=2e-3)


def test_autocast_leaves_float64_alone(device):
    layer = tt.TiedConv2d(4, 3, device=device, dtype=torch.float64)
    with torch.autocast(device, torch.float16):
        assert layer(torch.randn(1, 4, 6, 6, device=device).double()).dtype == torch.float64


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_memory_formats_are_those_of_the_dense_convolution(padding_mode, device):
    conv = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode=padding_mode, device=device)
    layer = tt.TiedConv2d.from_conv(conv)
    images = randn(2, 4, 6, 6, device=device)
    views = {
        "contiguous": images,
        "channels-last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3),
        "unbatched": images[0],
    }
    for name, x in views.items():
        x = x.detach().requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        channels_last = name == "channels-last"
        assert y.is_contiguous() is not channels_last, name
        assert y.dim() == x.dim()
        if channels_last:
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_images_reach_the_kernel_without_a_copy(device, monkeypatch):
    seen, conv = [], launch.conv

    def spy(convolution, config):
        seen.append(convolution.x.data_ptr())
        return conv(convolution, config)

    monkeypatch.setattr(launch, "conv", spy)
    x = randn(2, 8, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    tt.TiedConv2d(8, 3, padding=1, device=device)(x)
    assert seen == [x.data_ptr()]


UPSTREAM = {
    "sum": lambda y: y.sum(),
    "cat": lambda y: (torch.cat([y, 2 * y], 1) ** 2).sum(),
    "transpose": lambda y: (y.transpose(1, 3) * torch.arange(4.0, device=y.device)).sum(),
    "expand": lambda y: (y.mean((2, 3), keepdim=True).expand_as(y) ** 2).sum(),
    "stripes": lambda y: y[..., ::2].pow(2).sum(),
    "channels-last": lambda y: y.contiguous(memory_format=torch.channels_last).pow(2).sum(),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_output_gradients_of_any_strides(name, device):
    x = randn(2, 4, 6, 6, device=device).requires_grad_()
    packed = randn(tt.packed_size(4, 3), device=device).requires_grad_()
    actual, expected = (
        torch.autograd.grad(UPSTREAM[name](f(x, packed, kernel_size=3, padding=1)), (x, packed))
        for f in (tt.tied_conv2d, tt.reference.tied_conv2d)
    )
    for a, e in zip(actual, expected, strict=True):
        assert oracle.relative_error(a, e) < 1e-5  # float32 rounding, summed over 72 pixels


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_gradient_penalty_is_that_of_the_reference(padding_mode, device):
    x = randn(1, 4, 5, 5, device=device).requires_grad_()
    packed = randn(tt.packed_size(4, 3), device=device).requires_grad_()
    options = {"kernel_size": 3, "padding": 1, "padding_mode": padding_mode}

    def penalty(function, x, packed):
        y = function(x, packed, **options).pow(3).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, packed))

    for actual, expected in zip(
        penalty(tt.tied_conv2d, x, packed),
        penalty(tt.reference.tied_conv2d, x.double(), packed.double()),
        strict=True,
    ):
        assert oracle.relative_error(actual, expected) < 1e-5  # three float32 convolutions deep


def test_training_step_is_the_same_to_the_bit(device):
    torch.manual_seed(3)
    start = tt.TiedConv2d(6, 3, padding=1, device=device).state_dict()
    x = randn(3, 6, 7, 7, device=device)

    def trained():
        layer = tt.TiedConv2d(6, 3, padding=1, device=device)
        layer.load_state_dict(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            layer(x).square().mean().backward()
            optimizer.step()
        return layer.packed.detach()

    assert torch.equal(trained(), trained())


def test_traced_function_equals_eager(device):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    x = randn(1, 4, 6, 6, device=device)

    def apply(x, packed, bias):
        return tt.tied_conv2d(x, packed, bias, kernel_size=3, padding=1)

    traced = aot_function(apply, fw_compiler=nop, bw_compiler=nop)
    tensors = (x, layer.packed, layer.bias)
    for actual, expected in zip(run(traced, tensors), run(apply, tensors), strict=True):
        assert torch.equal(actual, expected)


def test_self_adjoint_layer_is_its_own_transpose_after_training(device):
    layer = tt.TiedConv2d(5, 3, padding=1, bias=False, symmetry="skew_adjoint", device=device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, y = randn(2, 1, 5, 6, 6, device=device)
    for _ in range(2):
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        left, right = (layer(x).double() * y).sum(), (x * layer(y).double()).sum()
        scale = layer(x).double().norm() * y.double().norm()
    assert abs(left + right) <= 1e-6 * scale  # <A x, y> = -<x, A y>, but for float32 rounding


def test_forward_mode_raises_clearly(device):
    x, packed = randn(1, 4, 5, 5, device=device), randn(tt.packed_size(4, 3), device=device)

    def f(x):
        return tt.tied_conv2d(x, packed, kernel_size=3)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            f(dual)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (x,), (x,))


def test_gradients_of_each_sample_equal_a_loop(device):
    images = randn(3, 4, 5, 5, device=device)
    packed = randn(tt.packed_size(4, 3), device=device)

    def loss(packed, x):
        return tt.tied_conv2d(x, packed, kernel_size=3, padding=1).pow(2).sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(packed, images)
    expected = torch.stack([torch.func.grad(loss)(packed, x) for x in images])
    torch.testing.assert_close(actual, expected)


def test_compiled_layer_equals_eager(device):
    layer = tt.TiedConv2d(4, 3, padding=1, padding_mode="circular", device=device)
    x = randn(2, 4, 6, 6, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    grads = [
        torch.autograd.grad(f(x).square().sum(), list(layer.parameters()))
        for f in (compiled, layer)
    ]
    torch.testing.assert_close(*grads)


def test_wrapping_more_than_once_raises(device):
    layer = tt.TiedConv2d(2, 9, padding=4, padding_mode="circular", device=device)
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        layer(randn(1, 2, 3, 8, device=device))


def test_empty_batch_gives_empty_output_and_zero_gradient(device):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    x = torch.zeros(0, 4, 6, 6, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not layer.packed.grad.any() and not layer.bias.grad.any() and x.grad.shape == x.shape
