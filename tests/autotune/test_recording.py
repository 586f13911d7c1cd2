"""Which problems a model meets, without a GPU."""

import pytest
import torch

import triton_tied as tt
from triton_tied.autotune.recording import problems_of

pytestmark = pytest.mark.usefixtures("absent_h200")


def model():
    return torch.nn.Sequential(
        tt.TiedConv2d(16, 3, padding=1), tt.TiedConv2d(16, 3, padding=1), tt.TiedConv2d(16, 5)
    )


def test_problems_of_a_model_are_met_forward_and_backward_without_a_gpu():
    net, x = model(), torch.randn(2, 16, 12, 12, requires_grad=True)
    found = problems_of(lambda: net(x).square().sum().backward())
    met = [(p.kernel, p.layout.kernel_size, p.image[1], p.geometry.padding[0][0]) for p in found]
    assert met == [
        ("conv", (3, 3), 12, 1),  # the second layer's, and both input gradients, are the same
        ("conv", (5, 5), 12, 0),
        ("conv", (5, 5), 8, 4),
        ("weight_grad", (5, 5), 12, 0),
        ("weight_grad", (3, 3), 12, 1),
    ]
    assert not problems_of(lambda: tt.TiedConv2d(4, 3, stride=2)(torch.randn(1, 4, 9, 9)))


def test_dtypes_of_autocast_are_met():
    """What a kernel reads and writes in another dtype than that of the images is other code."""
    layer, x = tt.TiedConv2d(16, 3, padding=1), torch.randn(1, 16, 8, 8, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(layer(x))
        y.sum().backward()

    found = [(p.kernel, p.dtype, p.parameters, p.written) for p in problems_of(step)]
    assert found == [
        ("conv", "bfloat16", "float32", None),  # both layers, and the input gradient of the second
        ("weight_grad", "bfloat16", None, "float32"),
        ("conv", "bfloat16", "float32", "float32"),  # the image is float32, and so its gradient
    ]


def test_rehearsal_computes_the_reference(monkeypatch):
    net, x = model(), torch.randn(2, 16, 12, 12)
    outputs = []
    problems_of(lambda: outputs.append(net(x)))
    torch.testing.assert_close(outputs[0], net(x))
