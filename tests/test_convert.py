"""Whole models: tied, untied, and all else as it was."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import triton_tied as tt


def conv_bn(before, after, stride=1):
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after)
    )


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.first, self.second = conv_bn(before, after, stride), conv_bn(after, after)
        changes = stride > 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride) if changes else nn.Identity()

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """The layout of ResNet-18, with fewer channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8, 2)
        blocks = []
        for before, after, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 2), (16, 24, 2)):
            blocks += [Block(before, after, stride), Block(after, after, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class DnCNN(nn.Sequential):
    def __init__(self, depth=5):
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [*conv_bn(8, 8), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x):
        return x - super().forward(x)


class UNet(nn.Module):
    """One pair of layers serves both resolutions."""

    def __init__(self):
        super().__init__()
        self.lift, self.down = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 2, stride=2)
        self.high = nn.ModuleDict({"in": nn.Conv2d(6, 6, 3, padding="same", groups=2)})
        self.low = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=2, dilation=2), self.high["in"]])
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.head = nn.Conv2d(12, 1, 1)

    def forward(self, x):
        high = F.relu(self.high["in"](self.lift(x)))
        low = self.down(high)
        for layer in self.low:
            low = F.relu(layer(low))
        return self.head(torch.cat([high, self.up(low)], 1))


MODELS = {
    "resnet": (ResNet18, (2, 3, 40, 40), 13),
    "dncnn": (DnCNN, (2, 1, 9, 9), 3),
    "unet": (UNet, (2, 1, 8, 8), 2),
}


def nearest(conv, symmetry):
    """Of any tied weight, written out entry by entry."""
    weight, groups = conv.weight.detach().double(), conv.groups
    flipped = weight.flip(tuple(range(2, weight.dim())))
    mirror = torch.cat([part.transpose(0, 1) for part in flipped.chunk(groups)])
    return (weight + {"self_adjoint": 1, "skew_adjoint": -1}[symmetry] * mirror) / 2


def make(name):
    model_class, shape, tied = MODELS[name]
    return model_class().double().eval(), torch.randn(shape, dtype=torch.float64), tied


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize("name", MODELS)
def test_tied_model_computes_with_the_nearest_tied_weights(name, symmetry):
    model, x, count = make(name)
    truth = copy.deepcopy(model)
    eligible = [
        (name, layer)
        for name, layer in truth.named_modules()
        if type(layer) is nn.Conv2d and layer.in_channels == layer.out_channels
        if layer.stride == (1, 1)
    ]
    before = {name: layer.weight.detach().clone() for name, layer in eligible}
    with torch.no_grad():
        for _, layer in eligible:
            layer.weight.copy_(nearest(layer, symmetry))
    report = tt.tie(model, symmetry=symmetry, project=True)
    torch.testing.assert_close(model(x), truth(x), rtol=1e-10, atol=1e-12)

    assert report.tied == [name for name, _ in eligible] and len(eligible) == count
    assert all(isinstance(model.get_submodule(name), tt.TiedConv2d) for name in report.tied)
    assert report.parameters_before == sum(p.numel() for p in truth.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    for layer in report.layers:
        if layer.skipped is None:
            old, new = before[layer.name], truth.get_submodule(layer.name).weight
            assert layer.moved == pytest.approx(((new - old).norm() / old.norm()).item())
            assert layer.numbers == new.numel()
            assert layer.packed == model.get_submodule(layer.name).packed_weight.numel()


@pytest.mark.parametrize("name", MODELS)
def test_untied_model_is_plain_and_equal_to_the_bit(name):
    model, x, _ = make(name)
    keys = list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    tt.tie(model, project=True)
    assert any(key.endswith("packed_weight") for key in model.state_dict())
    expected = model(x)
    assert tt.untie(model) is model
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(x), expected)
    assert all(not layer.moved for layer in tt.tie(model).layers)  # they are tied as they are


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_go_both_ways(name):
    dense, x, _ = make(name)
    tied = make(name)[0]
    tied.load_state_dict(dense.state_dict())
    tt.tie(tied, project=True)
    again = make(name)[0]  # a tied model, from the tied one's checkpoint
    tt.tie(again, project=True)
    again.load_state_dict(tied.state_dict())
    assert torch.equal(again(x), tied(x))
    plain = make(name)[0]  # a dense model, from the untied one's checkpoint
    plain.load_state_dict(tt.untie(copy.deepcopy(tied)).state_dict())
    assert torch.equal(plain(x), tied(x))
    again.load_state_dict(plain.state_dict())  # a tied model, from the dense one's
    assert torch.equal(again(x), tied(x))


