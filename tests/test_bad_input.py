"""Every mistake raises before any work, with the offending values and PyTorch's type of error."""

import re
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_tied as tt
from triton_tied import reference

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d, 3: tt.tied_conv3d}
SYMMETRIES = ["self_adjoint", "skew_adjoint"]

X = torch.randn(2, 8, 10, 10)
W = torch.randn(8, 8, 3, 3)
PACKED = torch.randn(tt.packed_size(8, 3))  # 292 elements
BIAS = torch.randn(8)


class Operators(TorchDispatchMode):
    """Records every operator that runs on tensors."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":  # questions about a tensor, such as its layout
            self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def assert_refused(error, message, function):
    """Raises, a second time as well, and where nobody listens; no operator runs, no tensor changes,
    no random number."""
    tensors = (X, W, PACKED, BIAS)
    before = [(t._version, t.clone()) for t in tensors]
    random, message = torch.get_rng_state(), re.compile(message, re.DOTALL)
    for _ in range(2):  # what the first call kept does not let the second one pass
        with pytest.raises(error, match=message):  # a plain call: under a mode there is none
            function()
        with Operators() as operators, pytest.raises(error, match=message):
            function()
        assert operators.ran == []
    for tensor, (version, values) in zip(tensors, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, values)
    assert torch.equal(torch.get_rng_state(), random)


def call(x=X, packed=PACKED, bias=None, kernel_size=3, **options):
    return tt.tied_conv2d(x, packed, bias, kernel_size=kernel_size, **options)


# options, what F.conv2d raises for them with a dense weight, and what our message says
OPTIONS = [
    ({"stride": 0}, RuntimeError, r"non-positive stride is not supported.*\[0, 0\]"),
    ({"stride": (1, -1)}, RuntimeError, r"non-positive stride.*\[1, -1\]"),
    ({"dilation": 0}, RuntimeError, r"non-positive dilation.*\[0, 0\]"),
    ({"dilation": -1}, RuntimeError, r"non-positive dilation.*\[-1, -1\]"),
    ({"dilation": (1, 0)}, RuntimeError, r"non-positive dilation.*\[1, 0\]"),
    ({"groups": 0}, RuntimeError, "non-positive groups is not supported.*0"),
    ({"groups": -1}, RuntimeError, "non-positive groups is not supported.*-1"),
    ({"groups": 3}, RuntimeError, r"groups=3.*\[2, 8, 10, 10\].*divisible by 3.*8 channels"),
    ({"padding": -1}, RuntimeError, r"negative padding is not supported.*\[-1, -1\]"),
    ({"padding": [0, -2]}, RuntimeError, r"negative padding is not supported.*\[0, -2\]"),
    ({"padding": "full"}, RuntimeError, "Invalid padding string: 'full'"),
    ({"padding": "Same"}, RuntimeError, "Invalid padding string: 'Same'"),
    ({"padding": ""}, RuntimeError, "Invalid padding string: ''"),
    ({"padding": "same", "stride": 2}, RuntimeError, r"'same' is not supported.*\[2, 2\]"),
    ({"padding": "same", "stride": (1, 2)}, RuntimeError, r"'same' is not supported.*\[1, 2\]"),
    ({"stride": (1, 1, 1)}, RuntimeError, r"stride.*list of 2 values.*stride=\[1, 1, 1\]"),
    ({"padding": (1, 1, 1)}, RuntimeError, r"padding.*list of 2 values.*padding=\[1, 1, 1\]"),
    ({"dilation": [1, 1, 1]}, RuntimeError, r"dilation.*list of 2 values.*\[1, 1, 1\]"),
    ({"stride": ()}, RuntimeError, r"stride.*list of 2 values.*stride=\[\]"),
    ({"padding": []}, RuntimeError, r"padding.*list of 2 values.*padding=\[\]"),
    ({"dilation": 5}, RuntimeError, r"\(10 x 10\). Kernel size: \(11 x 11\)"),
    ({"dilation": (1, 7), "padding": 2}, RuntimeError, r"\(14 x 14\). Kernel size: \(3 x 15\)"),
    ({"stride": 1.5}, TypeError, "stride.*1.5"),
    ({"stride": (1, 1.0)}, TypeError, r"stride.*\(1, 1.0\)"),
    ({"stride": (True, 1)}, TypeError, r"stride.*\(True, 1\)"),
    ({"stride": None}, TypeError, "stride.*None"),
    ({"stride": "1"}, TypeError, "stride.*'1'"),
    ({"padding": True}, TypeError, "padding.*True"),
    ({"padding": [True]}, TypeError, r"padding.*\[True\]"),
    ({"padding": (0, 1.0)}, TypeError, r"padding.*\(0, 1.0\)"),
    ({"padding": None}, TypeError, "padding.*None"),
    ({"dilation": 2.0}, TypeError, "dilation.*2.0"),
    ({"dilation": True}, TypeError, "dilation.*True"),
    ({"groups": 1.0}, TypeError, "groups.*1.0"),
    ({"groups": True}, TypeError, "groups.*True"),
    ({"groups": None}, TypeError, "groups.*None"),
    ({"groups": (1,)}, TypeError, r"groups.*\(1,\)"),
    ({"groups": "1"}, TypeError, "groups.*'1'"),
    ({"stride": range(1, 3)}, TypeError, r"stride.*range\(1, 3\)"),
    ({"stride": b"\x01\x01"}, TypeError, "stride.*b'"),
    ({"stride": np.float64(1)}, TypeError, "stride.*1.0"),
    ({"stride": (np.True_, 1)}, TypeError, r"stride.*True"),
    ({"stride": np.array([1, 1])}, TypeError, "stride.*array"),
    ({"groups": np.array([1])}, TypeError, "groups.*array"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=lambda v: str(v)[:40])
def test_options_that_the_dense_convolution_refuses(options, error, message):
    with pytest.raises(error):
        F.conv2d(X, W, **options)
    assert_refused(error, message, lambda: call(**options))


FLOAT8 = torch.float8_e4m3fn
SPARSE = X.to_sparse()
NESTED = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
# tensors for F.conv2d, ours, what F.conv2d raises, and what our message says
TENSORS = [
    ((X[:, :7], W), {"x": X[:, :7]}, RuntimeError,
     r"weight of size \[8, 8, 3, 3\], expected input\[2, 7, 10, 10\] to have 8 channels, "
     r"but got 7 channels instead.*224 elements"),
    ((X[0, :7], W), {"x": X[0, :7]}, RuntimeError,
     r"input\[7, 10, 10\] to have 8 channels, but got 7 channels instead"),
    ((X[..., :2, :2], W), {"x": X[..., :2, :2]}, RuntimeError,
     r"\(2 x 2\). Kernel size: \(3 x 3\).*\[2, 8, 2, 2\]"),
    ((X[0, :, :2], W), {"x": X[0, :, :2]}, RuntimeError, r"\(2 x 10\).*\[8, 2, 10\]"),
    ((X[:0, :, :2], W), {"x": X[:0, :, :2]}, RuntimeError, r"\(2 x 10\). Kernel size: \(3 x 3\)"),
    ((X[:0], W, None, 1, 0, 5), {"x": X[:0], "dilation": 5}, RuntimeError,
     r"\(10 x 10\). Kernel size: \(11 x 11\).*\[0, 8, 10, 10\]"),
    ((X[:, :, :0], W), {"x": X[:, :, :0]}, RuntimeError, r"\(0 x 10\).*\[2, 8, 0, 10\]"),
    ((X, W, BIAS[:7]), {"bias": BIAS[:7]}, RuntimeError,
     r"\[8, 8, 3, 3\], expected bias to be 1-dimensional with 8 elements.*\[7\]"),
    ((X, W, BIAS[:, None]), {"bias": BIAS[:, None]}, RuntimeError, r"bias.*\[8, 1\]"),
    ((X, W.half()), {"packed": PACKED.half()}, RuntimeError,
     r"Input type \(torch.float32\) and packed type \(torch.float16\) should be the same"),
    ((X.bfloat16(), W), {"x": X.bfloat16()}, RuntimeError,
     r"Input type \(torch.bfloat16\) and packed type \(torch.float32\) should be the same"),
    ((X, W, BIAS.double()), {"bias": BIAS.double()}, RuntimeError,
     r"Input type \(torch.float32\) and bias type \(torch.float64\)"),
    ((X.bool(), W.bool()), {"x": X.bool(), "packed": PACKED.bool()}, NotImplementedError,
     "input of dtype torch.bool"),
    ((X.to(FLOAT8), W.to(FLOAT8)), {"x": X.to(FLOAT8), "packed": PACKED.to(FLOAT8)},
     NotImplementedError, "torch.float8_e4m3fn"),
    ((SPARSE, W), {"x": SPARSE}, RuntimeError, "input.*torch.sparse_coo"),
    ((X, W.to_sparse()), {"packed": PACKED.to_sparse()}, RuntimeError, "packed.*torch.sparse_coo"),
    ((X, W, BIAS.to_sparse()), {"bias": BIAS.to_sparse()}, RuntimeError, "bias.*sparse_coo"),
    ((NESTED, W), {"x": NESTED}, RuntimeError, "not implemented for input.*nested"),
    (([1, 2], W), {"x": [1, 2]}, TypeError, "'input' must be Tensor, not list"),
    ((X.numpy(), W), {"x": X.numpy()}, TypeError, "'input' must be Tensor, not ndarray"),
    ((X, [1, 2]), {"packed": [1, 2]}, TypeError, "'packed' must be Tensor, not list"),
    ((X, W, 1.0), {"bias": 1.0}, TypeError, "'bias' must be Tensor, not float"),
    ((None, W), {"x": None}, TypeError, "'input' must be Tensor, not NoneType"),
    ((X, None), {"packed": None}, TypeError, "'packed' must be Tensor, not NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("dense, tied, error, message", TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_the_dense_convolution_refuses(dense, tied, error, message):
    with pytest.raises(error):
        F.conv2d(*dense)
    assert_refused(error, message, lambda: call(**tied))


WRONG_RANKS = [(d, r) for d in (1, 2, 3) for r in range(7) if r not in (d + 1, d + 2)]


@pytest.mark.parametrize("dims, rank", WRONG_RANKS)
def test_wrong_rank_names_the_function_and_the_size(dims, rank):
    x, packed = torch.randn([4] * rank), torch.randn(tt.packed_size(4, (3,) * dims))
    message = rf"{dims + 1}D.*{dims + 2}D.*tied_conv{dims}d.*{re.escape(str([4] * rank))}"
    with pytest.raises(RuntimeError):
        CONVOLUTIONS[dims](x, torch.randn(4, 4, *[3] * dims))
    assert_refused(RuntimeError, message, lambda: TIED[dims](x, packed, kernel_size=3))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize(
    "channels, size, options, message",
    [
        (3, 5, {}, "to have 4 channels, but got 3 channels instead"),
        (4, 2, {}, r"\(2( x 2)*\). Kernel size: \(3( x 3)*\)"),
        (4, 0, {"padding": 2}, r"\(4( x 4)*\).*got input of size \[2, 4(, 0)+\]"),
        (4, 5, {"dilation": 3}, r"\(5( x 5)*\). Kernel size: \(7( x 7)*\)"),
        (4, 5, {"stride": (1, 1)}, r"list of [13] values.*stride=\[1, 1\]"),
        (4, 5, {"stride": -2}, r"non-positive stride.*\[-2(, -2)*\]"),
        (4, 5, {"padding": -1}, r"negative padding.*\[-1(, -1)*\]"),
    ],
    ids=str,
)
def test_mistakes_in_one_and_three_dimensions(dims, channels, size, options, message):
    x = torch.randn(2, channels, *[size] * dims)
    packed = torch.randn(tt.packed_size(4, (3,) * dims))
    with pytest.raises(RuntimeError):
        CONVOLUTIONS[dims](x, torch.randn(4, 4, *[3] * dims), **options)
    assert_refused(RuntimeError, message, lambda: TIED[dims](x, packed, kernel_size=3, **options))


def meta(tensor):
    return tensor.to("meta")


RESIDUAL = torch.randn(2, 8, 8, 8)
OURS = [  # what F.conv2d accepts, or does not have
    ({"x": X.long(), "packed": PACKED.long()}, NotImplementedError, "torch.int64"),
    ({"x": X.int(), "packed": PACKED.int()}, NotImplementedError, "torch.int32"),
    ({"x": X.cfloat(), "packed": PACKED.cfloat()}, NotImplementedError, "torch.complex64"),
    ({"x": X.to_mkldnn()}, NotImplementedError, "input.*torch._mkldnn"),
    ({"x": X[:, :0]}, RuntimeError, r"\[2, 0, 10, 10\].*got 0 channels"),
    ({"x": X[0, :0]}, RuntimeError, r"\[0, 10, 10\].*got 0 channels"),
    ({"x": meta(X)}, RuntimeError, "input is on meta and packed is on cpu"),
    ({"packed": meta(PACKED)}, RuntimeError, "input is on cpu and packed is on meta"),
    ({"bias": meta(BIAS)}, RuntimeError, "input is on cpu and bias is on meta"),
    ({"residual": meta(RESIDUAL)}, RuntimeError, "input is on cpu and residual is on meta"),
    ({"stride": (1, True)}, TypeError, r"stride.*\(1, True\)"),  # PyTorch looks at the first only
    ({"dilation": [1, True]}, TypeError, r"dilation.*\[1, True\]"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size.*3.0"),
    ({"kernel_size": (3, True)}, TypeError, r"kernel_size.*\(3, True\)"),
    ({"kernel_size": None}, TypeError, "kernel_size.*None"),
    ({"kernel_size": "3"}, TypeError, "kernel_size.*'3'"),
    ({"kernel_size": (3, 3, 3)}, RuntimeError, r"kernel_size=\[3, 3, 3\]"),
    ({"kernel_size": 0}, ValueError, r"kernel_size should be positive, got \(0, 0\)"),
    ({"kernel_size": (3, -1)}, ValueError, r"kernel_size should be positive, got \(3, -1\)"),
    ({"symmetry": "hermitian"}, ValueError, "symmetry must be one of.*'hermitian'"),
    ({"symmetry": None}, ValueError, "symmetry must be one of.*None"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of.*'mirror'"),
    ({"padding_mode": None}, ValueError, "padding_mode must be one of.*None"),
    ({"symmetry": ["self_adjoint"]}, ValueError, r"symmetry must be one of.*\['self_adjoint'\]"),
    ({"padding_mode": ["zeros"]}, ValueError, r"padding_mode must be one of.*\['zeros'\]"),
    ({"alpha": "1"}, TypeError, "alpha must be a real number.*'1'"),
    ({"alpha": True}, TypeError, "alpha must be a real number.*True"),
    ({"alpha": None}, TypeError, "alpha must be a real number.*None"),
    ({"alpha": 1j}, TypeError, "alpha must be a real number.*1j"),
    ({"alpha": np.True_}, TypeError, "alpha must be a real number.*True"),
    ({"alpha": np.ones(())}, TypeError, "alpha must be a real number.*array"),
    ({"alpha": torch.ones(2, 3)}, TypeError, r"real tensor.*size \[2, 3\] and dtype torch.float32"),
    ({"alpha": torch.tensor(1j)}, TypeError, r"real tensor.*size \[\] and dtype torch.complex64"),
    ({"alpha": torch.tensor(True)}, TypeError, r"real tensor.*size \[\] and dtype torch.bool"),
    ({"beta": "1"}, TypeError, "beta must be a real number, got '1'"),
    ({"beta": True}, TypeError, "beta must be a real number, got True"),
    ({"beta": None}, TypeError, "beta must be a real number, got None"),
    ({"beta": 1j}, TypeError, "beta must be a real number, got 1j"),
    ({"beta": np.True_}, TypeError, "beta must be a real number, got .*True"),
    ({"beta": np.ones(())}, TypeError, "beta must be a real number, got array"),
    ({"beta": torch.tensor(0.5)}, TypeError,
     r"beta must be a real number, got a tensor of size \[\] and dtype torch.float32"),
    ({"beta": torch.ones(2, 3)}, TypeError, r"real number, got a tensor of size \[2, 3\]"),
    ({"beta": [1.0], "residual": RESIDUAL}, TypeError, r"beta must be a real number, got \[1.0\]"),
    ({"beta": "1", "residual": RESIDUAL}, TypeError, "beta must be a real number, got '1'"),
    ({"beta": torch.tensor(1.0), "residual": RESIDUAL, "alpha": torch.tensor(1.0)}, TypeError,
     "beta must be a real number, got a tensor"),
    ({"residual": 1.0}, TypeError, "'residual' must be Tensor, not float"),
    ({"residual": X}, RuntimeError,
     r"residual of the output's size \[2, 8, 8, 8\].*\[2, 8, 10, 10\]"),
    ({"residual": RESIDUAL[0]}, RuntimeError, r"\[2, 8, 8, 8\].*\[8, 8, 8\]"),
    ({"residual": RESIDUAL[:1]}, RuntimeError, r"\[2, 8, 8, 8\].*\[1, 8, 8, 8\]"),  # no broadcast
    ({"residual": RESIDUAL.half()}, RuntimeError, "residual type.*float16"),
    ({"packed": PACKED[:-1]}, RuntimeError,
     r"1-dimensional with 292 elements for channels=8, kernel_size=\(3, 3\), groups=1, "
     r"symmetry='self_adjoint', but got packed of size \[291\]"),
    ({"packed": PACKED[:0]}, RuntimeError, r"292 elements.*packed of size \[0\]"),
    ({"packed": PACKED[None]}, RuntimeError, r"292 elements.*packed of size \[1, 292\]"),
    ({"packed": PACKED[0]}, RuntimeError, r"292 elements.*packed of size \[\]"),
    ({"packed": W}, RuntimeError, r"292 elements.*packed of size \[8, 8, 3, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", OURS, ids=range(len(OURS)))
def test_mistakes_that_the_dense_convolution_does_not_know(arguments, error, message):
    assert_refused(error, message, lambda: call(**arguments))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("more", [-1, 8])
def test_the_reference_refuses_a_packed_vector_of_another_length(more, symmetry):
    size = tt.packed_size(8, 3, symmetry=symmetry)
    packed = torch.randn(size + more)
    message = rf"{size} elements.*got packed of size \[{size + more}\]"
    options = {"kernel_size": 3, "symmetry": symmetry}
    assert_refused(ValueError, message, lambda: reference.tied_conv2d(X, packed, **options))


def count(channels, taps, groups, symmetry):
    sign, c = oracle.SIGNS[symmetry], channels // groups
    return groups * (taps // 2 * c * c + taps % 2 * c * (c + sign) // 2)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("other", [4, 6, 10, 16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims, kernel", [(1, 4), (2, 3), (3, 1)])
def test_packed_of_another_channel_count_is_named_with_it(dims, kernel, groups, other, symmetry):
    right, wrong = (count(c, kernel**dims, groups, symmetry) for c in (8, other))
    x, packed = torch.randn(2, 8, *[6] * dims), torch.randn(wrong)
    size = re.escape(str([other, other // groups, *[kernel] * dims]))
    message = (
        rf"groups={groups}, weight of size {size}.*have {other} channels, but got 8 channels "
        rf"instead.*{right} elements.*{symmetry}.*size \[{wrong}\]"
    )
    options = {"kernel_size": kernel, "groups": groups, "symmetry": symmetry}
    assert_refused(RuntimeError, message, lambda: TIED[dims](x, packed, **options))


@pytest.mark.parametrize("symmetry, other", [SYMMETRIES, SYMMETRIES[::-1]])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_packed_of_the_other_symmetry_is_named_with_it(dims, symmetry, other):
    right, wrong = (count(8, 3**dims, 1, s) for s in (symmetry, other))
    x, packed = torch.randn(2, 8, *[6] * dims), torch.randn(wrong)
    message = (
        rf"{right} elements.*symmetry='{symmetry}'.*size \[{wrong}\], "
        rf"the length for symmetry='{other}'"
    )
    options = {"kernel_size": 3, "symmetry": symmetry}
    assert_refused(RuntimeError, message, lambda: TIED[dims](x, packed, **options))


MISTAKES_OF_EACH_KIND = [
    {"x": X[:, :7]},
    {"packed": PACKED[1:]},
    {"bias": BIAS[1:]},
    {"residual": X},
    {"stride": 0},
    {"groups": 3},
    {"dilation": 5},
    {"padding": "full"},
    {"symmetry": "even"},
    {"alpha": torch.ones(1)},
    {"beta": torch.ones(())},
]


@pytest.mark.parametrize("mistake", MISTAKES_OF_EACH_KIND, ids=lambda m: next(iter(m)))
def test_neither_the_weight_is_made_nor_the_convolution_run(mistake, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(reference, "dense_weight", fail)
    monkeypatch.setattr(reference, "convolve", fail)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        call(**mistake)
    with pytest.raises(AssertionError, match="work began"):  # where a valid call does begin
        call()


@pytest.mark.parametrize(
    "name, valid, mistakes",
    [
        ("stride", 1, [1.0, True, np.True_, (1.0, 1), (1, 1.0), (True, 1), (1, True)]),
        ("padding", 1, [1.0, True, (1, 1.0), [True], (1, True)]),
        ("dilation", 1, [1.0, True, (True, True), [1, 1.0]]),
        ("kernel_size", 3, [3.0, (3.0, 3), [3, 3.0]]),
        ("groups", 1, [1.0, True]),
        ("alpha", 1, [True, "1", 1 + 0j]),
        ("beta", 1, [True, "1", 1 + 0j, torch.ones(())]),
        ("x", X, [SPARSE, NESTED]),  # of the same size, dtype and device
        ("packed", PACKED, [PACKED.to_sparse()]),
    ],
)
def test_what_passed_once_does_not_let_its_equals_pass(name, valid, mistakes):
    expected = call(**{name: valid})
    for mistake in mistakes:
        with pytest.raises(
            (TypeError, NotImplementedError), match="input" if name == "x" else name
        ):
            call(**{name: mistake})
    assert torch.equal(call(**{name: valid}), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "cached"])
def test_valid_calls_are_right_among_mistakes(inside):
    x, packed = torch.randn(2, 8, 10, 10).double(), torch.randn(292).double()
    convolution = oracle.Convolution((8, (3, 3), 1, "self_adjoint"))
    (expected,) = oracle.expect(convolution, [x, packed])

    def calls():
        for mistake in [{"stride": 0}, {"packed": packed[1:]}, {"symmetry": "skew_adjoint"}]:
            with pytest.raises(RuntimeError):
                call(**{"x": x, "packed": packed, **mistake})
            oracle.assert_within_bound(call(x, packed), expected)

    if inside:
        calls = tt.cached()(calls)
    calls()


TOO_LARGE = [("reflect", 10), ("reflect", (0, 11)), ("circular", 11), ("circular", (11, 0))]


@pytest.mark.parametrize("x", [X, X[0], X[:0]], ids=["batch", "unbatched", "empty"])
@pytest.mark.parametrize("padding_mode, padding", TOO_LARGE)
def test_padding_larger_than_the_image_is_refused_before_other_work(padding_mode, padding, x):
    dense = nn.Conv2d(8, 8, 3, padding=padding, padding_mode=padding_mode)
    with pytest.raises(RuntimeError) as theirs:
        dense(x)
    message = re.escape(str(theirs.value))
    with Operators() as operators, pytest.raises(RuntimeError, match=message):
        call(x, padding=padding, padding_mode=padding_mode)
    assert all("pad" in name for name in operators.ran)  # the one that refuses


LAYERS = [  # what nn.Conv2d raises, where it does, and what our message says
    ({"channels": 8, "kernel_size": 3, "groups": 3}, ValueError, "groups.*channels=8, groups=3"),
    ({"channels": 8, "kernel_size": 3, "groups": 0}, ValueError, "groups.*positive.*0"),
    ({"channels": 8, "kernel_size": 3, "groups": -1}, ValueError, "groups.*positive.*-1"),
    ({"channels": 8, "kernel_size": 3, "groups": 2.0}, TypeError, "groups.*2.0"),
    ({"channels": 8, "kernel_size": 3, "groups": "2"}, TypeError, "groups.*'2'"),
    ({"channels": 8, "kernel_size": 3, "padding": "full"}, ValueError, "'full'"),
    ({"channels": 8, "kernel_size": 3, "padding": "same", "stride": 2}, ValueError,
     r"'same'.*\[2, 2\]"),
    ({"channels": 8, "kernel_size": 3, "padding_mode": "mirror"}, ValueError, "'mirror'"),
    ({"channels": 8, "kernel_size": 3.0}, TypeError, "kernel_size.*3.0"),
    ({"channels": 8, "kernel_size": None}, TypeError, "kernel_size.*None"),
    ({"channels": True, "kernel_size": 3}, TypeError, "channels.*True"),
    ({"channels": "8", "kernel_size": 3}, TypeError, "channels.*'8'"),
    ({"channels": -4, "kernel_size": 3}, (RuntimeError, ValueError), "channels.*positive.*-4"),
    ({"channels": 8, "kernel_size": -1}, (RuntimeError, ValueError), "kernel_size.*positive.*-1"),
    ({"channels": 8, "kernel_size": (3, -1)}, (RuntimeError, ValueError), r"positive.*\(3, -1\)"),
]  # fmt: skip
OUR_LAYERS = [
    ({"channels": 8, "kernel_size": 0}, ValueError, "kernel_size.*positive.*0"),
    ({"channels": 0, "kernel_size": 3}, ValueError, "channels.*positive.*0"),
    ({"channels": 8.0, "kernel_size": 3}, TypeError, "channels.*8.0"),
    ({"channels": 8, "kernel_size": True}, TypeError, "kernel_size.*True"),
    ({"channels": 8, "kernel_size": (3, 3, 3)}, ValueError, r"\[3, 3, 3\]"),
    ({"channels": 8, "kernel_size": ()}, ValueError, r"kernel_size=\[\]"),
    ({"channels": 8, "kernel_size": 3, "groups": True}, TypeError, "groups.*True"),
    ({"channels": 8, "kernel_size": 3, "stride": 0}, ValueError, r"non-positive stride.*\[0, 0\]"),
    ({"channels": 8, "kernel_size": 3, "stride": 1.5}, TypeError, "stride.*1.5"),
    ({"channels": 8, "kernel_size": 3, "stride": (1, 1, 1)}, ValueError, r"stride=\[1, 1, 1\]"),
    ({"channels": 8, "kernel_size": 3, "dilation": 0}, ValueError, r"dilation.*\[0, 0\]"),
    ({"channels": 8, "kernel_size": 3, "dilation": True}, TypeError, "dilation.*True"),
    ({"channels": 8, "kernel_size": 3, "padding": -1}, ValueError, "negative padding.*-1"),
    ({"channels": 8, "kernel_size": 3, "padding": (0, -1)}, ValueError, r"negative.*\(0, -1\)"),
    ({"channels": 8, "kernel_size": 3, "padding": True}, TypeError, "padding.*True"),
    ({"channels": 8, "kernel_size": 3, "symmetry": "even"}, ValueError, "'even'"),
]


@pytest.mark.parametrize("arguments, error, message", LAYERS, ids=str)
def test_layer_arguments_that_the_dense_layer_refuses(arguments, error, message):
    channels = arguments["channels"]
    options = {name: value for name, value in arguments.items() if name != "channels"}
    with pytest.raises(error):
        nn.Conv2d(channels, channels, **options)
    assert_refused(error, message, lambda: tt.TiedConv2d(**arguments))


@pytest.mark.parametrize("arguments, error, message", OUR_LAYERS, ids=str)
def test_layer_arguments_that_the_dense_layer_lets_pass(arguments, error, message):
    assert_refused(error, message, lambda: tt.TiedConv2d(**arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((64, 64, 3), r"dense layer's \(64, 64, 3\) is TiedConv2d\(64, kernel_size=3\)"),
        ((5, 5, (3, 1), 2), r"is TiedConv2d\(5, kernel_size=\(3, 1\)\)"),
        ((3, 8, 3), r"TiedConv2d\(3, 8, 3\).*as many input as output channels"),
        ((64, 3, 1), r"options are given by name"),
    ],
)
def test_the_positions_of_the_dense_layer_are_refused_with_the_right_call(arguments, message):
    assert_refused(TypeError, message, lambda: tt.TiedConv2d(*arguments, padding=1))


def test_layer_of_integers_is_refused_as_the_dense_one_is():
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Conv2d(8, 8, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="floating point"):
        tt.TiedConv2d(8, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (X[:, :7], RuntimeError, r"input\[2, 7, 10, 10\] to have 8 channels, but got 7"),
        (X[0, :7], RuntimeError, r"input\[7, 10, 10\] to have 8 channels, but got 7"),
        (X[0, 0], RuntimeError, r"3D \(unbatched\) or 4D.*\[10, 10\]"),
        (X[None], RuntimeError, r"3D \(unbatched\) or 4D.*\[1, 2, 8, 10, 10\]"),
        (X[..., :2], RuntimeError, r"\(10 x 2\). Kernel size: \(3 x 3\)"),
        (X.double(), RuntimeError, r"\(torch.float64\) and packed type \(torch.float32\)"),
        (X.bool(), RuntimeError, "torch.bool"),
        ([1, 2], TypeError, "must be Tensor, not list"),
    ],
    ids=range(8),
)
def test_layer_refuses_the_inputs_that_the_dense_one_refuses(x, error, message):
    layer = tt.TiedConv2d(8, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error):
        nn.Conv2d(8, 8, 3)(x)
    assert_refused(error, message, lambda: layer(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "conv, error, message",
    [
        (nn.Conv2d(4, 8, 3), ValueError, "in_channels=4, out_channels=8"),
        (nn.Conv1d(4, 4, 3), TypeError, "expects Conv2d, got Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), TypeError, "expects Conv2d, got ConvTranspose2d"),
        (nn.Linear(4, 4), TypeError, "expects Conv2d, got Linear"),
        (nn.Conv2d, TypeError, "expects Conv2d, got type"),
        (None, TypeError, "expects Conv2d, got NoneType"),
    ],
    ids=str,
)
def test_from_conv_refuses_what_it_cannot_tie(conv, error, message):
    assert_refused(error, message, lambda: tt.TiedConv2d.from_conv(conv))


def test_from_conv_refuses_an_unknown_symmetry():
    with pytest.raises(ValueError, match="'even'"):
        tt.TiedConv2d.from_conv(nn.Conv2d(4, 4, 3), symmetry="even")


@pytest.mark.parametrize(
    "weight, options, error, message",
    [
        (torch.zeros(4, 3, 3, 3), {}, ValueError, r"\[4, 3, 3, 3\]"),
        (torch.zeros(4, 4, 3, 3), {"groups": 2}, ValueError, r"groups=2.*\[4, 4, 3, 3\]"),
        (torch.zeros(4, 2, 3, 3), {"groups": 3}, ValueError, r"groups=3.*\[4, 2, 3, 3\]"),
        (torch.zeros(4, 4, 3, 3), {"groups": 0}, ValueError, "groups=0"),
        (torch.zeros(4, 4, 3, 3), {"groups": -1}, ValueError, "groups=-1"),
        (torch.zeros(4, 4, 3, 3), {"groups": 1.0}, TypeError, "groups.*1.0"),
        (torch.zeros(4, 4, 3, 3), {"groups": True}, TypeError, "groups.*True"),
        (torch.zeros(4, 4), {}, ValueError, r"\[4, 4\]"),
        (torch.zeros(()), {}, ValueError, r"\[\]"),
        (torch.zeros(0, 0, 3, 3), {}, ValueError, "channels.*positive.*0"),
        (torch.zeros(4, 4, 3, 0), {}, ValueError, r"positive.*\(3, 0\)"),
        (torch.zeros(4, 4, 3, 3).long(), {}, NotImplementedError, "weight.*int64"),
        (torch.zeros(4, 4, 3, 3).bool(), {}, NotImplementedError, "weight.*bool"),
        (torch.zeros(4, 4, 3, 3).cfloat(), {}, NotImplementedError, "weight.*complex64"),
        (torch.zeros(4, 4, 3, 3), {"symmetry": "even"}, ValueError, "'even'"),
        (torch.zeros(4, 4, 3, 3), {"groups": "1"}, TypeError, "groups.*'1'"),
        (SPARSE, {}, NotImplementedError, "weight.*sparse_coo"),
        ([1.0], {}, TypeError, "'weight' must be Tensor, not list"),
        (None, {}, TypeError, "'weight' must be Tensor, not NoneType"),
    ],
    ids=lambda v: str(list(v.shape)) if isinstance(v, torch.Tensor) else str(v),
)
def test_pack_refuses_mistakes(weight, options, error, message):
    assert_refused(error, message, lambda: tt.pack(weight, **options))


@pytest.mark.parametrize(
    "packed, arguments, error, message",
    [
        (PACKED[1:], (8, 3), ValueError, r"292 elements for channels=8.*\[291\]"),
        (PACKED[None], (8, 3), ValueError, r"292 elements.*\[1, 292\]"),
        (PACKED, (8, 3, 1, "skew_adjoint"), ValueError, r"284 elements.*skew_adjoint.*\[292\]"),
        (PACKED, (8, (3, 3), 3), ValueError, "channels=8, groups=3"),
        (PACKED.long(), (8, 3), NotImplementedError, "packed.*int64"),
        (PACKED.cfloat(), (8, 3), NotImplementedError, "packed.*complex64"),
        (PACKED, (8, 3, 1, "self_adjoint", torch.channels_last_3d), ValueError, "channels_last_3d"),
        (PACKED, (8, 3, 1, "self_adjoint", torch.preserve_format), ValueError, "preserve_format"),
        (PACKED, (8, 3, 1, "self_adjoint", "channels_last"), ValueError, "got channels_last"),
        (PACKED[:100], (8, (3,), 1, "self_adjoint", torch.channels_last), ValueError,
         r"kernel_size=\(3,\), got torch.channels_last"),
        (PACKED.to_sparse(), (8, 3), NotImplementedError, "packed.*sparse_coo"),
        ([1.0], (8, 3), TypeError, "'packed' must be Tensor, not list"),
        (None, (8, 3), TypeError, "'packed' must be Tensor, not NoneType"),
    ],
    ids=lambda v: str(list(v.shape)) if isinstance(v, torch.Tensor) else str(v),
)  # fmt: skip
def test_unpack_refuses_mistakes(packed, arguments, error, message):
    assert_refused(error, message, lambda: tt.unpack(packed, *arguments))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((8, 3, 1, "even"), ValueError, "'even'"),
        ((8, ()), ValueError, "kernel_size"),
        ((8, (3, 0)), ValueError, r"kernel_size.*\(3, 0\)"),
        ((8, 3.0), TypeError, "kernel_size.*3.0"),
        ((8, (3, True)), TypeError, r"kernel_size.*\(3, True\)"),
        ((8, None), TypeError, "kernel_size.*None"),
        ((8, "33"), TypeError, "kernel_size.*'33'"),
        ((8, b"33"), TypeError, "kernel_size.*b'33'"),
        (("8", 3), TypeError, "channels.*'8'"),
        ((True, 3), TypeError, "channels.*True"),
        ((8.0, 3), TypeError, "channels.*8.0"),
        ((0, 3), ValueError, "channels.*0"),
        ((-4, 3), ValueError, "channels.*-4"),
        ((8, 3, -2), ValueError, "groups.*-2"),
        ((8, 3, 0), ValueError, "groups.*0"),
        ((8, 3, 3), ValueError, "channels=8, groups=3"),
        ((8, 3, (1,)), TypeError, r"groups.*\(1,\)"),
        ((8, 3, True), TypeError, "groups.*True"),
    ],
    ids=str,
)
def test_packed_size_refuses_mistakes(arguments, error, message):
    assert_refused(error, message, lambda: tt.packed_size(*arguments))


def assert_loading_is_refused(layer, state, message):
    """With PyTorch's one RuntimeError for all of a checkpoint; ``packed`` stays as it was."""
    before = layer.packed_weight.detach().clone()
    with pytest.raises(RuntimeError, match=re.compile(f"Error.*in loading.*{message}", re.DOTALL)):
        layer.load_state_dict(state)
    assert torch.equal(layer.packed_weight, before)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_untied_checkpoint_is_refused_with_the_deviation_and_its_place(symmetry):
    layer = tt.TiedConv2d(4, 3, symmetry=symmetry)
    state = tt.TiedConv2d(4, 3, symmetry=symmetry).to_conv().state_dict()
    place = tuple(torch.randint(k, ()).item() for k in (4, 4, 3)) + (0,)  # never the centre tap
    state["weight"][place] += 3.0  # half of it is the distance to the nearest tied weight
    o, i, a, b = place
    either = "|".join(re.escape(str(list(p))) for p in (place, (i, o, 2 - a, 2 - b)))
    message = rf"'weight'.*not tied.*{symmetry}.*up to 1\.5, at ({either})"
    assert_loading_is_refused(layer, state, message)


