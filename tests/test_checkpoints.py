"""Dense checkpoints reach a tied layer, or are refused, whichever way they come."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import parametrizations, prune

import triton_tied as tt


def make_model(bias=True):
    layers = [tt.TiedConv2d(4, 3, padding=1, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, tt.TiedConv2d(4, (3, 1), groups=2, bias=bias))


def dense_state(bias=True):
    """The state dict of a dense model, tied, with other numbers."""
    model = make_model(bias)
    return nn.Sequential(model[0].to_conv(), model[1], model[2].to_conv()).state_dict()


def holds(model, state):
    return all(torch.equal(getattr(model[int(k[0])], k[2:]), v) for k, v in state.items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_the_whole_dense_dictionary_is_loaded(strict, bias):
    model, state = make_model(bias), dense_state(bias)
    assert not holds(model, state)
    model.load_state_dict(state, strict=strict)
    assert holds(model, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_torch_distributed_loads_a_dense_dictionary(full, strict, bias):
    model, state = make_model(bias), dense_state(bias)
    options = StateDictOptions(full_state_dict=full, strict=strict)
    set_model_state_dict(model, copy.copy(state), options=options)
    assert holds(model, state)


@pytest.mark.parametrize("strict", [True, False])
def test_torch_distributed_refuses_an_untied_dictionary(strict):
    model, state = make_model(), dense_state()
    state["2.weight"][0, 1, 0, 0] += 1
    before = copy.deepcopy(model.state_dict())
    options = StateDictOptions(full_state_dict=True, strict=strict)
    with pytest.raises(RuntimeError, match=r"'2\.weight'.*not tied"):
        set_model_state_dict(model, state, options=options)
    assert torch.equal(model[2].packed_weight, before["2.packed_weight"])


def test_a_loader_that_drops_unknown_names_is_noticed():
    model, state = make_model(), dense_state()
    known = {name: value for name, value in state.items() if name in model.state_dict()}
    with pytest.warns(UserWarning, match=r"'2\.bias' is loaded.*dense '2\.weight'.*stays"):
        model.load_state_dict(known, strict=False)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="Missing key.*packed_weight"):
        model.load_state_dict(known)


def test_nothing_is_said_where_a_part_is_loaded_on_purpose():
    model = make_model()
    part = {name: value for name, value in model.state_dict().items() if name.startswith("0")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(part, strict=False)


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "packed_weight", 0.5),
    "parametrized": lambda layer: parametrizations.weight_norm(layer, "packed_weight"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_dense_weight_is_not_lost_on_a_vector_that_is_computed(name, strict):
    model, other = make_model(), make_model()
    for each in (model, other):
        COMPUTED[name](each[2])
    before = model[2].packed_weight.detach().clone()
    message = re.compile(r"dense weight '2\.weight'.*packed_weight.*computed from other", re.DOTALL)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(dense_state(), strict=strict)
    assert torch.equal(model[2].packed_weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(other.state_dict(), strict=strict)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(model[2](x), other[2](x))  # PyTorch prunes before the forward


@pytest.mark.parametrize("strict", [True, False])
def test_two_weights_for_one_layer_are_refused(strict):
    model = make_model()
    state = {**dense_state(), "0.packed_weight": torch.zeros_like(model[0].packed_weight)}
    with pytest.raises(RuntimeError, match=r"both a dense '0\.weight' and '0\.packed_weight'"):
        model.load_state_dict(state, strict=strict)


def test_the_old_name_of_the_parameter_is_refused():
    layer = tt.TiedConv2d(4, 3)
    state = {"packed": layer.packed_weight.detach() + 1, "bias": layer.bias.detach()}
    message = re.compile("Missing.*packed_weight.*Unexpected.*packed", re.DOTALL)
    with pytest.warns(UserWarning, match="bias"), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    with pytest.raises(AttributeError, match="packed_weight"):
        layer.packed = layer.packed_weight
    with pytest.raises(AttributeError, match="packed"):
        _ = layer.packed
