"""The dense weight of a layer: what may be assigned to it, and what is refused on it."""

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import triton_tied as tt

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tied_weight(layer):
    """A random tied weight for the layer, entry by entry."""
    packed = torch.randn_like(layer.packed_weight)
    layout = (layer.channels, layer.kernel_size, layer.groups, layer.symmetry)
    return oracle.expand(packed, *layout).detach()


@pytest.fixture(params=SYMMETRIES)
def layer(request):
    return tt.TiedConv2d(6, (3, 2), padding=1, groups=2, symmetry=request.param)


def mirror(weight, symmetry, groups=1):
    flipped = oracle.SIGNS[symmetry] * weight.flip(tuple(range(2, weight.dim())))
    return torch.cat([part.transpose(0, 1) for part in flipped.chunk(groups)])


# ---- assignment


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_weight_that_is_tied_to_rounding_is_stored(symmetry, dtype):
    layer = tt.TiedConv1d(5, 3, symmetry=symmetry, dtype=dtype)
    parameter = layer.packed_weight
    weight = tied_weight(layer)
    layer.weight = weight
    assert torch.equal(layer.weight, weight) and layer.packed_weight is parameter
    # Each entry off by at most two roundings of the largest.
    noise = (torch.rand_like(weight, dtype=torch.float64) * 4 - 2) * torch.finfo(dtype).eps
    rounded = (weight.double() + noise * weight.abs().max().double()).to(dtype)
    layer.weight = rounded
    nearest = (rounded.double() + mirror(rounded.double(), symmetry)) / 2
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    torch.testing.assert_close(layer.weight.double(), nearest, rtol=info.eps, atol=least)
    assert [name for name, _ in layer.named_parameters()] == ["packed_weight", "bias"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_that_is_further_than_the_bound_is_refused_with_its_deviation(dtype, layer):
    layer.to(dtype)
    before = layer.packed_weight.detach().clone()
    weight = tied_weight(layer)
    size = weight.abs().max().item()
    weight[3, 1, 0, 1] += 12 * torch.finfo(dtype).eps * size  # half of it is the distance
    with pytest.raises(ValueError, match=r"not tied.*at \[(3, 1, 0, 1|4, 0, 2, 0)\].*project_"):
        layer.weight = weight
    weight[0, 2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="not tied.*nan"):
        layer.weight = weight
    assert torch.equal(layer.packed_weight, before)


def test_project_stores_the_nearest_tied_weight_and_returns_the_layer(layer):
    for weight in (torch.randn(6, 3, 3, 2), nn.Parameter(torch.randn(6, 3, 3, 2))):
        assert layer.project_(weight) is layer
        nearest = (weight + mirror(weight, layer.symmetry, 2)) / 2
        torch.testing.assert_close(layer.weight, nearest)
    assert layer.packed_weight.requires_grad and layer.packed_weight.grad_fn is None
    with pytest.raises(ValueError, match=r"\[6, 3, 3, 2\], but got weight of size \[6, 6, 3, 2\]"):
        layer.project_(torch.zeros(6, 6, 3, 2))


@pytest.mark.parametrize("make", [nn.Parameter, lambda w: w * torch.ones((), requires_grad=True)])
def test_weight_that_requires_a_gradient_is_refused(layer, make):
    before = layer.packed_weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"requires a gradient.*detach\(\)"):
        layer.weight = make(tied_weight(layer))
    assert torch.equal(layer.packed_weight, before)


def test_weight_of_another_layer_is_not_taken_for_sharing():
    one, other = tt.TiedConv2d(4, 3), tt.TiedConv2d(4, 3)
    with pytest.raises(RuntimeError, match="share.*packed_weight"):
        one.weight = other.weight
    one.weight = other.weight.detach()
    assert torch.equal(one.packed_weight, other.packed_weight)
    one.packed_weight = other.packed_weight
    assert one.packed_weight is other.packed_weight


