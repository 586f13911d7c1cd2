"""The dense weight of a layer, as a tensor that refuses to be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")}


class ReadOnlyWeight(Tensor):
    """Refuses in-place operations: the layer would not see them. What is computed from it is a
    plain Tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = (*args, *kwargs.values())  # torch.nn.init passes its tensor by keyword
        targets = kwargs.get("out", given[0] if given else None)
        targets = targets if isinstance(targets, list | tuple) else [targets]
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        in_place = in_place or name in ("__setitem__", "__set__") or name in _IN_PLACE_OPERATORS
        writes = in_place or "out" in kwargs or kwargs.get("inplace", False)
        if writes and any(isinstance(target, cls) for target in targets):
            raise RuntimeError(
                f"{name}: the dense weight of a tied layer is computed from layer.packed, so that "
                f"writing into it would change nothing. Assign to layer.weight, which projects, "
                f"or write into layer.packed"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__repr__", "__deepcopy__", "__reduce_ex__"):  # shown, copied, saved plain
                args = (args[0].as_subclass(Tensor), *args[1:])
            return _guard_views(cls, func(*args, **kwargs), given)


def _guard_views(cls: type, result: Any, given: tuple) -> Any:
    """What shares the weight's memory (``.data``, ``[0]``, ``.view(-1)``) is as read-only."""
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(_guard_views(cls, item, given) for item in result)
    weights = [t for t in given if isinstance(t, Tensor) and isinstance(t, cls)]
    shared = [weight.untyped_storage()._cdata for weight in weights]
    if isinstance(result, Tensor) and result.untyped_storage()._cdata in shared:
        return result.as_subclass(cls)
    return result
