"""Layers with ``nn.Conv2d``'s conventions that hold a tied weight as its free numbers only."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from . import functional, operations
from .argument_checks import check_holds_its_numbers, packed_is_computed
from .cached_weights import forget
from .dense_layers import OPTIONS, check_can_be_tied, hand_over, options_of
from .geometry import Geometry, IntOrInts, Padding, PaddingMode, per_axis, resolve
from .memory_format import CHANNELS_LAST, as_channels_last, has_channels_last_strides
from .nearest import pack_tied
from .packing import Symmetry, check_supported, is_distributed, make_layout, pack, unpack
from .read_only_weight import ReadOnlyWeight, is_weight_of
from .spectral_norm import (
    Method,
    check_bounded,
    check_own_transpose,
    power_iteration,
    spectral_norm,
)

_Layer = TypeVar("_Layer", bound="_TiedConv")
_REMEDY = "To store the nearest one, call project_(weight) of the layer"
_FIXED = ("channels", "in_channels", "out_channels", "kernel_size", "groups", "symmetry")


class _TiedConv(nn.Module):
    """What the layers of one, two and three dimensions share; see :class:`TiedConv2d`."""

    dims: ClassVar[int]
    dense: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]
    transposed: ClassVar[bool] = False

    packed_weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrInts,
        *misplaced: NoReturn,
        stride: IntOrInts = 1,
        padding: Padding = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        symmetry: Symmetry = "self_adjoint",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if misplaced:
            _refuse_positions(type(self).__name__, channels, kernel_size, *misplaced)
        super().__init__()
        try:
            kernel = per_axis("kernel_size", kernel_size, self.dims)
            geometry = resolve(kernel, stride, padding, dilation)
        except RuntimeError as error:
            raise ValueError(str(error)) from None  # as nn.Conv2d does for the arguments it checks
        functional.check_padding_mode(padding_mode)
        self._layout = make_layout(channels, kernel, groups, symmetry)
        self.stride = geometry.stride
        amounts = padding if isinstance(padding, str) else geometry.symmetric_padding
        if amounts is None:
            raise ValueError(f"negative padding is not supported, got padding={padding}")
        self.padding: Padding = amounts
        self.dilation = geometry.dilation
        self.padding_mode = padding_mode
        self._channels_last = False
        factory = {"device": device, "dtype": dtype}
        self.packed_weight = nn.Parameter(torch.empty(self._layout.size, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def channels(self) -> int:
        return self._layout.channels

    @property
    def in_channels(self) -> int:
        return self._layout.channels

    @property
    def out_channels(self) -> int:
        return self._layout.channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self._layout.kernel_size

    @property
    def groups(self) -> int:
        return self._layout.groups

    @property
    def symmetry(self) -> Symmetry:
        return self._layout.symmetry

    @property
    def output_padding(self) -> tuple[int, ...]:
        return (0,) * self.dims

    def reset_parameters(self) -> None:
        """Draws ``packed_weight`` so that each entry of the dense weight has the distribution of
        ``nn.Conv2d``'s default, U(-b, b) with b = 1/sqrt(fan_in), and the bias likewise. (With
        "skew_adjoint" the diagonal of the centre tap is zero.) Others are in
        ``triton_tied.init``."""
        check_holds_its_numbers(self)
        bound = 1 / math.sqrt(self._layout.group_channels * self._layout.taps)
        nn.init.uniform_(self.packed_weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``(channels, channels // groups, *kernel_size)``, tied to the last bit.

        Computed on each access and differentiable. What would change nothing in the layer raises:
        writing into it in place, hooks on it.

        Assigning to it stores a weight that is tied to rounding: no entry further from the nearest
        tied weight than four roundings (machine epsilons) of the largest entry. Another weight
        raises ValueError, with the deviation; ``project_`` takes it. A weight that requires a
        gradient raises RuntimeError, since its numbers are copied.
        """
        weight = self._expand()
        if torch.compiler.is_compiling() or type(weight) is not Tensor:
            return weight  # the compiler, and fake or distributed tensors, take no subclass of ours
        return ReadOnlyWeight.of(weight, self.packed_weight)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        name = type(self).__name__
        check_supported(name, "weight", weight)
        # What this layer itself gave may be put back, as torch.func.functional_call does.
        if weight.requires_grad and not is_weight_of(weight, self.packed_weight):
            raise RuntimeError(
                f"{name}.weight was assigned a tensor that requires a gradient, which would not "
                f"reach it: its numbers are copied into packed_weight. Assign weight.detach(); to "
                f"share the weight of another tied layer, assign its packed_weight"
            )
        self._store(pack_tied(weight, self._layout, _REMEDY))

    def _expand(self) -> Tensor:
        channels_last = self._channels_last and CHANNELS_LAST[self.dims]
        memory_format = channels_last or torch.contiguous_format
        return unpack(self.packed_weight, *self._shape, memory_format)

    @property
    def _shape(self) -> tuple[int, tuple[int, ...], int, Symmetry]:
        """What the functions of a packed vector take after it."""
        return self.channels, self.kernel_size, self.groups, self.symmetry

    def project_(self: _Layer, weight: Tensor) -> _Layer:
        """Stores the tied weight nearest to a dense one, ``(W + s * flip(W)^T) / 2``, and returns
        the layer. No gradient goes through it.

        Args:
            weight: ``(channels, channels // groups, *kernel_size)``, any floating dtype.

        Raises:
            TypeError, NotImplementedError: no tensor, or one that is not supported.
            ValueError: another size.
            RuntimeError: ``packed_weight`` is computed from other parameters.
        """
        if isinstance(weight, Tensor) and weight.shape != self._layout.weight_shape:
            raise ValueError(
                f"expected weight of size {list(self._layout.weight_shape)}, "
                f"but got weight of size {list(weight.shape)}"
            )
        self._store(pack(weight, self.groups, self.symmetry))
        return self

    def inner(self, other: _TiedConv) -> Tensor:
        """The Frobenius inner product of the dense weight with that of another layer of the same
        channels, kernel size, groups and symmetry; as ``triton_tied.inner``.

        Raises:
            TypeError: ``other`` is no tied layer.
            ValueError: it is one of another shape or symmetry.
        """
        if not isinstance(other, _TiedConv):
            raise TypeError(f"other must be a tied layer, not {type(other).__name__}")
        if other._layout != self._layout:
            raise ValueError(f"expected a layer of {self._layout}, but got one of {other._layout}")
        return operations.inner(self.packed_weight, other.packed_weight, *self._shape)

    def norm(self) -> Tensor:
        """The Frobenius norm of the dense weight; as ``triton_tied.norm``."""
        return operations.norm(self.packed_weight, *self._shape)

    def spectral_norm(
        self, method: Method = "bound", *, image_size: IntOrInts | None = None
    ) -> Tensor:
        """The spectral norm of the convolution, as ``triton_tied.spectral_norm``, which says for
        what images: "bound" is an upper bound of the layer's Lipschitz constant for all.

        Raises:
            ValueError: for reflect or replicate padding, and circular padding that does more than
                keep the size, no bound is known.
        """
        check_bounded(self.kernel_size, self._geometry, self.padding_mode)
        packed, dilation = self.packed_weight, self.dilation
        return spectral_norm(packed, *self._shape, method, image_size=image_size, dilation=dilation)

    def power_iteration(
        self,
        image_size: IntOrInts,
        vector: Tensor | None = None,
        *,
        tolerance: float = 1e-4,
        max_steps: int = 1000,
    ) -> tuple[Tensor, Tensor]:
        """The layer's spectral norm for images of one size, from below, and the vector for the next
        call; as ``triton_tied.power_iteration``.

        Raises:
            ValueError: the layer is not its own transpose, up to the sign.
        """
        check_own_transpose(self.kernel_size, self._geometry, self.padding_mode)
        return power_iteration(
            self.packed_weight,
            *self._shape,
            image_size=image_size,
            padding_mode=self.padding_mode,
            dilation=self.dilation,
            vector=vector,
            tolerance=tolerance,
            max_steps=max_steps,
        )

    def scale_channels_(self: _Layer, factors: Tensor) -> _Layer:
        """Stores ``D W D``, as ``triton_tied.scale_channels`` gives it, and returns the layer. No
        gradient goes through it, as with the next two; the functions have one."""
        return self._replace(operations.scale_channels, factors)

    def scale_groups_(self: _Layer, factors: Tensor) -> _Layer:
        """Stores what ``triton_tied.scale_groups`` gives, and returns the layer."""
        return self._replace(operations.scale_groups, factors)

    def shift_diagonal_(self: _Layer, gamma: float | Tensor) -> _Layer:
        """Stores what ``triton_tied.shift_diagonal`` gives, and returns the layer."""
        return self._replace(operations.shift_diagonal, gamma)

    def _replace(self: _Layer, function: Callable[..., Tensor], argument: object) -> _Layer:
        self._store(function(self.packed_weight.detach(), argument, *self._shape))
        return self

    @property
    def _geometry(self) -> Geometry:
        padding: Any = self.padding  # not None, as __init__ has seen
        return resolve(self.kernel_size, self.stride, padding, self.dilation)

    def _store(self, packed: Tensor) -> None:
        check_holds_its_numbers(self)
        with torch.no_grad():
            self.packed_weight.copy_(packed)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("weight"):  # "weight_orig" of pruning, for instance
            raise ValueError(
                f"a {type(self).__name__} has no parameter 'weight', from which {name!r} could be "
                f"made: its dense weight is computed. Its parameter is 'packed_weight'"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise AttributeError(
                f"{name} of a {type(self).__name__} is fixed when it is made, since it says what "
                f"the numbers of packed_weight are: make another layer"
            )
        if name == "packed":
            raise AttributeError(f"the parameter of a {type(self).__name__} is packed_weight")
        if name == "weight":  # nn.Module would register a Parameter over the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        input: Tensor,
        *,
        alpha: float | Tensor = 1.0,
        residual: Tensor | None = None,
        beta: float = 1.0,
    ) -> Tensor:
        """``alpha * (conv(input, weight) + bias) + beta * residual``, as in ``tied_conv2d``."""
        if self._channels_last:
            input = as_channels_last(self.dims, input)
            residual = as_channels_last(self.dims, residual)
        layout = self._layout
        return functional.BY_DIMENSIONS[self.dims](
            input,
            self.packed_weight,
            self.bias,
            kernel_size=layout.kernel_size,
            symmetry=layout.symmetry,
            alpha=alpha,
            residual=residual,
            beta=beta,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=layout.groups,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        shown = [f"{self.channels}, kernel_size={self.kernel_size}"]
        defaults = {**OPTIONS, "symmetry": "self_adjoint"}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value not in (default, (default,) * self.dims):
                shown.append(f"{name}={value!r}")
        if self.bias is None:
            shown.append("bias=False")
        dense = math.prod(self._layout.weight_shape)
        return ", ".join([*shown, f"packed_weight={self._layout.size} of {dense}"])

    @classmethod
    def from_conv(
        cls: type[_Layer], conv: nn.Module, symmetry: Symmetry = "self_adjoint"
    ) -> _Layer:
        """The tied layer nearest to a dense one: its weight is projected, see ``pack``.

        Stride, padding, padding mode, dilation, groups, bias, dtype, device, memory format,
        training mode, ``requires_grad`` and the hooks of forward and backward are those of
        ``conv``; no numbers are shared with it.

        Raises:
            TypeError: ``conv`` is not the dense layer of as many dimensions, or has a forward of
                its own.
            ValueError: ``conv`` has other output than input channels; an unknown symmetry.
        """
        check_can_be_tied(conv, cls.dense, f"{cls.__name__}.from_conv")
        dense = cast(nn.Conv2d, conv)
        weight, trains = dense.weight.detach(), dense.weight.requires_grad
        tied = cls(
            dense.in_channels,
            dense.kernel_size,
            bias=dense.bias is not None,
            symmetry=symmetry,
            device="meta",
            dtype=weight.dtype,
            **options_of(dense),
        )
        tied.packed_weight = nn.Parameter(pack(weight, tied.groups, symmetry), trains)
        tied._channels_last = has_channels_last_strides(cls.dims, weight)
        hand_over(dense, tied)
        return tied

    def _to_conv(self) -> Any:
        dense: Any = self.dense
        conv = dense(
            self.channels,
            self.channels,
            self.kernel_size,
            bias=self.bias is not None,
            device="meta",
            dtype=self.packed_weight.dtype,
            **options_of(self),
        )
        conv.weight = nn.Parameter(self._expand().detach(), self.packed_weight.requires_grad)
        hand_over(self, conv)
        return conv

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``Module.to`` and the like. They turn only parameters of four or five dimensions to
        channels-last, and the packed vector has one: a small tensor shows what they ask for."""
        self._leave_blocks()
        if self.dims not in CHANNELS_LAST:
            return super()._apply(fn, recurse)
        memory_format = CHANNELS_LAST[self.dims] if self._channels_last else torch.contiguous_format
        # None of its own is left where packed_weight is a buffer, or a part of a flattened one.
        like = next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0))
        probe = torch.empty(
            (2,) * (self.dims + 2),
            dtype=like.dtype,
            device=like.device,
            memory_format=memory_format,
        )
        super()._apply(fn, recurse)
        self._channels_last = has_channels_last_strides(self.dims, fn(probe))
        return self

    def _leave_blocks(self) -> None:
        """An open ``cached()`` block lets go of ``packed_weight``, which PyTorch may be about to
        swap for another."""
        if "packed_weight" in self._parameters:
            forget(self.packed_weight)

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
        """Takes a dense ``weight`` in place of ``packed_weight``, if it is tied to rounding."""
        dense, packed, bias = (prefix + name for name in ("weight", "packed_weight", "bias"))
        given = state_dict.get(packed)
        self._leave_blocks()
        # A loader that looks for the model's own names first hands back the layer's own.
        handed_back = given is not None and given is self._parameters.get("packed_weight")
        if "packed_weight" not in self._parameters:
            if dense in state_dict:
                why = packed_is_computed(self)
                error_msgs.append(f"While loading the dense weight {dense!r}: {why}")
        elif dense in state_dict and (
            is_distributed(self.packed_weight) or (handed_back and _has_other_processes())
        ):
            error_msgs.append(
                f"The dense weight {dense!r} would not reach all processes. Load the dense "
                f"dictionary into a tied model that is not distributed, by its load_state_dict, "
                f"and give the state_dict() of that to all"
            )
        elif dense in state_dict and (given is None or handed_back):
            state_dict = dict(state_dict)
            try:
                weight = state_dict.pop(dense)
                state_dict[packed] = pack_tied(weight, self._layout, _REMEDY)
            except (TypeError, ValueError, NotImplementedError) as error:
                error_msgs.append(f"While loading the dense weight {dense!r}: {error}")
                # reported above, so not missing as well
                state_dict[packed] = self.packed_weight.detach()
        elif dense in state_dict:
            error_msgs.append(f"There are both a dense {dense!r} and {packed!r}: which is meant?")
        elif (given is None or handed_back) and state_dict.get(bias, self.bias) is not self.bias:
            warnings.warn(
                f"{bias!r} is loaded, but neither {packed!r} nor a dense {dense!r} is there: the "
                f"weight stays as it was. If a loader has dropped the dense weight, since the "
                f"model has no parameter of that name, use load_state_dict of the whole dictionary",
                stacklevel=2,
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` calls first."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile a {type(self).__name__}. Script the dense layer that "
            f"computes the same, layer.to_conv(), or use torch.export or torch.jit.trace"
        )


def _has_other_processes() -> bool:
    distributed = torch.distributed
    is_up = distributed.is_available() and distributed.is_initialized()
    return is_up and distributed.get_world_size() > 1


def _refuse_positions(name: str, channels: Any, kernel_size: Any, *others: Any) -> NoReturn:
    """The habit of ``nn.Conv2d(64, 64, 3)`` would make a kernel of 64 x 64 with stride 3."""
    given = ", ".join(map(repr, (channels, kernel_size, *others)))
    if channels == kernel_size:
        remedy = f"a dense layer's ({given}) is {name}({channels!r}, kernel_size={others[0]!r})"
    else:
        remedy = "there are as many input as output channels, and options are given by name"
    raise TypeError(
        f"{name}({given}): only the channels and the kernel size are given by position: {remedy}"
    )


class TiedConv1d(_TiedConv):
    """``TiedConv2d`` over ``(N, C, L)`` or ``(C, L)``."""

    dims = 1
    dense = nn.Conv1d

    def to_conv(self) -> nn.Conv1d:
        """As that of :class:`TiedConv2d`."""
        return self._to_conv()


class TiedConv2d(_TiedConv):
    """``nn.Conv2d`` with a tied weight, ``W[i,j,a,b] = s * W[j,i,KH-1-a,KW-1-b]``, of which only
    the free numbers are held.

    Args:
        channels: input and output channels C.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``, but by name after the kernel size. The tie holds inside each group.
        symmetry: "self_adjoint" (s = +1) or "skew_adjoint" (s = -1).

    Attributes:
        packed_weight: the free numbers, ``(packed_size(C, kernel_size, groups, symmetry),)``.
        bias: ``(C,)`` or None.
        weight: the dense ``(C, C // groups, KH, KW)`` weight, computed from ``packed_weight``.

    The input is ``(N, C, H, W)`` or ``(C, H, W)``. As a linear map the convolution is its own
    transpose, up to the sign s, with stride 1, an odd kernel, and zero or circular "same"
    padding. With a stride, an even kernel, or reflect or replicate padding the weight is still
    tied, but the map is not self-adjoint.

    In training, a packed number sits in two places of W (one for the centre's diagonal), so its
    gradient is the sum of two dense ones: against an averaged dense weight plain SGD moves W twice
    as far per step, Adam does not differ, and L2 on ``packed_weight`` weighs a pair half as much.

    Channels, kernel size, groups and symmetry cannot be changed afterwards: they say what the
    numbers of ``packed_weight`` are. Stride, padding and dilation can, as in ``nn.Conv2d``. After
    ``.to(memory_format=torch.channels_last)`` the output is channels-last, whatever the input.

    Raises:
        TypeError: an argument of the wrong kind, or more than two by position.
        ValueError: sizes that are not positive, groups that do not divide C, negative padding,
            "same" with a stride, an unknown symmetry, padding string or padding mode.

    Examples:
        >>> TiedConv2d(64, kernel_size=3, padding=1)
        TiedConv2d(64, kernel_size=(3, 3), padding=(1, 1), packed_weight=18464 of 36864)
    """

    dims = 2
    dense = nn.Conv2d

    def to_conv(self) -> nn.Conv2d:
        """The dense layer that computes the same, with the same settings and the hooks of forward
        and backward; no numbers are shared with it."""
        return self._to_conv()


class TiedConv3d(_TiedConv):
    """``TiedConv2d`` over ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""

    dims = 3
    dense = nn.Conv3d

    def to_conv(self) -> nn.Conv3d:
        """As that of :class:`TiedConv2d`."""
        return self._to_conv()