def test_a_trained_tied_model_stays_tied():
    model, x, _ = make("unet")
    tt.tie(model.train(), project=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    tt.untie(model)
    for conv in (model.high["in"], model.low[0]):
        assert torch.equal(conv.weight, nearest(conv, "self_adjoint"))


def test_untied_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(
        OrderedDict(a=nn.Conv1d(4, 4, 3), b=nn.Conv1d(4, 4, 3), c=nn.Conv1d(4, 4, 3))
    )
    model.a = tt.TiedConv1d(4, kernel_size=3).to_conv()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"2 weights are not tied.*: b by 0\.\d+, c by.*project"):
        tt.tie(model)
    for name, p in model.named_parameters():
        parameter, values = before[name]
        assert p is parameter and torch.equal(p, values)
    assert tt.tie(model, where=lambda name, _: name == "a").tied == ["a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_tied_to_rounding_counts_as_tied(dtype):
    conv = nn.Conv2d(6, 6, 3, dtype=torch.float64)
    tied = nearest(conv, "self_adjoint")
    noise = 1 + torch.finfo(dtype).eps * (2 * torch.rand_like(tied) - 1)
    conv.weight.data = tied * noise
    model = nn.Sequential(conv.to(dtype))
    assert tt.tie(model).layers[0].moved < 2 * torch.finfo(dtype).eps
    off = nn.Conv2d(6, 6, 3, dtype=dtype)
    off.weight.data = (tied * (1 + 40 * torch.finfo(dtype).eps * torch.randn_like(tied))).to(dtype)
    with pytest.raises(ValueError, match="not tied"):
        tt.tie(nn.Sequential(off))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_forward():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


def hooked_weight():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.register_hook(lambda grad: grad / 2)
    return conv


def hooked_state_dict():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_state_dict_post_hook(lambda *_: None)
    return conv


SKIPPED = {
    "3 input, 4 output": lambda: nn.Conv2d(3, 4, 3),
    "stride": lambda: nn.Conv2d(4, 4, 3, stride=(1, 2)),
    "subclass": lambda: Doubled(4, 4, 3),
    "subclass, which": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "computed from": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
    "computed from other": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
    "forward was replaced": replaced_forward,
    "gradient hooks": hooked_weight,
    "state-dict hooks": hooked_state_dict,
    "complex64": lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_layers_that_cannot_be_tied_are_skipped_with_the_reason(reason):
    layer = SKIPPED[reason]()
    model = nn.ModuleList([nn.Conv2d(4, 4, 3), layer, nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4)])
    report = tt.tie(model, project=True)
    assert report.tied == ["0"] and list(report.skipped) == ["1"]
    assert reason.removesuffix(", which") in report.skipped["1"]
    assert model[1] is layer


def test_where_picks_among_the_layers_that_can_be_tied():
    asked = []

    def where(name, layer):
        asked.append(name)
        return name == "1"

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3))
    report = tt.tie(model, where=where, project=True)
    assert asked == ["1", "2"] and report.tied == ["1"] and "where" in report.skipped["2"]
    assert model[1].stride == (2, 2)


@pytest.mark.parametrize("back", [False, True], ids=["tie", "untie"])
def test_what_belongs_to_a_layer_is_kept(back):
    conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16, padding_mode="circular").eval()
    conv.weight.requires_grad_(False)
    model, bias, calls = nn.Sequential(conv), conv.bias, []
    handles = [
        conv.register_forward_pre_hook(lambda *_: calls.append("before")),
        conv.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
        conv.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    tt.tie(model, project=True)
    if back:
        tt.untie(model)
    layer = model[0]
    assert layer is not conv and layer.bias is bias and not layer.training
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert flags == {"weight" if back else "packed_weight": False, "bias": True}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer(torch.randn(1, 4, 5, 5, dtype=torch.bfloat16).requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    layer(torch.randn(1, 4, 5, 5, dtype=torch.bfloat16))
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_pruned_layers_hand_over_what_was_left(name):
    """As numbers: the hook that prunes looks for parameters that the other layer has not."""
    x = torch.randn(1, 4, 6, 6)
    dense = prune.random_unstructured(nn.Conv2d(4, 4, 3), name, 0.5)
    tied = tt.TiedConv2d.from_conv(dense)
    truth = F.conv2d(x.double(), nearest(dense, "self_adjoint"), dense.bias.double())
    torch.testing.assert_close(tied(x).double(), truth, rtol=1e-5, atol=1e-5)
    name = {"weight": "packed_weight"}.get(name, name)
    model = nn.Sequential(prune.random_unstructured(tt.TiedConv2d(4, 3), name, 0.5))
    expected = model(x)
    torch.testing.assert_close(model[0].to_conv()(x), expected)
    torch.testing.assert_close(tt.untie(model)(x), expected)
    assert {key for key, _ in model.named_parameters()} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("convert", [tt.TiedConv2d.from_conv, tt.TiedConv2d.to_conv])
def test_hooks_of_a_copy_are_its_own(convert):
    old = nn.Conv2d(4, 4, 3) if convert == tt.TiedConv2d.from_conv else tt.TiedConv2d(4, 3)
    new, calls = convert(old), []
    new.register_forward_hook(lambda *_: calls.append("new"))
    old(torch.randn(1, 4, 5, 5))
    assert not calls


def test_what_is_shared_stays_shared():
    twice, a, b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    b.weight, b.bias = a.weight, a.bias
    model = nn.Sequential(twice, nn.Sequential(a, twice), b)
    report = tt.tie(model, project=True)
    assert report.tied == ["0", "1.0", "2"]
    assert model[0] is model[1][1] and model[1][0] is not model[2]
    assert model[1][0].packed_weight is model[2].packed_weight and model[1][0].bias is model[2].bias
    assert report.parameters_after == 2 * (tt.packed_size(4, 3) + 4)
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    tt.untie(model)
    assert model[0] is model[1][1] and model[1][0].weight is model[2].weight
    assert report.parameters_before == sum(p.numel() for p in model.parameters())


def test_a_weight_that_another_layer_needs_dense_is_left_alone():
    encoder, decoder = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)
    decoder.weight = encoder.weight
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder, "other": nn.Conv2d(4, 4, 3)})
    report = tt.tie(model, project=True)
    assert report.tied == ["other"] and "'decoder'" in report.skipped["encoder"]
    assert model["encoder"].weight is model["decoder"].weight


