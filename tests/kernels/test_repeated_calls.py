"""A call whose like was seen before goes straight to its launches; nothing may be stale, skipped or
lost on that way."""

import collections
import contextlib

import numpy as np
import pytest
import torch
from oracle import relative_error
from problems import INTERPRETED
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import triton_tied as tt
from triton_tied import functional
from triton_tied.autotune import choices, first_use, recording, select, tuned_configs
from triton_tied.kernels import launch
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.operators import autograd_and_vmap, description

OPTIONS = {"kernel_size": 3, "padding": 1}
BOUND = 1e-5  # relative, of sums of 36 products in float32


@pytest.fixture(autouse=True)
def long_ways(monkeypatch):
    """How often a call went the long way."""
    tuned_configs.forget()
    seen, convolve = [], functional.convolve
    monkeypatch.setattr(functional, "convolve", lambda *a: (seen.append(a), convolve(*a))[1])
    yield seen
    tuned_configs.forget()


def tensors(device, dtype=torch.float32, last=True, channels=4):
    """An image, a packed vector and a bias, of fresh numbers."""
    x = torch.randn(2, channels, 5, 3, device=device).to(dtype)
    sizes = tt.packed_size(channels, 3), channels
    packed, bias = (torch.randn(size, device=device).to(dtype) for size in sizes)
    return x.contiguous(memory_format=torch.channels_last) if last else x, packed, bias


def check(x, packed, bias, **options):
    """The call, held against the reference in float64."""
    options = {**OPTIONS, **options}
    y = tt.tied_conv2d(x, packed, bias, **options)
    doubles = [None if t is None else t.double() for t in (x, packed, bias)]
    if "residual" in options:
        options["residual"] = options["residual"].double()
    bound = BOUND if y.dtype == torch.float32 else 4e-3
    assert relative_error(y, tt.reference.tied_conv2d(*doubles, **options)) < bound
    return y


def test_the_second_call_of_a_description_takes_the_short_way(device, long_ways, monkeypatch):
    check(*tensors(device))
    for name in ("_check", "_check_once", "takes_operators"):
        monkeypatch.setattr(functional, name, None)
    check(*tensors(device))
    check(*tensors(device), alpha=0.5, beta=3)  # numbers are no part of it
    assert len(long_ways) == 1


OTHERS = {
    "sizes": lambda t: ((t[0][:1], *t[1:]), {}),
    "memory": lambda t: ((t[0].contiguous(), *t[1:]), {}),
    "alignment": lambda t: ((_shifted(t[0]), *t[1:]), {}),
    "alignment of the weight": lambda t: ((t[0], _shifted(t[1]), t[2]), {}),
    "alignment of the bias": lambda t: ((*t[:2], _shifted(t[2])), {}),
    "dtype": lambda t: ([each.half() for each in t], {}),
    "no bias": lambda t: ((*t[:2], None), {}),
    "a residual": lambda t: (t, {"residual": torch.randn_like(t[0])}),
    "padding": lambda t: (t, {"padding": 2}),
    "dilation": lambda t: (t, {"dilation": 2, "padding": 2}),
    "padding mode": lambda t: (t, {"padding_mode": "circular"}),
    "another padding mode": lambda t: (t, {"padding_mode": "reflect"}),
    "unbatched": lambda t: ((t[0][0], *t[1:]), {}),
}


