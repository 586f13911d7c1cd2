"""Layers with ``nn.Conv2d``'s conventions that hold a tied weight as its free numbers only."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from . import functional
from .geometry import IntOrInts, Padding, per_axis, resolve
from .packing import check_supported, is_distributed, make_layout, pack, unpack
from .read_only_weight import ReadOnlyWeight

# What a layer holds as attributes of these names, as ``nn.Conv2d`` does, and its default.
_OPTIONS: dict[str, Any] = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
}

_Layer = TypeVar("_Layer", bound="_TiedConv")


class _TiedConv(nn.Module):
    """What the layers of one, two and three dimensions share; see :class:`TiedConv2d`."""

    dims: ClassVar[int]
    dense: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    packed: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrInts,
        stride: IntOrInts = 1,
        padding: Padding = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        symmetry: str = "self_adjoint",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            kernel = per_axis("kernel_size", kernel_size, self.dims)
            geometry = resolve(kernel, stride, padding, dilation)
        except RuntimeError as error:
            raise ValueError(str(error)) from None  # as nn.Conv2d does for the arguments it checks
        functional.check_padding_mode(padding_mode)
        self._layout = make_layout(channels, kernel, groups, symmetry)
        self.channels = self._layout.channels
        self.kernel_size = kernel
        self.stride = geometry.stride
        self.padding = padding if isinstance(padding, str) else geometry.symmetric_padding
        if self.padding is None:
            raise ValueError(f"negative padding is not supported, got padding={padding}")
        self.dilation = geometry.dilation
        self.groups = self._layout.groups
        self.padding_mode = padding_mode
        self.symmetry = symmetry
        factory = {"device": device, "dtype": dtype}
        self.packed = nn.Parameter(torch.empty(self._layout.size, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``packed`` so that each entry of the dense weight has the distribution of
        ``nn.Conv2d``'s default, U(-b, b) with b = 1/sqrt(fan_in), and the bias likewise. (With
        "skew_adjoint" the diagonal of the centre tap is zero.)"""
        bound = 1 / math.sqrt(self._layout.group_channels * self._layout.taps)
        nn.init.uniform_(self.packed, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``(channels, channels // groups, *kernel_size)``, tied to the last bit.

        Computed on each access and differentiable. Assigning to it projects the assigned weight
        onto the tied ones and stores that in ``packed``; writing into it in place raises, since
        that would change nothing in the layer.
        """
        weight = unpack(self.packed, self.channels, self.kernel_size, self.groups, self.symmetry)
        if torch.compiler.is_compiling() or is_distributed(weight):
            return weight
        return weight.as_subclass(ReadOnlyWeight)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        if weight.shape != self._layout.weight_shape:
            raise ValueError(
                f"expected weight of size {list(self._layout.weight_shape)}, "
                f"but got weight of size {list(weight.shape)}"
            )
        with torch.no_grad():
            self.packed.copy_(pack(weight, self.groups, self.symmetry))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a Parameter over the property
            check_supported(type(self).__name__, name, value)
            value = value.detach()
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        return functional.tied_conv(
            self.dims,
            input,
            self.packed,
            self.bias,
            kernel_size=self.kernel_size,
            symmetry=self.symmetry,
            **_options_of(self),
        )

    def extra_repr(self) -> str:
        shown = [f"{self.channels}, kernel_size={self.kernel_size}"]
        defaults = {**_OPTIONS, "symmetry": "self_adjoint"}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value not in (default, (default,) * self.dims):
                shown.append(f"{name}={value!r}")
        if self.bias is None:
            shown.append("bias=False")
        dense = math.prod(self._layout.weight_shape)
        return ", ".join([*shown, f"packed={self._layout.size} of {dense}"])

    @classmethod
    def from_conv(cls: type[_Layer], conv: nn.Module, symmetry: str = "self_adjoint") -> _Layer:
        """The tied layer nearest to a dense one: its weight is projected, see ``pack``.

        Stride, padding, padding mode, dilation, groups, bias, dtype, device and training mode are
        those of ``conv``; nothing is shared with it.

        Raises:
            TypeError: ``conv`` is not the dense layer of as many dimensions.
            ValueError: ``conv`` has other output than input channels; an unknown symmetry.
        """
        if not isinstance(conv, cls.dense):
            raise TypeError(
                f"{cls.__name__}.from_conv expects {cls.dense.__name__}, got {type(conv).__name__}"
            )
        if conv.in_channels != conv.out_channels:
            raise ValueError(
                f"a tied weight has as many input as output channels, got "
                f"in_channels={conv.in_channels}, out_channels={conv.out_channels}"
            )
        weight = conv.weight.detach()
        tied = nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.kernel_size,
            bias=conv.bias is not None,
            symmetry=symmetry,
            device=weight.device,
            dtype=weight.dtype,
            **_options_of(conv),
        )
        tied.weight = weight
        if conv.bias is not None:
            with torch.no_grad():
                tied.bias.copy_(conv.bias)
        return tied.train(conv.training)

    def to_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """The dense ``nn.Conv`` that computes the same; nothing is shared with it."""
        conv: Any = nn.utils.skip_init(
            self.dense,
            self.channels,
            self.channels,
            self.kernel_size,
            bias=self.bias is not None,
            device=self.packed.device,
            dtype=self.packed.dtype,
            **_options_of(self),
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes a dense ``weight`` in place of ``packed``, if it is tied to the last bit."""
        dense, packed = prefix + "weight", prefix + "packed"
        if dense in state_dict and packed not in state_dict:
            state_dict = dict(state_dict)
            try:
                state_dict[packed] = self._pack_exactly(state_dict.pop(dense))
            except (TypeError, ValueError, NotImplementedError) as error:
                error_msgs.append(f"While loading the dense weight {dense!r}: {error}")
                state_dict[packed] = self.packed.detach()  # reported above, so not missing as well
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _pack_exactly(self, weight: Tensor) -> Tensor:
        check_supported("load_state_dict", "weight", weight)
        if weight.shape != self._layout.weight_shape:
            raise ValueError(
                f"expected size {list(self._layout.weight_shape)}, got {list(weight.shape)}"
            )
        packed = pack(weight, self.groups, self.symmetry)
        nearest = unpack(packed, self.channels, self.kernel_size, self.groups, self.symmetry)
        if torch.equal(nearest, weight):
            return packed
        deviation = (weight.double() - nearest.double()).abs()
        worst = [int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape)]
        raise ValueError(
            f"it is not tied ({self.symmetry}): it deviates from the nearest tied weight by up to "
            f"{deviation.max().item():.3g}, at {worst}. To take the nearest one, use "
            f"{type(self).__name__}.from_conv, or assign it to .weight"
        )


def _options_of(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _OPTIONS}


class TiedConv1d(_TiedConv):
    """``TiedConv2d`` over ``(N, C, L)`` or ``(C, L)``."""

    dims = 1
    dense = nn.Conv1d


class TiedConv2d(_TiedConv):
    """``nn.Conv2d`` with a tied weight, ``W[i,j,a,b] = s * W[j,i,KH-1-a,KW-1-b]``, of which only
    the free numbers are held.

    Args:
        channels: input and output channels C.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``. The tie holds inside each group.
        symmetry: "self_adjoint" (s = +1) or "skew_adjoint" (s = -1).

    Attributes:
        packed: the free numbers, ``(packed_size(C, kernel_size, groups, symmetry),)``.
        bias: ``(C,)`` or None.
        weight: the dense ``(C, C // groups, KH, KW)`` weight, computed from ``packed``.

    The input is ``(N, C, H, W)`` or ``(C, H, W)``. As a linear map the convolution is its own
    transpose, up to the sign s, with stride 1, an odd kernel, and zero or circular "same"
    padding. With a stride, an even kernel, or reflect or replicate padding the weight is still
    tied, but the map is not self-adjoint.

    In training, a packed number sits in two places of W (one for the centre's diagonal), so its
    gradient is the sum of two dense ones: against an averaged dense weight plain SGD moves W twice
    as far per step, Adam does not differ, and L2 on ``packed`` weighs a pair half as much.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: sizes that are not positive, groups that do not divide C, negative padding,
            "same" with a stride, an unknown symmetry, padding string or padding mode.

    Examples:
        >>> TiedConv2d(64, kernel_size=3, padding=1)
        TiedConv2d(64, kernel_size=(3, 3), padding=(1, 1), packed=18464 of 36864)
    """

    dims = 2
    dense = nn.Conv2d


class TiedConv3d(_TiedConv):
    """``TiedConv2d`` over ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""

    dims = 3
    dense = nn.Conv3d
