"""The dense weight of a layer, as a tensor that refuses what would change nothing in the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_GRADIENTS = {"requires_grad_", "setting requires_grad", "setting grad"}
_PLAINLY = {"__repr__", "__deepcopy__", "__reduce_ex__"}  # shown, copied and saved as a Tensor is
_EXPORTS = {"__dlpack__", "to_dlpack"}


class ReadOnlyWeight(Tensor):
    """The weight is computed on each access. So in-place operations and hooks on it raise, and its
    NumPy arrays are read-only. What is computed from it is a plain Tensor."""

    _packed_weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, packed_weight: Tensor) -> ReadOnlyWeight:
        """A weight that was computed from the packed one."""
        guarded = weight.as_subclass(cls)
        guarded._packed_weight = packed_weight
        return guarded

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__set__":
            name = f"setting {func.__self__.__name__}"
        given = (*args, *kwargs.values())  # torch.nn.init passes its tensor by keyword
        targets = kwargs.get("out", given[0] if given else None)
        targets = targets if isinstance(targets, list | tuple) else [targets]
        weights = [target for target in targets if isinstance(target, cls)]
        if weights:
            _refuse(name, kwargs, any(hasattr(weight, "_packed_weight") for weight in weights))
        with torch._C.DisableTorchFunctionSubclass():
            if name in _PLAINLY:
                args = (args[0].as_subclass(Tensor), *args[1:])
            result = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                result.flags.writeable = False
            return _guard_views(cls, result, given)


def is_weight_of(weight: Tensor, packed_weight: Tensor) -> bool:
    """Whether a layer with this packed weight computed the dense one."""
    return (
        isinstance(weight, ReadOnlyWeight)
        and getattr(weight, "_packed_weight", None) is packed_weight  # a view has none
    )


def _refuse(name: str, kwargs: dict, itself: bool) -> None:
    """Raises RuntimeError for what would change nothing in the layer; of the weight itself, not of
    its detach(), also a choice of its gradient."""
    method = name.endswith("_") and not name.endswith("__")
    in_place = (method or name.startswith("setting ")) and name not in _GRADIENTS
    in_place = in_place or name == "__setitem__" or name in _IN_PLACE_OPERATORS or name in _EXPORTS
    if in_place or "out" in kwargs or kwargs.get("inplace", False):
        raise RuntimeError(
            f"{name}: the dense weight of a tied layer is computed from layer.packed_weight, so "
            f"writing into it would change nothing. Assign a tied weight to layer.weight, store "
            f"the nearest one by layer.project_(weight), or write into layer.packed_weight; "
            f"layer.weight.clone() is an ordinary tensor"
        )
    if name in _HOOKS or (name in _GRADIENTS and itself):
        raise RuntimeError(
            f"{name}: the dense weight of a tied layer is computed from layer.packed_weight on "
            f"each access, so nothing would come of this. Hooks and gradients are those of "
            f"layer.packed_weight; layer.weight.clone() is an ordinary tensor, to be kept and used "
            f"in place of layer.weight"
        )


def _guard_views(cls: type, result: Any, given: tuple) -> Any:
    """What shares the weight's memory (``.data``, ``[0]``, ``.view(-1)``) is as read-only."""
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(_guard_views(cls, item, given) for item in result)
    weights = [t for t in given if isinstance(t, Tensor) and isinstance(t, cls)]
    shared = [weight.untyped_storage()._cdata for weight in weights]
    if isinstance(result, Tensor) and result.untyped_storage()._cdata in shared:
        return result.as_subclass(cls)
    return result
