"""A tied layer in the place of an ``nn.Conv2d``: what other code asks of one."""

import copy
import fractions
import pickle

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import triton_tied as tt
from triton_tied import dispatch

LAYERS = {
    1: (tt.TiedConv1d, nn.Conv1d),
    2: (tt.TiedConv2d, nn.Conv2d),
    3: (tt.TiedConv3d, nn.Conv3d),
}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


# ---- attributes


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_attributes_are_those_of_the_dense_layer(dims):
    tied_class, _ = LAYERS[dims]
    layer = tied_class(6, 3, stride=2, padding=1, dilation=2, groups=3)
    dense = layer.to_conv()
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    for name in [*names, "groups", "transposed", "output_padding", "padding_mode"]:
        assert getattr(layer, name) == getattr(dense, name), name


@pytest.mark.parametrize(
    "name, value",
    [
        ("symmetry", "skew_adjoint"),
        ("channels", 8),
        ("in_channels", 8),
        ("out_channels", 8),
        ("kernel_size", (4, 4)),
        ("groups", 2),
    ],
)
def test_what_the_free_numbers_mean_cannot_be_changed(name, value):
    layer = tt.TiedConv2d(4, 2)  # both symmetries have the same length
    weight = layer.weight.detach().clone()
    with pytest.raises(AttributeError, match=f"{name}.*fixed.*another layer"):
        setattr(layer, name, value)
    assert torch.equal(layer.weight, weight)


def test_the_walk_over_the_image_can_be_changed_as_in_the_dense_layer():
    layer, x = tt.TiedConv2d(4, 3), torch.randn(1, 4, 9, 9)
    dense = layer.to_conv()
    for each in (layer, dense):
        each.stride, each.padding, each.dilation = (2, 1), (2, 2), (1, 2)
    torch.testing.assert_close(layer(x), dense(x))


