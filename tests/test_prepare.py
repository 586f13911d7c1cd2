"""A weight that is prepared once and passed instead of the packed vector."""

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import triton_tied as tt
from triton_tied import dispatch, packing

pytestmark = pytest.mark.usefixtures("one_config")

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
FUNCTIONS = {
    name: {d: getattr(module, f"tied_conv{d}d") for d in (1, 2, 3)}
    for name, module in {"functions": tt, "reference": tt.reference}.items()
}
CHANNELS_LAST = {1: [], 2: [torch.channels_last], 3: [torch.channels_last_3d]}
# The kernels serve float32 where they are interpreted, and never float64.
DTYPE = torch.float32 if dispatch.INTERPRETED else torch.float64
SIDES = (2, 3) if dispatch.INTERPRETED else (6, 6)  # the interpreter is slow
TOLERANCE = 1e-5 if dispatch.INTERPRETED else 1e-13


def assert_same(actual, expected, tolerance=TOLERANCE):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and oracle.relative_error(a, e) <= tolerance


@pytest.fixture
def packed():
    return torch.randn(tt.packed_size(4, 3), dtype=DTYPE, requires_grad=True)


@pytest.fixture
def x():
    return torch.randn(2, 4, *SIDES, dtype=DTYPE)


def repeated(x, packed, times=12):
    for _ in range(times):
        x = tt.tied_conv2d(x, packed, kernel_size=3, padding=1, alpha=0.3)
    return x


def prepared(packed, **options):
    return tt.prepare(packed, 4, 3, **options)


def gradient(function, packed):
    packed.grad = None
    function()
    return packed.grad


@pytest.mark.parametrize("path", FUNCTIONS)
@pytest.mark.parametrize(
    "dims, groups, symmetry",
    [
        (1, 1, "self_adjoint"),
        (1, 4, "skew_adjoint"),
        (2, 1, "skew_adjoint"),
        (2, 2, "self_adjoint"),
        (2, 4, "self_adjoint"),
        (3, 2, "skew_adjoint"),
    ],
)
def test_it_takes_the_place_of_packed(path, dims, groups, symmetry):
    kernel = {1: (3,), 2: (3, 1), 3: (3, 2, 1)}[dims]
    layout = (4, kernel, groups, symmetry)
    packed = torch.randn(tt.packed_size(*layout), dtype=DTYPE, requires_grad=True)
    function = FUNCTIONS[path][dims]
    orders = [torch.contiguous_format, *CHANNELS_LAST[dims]]
    options = {"kernel_size": kernel, "groups": groups, "symmetry": symmetry}
    for stride in (1, 2):
        for order in orders:
            x = torch.randn(1, 4, *[4] * dims, dtype=DTYPE).contiguous(memory_format=order)
            x.requires_grad_()
            expected = function(x, packed, stride=stride, **options)
            upstream = torch.randn_like(expected)
            grads = torch.autograd.grad(expected, (x, packed), upstream)
            for memory_format in orders:
                weight = tt.prepare(packed, *layout, memory_format=memory_format)
                actual = function(x, weight, stride=stride, **options)
                assert actual.stride() == expected.stride()
                assert_same([actual], [expected])
                assert_same(torch.autograd.grad(actual, (x, packed), upstream), grads)


def test_it_is_expanded_once_and_folded_once_for_each_backward(packed, x, monkeypatch):
    monkeypatch.setattr(packing, "_MAX_GATHERED", 0)
    seen = {"expand": 0, "fold": 0}
    for name in seen:
        function = getattr(packing, name)

        def counted(*arguments, name=name, function=function):
            seen[name] += 1
            return function(*arguments)

        monkeypatch.setattr(packing, name, counted)
    packed, x = packed.detach().double().requires_grad_(), x.double()
    weight = prepared(packed)
    for count in (1, 2, 3):
        repeated(x, weight).square().sum().backward()
        assert seen == {"expand": 1, "fold": count}


def test_backwards_add_up(packed, x):
    def train(weight):
        y = repeated(x, weight, 2)
        y[:1].square().sum().backward(retain_graph=True)
        y.square().sum().backward()
        repeated(x, weight, 1).sum().backward()

    expected = gradient(lambda: train(packed), packed)
    assert_same([gradient(lambda: train(prepared(packed)), packed)], [expected])


@pytest.mark.parametrize("use_reentrant", [False, True][: 1 if dispatch.INTERPRETED else 2])
@pytest.mark.parametrize("made", ["outside", "inside", "passed"])
def test_checkpoints(use_reentrant, made, packed, x):
    x.requires_grad_()

    def train(weight, segment, *more):
        y = tt.tied_conv2d(x, weight, kernel_size=3, padding=1)
        for _ in range(2):
            y = checkpoint(segment, y, *more, use_reentrant=use_reentrant)
        y.square().sum().backward()

    expected = gradient(lambda: train(packed, lambda y: repeated(y, packed, 1)), packed)
    weight = prepared(packed)
    segment = {
        "outside": lambda y: repeated(y, weight, 1),
        "inside": lambda y: repeated(y, prepared(packed), 1),
        "passed": lambda y, weight: repeated(y, weight, 1),
    }[made]
    more = [weight] if made == "passed" else []
    assert_same([gradient(lambda: train(weight, segment, *more), packed)], [expected])


@pytest.mark.parametrize("made", ["outside", "inside", "passed"])
def test_the_compiler_takes_it_whole(made, packed, x):
    def apply(x, weight):
        return repeated(x, prepared(packed) if made == "inside" else weight, 2).tanh()

    weight = prepared(packed)
    compiled = torch.compile(
        apply if made == "passed" else lambda x: apply(x, weight),
        backend="aot_eager",
        fullgraph=True,
    )
    more = [weight] if made == "passed" else []
    expected = gradient(lambda: apply(x, packed).square().sum().backward(), packed)
    for _ in range(2):
        assert_same([compiled(x, *more)], [apply(x, packed)])
        actual = gradient(lambda: compiled(x, *more).square().sum().backward(), packed)
        assert_same([actual], [expected])


