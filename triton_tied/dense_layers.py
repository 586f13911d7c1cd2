"""What a tied layer and the dense one that it stands for hand over to each other."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# What a layer holds as attributes of these names, as ``nn.Conv2d`` does, and its default.
OPTIONS: dict[str, Any] = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)

# Hooks that compute a parameter before each forward: its value is handed over.
_MAKE_A_PARAMETER = (SpectralNorm, WeightNorm, BasePruningMethod)


def options_of(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in OPTIONS}


def check_can_be_tied(conv: nn.Module, dense: type[nn.Module], asked_by: str) -> None:
    """Raises unless ``conv`` computes what a ``dense`` layer does, with as many output as input
    channels. A parametrized layer is of a class of its own that computes the same."""
    if not isinstance(conv, dense):
        raise TypeError(f"{asked_by} expects {dense.__name__}, got {type(conv).__name__}")
    own: Any = type(conv)
    if own.forward is not dense.forward or own._conv_forward is not dense._conv_forward:  # type: ignore[attr-defined]
        raise TypeError(
            f"{asked_by} expects {dense.__name__}, got {type(conv).__name__}, which has a forward "
            f"of its own: what it computes would be lost"
        )
    if conv.in_channels != conv.out_channels:
        raise ValueError(
            f"a tied weight has as many input as output channels, got "
            f"in_channels={conv.in_channels}, out_channels={conv.out_channels}"
        )


def hand_over(old: nn.Module, new: nn.Module, *, replaces: bool = False) -> None:
    """The bias, the training mode, and the hooks of forward and backward, in their order: copies,
    or, where ``new`` takes the place of ``old``, the same bias, and the hooks so that their handles
    go on to remove them."""
    bias: Any = old.bias
    if replaces and isinstance(bias, nn.Parameter):
        new.bias = bias
    elif bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    new.train(old.training)
    for hooks in _HOOKS:
        if replaces:
            setattr(new, hooks, getattr(old, hooks))
        else:
            getattr(new, hooks).update(getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    for key, hook in list(new._forward_pre_hooks.items()):
        if isinstance(hook, _MAKE_A_PARAMETER):
            del new._forward_pre_hooks[key]
