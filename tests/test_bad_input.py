"""Every mistake raises before any work, with the offending values and PyTorch's type of error."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_tied as tt
from triton_tied import functional, reference


@pytest.fixture(autouse=True)
def no_work_is_done(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(functional, "prepare", fail)
    monkeypatch.setattr(reference, "convolve", fail)


X = torch.zeros(2, 8, 10, 10)
W = torch.zeros(8, 8, 3, 3)
PACKED = torch.zeros(tt.packed_size(8, 3))  # 292 elements
SPARSE = torch.eye(8).to_sparse()


def call(x=X, packed=PACKED, bias=None, kernel_size=3, **options):
    return tt.tied_conv2d(x, packed, bias, kernel_size=kernel_size, **options)


# options, what F.conv2d raises for them with a dense weight, and what our message says
OPTIONS = [
    ({"stride": 0}, RuntimeError, r"non-positive stride is not supported.*\[0, 0\]"),
    ({"stride": (1, -1)}, RuntimeError, r"non-positive stride.*\[1, -1\]"),
    ({"dilation": 0}, RuntimeError, r"non-positive dilation.*\[0, 0\]"),
    ({"dilation": -1}, RuntimeError, r"non-positive dilation.*\[-1, -1\]"),
    ({"groups": 0}, RuntimeError, "non-positive groups is not supported.*0"),
    ({"groups": -1}, RuntimeError, "non-positive groups is not supported.*-1"),
    ({"groups": 3}, RuntimeError, r"groups=3.*\[2, 8, 10, 10\].*divisible by 3.*8 channels"),
    ({"padding": -1}, RuntimeError, r"negative padding is not supported.*\[-1, -1\]"),
    ({"padding": (0, -2)}, RuntimeError, r"negative padding is not supported.*\[0, -2\]"),
    ({"padding": "full"}, RuntimeError, "Invalid padding string: 'full'"),
    ({"padding": "same", "stride": 2}, RuntimeError, r"'same' is not supported.*\[2, 2\]"),
    ({"stride": (1, 1, 1)}, RuntimeError, r"stride.*list of 2 values.*stride=\[1, 1, 1\]"),
    ({"padding": (1, 1, 1)}, RuntimeError, r"padding.*list of 2 values.*padding=\[1, 1, 1\]"),
    ({"stride": ()}, RuntimeError, r"stride.*list of 2 values.*stride=\[\]"),
    ({"dilation": 5}, RuntimeError, r"\(10 x 10\). Kernel size: \(11 x 11\)"),
    ({"stride": 1.5}, TypeError, "stride.*1.5"),
    ({"stride": (1, 1.0)}, TypeError, r"stride.*\(1, 1.0\)"),
    ({"padding": True}, TypeError, "padding.*True"),
    ({"padding": None}, TypeError, "padding.*None"),
    ({"dilation": 2.0}, TypeError, "dilation.*2.0"),
    ({"groups": 1.0}, TypeError, "groups.*1.0"),
    ({"groups": None}, TypeError, "groups.*None"),
    ({"stride": range(1, 3)}, TypeError, r"stride.*range\(1, 3\)"),
    ({"stride": b"\x01\x01"}, TypeError, "stride.*b'"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=lambda v: str(v)[:40])
def test_options_that_the_dense_convolution_refuses(options, error, message, monkeypatch):
    with pytest.raises(error):
        F.conv2d(X, W, **options)
    with pytest.raises(error, match=message):
        call(**options)


# tensors for F.conv2d, ours, what F.conv2d raises, and what our message says
TENSORS = [
    ((X[:, :7], W), {"x": X[:, :7]}, RuntimeError,
     r"weight of size \[8, 8, 3, 3\], expected input\[2, 7, 10, 10\] to have 8 channels, "
     r"but got 7 channels instead.*224 elements"),
    ((X[0, 0], W), {"x": X[0, 0]}, RuntimeError, r"3D \(unbatched\) or 4D.*\[10, 10\]"),
    ((X[None], W), {"x": X[None]}, RuntimeError, r"3D \(unbatched\) or 4D.*\[1, 2, 8, 10, 10\]"),
    ((X[..., :2, :2], W), {"x": X[..., :2, :2]}, RuntimeError,
     r"\(2 x 2\). Kernel size: \(3 x 3\).*\[2, 8, 2, 2\]"),
    ((X[:0, :, :2], W), {"x": X[:0, :, :2]}, RuntimeError, r"\(2 x 10\). Kernel size: \(3 x 3\)"),
    ((X[:, :, :0], W), {"x": X[:, :, :0]}, RuntimeError, r"\(0 x 10\).*\[2, 8, 0, 10\]"),
    ((X, W, X[0, :7, 0, 0]), {"bias": X[0, :7, 0, 0]}, RuntimeError,
     r"\[8, 8, 3, 3\], expected bias to be 1-dimensional with 8 elements.*\[7\]"),
    ((X, W, torch.zeros(8, 1)), {"bias": torch.zeros(8, 1)}, RuntimeError, r"bias.*\[8, 1\]"),
    ((X, W.half()), {"packed": PACKED.half()}, RuntimeError,
     r"Input type \(torch.float32\) and packed type \(torch.float16\) should be the same"),
    ((X, W, torch.zeros(8).double()), {"bias": torch.zeros(8).double()}, RuntimeError,
     r"Input type \(torch.float32\) and bias type \(torch.float64\)"),
    ((X.bool(), W.bool()), {"x": X.bool(), "packed": PACKED.bool()}, NotImplementedError,
     "input of dtype torch.bool"),
    ((X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)),
     {"x": X.to(torch.float8_e4m3fn)}, NotImplementedError, "torch.float8_e4m3fn"),
    ((SPARSE, W), {"x": SPARSE}, RuntimeError, "torch.sparse_coo"),
    (([1, 2], W), {"x": [1, 2]}, TypeError, "'input' must be Tensor, not list"),
    ((X, [1, 2]), {"packed": [1, 2]}, TypeError, "'packed' must be Tensor, not list"),
    ((None, W), {"x": None}, TypeError, "'input' must be Tensor, not NoneType"),
    ((X, None), {"packed": None}, TypeError, "'packed' must be Tensor, not NoneType"),
    ((X, W, 1.0), {"bias": 1.0}, TypeError, "'bias' must be Tensor, not float"),
]  # fmt: skip


@pytest.mark.parametrize("dense, tied, error, message", TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_the_dense_convolution_refuses(dense, tied, error, message):
    with pytest.raises(error):
        F.conv2d(*dense)
    with pytest.raises(error, match=message):
        call(**tied)


OURS = [  # what F.conv2d accepts, or does not have
    ({"x": X.long(), "packed": PACKED.long()}, NotImplementedError, "torch.int64"),
    ({"x": X.cfloat(), "packed": PACKED.cfloat()}, NotImplementedError, "torch.complex64"),
    ({"x": X[:, :0]}, RuntimeError, r"\[2, 0, 10, 10\].*got 0 channels"),
    ({"x": X.to("meta")}, RuntimeError, "input is on meta and packed is on cpu"),
    ({"bias": torch.zeros(8, device="meta")}, RuntimeError, "on cpu and bias is on meta"),
    ({"groups": True}, TypeError, "groups.*True"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size.*3.0"),
    ({"kernel_size": (3, True)}, TypeError, r"kernel_size.*\(3, True\)"),
    ({"kernel_size": (3, 3, 3)}, RuntimeError, r"kernel_size=\[3, 3, 3\]"),
    ({"kernel_size": 0}, ValueError, r"kernel_size should be positive, got \(0, 0\)"),
    ({"kernel_size": (3, -1)}, ValueError, r"kernel_size should be positive, got \(3, -1\)"),
    ({"symmetry": "hermitian"}, ValueError, "symmetry must be one of.*'hermitian'"),
    ({"symmetry": ["self_adjoint"]}, ValueError, r"symmetry must be one of.*\['self_adjoint'\]"),
    ({"padding_mode": ["zeros"]}, ValueError, r"padding_mode must be one of.*\['zeros'\]"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of.*'mirror'"),
    ({"alpha": "1"}, TypeError, "alpha must be a plain number.*'1'"),
    ({"alpha": True}, TypeError, "alpha must be a plain number.*True"),
    ({"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a plain number.*tensor"),
    ({"residual": torch.zeros(2, 8, 10, 10)}, RuntimeError,
     r"residual of the output's size \[2, 8, 8, 8\].*\[2, 8, 10, 10\]"),
    ({"residual": torch.zeros(8, 8, 8)}, RuntimeError, r"\[2, 8, 8, 8\].*\[8, 8, 8\]"),
    ({"residual": torch.zeros(2, 8, 8, 8).half()}, RuntimeError, "residual type.*float16"),
    ({"packed": PACKED[:-1]}, RuntimeError,
     r"1-dimensional with 292 elements for channels=8, kernel_size=\(3, 3\), groups=1, "
     r"symmetry='self_adjoint', but got packed of size \[291\]"),
    ({"packed": PACKED[:284]}, RuntimeError, "the length for symmetry='skew_adjoint'"),
    ({"packed": PACKED[None]}, RuntimeError, r"292 elements.*packed of size \[1, 292\]"),
    ({"packed": torch.zeros(tt.packed_size(6, 3, 2)), "groups": 2}, RuntimeError,
     r"groups=2, weight of size \[6, 3, 3, 3\].*have 6 channels, but got 8 channels"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", OURS, ids=range(len(OURS)))
def test_mistakes_that_the_dense_convolution_does_not_know(arguments, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        call(**arguments)


@pytest.mark.parametrize("dims, wrong", [(1, 1), (1, 4), (2, 2), (2, 5), (3, 3), (3, 6)])
def test_wrong_rank_names_the_function_and_the_size(dims, wrong):
    function = getattr(tt, f"tied_conv{dims}d")
    with pytest.raises(RuntimeError, match=rf"{dims + 1}D.*{dims + 2}D.*tied_conv{dims}d.*\[4"):
        function(torch.zeros([4] * wrong), PACKED, kernel_size=3)


def test_what_passed_as_an_int_does_not_let_its_equals_pass(monkeypatch):
    monkeypatch.undo()  # the valid call does its work
    for name, valid, mistakes in [
        ("stride", 1, [1.0, True, (1.0, 1), (True, 1)]),
        ("padding", 1, [1.0, True, (1, 1.0), [True]]),
        ("dilation", 1, [1.0, True, (True, True)]),
        ("kernel_size", 3, [3.0, (3.0, 3)]),
        ("groups", 1, [1.0, True]),
    ]:
        call(**{name: valid})
        for mistake in mistakes:
            with pytest.raises(TypeError, match=name):
                call(**{name: mistake})


def test_integers_of_numpy_and_lists_are_taken_as_the_dense_convolution_takes_them(monkeypatch):
    monkeypatch.undo()
    x, packed = torch.randn(1, 8, 6, 6), torch.randn(tt.packed_size(np.int64(8), [3, 3]))
    weight = tt.unpack(packed, 8, 3)
    for options in ({"stride": np.int64(2)}, {"padding": [1]}, {"dilation": (np.int32(2), 1)}):
        expected = F.conv2d(x, weight, groups=np.int64(1), **options)
        actual = call(x, packed, kernel_size=np.int64(3), groups=np.int64(1), **options)
        assert torch.equal(actual, expected)
    assert tt.TiedConv2d(np.int64(8), np.int64(3), groups=np.int64(2)).channels == 8


@pytest.mark.parametrize("padding_mode, padding", [("reflect", 10), ("circular", 11)])
def test_padding_larger_than_the_image_is_refused(padding_mode, padding, monkeypatch):
    monkeypatch.undo()  # F.pad itself checks this, before the convolution
    dense = nn.Conv2d(8, 8, 3, padding=padding, padding_mode=padding_mode)
    with pytest.raises(RuntimeError) as theirs:
        dense(X)
    with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
        call(padding=padding, padding_mode=padding_mode)


LAYERS = [  # what nn.Conv2d raises, where it does, and what our message says
    ({"channels": 8, "kernel_size": 3, "groups": 3}, ValueError, "groups.*channels=8, groups=3"),
    ({"channels": 8, "kernel_size": 3, "groups": 0}, ValueError, "groups.*positive.*0"),
    ({"channels": 8, "kernel_size": 3, "padding": "full"}, ValueError, "'full'"),
    ({"channels": 8, "kernel_size": 3, "padding": "same", "stride": 2}, ValueError, "'same'"),
    ({"channels": 8, "kernel_size": 3, "padding_mode": "mirror"}, ValueError, "'mirror'"),
    ({"channels": 8, "kernel_size": 3.0}, TypeError, "kernel_size.*3.0"),
    ({"channels": -4, "kernel_size": 3}, (RuntimeError, ValueError), "channels.*positive.*-4"),
    ({"channels": 8, "kernel_size": -1}, (RuntimeError, ValueError), "kernel_size.*positive.*-1"),
]
OUR_LAYERS = [
    ({"channels": 8, "kernel_size": 0}, ValueError, "kernel_size.*positive.*0"),
    ({"channels": 0, "kernel_size": 3}, ValueError, "channels.*positive.*0"),
    ({"channels": 8.0, "kernel_size": 3}, TypeError, "channels.*8.0"),
    ({"channels": 8, "kernel_size": (3, 3, 3)}, ValueError, r"\[3, 3, 3\]"),
    ({"channels": 8, "kernel_size": 3, "stride": 0}, ValueError, "non-positive stride"),
    ({"channels": 8, "kernel_size": 3, "dilation": 0}, ValueError, "non-positive dilation"),
    ({"channels": 8, "kernel_size": 3, "padding": -1}, ValueError, "negative padding.*-1"),
    ({"channels": 8, "kernel_size": 3, "symmetry": "even"}, ValueError, "'even'"),
    ({"channels": 8, "kernel_size": 3, "dtype": torch.int64}, RuntimeError, "floating point"),
]


@pytest.mark.parametrize("arguments, error, message", LAYERS, ids=str)
def test_layer_arguments_that_the_dense_layer_refuses(arguments, error, message):
    channels = arguments["channels"]
    options = {name: value for name, value in arguments.items() if name != "channels"}
    with pytest.raises(error):
        nn.Conv2d(channels, channels, **options)
    with pytest.raises(error, match=message):
        tt.TiedConv2d(**arguments)


@pytest.mark.parametrize("arguments, error, message", OUR_LAYERS, ids=str)
def test_layer_arguments_that_the_dense_layer_lets_pass(arguments, error, message):
    with pytest.raises(error, match=message):
        tt.TiedConv2d(**arguments)


def test_layer_names_the_channels_it_expects():
    with pytest.raises(RuntimeError, match=r"input\[2, 7, 10, 10\] to have 8 channels, but got 7"):
        tt.TiedConv2d(8, 3)(X[:, :7])


@pytest.mark.parametrize(
    "conv, error, message",
    [
        (nn.Conv2d(4, 8, 3), ValueError, "in_channels=4, out_channels=8"),
        (nn.Conv1d(4, 4, 3), TypeError, "expects Conv2d, got Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), TypeError, "expects Conv2d, got ConvTranspose2d"),
        (nn.Linear(4, 4), TypeError, "expects Conv2d, got Linear"),
    ],
    ids=str,
)
def test_from_conv_refuses_what_it_cannot_tie(conv, error, message):
    with pytest.raises(error, match=message):
        tt.TiedConv2d.from_conv(conv)


def test_from_conv_refuses_an_unknown_symmetry():
    with pytest.raises(ValueError, match="'even'"):
        tt.TiedConv2d.from_conv(nn.Conv2d(4, 4, 3), symmetry="even")


@pytest.mark.parametrize(
    "function, error, message",
    [
        (lambda: tt.pack(torch.zeros(4, 3, 3, 3)), ValueError, r"\[4, 3, 3, 3\]"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 3), groups=2), ValueError, "groups=2"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 3), groups=0), ValueError, "groups=0"),
        (lambda: tt.pack(torch.zeros(4, 4)), ValueError, r"\[4, 4\]"),
        (lambda: tt.pack(torch.zeros(0, 0, 3, 3)), ValueError, "channels.*positive.*0"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 0)), ValueError, r"positive.*\(3, 0\)"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 3).long()), NotImplementedError, "int64"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 3), symmetry="even"), ValueError, "'even'"),
        (lambda: tt.pack(torch.zeros(4, 4, 3, 3), groups="1"), TypeError, "groups.*'1'"),
        (lambda: tt.pack([1.0]), TypeError, "'weight' must be Tensor, not list"),
        (lambda: tt.pack(SPARSE), NotImplementedError, "sparse_coo"),
        (lambda: tt.unpack(None, 8, 3), TypeError, "'packed' must be Tensor, not NoneType"),
        (lambda: tt.packed_size(8, b"33"), TypeError, "kernel_size.*b'33'"),
        (lambda: tt.packed_size("8", 3), TypeError, "channels.*'8'"),
        (lambda: tt.unpack(PACKED[1:], 8, 3), ValueError, r"292 elements.*\[291\]"),
        (lambda: tt.unpack(PACKED.long(), 8, 3), NotImplementedError, "int64"),
        (lambda: tt.unpack(PACKED, 8, (3, 3), 3), ValueError, "channels=8, groups=3"),
        (
            lambda: tt.unpack(PACKED, 8, 3, memory_format=torch.channels_last_3d),
            ValueError,
            "channels_last_3d",
        ),
        (lambda: tt.packed_size(8, 3, symmetry="even"), ValueError, "'even'"),
        (lambda: tt.packed_size(8, ()), ValueError, "kernel_size"),
        (lambda: tt.packed_size(8, (3, 0)), ValueError, r"\(3, 0\)"),
        (lambda: tt.packed_size(8, 3.0), TypeError, "kernel_size"),
        (lambda: tt.packed_size(True, 3), TypeError, "channels.*True"),
        (lambda: tt.packed_size(8, 3, groups=-2), ValueError, "groups.*-2"),
    ],
)
def test_packing_refuses_mistakes(function, error, message):
    with pytest.raises(error, match=message):
        function()


def test_checkpoint_of_the_wrong_shape_is_refused():
    layer = tt.TiedConv2d(8, 3)
    with pytest.raises(RuntimeError, match=r"expected size \[8, 8, 3, 3\], got \[8, 8, 5, 5\]"):
        layer.load_state_dict(nn.Conv2d(8, 8, 5).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        layer.load_state_dict(tt.TiedConv2d(8, 5).state_dict())
    for wrong, message in (([1.0], "not list"), (torch.zeros(8, 8, 3, 3).long(), "int64")):
        with pytest.raises(RuntimeError, match=f"While loading the dense weight.*{message}"):
            layer.load_state_dict({"weight": wrong, "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        layer.load_state_dict({"packed": layer.packed.detach()})


@pytest.mark.parametrize(
    "write",
    [
        lambda w: nn.init.kaiming_normal_(w),
        lambda w: w.data.normal_(),
        lambda w: w.detach().mul_(2),
        lambda w: w.__setitem__(0, 1),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch.Tensor.add_(w, 1),
        lambda w: w.__iadd__(1),
        lambda w: w[0].zero_(),
        lambda w: w.view(-1).data[0].zero_(),
        lambda w: w.unbind()[1].fill_(1),
        lambda w: F.relu(w, inplace=True),
        lambda w: torch._foreach_mul_([w], 2),
        lambda w: setattr(w, "data", torch.zeros(4, 4, 3, 3)),
    ],
    ids=range(13),
)
def test_writing_into_the_dense_weight_raises(write):
    layer = tt.TiedConv2d(4, 3)
    before = layer.packed.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer.packed"):
        write(layer.weight)
    assert torch.equal(layer.packed, before)


def test_assigning_what_is_no_weight_raises():
    layer = tt.TiedConv2d(4, 3)
    with pytest.raises(TypeError, match="'weight' must be Tensor, not NoneType"):
        layer.weight = None
    with pytest.raises(NotImplementedError, match="int64"):
        layer.weight = torch.zeros(4, 4, 3, 3).long()
    with pytest.raises(ValueError, match=r"\[4, 4, 3, 3\], but got weight of size \[4, 4, 5, 5\]"):
        layer.weight = torch.zeros(4, 4, 5, 5)
