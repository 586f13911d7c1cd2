r"""Skew orthogonal convolutions (Singla and Feizi, ICML 2021): the exponential of a skew-adjoint
convolution is orthogonal.

.. math:: y = \mathrm{cut}(\exp(A) \, \mathrm{pad}(\mathrm{unshuffle}(x))) + b,
    \quad A = c \, W / \sigma(W)

where :math:`\sigma` is the least norm of the matrices into which W can be reshaped, and c a number:
the norm of A is at most :math:`c \sqrt{K_H K_W}`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .argument_checks import (
    check_circular_or_zeros,
    check_holds_its_numbers,
    check_image,
    check_odd,
)
from .exponential import exp_error_bound, tied_exp
from .geometry import IntOrInts, PaddingMode, as_number, as_positive, per_axis
from .operations import scale_groups
from .packing import Symmetry, is_distributed, make_layout, pack, unpack
from .spectral_norm import spectral_norm, without_autocast
from .tracing import overridable

_FIRST_ITERATIONS = 50  # of the power method, for new weights; then one in each training step
# What the published layers save beside their weight: the vectors of their power method.
_PUBLISHED_VECTORS = [f"{under}{kind}{n}" for under in ("", "_") for kind in "uv" for n in "1234"]


class SkewOrthogonalConv2d(nn.Module):
    """A convolution whose Jacobian is orthogonal, up to the error of a series.

    Where there are more output than input channels, images are padded with channels of zeros, so
    that the norm is kept; where there are fewer, the last channels are cut off, and the map is
    1-Lipschitz. A stride s is ``F.pixel_unshuffle``: it makes s*s channels of each, and loses
    nothing. Zero or circular padding keeps the size.

    Args:
        in_channels, out_channels, bias, device, dtype: as in ``nn.Conv2d``.
        kernel_size: odd.
        stride: an int that divides the sides of the image.
        groups: divides the larger of out_channels and in_channels * stride * stride; each group
            is normalised by itself.
        padding_mode: "zeros" or "circular".
        train_terms, eval_terms: how often the convolution is applied, in training and in
            evaluation mode: 5 and 12 in the paper. (In its successor of 2022 "6 and 15 terms" count
            the first, x itself: 5 and 14 here.)
        correction: c in the formula; by default 0.7 as in the paper, and 1 for a 1x1 kernel. (In
            its successor 1.)
        recompute: as in ``tied_exp``.

    Attributes:
        packed_weight: the free numbers of the skew-adjoint W.
        bias: ``(out_channels,)`` or None.

    The normalisation is the published one: a power method, one step of it in each forward in
    training mode, whose vectors are buffers. ``normalized(iterations=50)`` brings them nearer to
    their limit, before an evaluation for instance. The scale of W does not change the output. The
    vectors count as constants, so a second derivative by the weight alone would not be right.

    The published layers hold a whole filter R and use ``(R - flip(R)^T) / 2``. Their state dicts,
    with "random_conv_filter" (2021) or "weight" (2022), are loaded. Plain SGD trains as theirs does
    with half of their learning rate, since a packed number sits in two places of W.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: sizes or terms that are not positive, an even kernel size, groups that do not
            divide the channels, another padding mode, a correction that is not positive.

    Examples:
        >>> SkewOrthogonalConv2d(16, 32, kernel_size=3, stride=2)
        SkewOrthogonalConv2d(16, 32, kernel_size=(3, 3), stride=2, packed_weight=18400 of 36864)
    """

    packed_weight: nn.Parameter
    bias: nn.Parameter | None
    flat_vectors: Tensor
    square_vectors: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        train_terms: int = 5,
        eval_terms: int = 12,
        correction: float | None = None,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = as_positive("in_channels", in_channels)
        self.out_channels = as_positive("out_channels", out_channels)
        self.stride = as_positive("stride", stride)
        channels = max(self.in_channels * self.stride**2, self.out_channels)
        kernel = per_axis("kernel_size", kernel_size, 2)
        self._layout = make_layout(channels, kernel, groups, "skew_adjoint")
        check_odd(name, kernel)
        check_circular_or_zeros(name, padding_mode)
        self.padding_mode: PaddingMode = padding_mode
        self.train_terms = as_positive("train_terms", train_terms)
        self.eval_terms = as_positive("eval_terms", eval_terms)
        if correction is None:
            correction = 1.0 if self._layout.taps == 1 else 0.7
        self.correction = as_number("correction", correction)
        if self.correction == 0:
            raise ValueError("correction should be positive, got correction=0")
        self.recompute = recompute
        factory = {"device": device, "dtype": dtype}
        self.packed_weight = nn.Parameter(torch.empty(self._layout.size, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        columns = {"flat_vectors": self._layout.taps, "square_vectors": kernel[1]}
        for vectors, taps in columns.items():
            size = self.groups, self._layout.group_channels * taps
            self.register_buffer(vectors, torch.empty(size, **factory))
        self.reset_parameters()

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self._layout.kernel_size

    @property
    def groups(self) -> int:
        return self._layout.groups

    @property
    def terms(self) -> int:
        """Those of the mode that the layer is in."""
        return self.train_terms if self.training else self.eval_terms

    def reset_parameters(self) -> None:
        """As published: W is the half difference of a normal filter of variance 1/C and its
        transpose, and the bias is U(-b, b) with b = 1/sqrt(out_channels).

        Raises:
            RuntimeError: ``packed_weight`` is computed from other parameters, by pruning say.
        """
        check_holds_its_numbers(self)
        nn.init.normal_(self.packed_weight, std=math.sqrt(0.5 / self._layout.group_channels))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_channels)
            nn.init.uniform_(self.bias, -bound, bound)
        self._restart()

    def forward(self, input: Tensor) -> Tensor:
        """From ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``; N may
        be absent.

        Raises:
            RuntimeError: images of another number of channels or axes, or with sides that stride
                does not divide; as ``tied_conv2d``.
        """
        output = tied_exp(
            _widened(
                input, type(self).__name__, self.in_channels, self._layout.channels, self.stride
            ),
            self.normalized(iterations=1 if self.training else 0),
            kernel_size=self.kernel_size,
            terms=self.terms,
            groups=self.groups,
            padding_mode=self.padding_mode,
            symmetry="skew_adjoint",
            recompute=self.recompute,
        )
        output = output.narrow(-3, 0, self.out_channels)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    def normalized(self, iterations: int = 0) -> Tensor:
        """The packed vector of A, after so many steps of the power method."""
        scale = self.correction / self._sigma(iterations)
        packed = self._whole_weight().to(scale.dtype)
        if self.groups == 1:
            scaled = packed * scale
        else:
            scaled = scale_groups(packed, scale, self._layout.channels, *self._sizes)
        return scaled.to(self.packed_weight.dtype)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """A bound of the Lipschitz constant in the present mode, training or evaluation, and
        images of any size: one, and the error of the series.

        It rests on singular values, not on the power method. Only rounding in the layer's dtype
        comes on top. Where no channels are cut, the norm of an image without the bias shrinks to no
        less than 2 minus this bound.
        """
        packed = self.normalized().to(torch.float64)
        norm = spectral_norm(packed, self._layout.channels, *self._sizes)
        return 1 + exp_error_bound(norm, self.terms, "skew_adjoint")

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return self.kernel_size, self.groups, self._layout.symmetry

    def _sigma(self, iterations: int) -> Tensor:
        vectors = self.flat_vectors, self.square_vectors
        return _least_norms(
            self._whole_weight(),
            *vectors,
            self._layout.channels,
            *self._sizes,
            iterations=iterations,
        )

    def _whole_weight(self) -> Tensor:
        """Also outside of the forward of ``fully_shard``, which shards it, but not the buffers."""
        packed: Any = self.packed_weight
        sharded = is_distributed(packed) and not is_distributed(self.flat_vectors)
        return packed.full_tensor() if sharded else packed

    @torch.no_grad()
    def _restart(self) -> None:
        """The power method begins anew, for other weights."""
        self.flat_vectors.normal_()
        self.square_vectors.normal_()
        self._sigma(_FIRST_ITERATIONS)

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
        """Takes what the published layers save, too."""
        names = [prefix + name for name in ("random_conv_filter", "weight")]
        published = next((name for name in names if name in state_dict), None)
        if published is not None:
            try:
                state_dict = self._from_published(state_dict, prefix, published)
            except (TypeError, ValueError, NotImplementedError) as error:
                error_msgs.append(f"While loading {published!r}: {error}")
                return
        known = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if published is not None and len(error_msgs) == known:
            self._restart()

    def _from_published(
        self, state_dict: dict[str, Any], prefix: str, published: str
    ) -> dict[str, Any]:
        if prefix + "packed_weight" in state_dict:
            raise ValueError(f"there is {prefix + 'packed_weight'!r}, too: which is meant?")
        correction = state_dict.get(prefix + "correction", self.correction)
        if not math.isclose(correction, self.correction, rel_tol=1e-6):
            raise ValueError(
                f"it was trained with correction={float(correction):.6g}, "
                f"but this layer has correction={self.correction}"
            )
        dropped = {prefix + name for name in ("correction", *_PUBLISHED_VECTORS)}
        kept = {name: value for name, value in state_dict.items() if name not in dropped}
        weight = kept.pop(published)
        if isinstance(weight, Tensor) and weight.dim() == 5:  # [groups, out, in, KH, KW]
            weight = weight.flatten(0, 1)
        kept[prefix + "packed_weight"] = pack(weight, self.groups, self._layout.symmetry)
        own = {f"{prefix}{name}": vectors for name, vectors in self.named_buffers(recurse=False)}
        return kept | own

    def extra_repr(self) -> str:
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {"stride": 1, "groups": 1, "padding_mode": "zeros", "recompute": False}
        defaults |= {"train_terms": 5, "eval_terms": 12}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={value!r}")
        if self.bias is None:
            shown.append("bias=False")
        dense = math.prod(self._layout.weight_shape)
        return ", ".join([*shown, f"packed_weight={self._layout.size} of {dense}"])


@overridable
def _widened(input: Tensor, name: str, in_channels: int, channels: int, stride: int) -> Tensor:
    """The image as the exponential takes it."""
    check_image(name, input, in_channels)
    if input.shape[-1] % stride or input.shape[-2] % stride:
        raise RuntimeError(
            f"{name} expected sides that are divisible by stride={stride}, "
            f"but got input of size {list(input.shape)}"
        )
    if stride > 1:
        input = F.pixel_unshuffle(input, stride)
    missing = channels - input.shape[-3]
    return F.pad(input, (0, 0, 0, 0, 0, missing)) if missing else input


@overridable
def _least_norms(
    packed: Tensor,
    flat_vectors: Tensor,
    square_vectors: Tensor,
    channels: int,
    kernel_size: tuple[int, ...],
    groups: int,
    symmetry: Symmetry,
    *,
    iterations: int,
) -> Tensor:
    """Of each group the least norm of its two matrices, above zero. (The published layers have two
    more, whose norms are the same for a tied weight.) The vectors are improved in so many steps,
    and count as constants in the gradient, which is exact where they are the singular vectors."""
    weight = unpack(packed, channels, kernel_size, groups, symmetry)
    c = channels // groups
    grouped = weight.to(torch.promote_types(weight.dtype, torch.float32)).view(
        groups, c, c, *kernel_size
    )
    flat = grouped.flatten(2)  # [out, in x KH x KW]
    square = grouped.transpose(2, 3).flatten(3).flatten(1, 2)  # [out x KH, in x KW]
    with without_autocast(weight.device):
        norms = torch.minimum(
            _power_method(flat, flat_vectors, iterations),
            _power_method(square, square_vectors, iterations),
        )
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _power_method(matrices: Tensor, right: Tensor, iterations: int) -> Tensor:
    """Estimates of the norms of ``[group, rows, columns]``, never above them. ``right`` holds the
    right singular vectors, and is improved."""
    with torch.no_grad():
        fixed = matrices.detach()
        vectors = F.normalize(right.to(matrices.dtype)[..., None], dim=1)
        left = F.normalize(fixed @ vectors, dim=1)
        for _ in range(iterations):
            vectors = F.normalize(fixed.mT @ left, dim=1)
            left = F.normalize(fixed @ vectors, dim=1)
        if iterations:
            right.copy_(vectors[..., 0])
    return (left * (matrices @ vectors)).sum((1, 2))
