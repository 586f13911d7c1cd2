"""Which problems a command is asked about: of layers by their shapes, or of a model."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..autotune.problem import Problem, dtype_of, problems_of_layer
from ..autotune.recording import problems_of
from ..geometry import resolve
from ..packing import SIGNS, Layout

_DTYPE_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("which convolutions")
    what.add_argument(
        "--shape",
        type=_sizes,
        action="append",
        metavar="N,C,H,W",
        default=[],
        help="a layer's input: images, channels, rows, columns; may be given several times",
    )
    what.add_argument(
        "--kernel-size", type=int, default=3, help="one side, for --shape (default: 3)"
    )
    what.add_argument(
        "--padding",
        type=_padding,
        default="same",
        help="for --shape: a number, same or valid (default: same)",
    )
    what.add_argument("--dilation", type=int, default=1, help="between taps (default: 1)")
    what.add_argument("--groups", type=int, default=1, help="of channels (default: 1)")
    what.add_argument(
        "--symmetry",
        choices=sorted(SIGNS),
        default="self_adjoint",
        help="of the layer's weight (default: self_adjoint)",
    )
    what.add_argument(
        "--dtype", choices=_DTYPE_NAMES, default="bf16", help="of the tensors (default: bf16)"
    )
    what.add_argument(
        "--memory",
        choices=("channels_last", "contiguous"),
        default="channels_last",
        help="how images lie in memory (default: channels_last)",
    )
    what.add_argument("--model", metavar="MODULE:FACTORY", help="a function that makes the model")
    what.add_argument("--input", type=_sizes, metavar="N,C,H,W", help="what the model takes")


def problems_asked_for(given: argparse.Namespace) -> list[Problem]:
    """Each once.

    Raises:
        ValueError: a request that makes no sense, or a model that cannot be run.
    """
    found: dict[Problem, None] = {}
    for shape in given.shape:
        found |= dict.fromkeys(_of_shape(shape, given))
    if given.model:
        if not given.input:
            raise ValueError("--model needs --input N,C,H,W")
        of_model = _of_model(given.model, given.input, _DTYPE_NAMES[given.dtype], given.memory)
        if not of_model:
            raise ValueError(f"--model {given.model} ran no tied convolution that has a kernel")
        found |= dict.fromkeys(of_model)
    elif given.input:
        raise ValueError("--input is what --model takes, which is not given")
    return list(found)


def _of_shape(shape: Sequence[int], given: argparse.Namespace) -> list[Problem]:
    n, channels, h, w = shape
    layout = Layout(channels, (given.kernel_size,) * 2, given.groups, given.symmetry)
    if isinstance(given.padding, int) and given.padding < 0:
        raise ValueError(f"negative padding is not supported, got {given.padding}")
    geometry = resolve(layout.kernel_size, 1, given.padding, given.dilation)
    if min(geometry.output_size((h, w), layout.kernel_size)) < 1:
        raise ValueError(f"a kernel larger than the padded image: --shape {n},{channels},{h},{w}")
    dtype = dtype_of(_DTYPE_NAMES[given.dtype])
    problem = Problem("conv", dtype, layout, (n, h, w), geometry, given.memory, given.memory)
    return problems_of_layer(problem)


def _of_model(name: str, shape: Sequence[int], dtype: torch.dtype, memory: str) -> list[Problem]:
    module, _, factory = name.partition(":")
    if not (module and factory):
        raise ValueError(f"expected --model MODULE:FACTORY, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    input = torch.randn(*shape, device=device, dtype=dtype).contiguous(
        memory_format=formats[memory]
    )
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), factory)()
        if not isinstance(model, torch.nn.Module):
            kind = type(model).__name__
            raise TypeError(f"expected a function that makes a torch.nn.Module, it made a {kind}")
        model.to(device, dtype)
        return problems_of(lambda: _run_both_ways(model, input))
    except Exception as error:  # it is the user's code that runs here
        raise ValueError(f"--model {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")


def _run_both_ways(model: torch.nn.Module, input: Tensor) -> None:
    """The backward is that of all that has one, whatever the model returns."""
    leaves = [leaf for leaf in tree_leaves(model(input)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if leaf.requires_grad:
            leaf.float().square().sum().backward(retain_graph=True)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected four positive numbers N,C,H,W, got {text!r}")
    return tuple(map(int, parts))


def _padding(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() else text
