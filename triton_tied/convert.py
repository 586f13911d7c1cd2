"""A whole model: its dense convolutions replaced by tied ones, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .dense_layers import hand_over
from .modules import TiedConv1d, TiedConv2d, TiedConv3d
from .nearest import MAX_ROUNDINGS
from .packing import SUPPORTED_DTYPES, Symmetry, check_symmetry

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Tied = TiedConv1d | TiedConv2d | TiedConv3d
_TIED_OF: dict[type, type[_Tied]] = {
    nn.Conv1d: TiedConv1d,
    nn.Conv2d: TiedConv2d,
    nn.Conv3d: TiedConv3d,
}

_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# They hold on to the parameters that they met when they were made.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@dataclass(frozen=True)
class LayerReport:
    """What ``tie`` did with one dense layer.

    Attributes:
        name: in the model; the first one, if it has several.
        kind: the layer's class before.
        numbers: of its weight, before.
        packed: of its weight, after; None if the layer was skipped.
        moved: how far the projection moved the weight, relative to its norm; None if skipped, NaN
            on the meta device.
        skipped: why the layer stayed as it was, or None.
    """

    name: str
    kind: str
    numbers: int
    packed: int | None = None
    moved: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class TieReport:
    """What ``tie`` did with a model: print it for a table.

    Attributes:
        layers: every ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, in the model's order.
        parameters_before, parameters_after: of the whole model.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int

    @property
    def tied(self) -> list[str]:
        """The names of the layers that were tied."""
        return [layer.name for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> dict[str, str]:
        """The names of the others, each with the reason."""
        return {layer.name: layer.skipped for layer in self.layers if layer.skipped is not None}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("layer")])
        lines = [
            f"{'layer':<{width}}  {'was':<7} {'numbers':>12} {'now':>12}  moved by, or why not"
        ]
        for layer in self.layers:
            now = "" if layer.packed is None else f"{layer.packed:,}"
            note = f"{layer.moved:.2g}" if layer.skipped is None else layer.skipped
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<7} {layer.numbers:>12,} {now:>12}  {note}"
            )
        tied = f"{len(self.tied)} of {len(self.layers)} layers tied"
        totals = f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after"
        return "\n".join([*lines, f"{tied}; {totals}"])


def tie(
    model: nn.Module,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    symmetry: Symmetry = "self_adjoint",
    project: bool = False,
) -> TieReport:
    """Replaces dense convolutions of a model by tied ones, in place.

    A layer can be tied if it is an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` itself, not a
    subclass, has as many input as output channels, and holds a plain weight: not a parametrized,
    pruned or sharded one, nor one that a layer uses which is not tied. Of these, those with
    stride 1 are tied, or those that ``where`` picks. Layers are replaced where they are registered:
    a plain list that holds one goes on to hold the old one.

    Kept are hooks on calls, the bias (the same parameter), ``requires_grad``, dtype, device,
    training mode, and sharing: a layer or a weight used in several places stays one. The tied
    weights are new parameters without ``grad``: make the optimizer after this, and wrap the model
    for several devices after this.

    Args:
        model: changed in place; ``copy.deepcopy`` it first to keep it.
        where: ``where(name, layer)`` is asked of each layer that can be tied, with stride or not.
        symmetry: "self_adjoint" or "skew_adjoint".
        project: take the nearest tied weight where a weight is not tied. Else such a model is
            refused, and not changed. A weight counts as tied if its projection moves it by at most
            4 eps of its dtype, relative to its norm.

    Returns:
        What was tied, what was skipped and why; print it for a table.

    Raises:
        TypeError: ``model`` is no module, a single convolution (``from_conv`` makes a tied one of
            it), or wrapped for several devices.
        ValueError: a weight is not tied and ``project`` is False; a lazy layer without a size; an
            unknown symmetry.

    Examples:
        >>> report = tie(model, where=lambda name, layer: name.startswith("body"), project=True)
    """
    check_symmetry(symmetry)
    _check_model("tie", model)
    if isinstance(model, _Conv):
        raise TypeError("tie: a single layer is not changed in place: use TiedConv2d.from_conv")
    before = _count_parameters(model)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, _Conv)}
    skipped = {conv: _why_not(name, conv, where) for conv, name in names.items()}
    skipped |= _sharing_with_others(model, [conv for conv in names if skipped[conv] is None])

    chosen = [conv for conv in names if skipped[conv] is None]
    tied = {conv: _TIED_OF[type(conv)].from_conv(conv, symmetry) for conv in chosen}
    moved = {conv: _distance(conv, layer) for conv, layer in tied.items()}
    if not project:
        _check_tied({names[conv]: (conv, distance) for conv, distance in moved.items()}, symmetry)
    shared: dict[Tensor, nn.Parameter] = {}
    for conv, layer in tied.items():
        layer.packed_weight = shared.setdefault(conv.weight, layer.packed_weight)
        hand_over(conv, layer, replaces=True)
    _replace(model, tied)
    layers = tuple(
        LayerReport(
            name,
            type(conv).__name__,
            conv.weight.numel(),
            tied[conv].packed_weight.numel() if conv in tied else None,
            moved.get(conv),
            skipped[conv],
        )
        for conv, name in names.items()
    )
    return TieReport(layers, before, _count_parameters(model))


