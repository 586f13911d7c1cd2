"""The layers: ``nn.Conv2d``'s conventions, and a tie that nothing done in training can break."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
LAYERS = {
    1: (tt.TiedConv1d, nn.Conv1d),
    2: (tt.TiedConv2d, nn.Conv2d),
    3: (tt.TiedConv3d, nn.Conv3d),
}


def is_tied(layer):
    """To the last bit, by slices of the dense weight."""
    weight = layer.weight.detach().clone()
    flipped = weight.flip(tuple(range(2, weight.dim())))
    sign = {"self_adjoint": 1, "skew_adjoint": -1}[layer.symmetry]
    mirror = torch.cat([sign * part.transpose(0, 1) for part in flipped.chunk(layer.groups)])
    return torch.equal(weight, mirror)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
        {"padding": 1, "groups": 2, "bias": False, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate", "dtype": torch.float64},
    ],
    ids=str,
)
def test_layer_computes_what_the_dense_one_does(dims, options):
    tied_class, dense_class = LAYERS[dims]
    tied = tied_class(4, 3, symmetry="skew_adjoint", **options)
    dense = dense_class(4, 4, 3, **options)
    kernel, groups = (3,) * dims, options.get("groups", 1)
    with torch.no_grad():
        dense.weight.copy_(oracle.expand(tied.packed_weight, 4, kernel, groups, "skew_adjoint"))
        if tied.bias is not None:
            dense.bias.copy_(tied.bias)
    x = torch.randn(2, 4, *[7] * dims, dtype=tied.packed_weight.dtype, requires_grad=True)
    for sample in (x, x[0]):
        expected, actual = dense(sample), tied(sample)
        torch.testing.assert_close(actual, expected)
        (want,) = torch.autograd.grad(expected.square().sum(), x)
        (got,) = torch.autograd.grad(actual.square().sum(), x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize(
    "optimizer, options",
    [("SGD", {}), ("Adam", {"eps": 1e-3}), ("AdamW", {"eps": 1e-3})],  # 1e-8 is zero in float16
)
def test_weight_stays_tied_after_training_steps(dtype, symmetry, optimizer, options):
    layer = tt.TiedConv2d(6, 3, padding=1, groups=2, symmetry=symmetry, dtype=dtype)
    before = layer.weight.detach().clone()
    steps = getattr(torch.optim, optimizer)(
        layer.parameters(), lr=0.1, weight_decay=0.01, **options
    )
    for _ in range(3):
        x = torch.randn(2, 6, 5, 5, dtype=dtype)
        (layer(x) - x.flip(1)).float().square().mean().backward()
        steps.step()
        steps.zero_grad()
        assert is_tied(layer)
    assert not torch.equal(layer.weight, before)


def test_one_step_of_sgd_moves_pairs_twice_as_far_as_on_the_averaged_weight():
    layer = tt.TiedConv2d(3, 3, padding=1, bias=False, dtype=torch.float64)
    free = layer.weight.detach().clone().requires_grad_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = layer.weight.detach().clone()
    averaged = (free + free.flip(2, 3).transpose(0, 1)) / 2
    nn.functional.conv2d(x, averaged, padding=1).square().sum().backward()
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    ratio = (layer.weight - before) / (-1e-3 * free.grad)
    expected = torch.full_like(ratio, 2)
    expected[range(3), range(3), 1, 1] = 1
    torch.testing.assert_close(ratio.detach(), expected)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_initial_weight_has_the_distribution_of_the_dense_default(symmetry):
    layer, dense = tt.TiedConv2d(96, 3, groups=2, symmetry=symmetry), nn.Conv2d(96, 96, 3, groups=2)
    bound = 1 / (48 * 9) ** 0.5
    ours, theirs = layer.weight.detach().clone(), dense.weight.detach()
    if symmetry == "skew_adjoint":  # its diagonal is zero, and nothing else is
        diagonal = torch.arange(48)
        for part in ours.chunk(2):
            assert not part[diagonal, diagonal, 1, 1].any()
        ours = ours[ours != 0]
    for weight in (ours, theirs):
        assert bound * 0.99 < weight.abs().max() <= bound
    # Quantiles of 20,736 independent uniform numbers: standard error at most 0.0035 of the range
    levels = torch.linspace(0.1, 0.9, 9)
    quantiles = ours.flatten().quantile(levels)
    torch.testing.assert_close(quantiles, (2 * levels - 1) * bound, rtol=0, atol=0.04 * bound)
    assert layer.bias.abs().max() <= bound and layer.bias.std() > 0.3 * bound


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_from_conv_takes_the_nearest_tied_weight_and_all_the_rest(dims, symmetry):
    tied_class, dense_class = LAYERS[dims]
    conv = dense_class(
        4, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular", dtype=torch.float64
    ).eval()
    state = torch.get_rng_state()
    tied = tied_class.from_conv(conv, symmetry)
    assert torch.equal(torch.get_rng_state(), state)
    flipped = conv.weight.flip(tuple(range(2, dims + 2)))
    sign = 1 if symmetry == "self_adjoint" else -1
    mirror = torch.cat([sign * part.transpose(0, 1) for part in flipped.chunk(2)])
    torch.testing.assert_close(tied.weight, (conv.weight + mirror) / 2)
    assert torch.equal(tied.bias, conv.bias) and tied.bias is not conv.bias
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "training")
    assert all(getattr(tied, name) == getattr(conv, name) for name in names)
    back = tied.to_conv()
    assert type(back) is dense_class and not back.training
    x = torch.randn(1, 4, *[6] * dims, dtype=torch.float64)
    assert torch.equal(back(x), tied(x))
    assert torch.equal(tied_class.from_conv(back, symmetry).packed_weight, tied.packed_weight)
    bare = tied_class.from_conv(dense_class(4, 4, 2, bias=False), symmetry)
    assert bare.bias is None and bare.to_conv().bias is None


def test_tied_dense_checkpoint_loads_to_the_bit():
    layer = tt.TiedConv2d(4, 3)
    dense = tt.TiedConv2d(4, 3).to_conv()
    model = nn.Sequential(layer)
    model.load_state_dict(nn.Sequential(dense).state_dict())
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.bias, dense.bias)
    assert set(model.state_dict()) == {"0.packed_weight", "0.bias"}
    other = nn.Sequential(tt.TiedConv2d(4, 3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].packed_weight, layer.packed_weight)


def test_untied_dense_checkpoint_is_refused_with_its_deviation():
    dense = tt.TiedConv2d(4, 3).to_conv()
    with torch.no_grad():
        dense.weight[1, 2, 0, 1] += 0.5
    layer = tt.TiedConv2d(4, 3)
    before = layer.packed_weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"not tied.*0\.25, at \[(1, 2, 0, 1|2, 1, 2, 1)\]"):
        layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.packed_weight, before)


def test_dense_weight_is_differentiable_and_an_ordinary_tensor_to_others():
    layer = tt.TiedConv2d(4, 3, dtype=torch.float64)
    truth = oracle.expand(layer.packed_weight, 4, (3, 3), 1, "self_adjoint")
    (expected,) = torch.autograd.grad(truth.square().sum(), layer.packed_weight)
    (actual,) = torch.autograd.grad(layer.weight.square().sum(), layer.packed_weight)
    torch.testing.assert_close(actual, expected)
    assert type(layer.weight + 0) is torch.Tensor
    assert (
        type(nn.functional.conv2d(torch.randn(1, 4, 5, 5).double(), layer.weight)) is torch.Tensor
    )


def test_dense_weight_is_shown_copied_and_saved_as_an_ordinary_tensor(tmp_path):
    layer = tt.TiedConv2d(4, 3)
    weight = layer.weight.detach()
    assert repr(weight).startswith("tensor(")
    torch.save(weight, tmp_path / "weight.pt")
    for other in (copy.deepcopy(weight), torch.load(tmp_path / "weight.pt")):
        assert type(other) is torch.Tensor and torch.equal(other, weight)
    kept = layer.weight.clone()
    kept.retain_grad()
    kept.sum().backward()
    assert torch.equal(kept.grad, torch.ones(4, 4, 3, 3))


def test_exported_layer_computes_the_same_for_any_batch():
    layer, x = tt.TiedConv2d(4, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 6, 6)
    batch = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=batch).module()
    for sample in (x, torch.randn(5, 4, 6, 6)):
        torch.testing.assert_close(exported(sample), layer(sample))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_layer_is_its_own_transpose_up_to_the_sign(padding_mode, symmetry):
    layer = tt.TiedConv2d(
        4, 3, padding=1, bias=False, padding_mode=padding_mode, symmetry=symmetry
    ).double()
    jacobian = torch.func.jacrev(layer)(torch.randn(4, 5, 5, dtype=torch.float64))
    matrix = jacobian.reshape(100, 100)
    sign = 1 if symmetry == "self_adjoint" else -1
    torch.testing.assert_close(matrix, sign * matrix.T)


def test_layer_survives_copy_pickle_conversion_and_compilation():
    layer = tt.TiedConv2d(4, 3, padding=1)
    x = torch.randn(1, 4, 5, 5)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and is_tied(layer)
    assert tt.TiedConv2d(4, 3, device="meta").weight.shape == (4, 4, 3, 3)


def test_repr_says_what_is_saved():
    assert repr(tt.TiedConv2d(64, 3, padding=1)) == (
        "TiedConv2d(64, kernel_size=(3, 3), padding=(1, 1), packed_weight=18464 of 36864)"
    )
    layer = tt.TiedConv1d(
        4, 2, stride=2, dilation=3, groups=2, bias=False, padding_mode="circular",
        symmetry="skew_adjoint",
    )  # fmt: skip
    assert repr(layer) == (
        "TiedConv1d(4, kernel_size=(2,), stride=(2,), dilation=(3,), groups=2, "
        "padding_mode='circular', symmetry='skew_adjoint', bias=False, packed_weight=8 of 16)"
    )