@pytest.mark.parametrize("computed", ["parametrized", "pruned"])
def test_weight_is_not_stored_in_a_vector_that_is_computed(computed):
    layer = tt.TiedConv2d(4, 3)
    weight = tied_weight(layer)
    if computed == "pruned":
        prune.l1_unstructured(layer, "packed_weight", 0.5)
    else:
        parametrizations.weight_norm(layer, "packed_weight")
    before = layer.packed_weight.detach().clone()
    for store in (layer.project_, lambda w: setattr(layer, "weight", w)):
        with pytest.raises(RuntimeError, match="packed_weight.*computed.*lost"):
            store(weight)
    assert torch.equal(layer.packed_weight, before)
    layer.register_parameter("other", None)


# ---- PyTorch's functions that assign it


def test_functional_call_with_a_dense_weight_is_right_or_raises(layer):
    x = torch.randn(2, 6, 5, 5)
    before = layer.packed_weight.detach().clone()

    def call(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = tied_weight(layer)
    expected = F.conv2d(x, weight, layer.bias, padding=1, groups=2)
    with torch.no_grad():
        torch.testing.assert_close(call(weight), expected)
    assert torch.equal(layer.packed_weight, before)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        call(weight.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="requires a gradient"):
        torch.func.grad(lambda w: call(w).sum())(weight)
    with pytest.raises(ValueError, match="not tied"):
        call(torch.randn(6, 3, 3, 2))
    assert torch.equal(layer.packed_weight, before) and layer.packed_weight.grad is None


def batch_norm():
    norm = nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm


def test_batch_norm_is_folded_into_the_dense_layer_only(layer):
    norm, x = batch_norm(), torch.randn(2, 6, 5, 5)
    layer.eval()
    with pytest.raises(RuntimeError, match="requires a gradient"):
        fusion.fuse_conv_bn_eval(layer, norm)
    with pytest.raises(ValueError, match="not tied"):
        fusion.fuse_conv_bn_eval(layer.requires_grad_(False), norm.requires_grad_(False))
    fused = fusion.fuse_conv_bn_eval(layer.to_conv(), norm)
    torch.testing.assert_close(fused(x), norm(layer(x)))


NORMS = {
    1: (tt.TiedConv1d, nn.BatchNorm1d),
    2: (tt.TiedConv2d, nn.BatchNorm2d),
    3: (tt.TiedConv3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", NORMS)
def test_batch_norm_is_folded_through_the_dense_layer_in_every_form(dims, bias, affine):
    tied_class, norm_class = NORMS[dims]
    layer = tied_class(6, (3, 2, 1)[:dims], groups=3, bias=bias, symmetry="skew_adjoint")
    norm = norm_class(6, affine=affine)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, *norm.parameters()):
            tensor.uniform_(0.5, 2)
    x, model = torch.randn(2, 6, *[4] * dims), nn.Sequential(layer, norm).eval()
    layout = (6, layer.kernel_size, 3, "skew_adjoint")
    convolved = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](
        x, oracle.expand(layer.packed_weight, *layout), layer.bias, groups=3
    )
    fused = fusion.fuse_conv_bn_eval(layer.to_conv(), norm)
    torch.testing.assert_close(fused(x), norm(convolved), rtol=1e-4, atol=1e-4)
    whole = fuse(tt.untie(copy.deepcopy(model)))
    assert [type(module) for module in whole.children()] == [layer.dense]
    torch.testing.assert_close(whole(x), norm(convolved), rtol=1e-4, atol=1e-4)


def test_batch_norm_of_equal_scales_keeps_the_tie(layer):
    norm, x = nn.BatchNorm2d(6).eval().requires_grad_(False), torch.randn(2, 6, 5, 5)
    norm.weight.fill_(-0.3)
    fused = fusion.fuse_conv_bn_eval(layer.eval().requires_grad_(False), norm)
    torch.testing.assert_close(fused(x), norm(layer(x)))


ON_THE_FREE_NUMBERS = {
    "weight norm, old": lambda m: nn.utils.weight_norm(m, "packed_weight", dim=None),
    "weight norm": lambda m: parametrizations.weight_norm(m, "packed_weight", dim=None),
    "spectral norm, old": lambda m: nn.utils.spectral_norm(m, "packed_weight"),
    "spectral norm": lambda m: parametrizations.spectral_norm(m, "packed_weight"),
    "pruning": lambda m: prune.l1_unstructured(m, "packed_weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", ON_THE_FREE_NUMBERS)
def test_what_computes_the_free_numbers_keeps_the_tie(name, layer):
    x, before = torch.randn(2, 6, 5, 5), layer.packed_weight.detach().clone()
    ON_THE_FREE_NUMBERS[name](layer)
    y = layer(x)
    if "spectral" in name:  # of a vector: its length
        torch.testing.assert_close(layer.packed_weight, before / before.norm())
    elif "weight" in name:
        torch.testing.assert_close(layer.packed_weight, before)
    else:
        assert (layer.packed_weight == 0).sum() == round(len(before) / 2)
    weight = dense_like(layer)
    torch.testing.assert_close(y, F.conv2d(x, weight, layer.bias, padding=1, groups=2))
    assert torch.equal(layer.weight, weight)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    torch.testing.assert_close(layer.to_conv()(x), y)
    layer.double().float()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


OVERWRITES = {
    "spectral norm, old": nn.utils.spectral_norm,
    "weight norm, old": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruning by channels": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "pruning by a mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(6, 3, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", OVERWRITES)
def test_what_would_overwrite_the_dense_weight_is_refused(name, layer):
    # PyTorch's two old functions look the name up in a dict of their own accord.
    message = "weight" if name.endswith("old") else "packed_weight"
    with pytest.raises((KeyError, ValueError), match=message):
        OVERWRITES[name](layer)
    assert [name for name, _ in layer.named_parameters()] == ["packed_weight", "bias"]
    assert torch.equal(layer.weight, mirror(layer.weight, layer.symmetry, 2))


# ---- what would do nothing


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.register_hook(print),
        lambda w: w.retain_grad(),
        lambda w: w.register_post_accumulate_grad_hook(print),
        lambda w: w.detach().__dlpack__(),
        lambda w: np.from_dlpack(w.detach()),
    ],
    ids=["hook", "retain_grad", "accumulation hook", "dlpack", "numpy through dlpack"],
)
def test_what_would_do_nothing_is_refused_with_the_remedy(use, layer):
    with pytest.raises(RuntimeError, match=r"layer\.packed_weight.*layer\.weight\.clone\(\)"):
        use(layer.weight)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_of_its_gradient_is_refused_and_one_of_a_copy_is_not(choice, trains, layer):
    layer.requires_grad_(trains)
    message = r"requires_grad.*Hooks and gradients are those of layer\.packed_weight"
    with pytest.raises(RuntimeError, match=message):
        layer.weight.requires_grad_(choice)
    with pytest.raises(RuntimeError, match=message):
        layer.weight.requires_grad = choice
    with pytest.raises(RuntimeError, match=r"setting grad.*layer\.packed_weight"):
        layer.weight.grad = torch.zeros(6, 3, 3, 2)
    assert layer.packed_weight.requires_grad is trains
    weight = layer.weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(weight.square().sum(), weight)
    torch.testing.assert_close(grad, 2 * dense_like(layer))


def dense_like(layer):
    layout = (layer.channels, layer.kernel_size, layer.groups, layer.symmetry)
    return oracle.expand(layer.packed_weight, *layout).detach()


def test_remedies_do_what_the_message_says(layer):
    seen = []
    weight = layer.weight.clone()
    weight.register_hook(seen.append)
    weight.retain_grad()
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())
    assert len(seen) == 1 and layer.packed_weight.grad.any()


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_numpy_reads_the_weight_and_cannot_write_it(layer):
    for array in (layer.weight.detach().numpy(), np.asarray(layer.weight.detach())):
        np.testing.assert_array_equal(array, layer.weight.tolist())
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    np.array(layer.weight.detach())[0] = 1  # a copy


def test_gradient_of_the_weight_warns_as_that_of_any_computed_tensor(layer):
    layer.weight.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not a leaf"):
            nn.utils.clip_grad_norm_([layer.weight], 1.0)


@pytest.mark.parametrize(
    "view", [lambda w: w[:], lambda w: w.view(w.shape), lambda w: w.contiguous()]
)
def test_a_view_of_the_weight_cannot_be_assigned_while_it_requires_a_gradient(view):
    layer = tt.TiedConv2d(4, 3)
    with pytest.raises(RuntimeError, match="requires"):
        layer.weight = view(layer.weight)