def untie(model: nn.Module) -> nn.Module:
    """Replaces the tied convolutions of a model by dense ones, in place, and returns the model.

    The result has plain ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` layers and the keys of a
    dense model in its state dict: for export, deployment, or code that knows nothing else. Its
    outputs are those of the reference path, to the bit. What ``tie`` keeps is kept.

    Args:
        model: changed in place; ``copy.deepcopy`` it first to keep it. Of a single tied layer the
            dense one is returned.

    Raises:
        TypeError: a layer of a subclass, which may compute something else (a parametrized one is:
            remove the parametrization first); a model that is none, or is wrapped for several
            devices.
    """
    _check_model("untie", model)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, _Tied)}
    for layer, name in names.items():
        if type(layer) not in _TIED_OF.values():
            raise TypeError(
                f"untie: {name!r} is a {type(layer).__name__}, a subclass that may compute "
                f"something else than the dense layer"
            )
    dense = {layer: layer.to_conv() for layer in names}
    weights: dict[tuple, Tensor] = {}
    for layer, conv in dense.items():
        shared = (layer.packed_weight, conv.weight.shape, layer.symmetry)
        conv.weight = weights.setdefault(shared, conv.weight)
        hand_over(layer, conv, replaces=True)
    _replace(model, dense)
    return dense[model] if isinstance(model, _Tied) else model


def _check_model(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} expects a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        wrapper = _WRAPPERS & {base.__name__ for base in type(module).__mro__}
        if wrapper:
            raise TypeError(f"{function}: replace layers first, and wrap in {wrapper.pop()} then")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{function}: {name!r} has no size yet: run the model once before")


def _why_not(name: str, conv: _Conv, where: Callable[[str, nn.Module], bool] | None) -> str | None:
    """Why a layer, taken by itself, is not tied."""
    if type(conv) not in _TIED_OF:
        return "a subclass, which may compute something else"
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} input, {conv.out_channels} output channels"
    if "forward" in vars(conv):
        return "its forward was replaced"
    if conv._parameters.keys() != {"weight", "bias"} or conv._buffers or conv._modules:
        return "its weight is computed from other parameters, or it holds more than weight and bias"
    if type(conv.weight) is not nn.Parameter:
        return f"its weight is a {type(conv.weight).__name__}"
    if conv.weight.dtype not in SUPPORTED_DTYPES:
        return f"its weight is {conv.weight.dtype}"
    if conv.weight._backward_hooks or conv.weight._post_accumulate_grad_hooks:
        return "its weight has gradient hooks"
    if any(getattr(conv, hooks) for hooks in _STATE_DICT_HOOKS):
        return "it has state-dict hooks, which know its weight"
    if where is not None:
        return None if where(name, conv) else "not picked by where"
    return f"stride={conv.stride}" if max(conv.stride) > 1 else None


def _sharing_with_others(model: nn.Module, chosen: list[_Conv]) -> dict[_Conv, str]:
    """Which of the chosen layers must stay, since a layer that is not chosen has their weight."""
    kept = set(chosen)
    others = {
        parameter: name or type(module).__name__
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if parameter is not None and module not in kept
    }
    return {
        conv: f"its weight is shared with {others[conv.weight]!r}, which is not tied"
        for conv in chosen
        if conv.weight in others
    }


def _distance(conv: _Conv, layer: _Tied) -> float:
    """How far the projection moved the weight, relative to its norm."""
    if conv.weight.is_meta:
        return float("nan")
    with torch.no_grad():
        # On the CPU, since not every device has float64.
        before, after = (weight.to("cpu").double() for weight in (conv.weight, layer.weight))
        distance = (after - before).norm().item()
        return distance / before.norm().item() if distance else 0.0


def _check_tied(moved: dict[str, tuple[_Conv, float]], symmetry: str) -> None:
    untied = [
        f"{name} by {distance:.2g}"
        for name, (conv, distance) in moved.items()
        if not conv.weight.is_meta
        and not distance <= MAX_ROUNDINGS * torch.finfo(conv.weight.dtype).eps
    ]
    if untied:
        more = f" and {len(untied) - 5} more" if len(untied) > 5 else ""
        raise ValueError(
            f"tie: {len(untied)} weights are not tied ({symmetry}), and the nearest tied ones are "
            f"away from them, relative to their norm: {', '.join(untied[:5])}{more}. To take the "
            f"nearest ones, use project=True; to leave layers as they are, use where"
        )


def _replace(model: nn.Module, replacements: dict) -> None:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                module._modules[name] = replacements[child]


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
