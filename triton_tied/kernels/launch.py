"""A plan and its tensors to launches: memory for the results, the current device, the compiler."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from ..dispatch import INTERPRETED
from ..packing import Layout
from .calls import Convolution, WeightGradient
from .configs import Config
from .descriptors import Description
from .matrices import matrices_kernel
from .plans import Launch, Merging, Plan, make_plan
from .precision import InputPrecision, rounds_operands
from .toolchain import explain

MATRICES_BLOCK = 64  # rows and columns of the tile that a program unpacks of a matrix
# Triton parses kernels with Python's parser, which on some versions of Python fails in two threads.
_compiling = threading.Lock()
_ANY_DEVICE = contextlib.nullcontext()
# In these versions a compiled kernel can be launched itself, with all arguments of its function. In
# calls of one description it is what Triton finds anew at each launch, in most of its time: types,
# constants and alignments are the same, and what is written is new memory, which PyTorch aligns.
_TAKES_ALL = triton.__version__.startswith(("3.6.", "3.7."))
_PLAIN = (1.0, 0.0)  # alpha and beta where they change nothing


def conv(convolution: Convolution, config: Config) -> Tensor:
    """The output of a convolution; raises as :func:`make_plan` and :func:`run`.

    Deterministic: every split sums its taps in order, then the splits are summed in order.
    """
    return run(make_plan(convolution, config), convolution)


def weight_grad(gradient: WeightGradient, config: Config) -> Tensor:
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
    output, calls = _bind(plan, call, call.x.device)
    return _run(plan, output, calls)


def prepared(plan: Plan, call: Convolution | WeightGradient) -> Callable[[], Tensor]:
    """All but the launches; what is returned may be called again, and then writes the same memory
    anew."""
    output, calls = _bind(plan, call, call.x.device)
    return lambda: _run(plan, output, calls)


def _run(plan: Plan, output: Tensor, calls: list[_Call]) -> Tensor:
    if not plan.main.programs:
        output.zero_()  # the gradient of no image
    else:
        for each in calls:
            each.run()
    return output if plan.copied is None else plan.copied.make(output.device).copy_(output)


def fault(call: Convolution | WeightGradient, config: Config) -> str | None:
    """Why the config should not be launched, or None; see :meth:`_Call.fault`."""
    _, calls = _bind(make_plan(call, config), call, "meta")
    faults = (each.fault() for each in calls)
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


def compile_matrices(
    packed: Tensor, layout: Layout, stored: int, dtype: torch.dtype, precision: InputPrecision
) -> str | None:
    """Compiles :func:`unpack_matrices`, and launches nothing; see :meth:`_Call.fault`."""
    matrices = _empty_matrices(layout, stored, dtype, "meta")
    return _matrices_call(packed, layout, matrices, precision).fault()


def matrices_options(on_nvidia: bool) -> dict[str, int]:
    """How Triton compiles :func:`unpack_matrices`; as it does a config."""
    return {"maxnreg": 255} if on_nvidia else {}


class _Call(NamedTuple):
    """A launch with its arguments, and where it runs."""

    launch: Launch
    values: tuple[Any, ...]
    device: torch.device

    @property
    def kernel(self) -> Any:
        return self.launch.kernel

    @property
    def arguments(self) -> dict[str, Any]:
        """By name."""
        return dict(zip(self.kernel.arg_names, self.values, strict=True))

    def run(self) -> None:
        """
        Raises:
            ToolchainError: Triton can compile nothing on this machine.
        """
        launch = self.launch
        if launch.compiled is not None and not _is_watched(launch):
            with self._on_device():
                launch.compiled[(launch.programs, 1, 1)](*self.values)
            return
        try:
            with _compiling, self._on_device():  # what was not compiled is compiled here
                grid = (launch.programs,)
                compiled = launch.kernel.run(
                    *self.values, grid=grid, warmup=False, **launch.options
                )
        except Exception as error:
            broken = explain(error)
            if broken:
                raise broken from error
            raise
        launch.compiled = compiled if _TAKES_ALL and type(compiled) is CompiledKernel else None

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
                launch = self.launch
                compiled = launch.kernel.warmup(
                    *self.values, grid=(launch.programs,), **launch.options
                )
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
        device = self.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return _ANY_DEVICE
        return torch.cuda.device(device)


def _bind(
    plan: Plan, call: Convolution | WeightGradient, device: torch.device | str
) -> tuple[Tensor, list[_Call]]:
    """Memory for the result on a device, and the launches that fill it."""
    output = plan.output.make(device)
    partial = output if plan.partial is None else plan.partial.make(device)
    scales: tuple[float, ...]
    before: list[_Call] = []
    if type(call) is Convolution:
        x, packed, weights, bias, residual, *_ = call
        if residual is None:
            residual, scales = output, (call.alpha, 0.0)
        else:
            scales = (call.alpha, call.beta)
        if bias is None:
            bias = packed  # never read: any pointer of the dtype that it would have serves
        if plan.merging:
            weights, bias, merges = _bind_merging(plan.merging, weights, bias, device)
            before = [merges]
        triangles = weights if weights.dim() == 1 else None
        tensors = (None, x, weights, triangles, bias, residual, partial)  # CONV_TENSORS
    else:
        x, bias, residual, scales = call.x, output, output, (call.alpha,)
        tensors = (None, x, call.grad, partial)  # GRAD_TENSORS
    arguments = plan.main.arrange(tensors)
    if plan.descriptors:
        arguments = _described(plan.descriptors, arguments)
    if plan.sum is None:
        return output, [*before, _call(plan.main, arguments, scales, x.device)]
    first = _call(plan.main, arguments, _PLAIN[: plan.main.scales], x.device)
    scales = (scales + _PLAIN[len(scales) :])[: plan.sum.scales]
    tensors = (None, partial, bias, residual, output)  # SUM_TENSORS
    last = _call(plan.sum, plan.sum.arrange(tensors), scales, x.device)
    return output, [*before, first, last]


def _bind_merging(
    merging: Merging, weights: Tensor, bias: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, _Call]:
    """The weight and the bias of merged columns, and the launch that fills them."""
    merged_weights = merging.weights.make(device)
    merged_bias = bias if merging.bias is None else merging.bias.make(device)
    tensors = (None, weights, bias, merged_weights, merged_bias)  # MERGE_TENSORS
    call = _call(merging.launch, merging.launch.arrange(tensors), (), weights.device)
    return merged_weights, merged_bias, call


def _is_watched(launch: Launch) -> bool:
    """Whether somebody wants to be told of each launch, or to have other code compiled for it."""
    return bool(launch.kernel.pre_run_hooks or knobs.compilation.instrumentation_mode)


def _described(
    descriptions: list[Description], tensors: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    """The tensors, those that are described as descriptors. Triton checked the fields before; its
    constructor would again."""
    arguments: list[Any] = list(tensors)
    for argument, tensor, kind, fields in descriptions:
        descriptor = arguments[argument] = object.__new__(kind)
        descriptor.__dict__.update(fields)
        descriptor.base = tensors[tensor]
    return tuple(arguments)


def _call(
    launch: Launch, tensors: Sequence[Any], scales: tuple[float, ...], device: torch.device
) -> _Call:
    values = (*tensors, *launch.numbers, *scales, *launch.constants)
    return _Call(launch, values, device)


def _empty_matrices(
    layout: Layout, stored: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    c = layout.group_channels
    return torch.empty(layout.groups, stored, c, c, dtype=dtype, device=device)


def _matrices_call(
    packed: Tensor, layout: Layout, matrices: Tensor, precision: InputPrecision
) -> _Call:
    groups, stored, c, _ = matrices.shape
    numbers = (c, groups, layout.taps, stored)
    constants = (layout.sign, rounds_operands(precision), MATRICES_BLOCK)
    programs = groups * stored * triton.cdiv(c, MATRICES_BLOCK) ** 2
    options = matrices_options(on_nvidia=torch.version.hip is None)
    launch = Launch(matrices_kernel, programs, tuple, numbers, constants, options)
    return _call(launch, (packed, matrices), (), packed.device)
