"""The whole way through the kernels: functions and layers, as users call them."""

import collections
import contextlib
import random

import bounds
import oracle
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from problems import INTERPRETED, KERNEL_DTYPES, SYMMETRIES, integers
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import triton_tied as tt
from triton_tied.autotune import image_copy, select
from triton_tied.kernels import launch, stored_taps
from triton_tied.kernels.calls import Convolution
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.depthwise import depthwise_kernel
from triton_tied.kernels.depthwise_grad import depthwise_grad_kernel
from triton_tied.kernels.matrices import matrices_kernel
from triton_tied.kernels.sum_splits import sum_splits_kernel
from triton_tied.kernels.weight_grad import weight_grad_kernel
from triton_tied.memory_format import memory_of

TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d}


NAMES = {
    conv_kernel: "conv",
    depthwise_kernel: "conv",
    weight_grad_kernel: "weight_grad",
    depthwise_grad_kernel: "weight_grad",
    sum_splits_kernel: "sum",
    matrices_kernel: "matrices",
}


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel is launched."""
    seen = collections.Counter()

    def counted(call, run=launch._Call.run):
        seen[NAMES[call.kernel]] += 1
        return run(call)

    monkeypatch.setattr(launch._Call, "run", counted)
    return seen


@pytest.fixture
def unpacked(monkeypatch):
    """The centre is read as a matrix, however few the channels."""
    monkeypatch.setattr(stored_taps, "UNPACKED_FROM", 1)


@pytest.fixture
def unsplit():
    """Sums are not shared among programs: as many launches whatever the problem."""
    with select.using(
        conv=ConvConfig((1, 8, 8), 16, 16), weight_grad=WeightGradConfig((1, 8, 8), 16, 16)
    ):
        yield


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def run(function, tensors):
    """Output and gradients of every tensor, for an upstream gradient fixed by the shape."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_for(output))]


def grad_for(output):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return grad.to(output.device, output.dtype)


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
def test_function_is_within_the_bound(dims, case, symmetry, device, launches):
    options = {"kernel_size": 3, "groups": 1, "padding_mode": "zeros"} | CASES[case]
    kernel, mode = (options.pop("kernel_size"),) * dims, options.pop("padding_mode")
    layout = (6, kernel, options["groups"], symmetry)
    dtype = KERNEL_DTYPES[dims % 2]
    x = randn(2, 6, *[9] * dims, device=device, dtype=dtype)
    packed = randn(tt.packed_size(*layout), device=device, dtype=dtype)
    bias = randn(6, device=device, dtype=dtype)

    def ours(x, packed, bias):
        more = {"kernel_size": kernel, "padding_mode": mode, "symmetry": symmetry}
        return TIED[dims](x, packed, bias, **more, **options)

    tensors = (x, packed, bias)
    results = run(ours, tensors)
    convolution = oracle.Convolution(layout, options, mode)
    expected = oracle.expect(convolution, tensors, grad_for(results[0]), reference=False)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        oracle.assert_within_bound(actual, wanted)
    assert launches["conv"] == 2 and launches["weight_grad"] == 1


def test_errors_are_at_most_twice_those_of_dense(device):
    """Over 60 problems, as root mean squares of the errors over the magnitudes of their terms.

    It cannot fail by luck: a mean over so many problems is not zero where one of them is exact, and
    sums in another order have errors of the same size. Seen were ratios of 0.8 to 1.2 in float32,
    and 0.5 to 0.9 in float16, in which the kernels round once and dense up to three times.
    """
    rng = random.Random(torch.randint(2**31, ()).item())
    *_, found = bounds.survey(60, rng, KERNEL_DTYPES, kernels=True, device=device)
    assert all(ratio <= 1 for ratio in found.worst.values()), found.worst
    for dtype in KERNEL_DTYPES:
        for result in bounds.RESULTS[:3]:
            assert 0 < found.ratio((dtype, result)) <= 2


