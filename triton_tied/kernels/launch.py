"""A plan and its tensors to launches: memory for the results, the current device, the compiler."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import INTERPRETED
from ..packing import Layout
from .configs import Config, ConvConfig, WeightGradConfig
from .matrices import matrices_kernel
from .plans import Convolution, Launch, Plan, WeightGradient, make_plan
from .precision import InputPrecision, rounds_operands
from .stored_taps import are_matrices, stored_taps
from .toolchain import explain

MATRICES_BLOCK = 64  # rows and columns of the tile that a program unpacks of a matrix
# Triton parses kernels with Python's parser, which on some versions of Python fails in two threads.
_compiling = threading.Lock()
_ANY_DEVICE = contextlib.nullcontext()


def conv(convolution: Convolution, config: ConvConfig) -> Tensor:
    """The output of a convolution; raises as :func:`make_plan` and :func:`run`.

    Deterministic: every split sums its taps in order, then the splits are summed in order.
    """
    return run(make_plan(convolution, config), convolution)


def weight_grad(gradient: WeightGradient, config: WeightGradConfig) -> Tensor:
    """The gradient of the packed vector, and of the bias; raises as :func:`make_plan` and
    :func:`run`.

    Deterministic: every split sums its pixels in order, then the splits are summed in order.
    """
    return run(make_plan(gradient, config), gradient)


def run(plan: Plan, call: Convolution | WeightGradient) -> Tensor:
    """The result of a call of the plan's description.

    Raises:
        ToolchainError: Triton can compile nothing on this machine.
    """
    return prepared(plan, call)()


def prepared(plan: Plan, call: Convolution | WeightGradient) -> Callable[[], Tensor]:
    """All but the launches; what is returned may be called again, and then writes the same memory
    anew."""
    device = call.x.device
    output = _like(plan.output, device)
    partial = output if plan.partial is None else _like(plan.partial, device)
    calls = [each for each in _bind(plan, call, output, partial) if each.programs]

    def launch() -> Tensor:
        if not calls:
            output.zero_()  # the gradient of no image
        for each in calls:
            each.run()
        return output

    return launch


def fault(call: Convolution | WeightGradient, config: Config) -> str | None:
    """Why the config should not be launched, or None; see :meth:`_Call.fault`."""
    plan = make_plan(call, config)
    partial = plan.output if plan.partial is None else plan.partial
    faults = (each.fault() for each in _bind(plan, call, plan.output, partial))
    return next((found for found in faults if found), None)


def unpack_matrices(
    packed: Tensor, layout: Layout, stored: int, dtype: torch.dtype, precision: InputPrecision
) -> Tensor:
    """The first ``stored`` taps as ``(groups, stored, C, C)`` of C = channels/groups, in ``dtype``,
    rounded for products of that precision.

    Raises:
        ToolchainError: Triton can compile nothing on this machine.
    """
    matrices = _empty_matrices(layout, stored, dtype, packed.device)
    _matrices_call(packed, layout, matrices, precision).run()
    return matrices


def read_weights(
    packed: Tensor, layout: Layout, dtype: torch.dtype, precision: InputPrecision
) -> Tensor:
    """What a convolution in ``dtype`` reads of the weight; see :class:`Convolution`.

    Raises:
        ToolchainError: Triton can compile nothing on this machine.
    """
    if not are_matrices(layout, precision):
        return packed.to(dtype).contiguous()
    return unpack_matrices(packed, layout, stored_taps(layout, precision), dtype, precision)


def compile_matrices(
    packed: Tensor, layout: Layout, stored: int, dtype: torch.dtype, precision: InputPrecision
) -> str | None:
    """Compiles :func:`unpack_matrices`, and launches nothing; see :meth:`_Call.fault`."""
    matrices = _empty_matrices(layout, stored, dtype, "meta")
    return _matrices_call(packed, layout, matrices, precision).fault()


def matrices_options(on_nvidia: bool) -> dict[str, int]:
    """How Triton compiles :func:`unpack_matrices`; see :func:`.configs.compile_options`."""
    return {"maxnreg": 255} if on_nvidia else {}


class _Call(NamedTuple):
    """A kernel, the number of its programs, its arguments, and where it runs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        """
        Raises:
            ToolchainError: Triton can compile nothing on this machine.
        """
        try:
            with _compiling, self._on_device():  # what was not compiled is compiled here
                self.kernel[(self.programs,)](**self.arguments)
        except Exception as error:
            broken = explain(error)
            if broken:
                raise broken from error
            raise

    def fault(self) -> str | None:
        """Compiles, and launches nothing. Returns why this GPU cannot run what came of it, or
        should not, since registers spill; None where all is well, or interpreted.

        Whether a config spills hangs on all that it is compiled for, so that a list of configs
        that were compiled for some problems cannot promise it for others.

        Raises:
            ToolchainError: Triton can compile nothing on this machine.
        """
        if INTERPRETED:
            return None
        try:
            with _compiling, self._on_device():
                compiled = self.kernel.warmup(grid=(self.programs,), **self.arguments)
                compiled._init_handles()  # loads it, which tells what it needs
        except Exception as error:  # a compiler has many ways to fail, none of them ours
            broken = explain(error)
            if broken:
                raise broken from error
            if "out of memory" in str(error):  # to load it: that says nothing of the code
                return None
            return f"{type(error).__name__}: {error}"
        spilled = 4 * compiled.n_spills
        return f"spills {spilled} bytes of registers" if spilled else None

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else _ANY_DEVICE


