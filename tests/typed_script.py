"""A user's script, for type checkers: ``tests/test_typing.py`` runs them on it, in strict mode.

Each ``type: ignore`` marks a mistake that they must find: one that is not needed is an error.
"""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import triton_tied as tt


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, channels, 3)
        self.middle = tt.TiedConv2d(
            channels, kernel_size=(3, 3), padding="same", padding_mode="circular", bias=False
        )
        self.pool = tt.TiedConv1d(channels, kernel_size=4, stride=2, symmetry="skew_adjoint")

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.middle(self.lift(x)).flatten(2))
        return pooled


net = Net(8)
layer = net.middle
assert_type(layer.packed, nn.Parameter)
assert_type(layer.bias, nn.Parameter | None)
assert_type(layer.weight, Tensor)
layer = tt.TiedConv2d.from_conv(nn.Conv2d(8, 8, 3), symmetry="self_adjoint")
conv: nn.Conv1d | nn.Conv2d | nn.Conv3d = layer.to_conv()

packed = torch.randn(tt.packed_size(8, (3, 3)))
weight = tt.unpack(packed, 8, 3, memory_format=torch.channels_last)
assert_type(weight, Tensor)
assert_type(tt.pack(weight, groups=1), Tensor)
x = torch.randn(1, 8, 9, 9)
y = tt.tied_conv2d(x, packed, kernel_size=3, padding=1, alpha=0.5, residual=x)
assert_type(y, Tensor)
with tt.cached():
    y = tt.tied_conv2d(y, packed, kernel_size=3)
y = tt.reference.tied_conv2d(x, packed, kernel_size=3)


def is_body(name: str, layer: nn.Module) -> bool:
    return name.startswith("body")


report = tt.tie(net, where=is_body, symmetry="skew_adjoint", project=True)
assert_type(report, tt.TieReport)
for name, reason in report.skipped.items():
    print(name + ": " + reason)
distances: list[float] = [layer.moved for layer in report.layers if layer.moved is not None]
names: list[str] = report.tied
plain: nn.Module = tt.untie(net)

tt.TiedConv2d(8, kernel_size=3, stride="2")  # type: ignore[arg-type]
tt.tie(net, project="yes")  # type: ignore[arg-type]
tt.tied_conv2d(x, packed)  # type: ignore[call-arg]
tt.tied_conv2d(x, None, kernel_size=3)  # type: ignore[arg-type]
report.parameters_before = 3  # type: ignore[misc]