def test_no_dense_convolution_runs_forward_or_backward(device, launches, unsplit):
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


def test_twelve_applications_prepare_once_under_autograd(device, launches, unpacked, unsplit):
    packed = randn(tt.packed_size(4, 3), device=device) / 6
    packed.requires_grad_()
    x = randn(1, 4, 6, 6, device=device)

    def gradient(weight):
        y = x
        for _ in range(12):
            y = tt.tied_conv2d(y, weight, kernel_size=3, padding=1)
        (grad,) = torch.autograd.grad(y.square().sum(), packed)
        return grad

    expected = gradient(packed)
    assert launches == {"matrices": 12, "conv": 12 + 11, "weight_grad": 12}
    launches.clear()
    with tt.cached():
        actual = gradient(packed)
    assert launches == {"matrices": 1, "conv": 12 + 11, "weight_grad": 12}
    assert torch.equal(actual, expected)
    launches.clear()
    prepared = tt.prepare(packed, 4, 3)
    assert launches == {"matrices": 1}
    assert torch.equal(gradient(prepared), expected)
    assert launches == {"matrices": 1, "conv": 12 + 11, "weight_grad": 12}


def test_prepared_matrices_are_never_stale(device, launches, unpacked):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = randn(1, 4, 6, 6, device=device)
    with tt.cached():
        for step in range(3):
            loss = layer(x).square().sum()
            y = tt.reference.tied_conv2d(
                x, layer.packed_weight, layer.bias, kernel_size=3, padding=1
            )
            torch.testing.assert_close(loss, y.square().sum())
            assert launches["matrices"] == step + 1
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
    assert launches["conv"] == 3 and launches["weight_grad"] == 2
    packed = layer.packed_weight.detach().half().double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()  # is not rounded to half
    z = x.half().double()
    for _ in range(2):
        z = F.conv2d(z, oracle.expand(packed, 4, (3, 3), 1, "self_adjoint"), bias, padding=1)
    torch.testing.assert_close(y.double(), z, rtol=2e-3, atol=2e-3)
    truth = torch.autograd.grad(z.square().sum(), (packed, bias))
    for parameter, expected in zip((layer.packed_weight, layer.bias), truth, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert oracle.relative_error(parameter.grad, expected) < 5e-3  # y, dy in half, twice


TOO_MANY = [2**12 + 1, 70_001]  # float16 rounds the former, and ends before the latter


@pytest.mark.parametrize("total", TOO_MANY)
@pytest.mark.parametrize("needs_packed", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_autocast_rounds_no_gradient_of_a_parameter_to_half(device, total, needs_packed, splits):
    x = torch.ones(1, 1, 8, 8, device=device)
    packed = torch.ones(1, device=device, requires_grad=needs_packed)
    bias = torch.zeros(1, device=device, requires_grad=True)
    grad = torch.full((1, 1, 8, 8), float(total // 64), dtype=torch.float16, device=device)
    grad[..., 0] += (total - 64 * (total // 64)) // 8
    grad[..., 0, 0] += total % 8
    config = WeightGradConfig((1, 4, 4), 16, 16, splits)
    with torch.autocast(device, torch.float16), select.using(weight_grad=config):
        y = tt.tied_conv2d(x, packed, bias, kernel_size=1)
        leaves = [leaf for leaf in (packed, bias) if leaf.requires_grad]
        gradients = torch.autograd.grad(y, leaves, grad)
    # each is the sum of grad: the image is one everywhere
    assert [(g.dtype, g.item()) for g in gradients] == [(torch.float32, total)] * len(leaves)
    assert torch.tensor(float(total)).half().float() != total


def test_autocast_rounds_no_bias_to_half(device, launches):
    x, packed = (torch.ones(shape, device=device) for shape in ((1, 1, 2, 2), (1,)))
    bias = torch.tensor([2.0**-12 - 1], device=device)  # which is -1 in half
    with torch.autocast(device, torch.float16):
        y = tt.tied_conv2d(x, packed, bias, kernel_size=1)
    assert y.dtype == torch.float16 and torch.equal(y.float(), torch.full_like(x, 2.0**-12))
    assert launches == {"conv": 1}


WAYS = {
    "first": contextlib.nullcontext,
    "seen before": contextlib.nullcontext,
    "profiled": lambda: profile(activities=[ProfilerActivity.CPU]),
    "counted": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_autocast_rounds_no_gradient_of_an_image_to_half(memory, device, launches):
    """It is the kernel's own sum in float32, on all ways: the same to the bit."""
    x = randn(2, 8, 5, 6, device=device).contiguous(memory_format=memory).requires_grad_()
    packed = randn(tt.packed_size(8, 3), device=device).requires_grad_()
    grad = randn(2, 8, 5, 6, device=device, dtype=torch.float16)
    found = []
    for way in WAYS.values():
        with way(), torch.autocast(device, torch.float16):
            y = tt.tied_conv2d(x, packed, kernel_size=3, padding=1)
            found.append(torch.autograd.grad(y, (x, packed), grad))
    assert launches["conv"] == 2 * len(WAYS)
    leaf = x.detach().half().double().requires_grad_()
    weight = oracle.expand(packed.detach().half().double(), 8, (3, 3), 1, "self_adjoint")
    z = F.conv2d(leaf, weight, padding=1)
    (truth,) = torch.autograd.grad(z, leaf, grad.double())
    along_x, _ = found[0]
    assert along_x.dtype == torch.float32 and oracle.relative_error(along_x, truth) < 1e-6
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_autocast_has_second_derivatives_of_a_wider_image(device):
    directions = [randn(1, 4, 5, 6, device=device), randn(tt.packed_size(4, 3), device=device)]
    tensors = [torch.randn_like(direction) / 4 for direction in directions]

    def layer(x, packed):
        return tt.tied_conv2d(x, packed, kernel_size=3, padding=1)

    def rounded(x, packed):
        return tt.reference.tied_conv2d(x, packed, kernel_size=3, padding=1)

    with torch.autocast(device, torch.float16):
        actual = second(lambda *leaves: layer(*leaves).float(), tensors, directions)
    expected = second(rounded, [t.double() for t in tensors], [d.double() for d in directions])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and oracle.relative_error(a, e) < 2e-2  # of half, twice


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
    seen, run = [], launch.run

    def spy(plan, call):
        seen.append(call.x.data_ptr())
        return run(plan, call)

    monkeypatch.setattr(launch, "run", spy)
    x = randn(2, 8, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    tt.TiedConv2d(8, 3, padding=1, device=device)(x)
    assert seen == [x.data_ptr()]


@pytest.fixture
def memory_seen(monkeypatch):
    """The memory format of the images that each launch reads."""
    seen = []

    run = launch.run

    def spy(plan, call):
        is_conv = isinstance(call, Convolution)
        images = [call.x] if is_conv else [call.x, call.grad]
        seen.append(("conv" if is_conv else "weight_grad", memory_of(*images)))
        return run(plan, call)

    monkeypatch.setattr(launch, "run", spy)
    return seen


IMAGES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a crop": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
GRADIENTS = {
    "of the same format": lambda y: y.square().sum(),
    "of another format": lambda y: (y.transpose(1, 3).contiguous() ** 2).sum(),
    "expanded": lambda y: y.mean((2, 3)).sum(),
}


@pytest.fixture
def copies_always(monkeypatch):
    """As if a copy took no time, so that it pays for small images too."""
    monkeypatch.setattr(image_copy, "copy_us", lambda problem, gpu: -1e9)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_all_launches_read_channels_last_memory(name, gradient, device, memory_seen, copies_always):
    x = IMAGES[name](randn(2, 8, 5, 6, device=device)).detach().requires_grad_()
    layer = tt.TiedConv2d(8, 3, padding=1, device=device)
    y = layer(x)
    along_x, _ = torch.autograd.grad(GRADIENTS[gradient](y), (x, layer.packed_weight))
    assert memory_seen == [(kernel, "channels_last") for kernel in ("conv", "conv", "weight_grad")]
    assert y.is_contiguous() is along_x.is_contiguous() is (name != "channels-last")


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 8, 1, 6), (8, 5, 6), (2, 8, 20)])
def test_outputs_are_written_as_channels_last_and_copied(shape, device, copies_always, monkeypatch):
    plans = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda plan, call: plans.append(plan) or run(plan, call))
    function = tt.tied_conv1d if shape == (2, 8, 20) else tt.tied_conv2d
    dims = 1 if shape == (2, 8, 20) else 2
    x, residual = randn(*shape, device=device), randn(*shape, device=device)
    packed = randn(tt.packed_size(8, (3,) * dims), device=device)
    reference = getattr(tt.reference, function.__name__)
    for options, copies in (({}, True), ({"residual": residual}, False)):
        leaves = [x.clone().requires_grad_(), packed.clone().requires_grad_()]
        results = []
        for convolve in (function, function, reference):  # the second is a repeated call
            y = convolve(*leaves, kernel_size=3, padding=1, **options)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        copied = [plan.copied is not None for plan in plans]
        assert copied == 2 * [copies, True, False]  # of the forward, and both gradients
        for actual, again, wanted in zip(*results, strict=True):
            assert torch.equal(actual, again) and actual.stride() == wanted.stride()
            assert oracle.relative_error(actual, wanted) < 1e-5  # float32, sums of 72
        plans.clear()


def test_rows_are_images_of_channels_last_memory(device, memory_seen, copies_always):
    x = randn(2, 8, 20, device=device).requires_grad_()
    y = tt.TiedConv1d(8, 3, padding=1, device=device)(x)
    y.square().sum().backward()
    assert {memory for _, memory in memory_seen} == {"channels_last"} and len(memory_seen) == 3
    assert y.is_contiguous() and x.grad.is_contiguous()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_copied_meets_gradients_of_its_own_format(gradient, last, device, memory_seen):
    x = randn(2, 3, 5, 6, device=device)  # pixels of 12 bytes
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    GRADIENTS[gradient](tt.TiedConv2d(3, 3, padding=1, device=device)(x)).backward()
    expected = "channels_last" if last else "contiguous"
    assert memory_seen == [(kernel, expected) for kernel in ("conv", "conv", "weight_grad")]


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


# What PyTorch itself runs on a GPU beside our kernels: all but memory and views of it.
VIEWS = {"view", "narrow", "slice", "as_strided", "detach"}
NO_KERNEL = {"to", "_to_copy", "empty", "empty_like", "empty_strided"} | VIEWS

STEPS = {
    # name: channels, autocast, dtype of the image and whether it needs a gradient, casts
    "float16": (64, False, torch.float16, True, 0),
    "float16, many channels": (128, False, torch.float16, True, 0),
    "autocast, a layer inside": (64, True, torch.float16, True, 1),  # the weight
    "autocast, the first layer": (64, True, torch.float32, False, 2),  # and the image
    "autocast, an image with a gradient": (64, True, torch.float32, True, 2),  # not cast back
    "autocast, many channels": (128, True, torch.float16, True, 0),  # the matrices are in half
    "float32": (64, False, torch.float32, True, 0),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("splits", [1, 2])
def test_launches_of_a_training_step(name, splits, device, monkeypatch):
    channels, autocast, dtype, needs_x, casts = STEPS[name]
    parameters = torch.float32 if autocast else dtype
    layer = tt.TiedConv2d(channels, 3, padding=1, device=device, dtype=parameters)
    x = randn(2, channels, 8, 8, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(needs_x)
    grad = randn(*x.shape, device=device, dtype=torch.float16 if autocast else dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    monkeypatch.undo()  # of memory that is filled and held, which PyTorch then copies
    launches = collections.Counter()  # counted alone: interpreted, they would call PyTorch
    monkeypatch.setattr(launch._Call, "run", lambda call: launches.update([NAMES[call.kernel]]))

    def step():
        launches.clear()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device, torch.float16, enabled=autocast):
            y = layer(x)
        y.backward(grad)
        return +launches

    configs = ConvConfig((1, 8, 8), 16, 16), WeightGradConfig((1, 8, 8), 16, 16, splits)
    with select.using(conv=configs[0], weight_grad=configs[1]):
        expected = {"conv": 1 + needs_x, "weight_grad": 1, "sum": splits - 1, "matrices": 0}
        expected["matrices"] = int(channels >= 128)
        assert step() == +collections.Counter(expected)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            assert step() == +collections.Counter(expected)
    others = {
        event.key.removeprefix("aten::"): event.count
        for event in profiled.key_averages()
        if event.key.startswith("aten::")
    }
    others = {key: count for key, count in others.items() if key not in NO_KERNEL}
    assert others == ({"copy_": casts} if casts else {})


def second(function, tensors, directions):
    """Gradients of what the gradients of x, packed and bias make with the directions, and they."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    first = torch.autograd.grad(output.pow(3).sum(), leaves, create_graph=True)
    products = [(g * d).sum() for g, d in zip(first, directions, strict=True)]
    return [*first, *torch.autograd.grad(sum(products), leaves)]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("alone", [None, 1, 2], ids=["all", "packed", "bias"])
def test_second_derivatives_go_through_the_gradient_of_the_bias(symmetry, alone, device, launches):
    packed_shape = (tt.packed_size(6, 3, 2, symmetry),)
    shapes = (2, 6, 5, 4), packed_shape, (6,)
    tensors, directions = ([randn(*s, device=device) for s in shapes] for _ in range(2))
    if alone is not None:  # a direction along the gradient of one of them
        directions = [d * (i == alone) for i, d in enumerate(directions)]

    def ours(x, packed, bias):
        return tt.tied_conv2d(
            x, packed, bias, kernel_size=3, padding=(1, 0), groups=2, symmetry=symmetry, alpha=-0.7
        )

    def dense(x, packed, bias):
        weight = oracle.expand(packed, 6, (3, 3), 2, symmetry)
        return -0.7 * F.conv2d(x, weight, bias, padding=(1, 0), groups=2)

    doubles = [[t.double() for t in each] for each in (tensors, directions)]
    truth = second(dense, *doubles)
    for actual, expected in zip(second(ours, tensors, directions), truth, strict=True):
        assert oracle.relative_error(actual, expected) < 1e-5  # three float32 convolutions deep
    # its own derivative is a convolution with a bias: nothing of PyTorch stands in for it
    assert launches["conv"] >= 4 and launches["weight_grad"] >= 2


PRECISIONS = ["tf32", "ieee"]


@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("many", [False, True], ids=["few channels", "many channels"])
@pytest.mark.parametrize("before", PRECISIONS)
@pytest.mark.parametrize("how", ["plain", "cached", "prepared"])
@pytest.mark.skipif(torch.version.hip is not None, reason="tf32 is NVIDIA's")
def test_a_setting_that_changes_is_followed_by_every_launch(
    how, before, many, kernel, device, convolution_precision, monkeypatch, request
):
    """Between forward and backward, inside a block, after a weight was prepared: what is read of
    the weight is what the precision of each launch asks for."""
    if many:
        request.getfixturevalue("unpacked")
    after, channels = PRECISIONS[before == "tf32"], 8  # of fewer no matrices are multiplied
    seen, run = [], launch._Call.run

    def watched(call):
        if call.kernel is conv_kernel:
            arguments = call.arguments
            taps = arguments["KERNEL_H"] * arguments["KERNEL_W"]
            seen.append((arguments["INPUT_PRECISION"], arguments["STORED"] == taps))
        return run(call)

    monkeypatch.setattr(launch._Call, "run", watched)
    # small integers: exact in either precision
    layout = (channels, kernel, 1, "self_adjoint")
    x = integers((1, channels, 3, 4), torch.float32, device).requires_grad_()
    packed = integers((tt.packed_size(*layout),), torch.float32, device).requires_grad_()

    def forward():
        return tt.tied_conv2d(x, weight, kernel_size=kernel)

    with tt.cached() if how == "cached" else contextlib.nullcontext():
        convolution_precision.fp32_precision = before
        weight = tt.prepare(packed, channels, kernel) if how == "prepared" else packed
        first = forward()
        convolution_precision.fp32_precision = after
        gradients = torch.autograd.grad(first.square().sum(), (x, packed))
        other = forward()
        convolution_precision.fp32_precision = before
        again = forward()
    stores_all = [(precision, precision == "tf32") for precision in (before, after, after, before)]
    if kernel == (1, 1) and many:
        stores_all = [(precision, True) for precision, _ in stores_all]  # its centre is all
    assert seen == stores_all
    doubles = [t.detach().double().requires_grad_() for t in (x, packed)]
    truth = F.conv2d(doubles[0], oracle.expand(doubles[1], *layout))
    for y in (first, other, again):
        assert torch.equal(y.double(), truth)
    expected = torch.autograd.grad(truth.square().sum(), doubles)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(actual.double(), wanted)


@pytest.mark.parametrize(
    "dims, beta, alpha, splits",
    [
        (1, 0, 1.0, 1),
        (2, 0, 0.5, 2),
        (2, 0, "tensor", 1),
        (1, -1.5, 1.0, 2),
        (2, 2, 0.5, 1),
        (1, -1.5, "tensor", 1),
    ],
)
def test_beta_scales_the_residual_and_its_gradient(dims, beta, alpha, splits, device, launches):
    dtype = KERNEL_DTYPES[1]
    x, residual = (randn(2, 6, *[5] * dims, device=device, dtype=dtype) for _ in range(2))
    kernel = (3,) * dims
    packed = randn(tt.packed_size(6, kernel), device=device, dtype=dtype)
    bias = randn(6, device=device, dtype=dtype)
    factor = torch.tensor(0.5, device=device) if alpha == "tensor" else alpha

    def ours(*tensors):
        x, packed, bias, residual = tensors
        return TIED[dims](
            x, packed, bias, kernel_size=3, padding=1, alpha=factor, residual=residual, beta=beta
        )

    def truth(*tensors):
        x, packed, bias, residual = tensors
        weight = oracle.expand(packed, 6, kernel, 1, "self_adjoint")
        y = oracle.CONVOLUTIONS[dims](x, weight, bias, padding=1)
        return float(factor) * y + beta * residual

    tensors = (x, packed, bias, residual)
    with select.using(conv=ConvConfig((2, 8, 8), 16, 16, splits=splits)):
        actual = run(ours, tensors)
    expected = run(truth, [tensor.double() for tensor in tensors])
    assert launches["conv"] == 2
    for ours_, wanted in zip(actual, expected, strict=True):
        assert oracle.relative_error(ours_, wanted) < 2e-3  # float16: 2^-11 at each rounding


@pytest.mark.parametrize("splits", [1, 2])
def test_a_residual_of_beta_zero_is_not_looked_at(splits, device):
    x, packed = randn(1, 4, 5, 5, device=device), randn(tt.packed_size(4, 3), device=device)
    options = {"kernel_size": 3, "padding": 1}
    with select.using(conv=ConvConfig((1, 4, 4), 16, 16, splits=splits)):
        plain = tt.tied_conv2d(x, packed, **options)
        nothing = torch.full_like(x, torch.nan)
        assert torch.equal(tt.tied_conv2d(x, packed, residual=nothing, beta=0, **options), plain)


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
        return layer.packed_weight.detach()

    assert torch.equal(trained(), trained())


def test_traced_function_equals_eager(device):
    layer = tt.TiedConv2d(4, 3, padding=1, device=device)
    x = randn(1, 4, 6, 6, device=device)

    def apply(x, packed, bias):
        return tt.tied_conv2d(x, packed, bias, kernel_size=3, padding=1)

    traced = aot_function(apply, fw_compiler=nop, bw_compiler=nop)
    tensors = (x, layer.packed_weight, layer.bias)
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


@pytest.mark.parametrize("case", ["grouped", "even kernel, same", "circular", "reflect"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_forward_mode_is_that_of_the_float64_reference(dims, case, device, launches):
    options = {"kernel_size": 3, "alpha": 0.5, "symmetry": "skew_adjoint"} | CASES[case]
    layout = (4, (options["kernel_size"],) * dims, options.setdefault("groups", 1) // 3 or 1)
    options["groups"] = layout[2]
    shapes = [(2, 4, *[5] * dims), (tt.packed_size(*layout, "skew_adjoint"),), (4,)]
    at, along = ([randn(*shape, device=device) for shape in (*shapes, shapes[0])] for _ in range(2))

    def ours(x, packed, bias, residual):
        return TIED[dims](x, packed, bias, residual=residual, **options)

    def reference(x, packed, bias, residual):
        name = f"tied_conv{dims}d"
        return getattr(tt.reference, name)(x, packed, bias, residual=residual, **options)

    def derivatives(function, dtype):
        point, direction = ([t.to(dtype) for t in tensors] for tensors in (at, along))
        yield torch.func.jvp(function, (*point,), (*direction,))[1]
        for i, tensor in enumerate(point):  # along each tensor alone
            one = lambda t, i=i: function(*point[:i], t, *point[i + 1 :])  # noqa: E731
            with forward_ad.dual_level():
                yield forward_ad.unpack_dual(
                    one(forward_ad.make_dual(tensor, direction[i]))
                ).tangent
        loss = torch.func.grad(lambda *t: function(*t).pow(3).sum(), (0, 1, 2, 3))
        yield from torch.func.jvp(loss, (*point,), (*direction,))[1]

    expected = list(derivatives(reference, torch.float64))
    launches.clear()
    for actual, truth in zip(derivatives(ours, torch.float32), expected, strict=True):
        assert oracle.relative_error(actual, truth) < 1e-5  # float32, three convolutions deep
    assert launches["conv"] > 6 and launches["weight_grad"] > 2


def test_jacobian_by_forward_mode_is_antisymmetric(device):
    layer = tt.TiedConv2d(3, kernel_size=3, padding=1, symmetry="skew_adjoint", device=device)
    x = randn(3, 3, 3, device=device)
    jacobian = torch.func.jacfwd(layer)(x).reshape(27, 27)
    dense = torch.func.jacrev(layer.to_conv())(x).reshape(27, 27)
    torch.testing.assert_close(jacobian, dense)
    torch.testing.assert_close(jacobian, -jacobian.T)


def test_forward_mode_in_half_precision_has_the_dtype_of_the_output(device):
    layer = tt.TiedConv2d(4, kernel_size=3, padding=1, device=device)
    x, tangent = randn(2, 1, 4, 5, 5, device=device)
    with torch.autocast(device, torch.float16), forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, tangent))
        actual = forward_ad.unpack_dual(dual).tangent
    assert actual.dtype == torch.float16
    expected = layer(tangent) - layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(actual.float(), expected, rtol=4e-3, atol=4e-3)


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
    assert (
        not layer.packed_weight.grad.any() and not layer.bias.grad.any() and x.grad.shape == x.shape
    )