def _like(described: Tensor, device: torch.device) -> Tensor:
    shape, stride = described.shape, described.stride()
    return torch.empty_strided(shape, stride, dtype=described.dtype, device=device)


def _bind(
    plan: Plan, call: Convolution | WeightGradient, output: Tensor, partial: Tensor
) -> list[_Call]:
    """The launches of a plan. ``partial`` is what the first writes, the output if it is alone."""
    if isinstance(call, Convolution):
        scales: dict[str, Any] = {"alpha": call.alpha, "beta": _beta(call)}
        # What is absent is never read: any pointer of the dtype that it would have serves.
        bias = call.packed if call.bias is None else call.bias
        added = {"bias": bias, "residual": output if call.residual is None else call.residual}
        tensors = {"x": call.x, "weights": call.weights, "opposite_weights": None, **added}
        packed = call.weights if call.weights.dim() == 1 else None
        tensors |= {"triangles": packed, "y": partial}
    else:
        scales, added = {"alpha": call.alpha}, {"bias": output, "residual": output}
        tensors = {"x": call.x, "grad": call.grad, "partial": partial}
        tensors |= {"opposite_x": None, "opposite_grad": None}
    device = call.x.device
    if plan.sum is None:
        return [_call(plan.main, {**_described(plan, tensors), **scales}, device)]
    ones = dict.fromkeys(scales, 1.0) | {"beta": 0.0}
    first = {**_described(plan, tensors), **({name: ones[name] for name in scales})}
    last = {"partial": partial, **added, "y": output, **ones, **scales}
    return [_call(plan.main, first, device), _call(plan.sum, last, device)]


def _beta(call: Convolution) -> float:
    return 0.0 if call.residual is None else call.beta


def _described(plan: Plan, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """The tensors, those that have a description as its descriptor."""
    arguments: dict[str, Any] = dict(tensors)
    for name, description in plan.descriptors.items():
        tensor = tensors[name]
        if tensor is None:  # the same memory, read in other tiles
            tensor = tensors[name.removeprefix("opposite_")]
        arguments[name] = TensorDescriptor(tensor, *description)
    return arguments


def _call(launch: Launch, arguments: dict[str, Any], device: torch.device) -> _Call:
    return _Call(launch.kernel, launch.programs, {**launch.arguments, **arguments}, device)


def _empty_matrices(
    layout: Layout, stored: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    c = layout.group_channels
    return torch.empty(layout.groups, stored, c, c, dtype=dtype, device=device)


def _matrices_call(
    packed: Tensor, layout: Layout, matrices: Tensor, precision: InputPrecision
) -> _Call:
    groups, stored, c, _ = matrices.shape
    arguments = {
        "packed": packed,
        "matrices": matrices,
        "channels": c,
        "groups": groups,
        "taps": layout.taps,
        "stored": stored,
        "SIGN": layout.sign,
        "ROUNDS": rounds_operands(precision),
        "BLOCK": MATRICES_BLOCK,
        **matrices_options(on_nvidia=torch.version.hip is None),
    }
    programs = groups * stored * triton.cdiv(c, MATRICES_BLOCK) ** 2
    return _Call(matrices_kernel, programs, arguments, packed.device)