def test_one_vector_under_two_symmetries_becomes_two_weights():
    """Their lengths are equal for even kernels."""
    model = nn.ModuleList([tt.TiedConv2d(4, kernel_size=2, bias=False) for _ in range(2)])
    model.append(tt.TiedConv2d(4, kernel_size=2, bias=False, symmetry="skew_adjoint"))
    model[1].packed_weight = model[2].packed_weight = model[0].packed_weight
    x = torch.randn(1, 4, 5, 5)
    expected = [layer(x) for layer in model]
    tt.untie(model)
    assert all(torch.equal(layer(x), y) for layer, y in zip(model, expected, strict=True))
    assert model[0].weight is model[1].weight and model[0].weight is not model[2].weight


def test_channels_last_input_gives_channels_last_output_before_and_after():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    tt.tie(model, project=True)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    z = tt.untie(model)(x)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, z)


def test_a_model_on_the_meta_device_is_tied_without_project():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
    tt.tie(model)
    trained = tt.TiedConv2d(4, kernel_size=3)
    model.load_state_dict(nn.Sequential(trained).state_dict(), assign=True)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(model(x), trained(x))


def test_single_layers_wrapped_models_and_subclasses_are_refused():
    conv, tied = nn.Conv2d(4, 4, 3), tt.TiedConv2d(4, kernel_size=3)
    with pytest.raises(TypeError, match="from_conv"):
        tt.tie(conv, project=True)
    dense = tt.untie(tied)
    assert type(dense) is nn.Conv2d and torch.equal(dense.weight, tied.weight)

    class Subclass(tt.TiedConv2d):
        pass

    with pytest.raises(TypeError, match="'0' is a Subclass"):
        tt.untie(nn.Sequential(Subclass(4, kernel_size=3)))
    with pytest.raises(ValueError, match="symmetry must be one of"):
        tt.tie(nn.Sequential(conv), symmetry="skew", project=True)

    class DistributedDataParallel(nn.Sequential):  # the real one needs a process group
        pass

    for convert in (tt.tie, tt.untie):
        with pytest.raises(TypeError, match="wrap in DistributedDataParallel then"):
            convert(nn.Sequential(DistributedDataParallel(nn.Conv2d(4, 4, 3))))


@pytest.mark.parametrize("model", [None, [nn.Conv2d(4, 4, 3)], torch.zeros(3)], ids=str)
def test_what_is_no_module_is_refused(model):
    for convert in (tt.tie, tt.untie):
        with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(model).__name__}"):
            convert(model)


def test_lazy_layers_must_have_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' has no size yet: run the model once"):
        tt.tie(model, project=True)
    model(torch.randn(1, 2, 8, 8))
    assert tt.tie(model, project=True).tied == ["1"]


def test_tied_inside_of_what_was_traced_or_compiled():
    for wrap in (torch.fx.symbolic_trace, lambda m: torch.compile(m, backend="eager")):
        model, x, _ = make("dncnn")
        wrapped = wrap(model)
        wrapped(x)
        report = tt.tie(wrapped, project=True)
        truth, _, _ = make("dncnn")
        truth.load_state_dict(
            {
                k.removeprefix("_orig_mod."): v
                for k, v in tt.untie(copy.deepcopy(wrapped)).state_dict().items()
            }
        )
        assert len(report.tied) == 3
        torch.testing.assert_close(wrapped(x), truth(x))


def test_the_report_is_a_table():
    model = nn.Sequential(
        OrderedDict(lift=nn.Conv2d(1, 8, 3), body=tt.TiedConv2d(8, kernel_size=3).to_conv())
    )
    assert str(tt.tie(model)) == (
        "layer  was          numbers          now  moved by, or why not\n"
        "lift   Conv2d            72               1 input, 8 output channels\n"
        "body   Conv2d           576          292  0\n"
        "1 of 2 layers tied; 664 parameters before, 380 after"
    )
    assert str(tt.tie(nn.Linear(2, 2))).endswith("0 of 0 layers tied; 6 parameters before, 6 after")