def test_checkpoint_of_a_random_dense_layer_is_refused():
    assert_loading_is_refused(tt.TiedConv2d(4, 3), nn.Conv2d(4, 4, 3).state_dict(), "not tied")


@pytest.mark.parametrize(
    "state, message",
    [
        (nn.Conv2d(8, 8, 5).state_dict(), r"\[8, 8, 3, 3\], but got weight of size \[8, 8, 5, 5\]"),
        (nn.Conv2d(4, 4, 3).state_dict(), r"\[8, 8, 3, 3\], but got weight of size \[4, 4, 3, 3\]"),
        (tt.TiedConv2d(8, 5).state_dict(), r"size mismatch for packed_weight.*\[804\].*\[292\]"),
        ({"bias": BIAS}, "Missing key.*packed_weight"),
        ({"weight": [1.0], "bias": BIAS}, "dense weight 'weight'.*not list"),
        ({"weight": meta(W), "bias": BIAS}, "dense weight 'weight'.*meta device has no values"),
    ],
    ids=["5x5", "4 channels", "packed", "no weight", "list", "meta"],
)  # fmt: skip
def test_checkpoint_of_the_wrong_shape_or_kind_is_refused(state, message):
    with pytest.raises(RuntimeError, match="in loading"):
        nn.Conv2d(8, 8, 3).load_state_dict(state)
    assert_loading_is_refused(tt.TiedConv2d(8, 3), state, message)