def test_recipes_by_name_take_the_parameter_for_a_weight():
    model = nn.Sequential(tt.TiedConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    decayed = {name for name, _ in model.named_parameters() if name.endswith("weight")}
    assert decayed == {"0.packed_weight", "2.weight"}


# ---- memory format


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_channels_last_layer_answers_in_channels_last_whatever_comes(dims, kernel_size):
    tied_class, dense_class = LAYERS[dims]
    layer = tied_class(4, kernel_size, padding=kernel_size // 2)
    dense = dense_class(4, 4, kernel_size, padding=kernel_size // 2)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.bias.copy_(layer.bias)
    for model in (layer, dense):
        nn.Sequential(model).to(memory_format=FORMATS[dims])
    x = torch.randn(2, 4, *[4] * dims)
    inputs = {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=FORMATS[dims]),
        "transposed": x.transpose(-1, -2),
        "batch of one": x[:1],
        "pixels first": x[0].movedim(0, -1).contiguous().movedim(-1, 0)[None],
        "unbatched": x[0],
    }
    for name, image in inputs.items():
        image = image.detach().requires_grad_()
        actual, expected = layer(image), dense(image)
        torch.testing.assert_close(actual, expected, msg=name)
        if name != "unbatched":  # PyTorch's convolution over volumes may answer otherwise
            assert dims == 3 or actual.is_contiguous(memory_format=FORMATS[dims]), name
            assert actual.stride() == expected.stride(), name
        grads = [torch.autograd.grad(y.square().sum(), image)[0] for y in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_channels_last_stays_with_the_layer_until_another_format_is_asked_for():
    layer, x = tt.TiedConv2d(4, 3, padding=1), torch.randn(2, 4, 5, 5)

    def is_channels_last(layer):
        with torch.no_grad():
            y = layer(x.to(layer.bias.dtype))
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) is (
            y.is_contiguous(memory_format=torch.channels_last)
        )
        return y.is_contiguous(memory_format=torch.channels_last)

    assert not is_channels_last(layer)
    layer.to(memory_format=torch.channels_last)
    for other in (
        layer,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).double().float(),
        copy.deepcopy(layer).to("cpu", torch.float64),
        tt.TiedConv2d.from_conv(layer.to_conv()),
    ):
        assert is_channels_last(other)
    assert layer.to_conv().weight.is_contiguous(memory_format=torch.channels_last)
    assert not is_channels_last(layer.to(memory_format=torch.contiguous_format))
    empty = tt.TiedConv2d(4, 3, device="meta").to(memory_format=torch.channels_last)
    assert empty.to_empty(device="cpu")._channels_last


@pytest.mark.parametrize("kept_as", ["buffer", "attribute"])  # a wrapper may take the parameters
def test_a_layer_without_a_parameter_is_converted(kept_as):
    layer, dense = tt.TiedConv2d(4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
    for module, name in ((layer, "packed_weight"), (dense, "weight")):
        numbers = getattr(module, name).detach()
        delattr(module, name)
        if kept_as == "buffer":
            module.register_buffer(name, numbers)
        else:
            setattr(module, name, numbers)
    x = torch.randn(2, 4, 5, 5)
    for module in (layer, dense):
        module.half().to(memory_format=torch.channels_last)
    expected = torch.float16 if kept_as == "buffer" else torch.float32
    assert layer.packed_weight.dtype == dense.weight.dtype == expected
    y = layer(x.to(expected))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_one_through_a_channels_last_layer_has_the_right_gradient():
    layer = tt.TiedConv2d(8, 3, padding=1, groups=2, dtype=torch.float64)
    image = torch.randn(5, 6, 8, dtype=torch.float64).permute(2, 0, 1)[None]
    layout = (8, (3, 3), 2, "self_adjoint")
    truth = F.conv2d(image, oracle.expand(layer.packed_weight, *layout), padding=1, groups=2)
    (expected,) = torch.autograd.grad(truth.square().sum(), layer.packed_weight)
    layer.bias = None
    layer.to(memory_format=torch.channels_last)
    (actual,) = torch.autograd.grad(layer(image).square().sum(), layer.packed_weight)
    torch.testing.assert_close(actual, expected)


# ---- alpha, beta and residual


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_takes_alpha_and_residual(dims, channels_last):
    tied_class, _ = LAYERS[dims]
    layer = tied_class(4, 3, padding=1, symmetry="skew_adjoint", dtype=torch.float64)
    if channels_last and dims > 1:
        layer.to(memory_format=FORMATS[dims])
    x, r = torch.randn(2, 2, 4, *[5] * dims, dtype=torch.float64)
    plain = layer(x)
    torch.testing.assert_close(layer(x, alpha=-0.3), -0.3 * plain)
    torch.testing.assert_close(layer(x, residual=r), plain + r)
    both = layer(x, alpha=2, residual=r)
    torch.testing.assert_close(both, 2 * plain + r)
    torch.testing.assert_close(layer(x, residual=r, beta=-0.7), plain - 0.7 * r)
    assert torch.equal(layer(x, residual=r * torch.nan, beta=0), plain)
    assert dims == 3 or both.stride() == plain.stride()
    with pytest.raises(TypeError):
        layer(x, -0.3)  # by name only


REALS = [np.float32(0.5), np.float64(0.5), np.int64(2), fractions.Fraction(1, 2), 0.5, 2]


@pytest.mark.parametrize("alpha", REALS, ids=lambda a: type(a).__name__)
def test_alpha_is_any_real_number(alpha):
    layer, x = tt.TiedConv2d(4, 3), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x, alpha=alpha), float(alpha) * layer(x))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_alpha_is_a_tensor_of_no_dimension_with_its_gradient(dtype, add):
    kind = torch.float32 if dispatch.INTERPRETED else torch.float64
    layer = tt.TiedConv2d(4, 3, padding=1, dtype=kind)
    x, r = torch.randn(2, 1, 4, 4, 4, dtype=kind)
    alpha = torch.tensor(3, dtype=dtype, requires_grad=dtype.is_floating_point)
    residual = r if add else None
    y = layer(x, alpha=alpha, residual=residual)
    z = alpha * layer(x) + (r if add else 0)
    torch.testing.assert_close(y, z)
    assert y.dtype == kind
    reference = tt.reference.tied_conv2d(
        x, layer.packed_weight, layer.bias, kernel_size=3, padding=1, alpha=alpha, residual=residual
    )
    torch.testing.assert_close(y, reference)
    leaves = [layer.packed_weight, layer.bias, *([alpha] if alpha.requires_grad else [])]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (y, z)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_step_size_that_is_learned_is_taken_by_vmap_and_by_compilation():
    layer, x = tt.TiedConv2d(4, 3, padding=1), torch.randn(1, 4, 5, 5)
    steps = torch.rand(3)
    actual = torch.vmap(lambda a: layer(x, alpha=a, residual=x))(steps)
    expected = torch.stack([x + a * layer(x) for a in steps])
    torch.testing.assert_close(actual, expected)
    compiled = torch.compile(
        lambda a: layer(x, alpha=a, residual=x), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(steps[0]), expected[0])