def _shifted(tensor):
    """The same, one number behind a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


@pytest.mark.parametrize("name", OTHERS)
def test_another_description_takes_the_long_way_once(name, device, long_ways):
    check(*tensors(device))
    for _ in range(2):
        arguments, options = OTHERS[name](tensors(device))
        check(*arguments, **options)
    assert len(long_ways) == 2


def test_autocast_is_part_of_the_description(device, long_ways):
    given = tensors(device)
    check(*given)
    for _ in range(2):
        with torch.autocast(device, torch.float16):
            assert check(*given).dtype == torch.float16
    assert check(*given).dtype == torch.float32 and len(long_ways) == 2


@pytest.mark.skipif(torch.version.hip is not None, reason="tf32 is NVIDIA's")
def test_the_setting_for_float32_is_part_of_the_description(
    device, long_ways, convolution_precision, monkeypatch
):
    seen, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda plan, call: (seen.append(plan), run(plan, call))[1])
    given = tensors(device, channels=8)  # of fewer no matrices are multiplied
    for precision in ("ieee", "tf32", "ieee"):
        convolution_precision.fp32_precision = precision
        tt.tied_conv2d(*given, **OPTIONS)
    found = [{"ieee", "tf32"} & set(plan.main.constants) for plan in seen]
    assert found == [{"ieee"}, {"tf32"}, {"ieee"}] and len(long_ways) == 2


MISTAKES = {
    "True for 1": ({"padding": True}, TypeError, "padding must be an int"),
    "1.0 for 1": ({"padding": 1.0}, TypeError, "padding must be an int"),
    "(3, 3.0)": ({"kernel_size": (3, 3.0)}, TypeError, "kernel_size must be an int"),
    "groups": ({"groups": True}, TypeError, "groups must be an int"),
    "symmetry": ({"symmetry": "even"}, ValueError, "symmetry must be one of"),
    "padding mode": ({"padding_mode": "zero"}, ValueError, "padding_mode must be one of"),
    "alpha": ({"alpha": "1"}, TypeError, "alpha must be a real number"),
    "beta": ({"beta": None}, TypeError, "beta must be a real number"),
    "alpha, a bool": ({"alpha": True}, TypeError, "alpha must be a real number"),
    "stride": ({"stride": 0}, RuntimeError, "non-positive stride"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_no_check_is_skipped_since_an_equal_call_was_right(name, device):
    options, error, message = MISTAKES[name]
    given = tensors(device)
    for kernel_size in (3, (3, 3)):
        tt.tied_conv2d(*given, kernel_size=kernel_size, padding=1, groups=1)
    with pytest.raises(error, match=message):
        tt.tied_conv2d(*given, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "right, wrong",
    [
        (np.int64(1), np.array([1])),  # of the same bytes
        (np.int32(1), np.float32(1e-45)),
        ((np.int8(1), 1), (np.True_, 1)),
    ],
    ids=str,
)
def test_numbers_of_other_libraries_are_checked_each_time(right, wrong, device):
    given = tensors(device)
    for _ in range(2):
        check(*given, padding=right)
    with pytest.raises(TypeError, match="padding must be an int"):
        tt.tied_conv2d(*given, kernel_size=3, padding=wrong)


def test_tensors_are_checked_each_time(device):
    x, packed, bias = tensors(device)
    for _ in range(2):
        check(x, packed, bias)
    for wrong, message in [
        ((x, packed[1:], bias), "expected packed"),
        ((x, packed, bias[1:]), "expected bias"),
        ((x, packed.half(), bias), "should be the same"),
        ((x.to_sparse(), packed, bias), "not implemented"),
        ((x, packed.int(), bias), "not implemented"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            tt.tied_conv2d(*wrong, **OPTIONS)
    with pytest.raises(TypeError, match="must be Tensor"):
        tt.tied_conv2d(x, packed.tolist(), bias, **OPTIONS)


@pytest.mark.parametrize("which", range(3), ids=["image", "weight", "bias"])
def test_memory_that_holds_negatives_is_read_with_its_sign(which, device):
    given = tensors(device)
    check(*given)
    negative = [torch._neg_view(t) if i == which else t for i, t in enumerate(given)]
    check(*negative)
    check(*given)


def test_tables_that_are_read_again_are_asked_again(device, long_ways, monkeypatch):
    check(*tensors(device))
    tuned_configs.read_again()
    asked, choose = [], select.choose
    monkeypatch.setattr(select, "choose", lambda *a: (asked.append(a), choose(*a))[1])
    check(*tensors(device))
    assert len(long_ways) == 2 and len(asked) == 1


def test_configs_given_by_hand_are_taken_and_not_kept(device, monkeypatch):
    seen, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda p, c: (seen.append(p.config), run(p, c))[1])
    x, packed, bias = tensors(device)
    x.requires_grad_()
    packed.requires_grad_()

    def step():
        seen.clear()
        tt.tied_conv2d(x, packed, bias, **OPTIONS).square().sum().backward()
        return list(seen)

    own = step()
    assert step() == own
    given = [ConvConfig((1, 2, 4), 16, 16), WeightGradConfig((1, 2, 8), 16, 16)]
    with select.using(conv=given[0], weight_grad=given[1]):
        assert step() == [given[0], given[0], given[1]]
    assert step() == own != [given[0], given[0], given[1]]


def test_a_known_call_is_recorded(device):
    given = tensors(device)
    check(*given)
    with recording.recording() as found:
        check(*given)
    assert len(found) == 1


CARE = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("made", CARE)
@pytest.mark.parametrize("asked", CARE)
def test_a_choice_serves_while_no_more_care_is_asked_for(made, asked, monkeypatch):
    """So it does in the capture of a CUDA graph, in which nothing is timed or checked."""
    monkeypatch.setattr(select, "times_on_first_use", lambda device: asked[0])
    monkeypatch.setattr(first_use, "checks", lambda device: asked[1])
    choice = select.Choice(None, *made)
    expected = made[0] >= asked[0] and made[1] >= asked[1]
    assert choice.serves(torch.device("cuda", 0)) == expected


class Listening(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


LISTENERS = {
    "a mode": Listening,
    "a profiler": profile,
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", LISTENERS)
def test_a_call_that_others_see_has_no_description(name, device, long_ways):
    given = tensors(device)
    check(*given)
    with LISTENERS[name]():
        assert description.key_of(2, *given, None, ()) is None
        check(*given)
    assert description.key_of(2, *given, None, ()) is not None
    assert len(long_ways) == 2


def test_transforms_and_the_compiler_see_a_known_call(device):
    x, packed, bias = tensors(device)
    check(x, packed, bias)

    def loss(packed):
        return tt.tied_conv2d(x, packed, bias, **OPTIONS).pow(2).sum()

    def truth(packed):
        doubles = (x.double(), packed, bias.double())
        return tt.reference.tied_conv2d(*doubles, **OPTIONS).pow(2).sum()

    expected = torch.func.grad(truth)(packed.double())
    assert relative_error(torch.func.grad(loss)(packed), expected) < BOUND
    many = torch.stack([packed, 2 * packed])
    for actual, each in zip(torch.vmap(torch.func.grad(loss))(many), many, strict=True):
        assert relative_error(actual, torch.func.grad(truth)(each.double())) < BOUND
    tangent = torch.randn_like(packed)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(packed, tangent)
        slope = forward_ad.unpack_dual(loss(dual)).tangent
    assert relative_error(slope, (expected * tangent).sum()) < 1e-4  # the sum cancels
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(loss, fullgraph=True, backend=keep)(packed)
    assert len(graphs) == 1


def test_gradients_follow_what_requires_them(device):
    """Though the description is the same with and without."""
    given = tensors(device)
    check(*given)
    for needs in [(True, True, True), (False, True, False), (True, False, False)] * 2:
        leaves = [t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        y = tt.tied_conv2d(*leaves, alpha=0.5, **OPTIONS)
        expected = tt.reference.tied_conv2d(*doubles, alpha=0.5, **OPTIONS)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected.backward(upstream.double())
        for leaf, double in zip(leaves, doubles, strict=True):
            assert (leaf.grad is None) == (double.grad is None)
            assert leaf.grad is None or relative_error(leaf.grad, double.grad) < BOUND
    with torch.no_grad():
        assert not tt.tied_conv2d(*leaves, **OPTIONS).requires_grad


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("last", [True, False])
def test_second_derivatives_of_a_known_call(padding_mode, last, device):
    options = {**OPTIONS, "padding_mode": padding_mode}

    def penalty(function, x, packed):
        x, packed = (t.detach().requires_grad_() for t in (x, packed))
        (grad,) = torch.autograd.grad(
            function(x, packed, **options).pow(3).sum(), x, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), (x, packed))

    for _ in range(2):
        x, packed, _ = tensors(device, last=last)
        actual = penalty(tt.tied_conv2d, x, packed)
        expected = penalty(tt.reference.tied_conv2d, x.double(), packed.double())
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < BOUND


def test_output_gradients_in_other_memory_have_backwards_of_their_own(device):
    x, packed, _ = tensors(device)
    x.requires_grad_()
    double = x.detach().double().requires_grad_()
    y = tt.tied_conv2d(x, packed, **OPTIONS)
    expected = tt.reference.tied_conv2d(double, packed.double(), **OPTIONS)
    dense = torch.randn_like(y)
    for grad in (
        dense,
        dense.contiguous(),
        dense[:1].expand(2, -1, -1, -1),
        dense,
        _shifted(dense),
    ):
        (actual,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, double, grad.double(), retain_graph=True)
        assert relative_error(actual, wanted) < BOUND


@pytest.mark.parametrize("how", ["cached", "prepared"])
def test_weights_made_before_are_reused_by_known_calls(how, device, monkeypatch):
    given = tensors(device, torch.float16)
    check(*given)
    seen, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda p, c: (seen.append(c.weights), run(p, c))[1])
    with tt.cached() if how == "cached" else contextlib.nullcontext():
        x, packed, bias = (each.float() if how == "cached" else each for each in given)
        weight = tt.prepare(packed, 4, 3) if how == "prepared" else packed
        with torch.autocast(device, torch.float16):
            for _ in range(3):
                tt.tied_conv2d(x.half(), weight, bias, **OPTIONS)
    assert len({weights.data_ptr() for weights in seen}) == 1 and len(seen) == 3
    if how == "prepared":
        with pytest.raises(ValueError, match="prepared for"):
            tt.tied_conv2d(x, weight, bias, kernel_size=(1, 9), padding=(0, 4))


def test_layers_of_one_description_share_what_is_known(device, long_ways):
    layers = [tt.TiedConv2d(4, 3, padding=1, device=device) for _ in range(3)]
    x = tensors(device)[0]
    for layer in layers * 2:
        y = layer(x)
        expected = tt.reference.tied_conv2d(
            x.double(), layer.packed_weight.double(), layer.bias.double(), **OPTIONS
        )
        assert relative_error(y, expected) < BOUND
    assert len(long_ways) == 1
    layers[0].padding = (2, 2)
    assert layers[0](x).shape == (2, 4, 7, 5) and len(long_ways) == 2


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels serve")
def test_a_rehearsal_leaves_nothing_behind(device, monkeypatch):
    """It goes through the operators where the reference serves."""
    monkeypatch.setattr("triton_tied.operators.kernel_path.why_reference", lambda *_: "no GPU")
    recording.problems_of(lambda: tt.tied_conv2d(*tensors(device), **OPTIONS))
    assert not any(isinstance(key[0], int) for key in choices._choices)


def test_known_calls_of_one_row(device, long_ways):
    for _ in range(2):
        x, packed = torch.randn(2, 4, 7, device=device), torch.randn(tt.packed_size(4, (3,)))
        packed = packed.to(device)
        y = tt.tied_conv1d(x, packed, kernel_size=3, padding=1)
        expected = tt.reference.tied_conv1d(x.double(), packed.double(), kernel_size=3, padding=1)
        assert y.shape == x.shape and relative_error(y, expected) < BOUND
    assert len(long_ways) == 1


def test_backward_of_a_known_call_asks_for_no_choice(device, monkeypatch):
    """Not even its look-up, from the second time on."""
    given = tensors(device)

    def step():
        leaves = [t.detach().requires_grad_() for t in given]
        y = tt.tied_conv2d(*leaves, **OPTIONS)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    step()
    asked = collections.Counter()
    monkeypatch.setattr(select, "_choice", lambda *_: asked.update(["choice"]))
    monkeypatch.setattr(autograd_and_vmap, "apply", lambda *_: asked.update(["apply"]))
    step()
    assert not asked
