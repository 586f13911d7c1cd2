r"""Residual steps with an antisymmetric convolution, which neither explode nor die out.

.. math:: x' = \sigma(A x - \gamma x + b), \qquad A^T = -A

(Haber and Ruthotto, Stable architectures for deep neural networks, 2017; Chang and others,
Reversible architectures for arbitrarily deep residual neural networks, 2018, and AntisymmetricRNN,
2019.) The eigenvalues of :math:`A - \gamma I` have the real part :math:`-\gamma`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .argument_checks import check_circular_or_zeros, check_image, check_odd
from .dense_layers import options_of
from .functional import tied_conv2d
from .geometry import IntOrInts, PaddingMode, as_number, as_positive
from .modules import TiedConv2d

Method = Literal["euler", "verlet"]


class AntisymmetricResidual2d(nn.Module):
    """One step of a residual net whose convolution A is skew-adjoint.

    "euler" steps forward: ``x + step * activation(A x - gamma * x + b)``.

    "verlet" splits the channels into two halves y and z, which drive each other by a convolution of
    half the channels: ``z - step * activation(A^T y + b)`` is the new z, and with that
    ``y + step * activation(A z + b)`` the new y. It has no damping, and ``inverse`` undoes it.

    **Stability.** Let the activation be zero at zero, with slopes between 0 and 1 (tanh, relu,
    identity). Steps of one and the same layer are stable, however many, where

    - ``step <= 2 * gamma / (gamma**2 + norm**2)`` for "euler", with the spectral norm of A. Then
      the sum of ``S(A x - gamma * x + b)`` never grows, where S is the activation's integral: log
      cosh for tanh. Without damping, gamma = 0, forward Euler is unstable for every step, if
      slowly.
    - ``step < 2 / norm`` for "verlet". Then the linear steps, and so the steps near a state of
      rest, stay bounded.

    ``stable_step()`` computes the limit. It falls as the weight grows in training.

    Args:
        channels: of input and output; for "verlet" even.
        kernel_size: odd.
        step: the step h, positive.
        gamma: the damping, zero or positive: by default 0.1, and 0 for "verlet", which has none.
        method: "euler" or "verlet".
        activation: a function of a tensor, by number: a module, or a function as ``torch.tanh``.
        groups, dilation, bias, device, dtype: as in ``TiedConv2d``.
        padding_mode: "zeros" or "circular"; the padding keeps the size.

    Attributes:
        conv: the ``TiedConv2d`` A x + b.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a step that is not positive, a negative gamma, gamma or an odd number of
            channels with "verlet", an unknown method, an even kernel size, another padding mode;
            as ``TiedConv2d``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrInts = 3,
        *,
        step: float = 0.1,
        gamma: float | None = None,
        method: Method = "euler",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.channels = as_positive("channels", channels)
        self.step = as_number("step", step)
        if gamma is None:
            gamma = 0.1 if method == "euler" else 0.0
        self.gamma = as_number("gamma", gamma)
        if self.step == 0:
            raise ValueError("step should be positive, got step=0")
        if method not in get_args(Method):
            raise ValueError(
                f"method must be one of {set(get_args(Method))}, but got method={method!r}"
            )
        if method == "verlet" and (self.gamma or self.channels % 2):
            raise ValueError(
                f"method 'verlet' needs gamma=0 and an even number of channels, "
                f"got gamma={self.gamma}, channels={self.channels}"
            )
        if not callable(activation):
            raise TypeError(f"activation must be a function of a tensor, got {activation!r}")
        check_circular_or_zeros(name, padding_mode)
        self.method, self.activation = method, activation
        self.conv = TiedConv2d(
            self.channels // 2 if method == "verlet" else self.channels,
            kernel_size,
            padding="same",
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            symmetry="skew_adjoint",
            device=device,
            dtype=dtype,
        )
        check_odd(name, self.conv.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """One step: ``(N, C, H, W)`` or ``(C, H, W)`` to the same size.

        Raises:
            RuntimeError: images of another number of channels or axes; as ``tied_conv2d``.
        """
        check_image(type(self).__name__, input, self.channels)
        if self.method == "euler":
            return input.add(self._force(input), alpha=self.step)
        y, z = input.chunk(2, -3)
        z = z.sub(self._transposed_force(y), alpha=self.step)
        y = y.add(self._force(z), alpha=self.step)
        return torch.cat([y, z], -3)

    def inverse(self, output: Tensor) -> Tensor:
        """The input of which "verlet" makes this output, up to rounding; sizes as in ``forward``.

        Raises:
            RuntimeError: another method than "verlet"; as ``forward``.
        """
        name = type(self).__name__
        if self.method != "verlet":
            raise RuntimeError(f"{name}.inverse needs method='verlet', got {self.method!r}")
        check_image(name, output, self.channels)
        y, z = output.chunk(2, -3)
        y = y.sub(self._force(z), alpha=self.step)
        z = z.add(self._transposed_force(y), alpha=self.step)
        return torch.cat([y, z], -3)

    @torch.no_grad()
    def stable_step(self) -> float:
        """The largest stable step, with ``spectral_norm(..., "bound")`` for the norm of A."""
        norm = float(self.conv.spectral_norm("bound"))
        if self.method == "verlet":
            return 2 / norm if norm else math.inf
        return 2 * self.gamma / (self.gamma**2 + norm**2) if self.gamma else 0.0

    def _force(self, x: Tensor) -> Tensor:
        """``activation(A x - gamma * x + b)``."""
        return self.activation(self.conv(x, residual=x if self.gamma else None, beta=-self.gamma))

    def _transposed_force(self, x: Tensor) -> Tensor:
        """``activation(A^T x + b)``, which is ``activation(-(A x - b))``."""
        conv = self.conv
        field = tied_conv2d(
            x,
            conv.packed_weight,
            None if conv.bias is None else -conv.bias,
            kernel_size=conv.kernel_size,
            symmetry=conv.symmetry,
            alpha=-1.0,
            **options_of(conv),
        )
        return self.activation(field)

    def extra_repr(self) -> str:
        return f"{self.channels}, step={self.step}, gamma={self.gamma}, method={self.method!r}"
