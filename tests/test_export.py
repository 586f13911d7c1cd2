"""Exported models compute the same, on either path. What needs onnx is skipped without it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import triton_tied as tt

MODELS = {
    "1-D": (lambda: tt.TiedConv1d(4, kernel_size=3, padding=1), (2, 4, 7)),
    "even kernel": (lambda: tt.TiedConv2d(4, kernel_size=2, padding=1), (2, 4, 5, 5)),
    "antisymmetric": (
        lambda: tt.TiedConv2d(6, kernel_size=3, groups=2, symmetry="skew_adjoint"),
        (2, 6, 5, 5),
    ),
    "circular": (
        lambda: tt.TiedConv2d(4, kernel_size=3, padding=1, padding_mode="circular"),
        (2, 4, 5, 5),
    ),
    "many channels": (
        lambda: tt.TiedConv2d(520, kernel_size=1, symmetry="skew_adjoint"),
        (1, 520, 2, 2),
    ),
    "3-D, stride": (lambda: tt.TiedConv3d(2, kernel_size=3, stride=2), (1, 2, 5, 5, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_traced_layer_takes_other_sizes_and_warns_of_nothing(name):
    make, shape = MODELS[name]
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, torch.randn(shape))
    graph = str(traced.inlined_graph)
    assert "arange" not in graph, "a table is computed on each call"
    x = torch.randn(3, shape[1], *(size + 1 for size in shape[2:]))
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_model_computes_the_same(name, dynamo, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    evaluator = pytest.importorskip("onnx.reference", reason="needs onnx").ReferenceEvaluator
    make, shape = MODELS[name]
    model, x = nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape)
    untied = tt.untie(copy.deepcopy(model))
    for exported in (model, untied):
        path = tmp_path / "model.onnx"
        torch.onnx.export(exported, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False)
        session = evaluator(str(path))
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)
    kinds = {node.op_type for node in session.proto_.graph.node}
    assert "Conv" in kinds and not {"Gather", "Transpose"} & kinds, "untied first: plain nodes"