# ---- from a dense layer and back


class Widened(nn.Conv2d):
    """Computes something else than its weight says."""

    def forward(self, input):
        return super().forward(input) + 1


class Scaled(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class Named(nn.Conv2d):
    """Computes the same."""


@pytest.mark.parametrize("subclass", [Widened, Scaled])
def test_subclass_with_a_forward_of_its_own_is_refused(subclass):
    with pytest.raises(TypeError, match=f"got {subclass.__name__}.*forward of its own"):
        tt.TiedConv2d.from_conv(subclass(4, 4, 3))


def test_subclass_and_parametrized_layer_that_compute_the_same_are_taken():
    dense = nn.utils.parametrizations.weight_norm(Named(4, 4, 3))
    layer = tt.TiedConv2d.from_conv(dense)
    nearest = (dense.weight + dense.weight.flip(2, 3).transpose(0, 1)) / 2
    torch.testing.assert_close(layer.weight, nearest)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False, None])
def test_what_is_trained_is_kept_both_ways(weight, bias):
    dense = nn.Conv2d(4, 4, 3, bias=bias is not None)
    dense.weight.requires_grad_(weight)
    if bias is not None:
        dense.bias.requires_grad_(bias)
    layer = tt.TiedConv2d.from_conv(dense)
    back = layer.to_conv()
    assert layer.packed_weight.requires_grad is back.weight.requires_grad is weight
    if bias is not None:
        assert layer.bias.requires_grad is back.bias.requires_grad is bias