def test_transforms(packed, x):
    packed = packed.detach()

    def ours(packed, x):
        return repeated(x, prepared(packed), 2).square().sum()

    def truth(packed, x):
        return repeated(x, packed, 2).square().sum()

    assert_same(torch.func.grad(ours, (0, 1))(packed, x), torch.func.grad(truth, (0, 1))(packed, x))
    both = torch.stack([packed, 2 * packed])
    actual = torch.vmap(lambda p: repeated(x, prepared(p), 1))(both)
    assert_same([actual], [torch.stack([repeated(x, p, 1) for p in both])])
    weight = prepared(packed)
    actual = torch.func.grad(lambda x: repeated(x, weight, 2).square().sum())(x)
    assert_same([actual], [torch.func.grad(truth, 1)(packed, x)])


@pytest.mark.skipif(dispatch.INTERPRETED, reason="derivatives by differences need float64")
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_derivatives_of_every_kind(symmetry, expansion):
    packed = torch.randn(tt.packed_size(2, 3, symmetry=symmetry), dtype=DTYPE, requires_grad=True)
    x = torch.randn(1, 2, 4, 4, dtype=DTYPE, requires_grad=True)

    def twice(x, packed):
        weight = tt.prepare(packed, 2, 3, symmetry=symmetry)
        for _ in range(2):
            x = tt.tied_conv2d(x, weight, kernel_size=3, padding=1, symmetry=symmetry)
        return x

    assert torch.autograd.gradcheck(twice, (x, packed), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(twice, (x, packed))


@pytest.mark.parametrize("when", ["before", "inside", "by dtype"])
def test_autocast_computes_in_half(when):
    packed = torch.randn(tt.packed_size(4, 3), requires_grad=True)
    x = torch.randn(2, 4, 6, 6)
    half = torch.float16 if dispatch.INTERPRETED else torch.bfloat16
    weight = prepared(packed, dtype=half if when == "by dtype" else None)
    with torch.autocast("cpu", half):
        expected = repeated(x, packed, 2)
        (grad,) = torch.autograd.grad(expected.float().sum(), packed)
        weight = prepared(packed) if when == "inside" else weight
        actual = repeated(x, weight, 2)
        assert actual.dtype == half
    assert torch.equal(actual, expected)
    if when != "before":
        assert weight.packed.dtype == half
    assert_same(torch.autograd.grad(actual.float().sum(), packed), [grad], tolerance=2e-2)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_it_is_what_packed_was(packed, x, precision, convolution_precision):
    convolution_precision.fp32_precision = precision  # the kernels read packed, or matrices
    weight, before, dense = prepared(packed), repeated(x, packed, 2), tt.unpack(packed, 4, 3)
    with torch.no_grad():
        packed.mul_(2)
    again = repeated(x, weight, 2)
    assert torch.equal(again, before) and torch.equal(tt.unpack(weight, 4, 3), dense)
    again.sum().backward()
    assert_same([repeated(x, prepared(packed), 2)], [4 * before])


def test_unpack_takes_it(packed):
    weight = prepared(packed)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        dense = tt.unpack(weight, 4, 3, memory_format=memory_format)
        assert torch.equal(dense, tt.unpack(packed, 4, 3))
        assert dense.is_contiguous(memory_format=memory_format)
    upstream = torch.randn_like(dense)
    (expected,) = torch.autograd.grad(tt.unpack(packed, 4, 3), packed, upstream)
    assert_same(torch.autograd.grad(dense, packed, upstream), [expected])


def test_cached_leaves_it_alone(packed, x):
    weight = prepared(packed)
    with tt.cached():
        repeated(x, packed, 2).sum().backward()
        expected, packed.grad = packed.grad, None
        repeated(x, weight, 2).sum().backward()
    assert_same([packed.grad], [expected])


def test_mistakes_are_told(packed, x):
    weight = prepared(packed)
    call = {"kernel_size": 3, "padding": 1}
    wrong = {"symmetry": "skew_adjoint"}, {"kernel_size": 4}, {"kernel_size": (9, 1)}, {"groups": 2}
    for option in wrong:
        with pytest.raises((RuntimeError, ValueError)):
            tt.tied_conv2d(x, weight, **{**call, **option})
    even = tt.prepare(torch.randn(tt.packed_size(4, 2), dtype=DTYPE), 4, 2)
    options = {"kernel_size": 2, "symmetry": "skew_adjoint"}  # of the same length
    for function in (tt.tied_conv2d, tt.reference.tied_conv2d):
        with pytest.raises(ValueError, match="prepared for.*skew_adjoint.*one for.*self_adjoint"):
            function(x, even, **options)
    with pytest.raises(ValueError, match="prepared for"):
        tt.unpack(even, 4, **options)
    with pytest.raises(RuntimeError, match="should be the same"):
        tt.tied_conv2d(x.half(), weight, **call)
    with pytest.raises(ValueError, match="74 elements"):
        prepared(packed[1:])
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        prepared(packed.tolist())
    with pytest.raises(NotImplementedError, match="int8"):
        prepared(packed, dtype=torch.int8)
    with pytest.raises(ValueError, match="memory_format"):
        prepared(packed, memory_format=torch.channels_last_3d)


def test_it_shows_what_it_is_for(packed):
    shown = repr(prepared(packed))
    assert shown.startswith("PreparedWeight(channels=4, kernel_size=(3, 3)") and str(DTYPE) in shown