def test_checkpoint_with_a_missing_or_an_extra_entry_is_refused():
    layer = tt.TiedConv2d(8, 3)
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        layer.load_state_dict({"packed_weight": PACKED})
    with pytest.raises(RuntimeError, match="both a dense 'weight' and 'packed_weight'"):
        layer.load_state_dict({"packed_weight": PACKED, "bias": BIAS, "weight": W})


def test_checkpoint_of_integers_is_refused():
    state = {"weight": W.long(), "bias": BIAS}
    assert_loading_is_refused(tt.TiedConv2d(8, 3), state, "dense weight 'weight'.*int64")


def scale_part(weight):
    weight[0] *= 2


WRITES = {
    "init.kaiming_normal_": nn.init.kaiming_normal_,
    "init.xavier_uniform_": nn.init.xavier_uniform_,
    "init.dirac_": nn.init.dirac_,
    "data": lambda w: w.data.normal_(),
    "detach": lambda w: w.detach().mul_(2),
    "copy": lambda w: w.copy_(torch.zeros(4, 4, 3, 3)),
    "item": lambda w: w.__setitem__(0, 1),
    "item of data": lambda w: w.data.__setitem__(0, 1),
    "out": lambda w: torch.add(w, 1, out=w),
    "method": lambda w: torch.Tensor.add_(w, 1),
    "augmented": lambda w: w.__iadd__(1),
    "augmented part": scale_part,
    "part": lambda w: w[0].zero_(),
    "view": lambda w: w.view(-1).data[0].zero_(),
    "diagonal": lambda w: w.diagonal().fill_(1),
    "unbind": lambda w: w.unbind()[1].fill_(1),
    "inplace": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "other data": lambda w: setattr(w, "data", torch.zeros(4, 4, 3, 3)),
    "init.normal_": nn.init.normal_,
    "init.uniform_": nn.init.uniform_,
    "init.constant_": lambda w: nn.init.constant_(w, 1),
    "init.kaiming_uniform_": nn.init.kaiming_uniform_,
    "view by keyword": lambda w: torch.transpose(input=w, dim0=0, dim1=1).zero_(),
}