def test_hooks_of_forward_and_backward_are_kept_both_ways():
    calls = []
    dense = nn.Conv2d(4, 4, 3)
    dense.register_forward_pre_hook(lambda m, args: calls.append(("before", type(m))))
    dense.register_forward_hook(
        lambda m, args, kwargs, out: calls.append(("after", type(m))) or 2 * out, with_kwargs=True
    )
    dense.register_full_backward_hook(lambda m, i, o: calls.append(("backward", type(m))))
    layer = tt.TiedConv2d.from_conv(dense)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    for module in (layer, layer.to_conv()):
        calls.clear()
        module(x).sum().backward()
        assert calls == [(name, type(module)) for name in ("before", "after", "backward")]
    bare = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), 2 * bare)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_hook_that_makes_the_dense_weight_is_not_kept(norm):
    dense = norm(nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(1, 4, 5, 5)
    dense(x)
    layer = tt.TiedConv2d.from_conv(dense)
    nearest = (dense.weight + dense.weight.flip(2, 3).transpose(0, 1)) / 2
    torch.testing.assert_close(layer(x), F.conv2d(x, nearest, dense.bias))


# ---- what traces, scripts and overrides


@pytest.mark.parametrize("channels_last", [False, True])
def test_symbolic_trace_has_the_function_as_a_node(channels_last):
    layer = tt.TiedConv2d(4, 3, padding=1, groups=2)
    if channels_last:
        layer.to(memory_format=torch.channels_last)
    model = nn.Sequential(layer, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert tt.tied_conv2d in [node.target for node in traced.graph.nodes]
    for x in torch.randn(2, 3, 4, 6, 6):
        torch.testing.assert_close(traced(x), model(x))
    again = pickle.loads(pickle.dumps(traced))
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_symbolic_trace_of_a_layer_alone_takes_its_options(channels_last):
    layer = tt.TiedConv2d(4, 3, padding=1)
    if channels_last:
        layer.to(memory_format=torch.channels_last)
    traced = torch.fx.symbolic_trace(layer)
    x, residual = torch.randn(2, 3, 4, 6, 6)
    for options in ({}, {"residual": residual, "beta": -0.5}):
        torch.testing.assert_close(traced(x, **options), layer(x, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: tt.AntisymmetricResidual2d(4),
        lambda: tt.AntisymmetricResidual2d(4, method="verlet", activation=nn.ReLU()),
        lambda: tt.SkewOrthogonalConv2d(4, 8, 3, stride=2, groups=2),
        lambda: tt.SkewOrthogonalConv2d(4, 3, 3, recompute=True),
    ],
)
def test_symbolic_trace_of_layers_built_on_the_functions(layer, training):
    model = nn.Sequential(layer(), nn.ReLU()).train(training)
    traced = torch.fx.symbolic_trace(model)
    saved = pickle.loads(pickle.dumps(traced))  # the other one shares the buffers of the model
    x, before = torch.randn(2, 4, 6, 6), copy.deepcopy(model.state_dict())
    expected = model(x)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    for graph in (saved, traced):
        torch.testing.assert_close(graph(x), expected)
        torch.testing.assert_close(graph.state_dict(), after)
    with pytest.raises(RuntimeError, match=r"input of size \[N, 4, H, W\].*size \[2, 3, 6, 6\]"):
        traced(x[:, :3])


def test_every_argument_of_the_functions_may_be_a_proxy():
    size = tt.packed_size(4, (3,))

    def step(x, packed, bias, alpha):
        return tt.tied_conv1d(
            x, packed, bias, kernel_size=3, padding=1, alpha=alpha, residual=x.relu(), beta=-2.0
        )

    arguments = (torch.randn(1, 4, 6), torch.randn(size), torch.randn(4), torch.tensor(0.3))
    traced = torch.fx.symbolic_trace(step)
    torch.testing.assert_close(traced(*arguments), step(*arguments))


SIZES = (6, (3, 1), 2, "skew_adjoint")
NAMED = {"kernel_size": (3, 1), "groups": 2, "symmetry": "skew_adjoint"}
OTHER_FUNCTIONS = {
    "unpack": (lambda p, x: tt.unpack(p, *SIZES).sin(), tt.unpack),
    "pack": (lambda p, x: tt.pack(x.reshape(6, 3, 3, 1), *SIZES[2:]) * p, tt.pack),
    "prepare": (lambda p, x: tt.tied_conv2d(x, tt.prepare(p, *SIZES), **NAMED), tt.prepare),
    "reference": (
        lambda p, x: tt.reference.tied_conv2d(x, p, **NAMED), tt.reference.tied_conv2d,
    ),
    "tied_exp": (lambda p, x: tt.tied_exp(x, p, terms=2, **NAMED), tt.tied_exp),
    "tied_linear": (lambda p, x: tt.tied_linear(x[..., 0].mT, p[:21]), tt.tied_linear),
    "inner": (lambda p, x: tt.inner(p, p.sin(), *SIZES), tt.inner),
    "norm": (lambda p, x: p * tt.norm(p, *SIZES), tt.norm),
    "scale_channels": (lambda p, x: tt.scale_channels(p, x[0, :, 0, 0], *SIZES), tt.scale_channels),
    "scale_groups": (lambda p, x: tt.scale_groups(p, x[0, :2, 0, 0], *SIZES), tt.scale_groups),
    "shift_diagonal": (
        lambda p, x: tt.shift_diagonal(p[:12], x[0, 0, 0, 0], 6, (1, 1), 2).sin(),
        tt.shift_diagonal,
    ),
    "spectral_norm": (lambda p, x: p / tt.spectral_norm(p, *SIZES), tt.spectral_norm),
    "power_iteration": (
        lambda p, x: tt.power_iteration(
            p, *SIZES, image_size=(9, 1), vector=x[0], tolerance=0, max_steps=2
        )[1],
        tt.power_iteration,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_every_function_is_a_node_and_is_seen_by_modes(name):
    function, target = OTHER_FUNCTIONS[name]
    p, x = torch.randn(tt.packed_size(*SIZES)), torch.randn(1, 6, 9, 1)
    traced = torch.fx.symbolic_trace(function)
    assert target in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(2 * p, x), function(2 * p, x))
    with Recorder() as mode:
        function(p, x)
    assert target in mode.seen


def test_dense_weight_in_a_traced_module_is_no_constant():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = tt.TiedConv2d(4, 3, padding=1)

        def forward(self, x):
            return F.conv2d(self.layer(x), self.layer.weight, padding=1)

    model, x = Twice(), torch.randn(1, 4, 5, 5)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        model.layer.packed_weight.mul_(2)
    torch.testing.assert_close(traced(x), model(x))


class Marked(torch.Tensor):
    """A subclass that PyTorch's own functions keep."""


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("argument", ["input", "packed", "residual"])
def test_subclasses_and_modes_are_asked_first(argument):
    tensors = {"input": torch.randn(1, 4, 6, 6), "packed": torch.randn(tt.packed_size(4, 3))}
    tensors["residual"] = torch.randn(1, 4, 4, 4)
    expected = tt.tied_conv2d(**tensors, kernel_size=3)
    marked = {**tensors, argument: tensors[argument].as_subclass(Marked)}
    actual = tt.tied_conv2d(**marked, kernel_size=3)
    assert type(actual) is Marked
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)
    with Recorder() as mode:
        tt.tied_conv2d(**tensors, kernel_size=3)
    assert mode.seen[0] is tt.tied_conv2d


def test_default_device_is_a_mode_that_changes_nothing():
    layer, x = tt.TiedConv2d(4, 3), torch.randn(1, 4, 5, 5)
    expected = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_is_refused_with_what_to_do_instead():
    model = nn.Sequential(tt.TiedConv2d(4, 3), nn.ReLU())
    with pytest.raises(NotImplementedError, match=r"TiedConv2d.*to_conv\(\)"):
        torch.jit.script(model)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(torch.jit.script(model[0].to_conv())(x), model[0](x))


# ---- devices and modes


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
def test_devices_without_float64_are_served(symmetry, dtype):
    layer = tt.TiedConv2d(4, 3, symmetry=symmetry, dtype=dtype)
    dense = nn.Conv2d(4, 4, 3, dtype=dtype)
    state = tt.TiedConv2d(4, 3, symmetry=symmetry, dtype=dtype).to_conv().state_dict()
    with NoFloat64():
        packed = tt.pack(dense.weight.detach(), symmetry=symmetry)
        tied = tt.TiedConv2d.from_conv(dense, symmetry)
        layer.load_state_dict(state)
        layer.weight = state["weight"]
        with pytest.raises(ValueError, match="not tied"):
            layer.weight = dense.weight.detach()
        tt.init.kaiming_normal_(tt.TiedConv2d(4, 3, symmetry=symmetry, dtype=dtype))
    assert torch.equal(packed, tied.packed_weight) and torch.equal(layer.weight, state["weight"])
    exact = tt.pack(dense.weight.detach().double(), symmetry=symmetry)  # and rounded once
    assert torch.equal(packed, exact.to(dtype))


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize("channels", [4, 90])
def test_layer_of_fake_tensors_after_one_of_real_ones(channels, symmetry):
    def shapes(layer, x):
        y = layer(x)
        grads = torch.autograd.grad(y.sum(), [layer.packed_weight, layer.bias])
        return [tuple(t.shape) for t in (y, layer.weight, *grads)], y.stride()

    options = {"kernel_size": 3, "padding": 1, "symmetry": symmetry}
    expected = shapes(tt.TiedConv2d(channels, **options), torch.randn(1, channels, 5, 6))
    with FakeTensorMode():
        layer = tt.TiedConv2d(channels, **options)
        assert shapes(layer, torch.randn(1, channels, 5, 6)) == expected
        again = tt.TiedConv2d.from_conv(layer.to_conv(), symmetry)
        assert shapes(again, torch.randn(1, channels, 5, 6)) == expected
    real = tt.TiedConv2d(channels, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert shapes(real, torch.randn(1, channels, 5, 6)) == expected
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(p) for name, p in real.named_parameters()}
        x = torch.randn(1, channels, 5, 6)
        assert torch.func.functional_call(real, fake, (x,)).shape == expected[0][0]
    assert shapes(real, torch.randn(1, channels, 5, 6)) == expected  # nothing fake was kept


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_autocast_gives_the_dtype_of_the_dense_layer_in_every_padding_mode(padding_mode, dims):
    tied_class, _ = LAYERS[dims]
    layer = tied_class(4, 3, padding=1, padding_mode=padding_mode)
    dense, x = layer.to_conv(), torch.randn(2, 4, *[6] * dims, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        actual, expected = layer(x), dense(x)
    assert actual.dtype == expected.dtype == torch.float16
    truth = dense(x)
    torch.testing.assert_close(actual.float(), truth, rtol=5e-3, atol=5e-3)
    grads = [torch.autograd.grad(y.float().sum(), x)[0] for y in (actual, truth)]
    torch.testing.assert_close(*grads, rtol=5e-3, atol=5e-3)
    with torch.autocast("cpu", dtype=torch.float16):  # a transform hides the images from it
        mapped = torch.func.vmap(layer)(x)
    assert mapped.dtype == torch.float16
    torch.testing.assert_close(mapped.float(), truth, rtol=5e-3, atol=5e-3)