@pytest.mark.parametrize(
    "write",
    WRITES.values(),
    ids=WRITES,
)
def test_writing_into_the_dense_weight_raises(write):
    layer = tt.TiedConv2d(4, 3)
    before = layer.packed_weight.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer.packed_weight"):
        write(layer.weight)
    assert torch.equal(layer.packed_weight, before)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.zeros(4, 4, 5, 5), ValueError, r"\[4, 4, 3, 3\].*got weight of size \[4, 4, 5, 5\]"),
        (torch.zeros(4, 4, 3), ValueError, r"\[4, 4, 3, 3\].*got weight of size \[4, 4, 3\]"),
        (torch.zeros(4, 4, 3, 3).long(), NotImplementedError, "int64"),
        ([1.0], TypeError, "'weight' must be Tensor, not list"),
        (None, TypeError, "'weight' must be Tensor, not NoneType"),
    ],
    ids=["5x5", "3-D", "integer", "list", "None"],
)
def test_assigning_what_is_no_weight_raises_and_changes_nothing(value, error, message):
    layer = tt.TiedConv2d(4, 3)
    parameter, before = layer.packed_weight, layer.packed_weight.detach().clone()
    with pytest.raises(error, match=message):
        layer.weight = value
    assert layer.packed_weight is parameter and torch.equal(layer.packed_weight, before)


# What looks odd and is right: (kernel_size, options), for F.conv2d with the kernel written out.
GOOD = [
    ([3, 2], {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}),
    ((3,), {"stride": (2,), "padding": (1,), "dilation": (2,)}),
    (torch.Size([2, 3]), {"padding": torch.Size([0, 1])}),
    (3, {"padding": 5}),  # more than d(K-1) = 2
    ((2, 3), {"padding": (7, 5), "dilation": (2, 1)}),
    ((2, 4), {"padding": "same"}),
    (4, {"padding": "same", "dilation": (1, 2)}),
    ((3, 2), {"padding": "valid", "stride": 2}),
    ((9, 10), {}),  # as large as the image
    (3, {"stride": (20, 30)}),  # larger than the image
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batch", [(3,), (), (0,)], ids=["batch", "unbatched", "empty"])
@pytest.mark.parametrize("groups, symmetry", [(1, "self_adjoint"), (2, "skew_adjoint")])
@pytest.mark.parametrize("kernel_size, options", GOOD, ids=str)
def test_what_looks_odd_but_is_right_gives_the_dense_result(
    kernel_size, options, groups, symmetry, batch
):
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    layout = (6, kernel * (2 // len(kernel)), groups, symmetry)
    x = torch.randn(*batch, 6, 9, 10, dtype=torch.float64)
    packed = torch.randn(tt.packed_size(*layout), dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)

    convolution = oracle.Convolution(layout, options)
    grad = torch.randn_like(convolution(x, packed, bias))
    leaves = [t.clone().requires_grad_() for t in (x, packed, bias)]
    more = {"groups": groups, "symmetry": symmetry, **options}
    output = tt.tied_conv2d(*leaves, kernel_size=kernel_size, **more)
    output.backward(grad)
    results = [output.detach(), *[leaf.grad for leaf in leaves]]
    for actual, expected in zip(
        results, oracle.expect(convolution, [x, packed, bias], grad), strict=True
    ):
        oracle.assert_within_bound(actual, expected)
    if batch == (0,):
        output, x_grad, packed_grad, bias_grad = results
        assert output.shape[:2] == (0, 6) and x_grad.shape == x.shape
        assert torch.equal(packed_grad, torch.zeros_like(packed))
        assert torch.equal(bias_grad, torch.zeros_like(bias))


def test_integers_of_numpy_and_lists_are_taken_as_the_dense_convolution_takes_them():
    x, packed = torch.randn(1, 8, 6, 6), torch.randn(tt.packed_size(np.int64(8), [3, 3]))
    weight = tt.unpack(packed, 8, 3)
    for options in ({"stride": np.int64(2)}, {"padding": [1]}, {"dilation": (np.int32(2), 1)}):
        expected = F.conv2d(x, weight, groups=np.int64(1), **options)
        actual = call(x, packed, kernel_size=np.int64(3), groups=np.int64(1), **options)
        assert torch.equal(actual, expected)
    assert tt.TiedConv2d(np.int64(8), np.int64(3), groups=np.int64(2)).channels == 8


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_empty_batch_has_zero_gradients_in_every_padding_mode(padding_mode):
    layer = tt.TiedConv2d(4, 3, padding=2, padding_mode=padding_mode)
    x = torch.randn(0, 4, 5, 6, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (0, 4, 7, 8) and x.grad.shape == x.shape
    for parameter in (layer.packed_weight, layer.bias):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


ROWS = torch.randn(5, 8)
MATRIX = torch.randn(tt.packed_size(8, (1,)))  # 36 elements
SHAPE = (8, (3, 3), 1, "self_adjoint")
SKEW = torch.randn(tt.packed_size(8, 3, symmetry="skew_adjoint"))


def linear(input=ROWS, packed=MATRIX, bias=None, **options):
    return tt.tied_linear(input, packed, bias, **options)


def torus(image_size=6, **options):
    return tt.spectral_norm(PACKED, *SHAPE, "circular", image_size=image_size, **options)


def power(packed=PACKED, kernel_size=3, image_size=6, symmetry="self_adjoint", **options):
    return tt.power_iteration(packed, 8, kernel_size, 1, symmetry, image_size=image_size, **options)


OPERATIONS = [
    (partial(linear, [1.0]), TypeError, "tied_linear.*'input' must be Tensor, not list"),
    (partial(linear, ROWS.long()), NotImplementedError, "tied_linear.*torch.int64"),
    (partial(linear, ROWS[0, 0]), RuntimeError, r"size \[..., channels\].*size \[\]"),
    (partial(linear, ROWS[:, :0]), RuntimeError, r"input\[5, 0\].*got 0 channels"),
    (partial(linear, ROWS[:, :7]), RuntimeError, r"28 elements.*channels=7.*packed of size \[36\]"),
    (partial(linear, ROWS.half()), RuntimeError, "Input type.*float16.*packed type.*float32"),
    (partial(linear, meta(ROWS)), RuntimeError, "input is on meta and packed is on cpu"),
    (partial(linear, groups=3), RuntimeError, r"groups=3, expected input\[5, 8\].*divisible by 3"),
    (partial(linear, groups=0), RuntimeError, "non-positive groups.*0"),
    (partial(linear, groups=True), TypeError, "groups.*True"),
    (partial(linear, symmetry="even"), ValueError, "symmetry must be one of.*'even'"),
    (partial(linear, packed=MATRIX[1:]), RuntimeError, r"36 elements.*packed of size \[35\]"),
    (partial(linear, bias=BIAS[1:]), RuntimeError, r"\[8, 8\], expected bias.*8 elements.*\[7\]"),
    (partial(linear, bias=BIAS.double()), RuntimeError, "Input type.*float32.*bias type.*float64"),
    (partial(tt.norm, PACKED[1:], *SHAPE), ValueError, r"292 elements.*size \[291\]"),
    (partial(tt.norm, PACKED.long(), *SHAPE), NotImplementedError, "norm.*packed.*torch.int64"),
    (partial(tt.norm, PACKED, 8, 0), ValueError, "kernel_size should be positive"),
    (partial(tt.inner, PACKED, PACKED[1:], *SHAPE), ValueError, r"expected q.*but got q.*\[291\]"),
    (partial(tt.inner, None, PACKED, *SHAPE), TypeError, "inner.*'p' must be Tensor, not NoneType"),
    (partial(tt.inner, PACKED, PACKED.half(), *SHAPE), RuntimeError, "p type.*q type.*float16"),
    (partial(tt.inner, PACKED, meta(PACKED), *SHAPE), RuntimeError, "p is on cpu and q is on meta"),
    (partial(tt.scale_channels, PACKED, BIAS[1:], *SHAPE), ValueError,
     r"factors to be 1-dimensional with 8 elements.*channels.*\[7\]"),
    (partial(tt.scale_channels, PACKED, 2.0, *SHAPE), TypeError, "'factors' must be Tensor"),
    (partial(tt.scale_channels, PACKED, BIAS.half(), *SHAPE), RuntimeError, "factors.*float16"),
    (partial(tt.scale_groups, PACKED, BIAS, *SHAPE), ValueError, r"1 elements.*groups.*\[8\]"),
    (partial(tt.scale_groups, SKEW, BIAS[:1], *SHAPE), ValueError, r"292 elements.*\[284\]"),
    (partial(tt.shift_diagonal, PACKED, "1", *SHAPE), TypeError, "gamma must be a real.*'1'"),
    (partial(tt.shift_diagonal, PACKED, BIAS, *SHAPE), TypeError, r"gamma.*size \[8\]"),
    (partial(tt.shift_diagonal, PACKED, True, *SHAPE), TypeError, "gamma.*True"),
    (partial(tt.shift_diagonal, SKEW, 1.0, 8, 3, symmetry="skew_adjoint"), ValueError,
     "skew-adjoint weight has a zero diagonal.*residual=x, beta=gamma"),
    (partial(tt.shift_diagonal, BIAS, 1.0, 2, (2, 2)), ValueError, r"odd along.*\(2, 2\)"),
    (partial(tt.spectral_norm, PACKED, *SHAPE, "fft"), ValueError, "method must be one of.*'fft'"),
    (partial(tt.spectral_norm, PACKED, *SHAPE, ["bound"]), ValueError, r"method.*\['bound'\]"),
    (partial(tt.spectral_norm, PACKED, *SHAPE, image_size=6), ValueError,
     "method='circular' alone.*method='bound' and image_size=6"),
    (partial(torus, None), ValueError, "method='circular' and image_size=None"),
    (partial(torus, (6, 0)), ValueError, r"image_size should be positive, got \(6, 0\)"),
    (partial(torus, (6, 6, 6)), RuntimeError, r"image_size=\[6, 6, 6\]"),
    (partial(torus, 6.0), TypeError, "image_size.*6.0"),
    (partial(torus, dilation=0), RuntimeError, r"non-positive dilation.*\[0, 0\]"),
    (partial(power, PACKED[1:]), ValueError, r"292 elements.*\[291\]"),
    (partial(power, PACKED[:128], 2), ValueError, r"its own transpose.*kernel_size=\(2, 2\)"),
    (partial(power, padding_mode="reflect"), ValueError, "its own transpose.*'reflect'"),
    (partial(power, padding_mode="mirror"), ValueError, "padding_mode must be one of.*'mirror'"),
    (partial(power, tolerance=-1e-3), ValueError, "tolerance should not be negative, got -0.001"),
    (partial(power, tolerance=float("nan")), ValueError, "tolerance.*nan"),
    (partial(power, tolerance="0"), TypeError, "tolerance must be a real number, got '0'"),
    (partial(power, max_steps=0), ValueError, "max_steps should be positive, got 0"),
    (partial(power, max_steps=1.0), TypeError, "max_steps.*1.0"),
    (partial(power, vector=X), ValueError, r"vector of size \[8, 6, 6\].*\[2, 8, 10, 10\]"),
    (partial(power, vector=X[0].half(), image_size=10), RuntimeError, "torch.float32.*float16"),
    (partial(power, vector=1.0), TypeError, "'vector' must be Tensor, not float"),
]  # fmt: skip


@pytest.mark.parametrize("function, error, message", OPERATIONS, ids=range(len(OPERATIONS)))
def test_mistakes_in_operations_on_packed_vectors(function, error, message):
    assert_refused(error, message, function)
