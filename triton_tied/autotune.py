"""Which config serves a problem: the caller's, the user's table, the shipped table, the cost model.

With ``torch.backends.cudnn.benchmark`` a problem without an entry is timed on first use, as cuDNN
does; otherwise the cost model chooses, at once and the same way every time. Nothing is timed in
deterministic mode, while a CUDA graph is captured, or on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from . import gpus, table, trial
from .candidates import Dtype, Kernel
from .configs import ConvConfig, WeightGradConfig
from .cost import Sieved, serves, sieve, unpack_us
from .geometry import Geometry, memory_of
from .launch import extent, input_precision
from .packing import Layout
from .problem import Centre, Problem
from .table import Entry, Origin
from .tuner import Config, Tuned

# A centre gathered from its triangle costs each program scattered reads; an unpacked one a launch.
# Where the one begins to pay is a guess, until a table holds both.
_SMALL_CENTRE = 64
_FEW_PIXELS = 2**14
_MOST_CHOSEN = 4096  # calls that are told apart; images of ever new sizes must not fill the memory

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

# Why a config of the kernel should not be launched for the tensors at hand, or None: the compiler's
# word.
Fault = Callable[[Any], str | None]

# Others may be stand-ins, of a tracer say, whose memory cannot be asked for.
_WITH_MEMORY = (Tensor, torch.nn.Parameter)

_Choice = TypeVar("_Choice")
_chosen: dict[tuple, Config] = {}
_unpacking: dict[tuple, bool] = {}
_tables: dict[str, dict[str, Entry]] = {}
# What this process timed but no table holds, by GPU and problem: a winner that could not be saved,
# or None, since nothing worked. It need not be timed again.
_unsaved: dict[tuple[str, str], Entry | None] = {}
_tuning = threading.RLock()
# Of the whole process: on a GPU the backward runs on threads of PyTorch's own.
_override: dict[str, Config] = {}
_recorded: dict[Problem, None] | None = None


def unpacks_centre(x: Tensor, layout: Layout, geometry: Geometry) -> bool:
    """Whether a convolution of ``x`` should unpack its centre first, though nothing else would use
    it: as the tables say where they hold both ways, else by a guess."""
    if torch.compiler.is_compiling() or type(x) not in _WITH_MEMORY:
        return guess_unpacks_centre(layout, x.shape[0] * x.shape[2] * x.shape[3])
    key = (layout, geometry, *_identity(x))
    known = _unpacking.get(key)
    if known is None:
        problem = describe("conv", layout, geometry, "gathered", x)
        known = _remember(_unpacking, key, _compare_centres(problem, x.device))
    return known


def _compare_centres(problem: Problem, device: torch.device) -> bool:
    gathered = _entry(problem, device)
    unpacked = _entry(replace(problem, centre="unpacked"), device)
    if gathered is None or unpacked is None:
        return guess_unpacks_centre(problem.layout, math.prod(problem.image))
    return unpacked.median_us + unpack_us(problem, gpus.of_device(device)) < gathered.median_us


def guess_unpacks_centre(layout: Layout, pixels: int) -> bool:
    """Where nothing was timed."""
    return layout.group_channels >= _SMALL_CENTRE and pixels >= _FEW_PIXELS


def no_fault(config: Config) -> None:
    return None


def conv_config(
    x: Tensor,
    layout: Layout,
    geometry: Geometry,
    unpacked: bool,
    fault: Fault = no_fault,
    form: tuple = (),
) -> ConvConfig:
    """For a convolution of ``x``; ``unpacked``: its centre tap is; ``form``: what else the
    compiled code, and so ``fault``, depends on."""
    centre: Centre = "unpacked" if unpacked else "gathered"
    return _choose("conv", layout, geometry, centre, (x,), fault, form)  # type: ignore[return-value]


def weight_grad_config(
    x: Tensor, grad: Tensor, layout: Layout, geometry: Geometry, fault: Fault = no_fault
) -> WeightGradConfig:
    """For the packed gradient of a convolution of ``x`` with output gradient ``grad``."""
    return _choose("weight_grad", layout, geometry, "none", (x, grad), fault)  # type: ignore[return-value]


def _choose(
    kernel: Kernel,
    layout: Layout,
    geometry: Geometry,
    centre: Centre,
    images: tuple[Tensor, ...],
    fault: Fault,
    form: tuple = (),
) -> Config:
    record(kernel, layout, geometry, centre, *images)
    if kernel in _override:
        return _override[kernel]
    x = images[0]
    key = (
        kernel, layout, geometry, centre, torch.backends.cudnn.benchmark, form,
        *_identity(*images),
    )  # fmt: skip
    config = _chosen.get(key)
    if config is None:
        problem = describe(kernel, layout, geometry, centre, *images)
        config, final = _find(problem, x.device, fault)
        if final:
            _remember(_chosen, key, config)
    return config


def _identity(*images: Tensor) -> tuple:
    """What of images a choice may depend on."""
    x = images[0]
    layouts = [(image.shape, image.stride(), image.data_ptr() % 16) for image in images]
    return x.dtype, x.device, input_precision(x.dtype), *layouts


def _remember(known: dict[tuple, _Choice], key: tuple, choice: _Choice) -> _Choice:
    if len(known) >= _MOST_CHOSEN:
        known.clear()
    known[key] = choice
    return choice


def describe(
    kernel: Kernel, layout: Layout, geometry: Geometry, centre: Centre, *images: Tensor
) -> Problem:
    """The problem of reading these images."""
    x = images[0]
    return Problem(
        kernel,
        dtype_of(x.dtype),
        layout,
        (max(x.shape[0], 1), x.shape[2], x.shape[3]),  # of no image nothing is launched
        geometry,
        memory_of(*images),
        centre if layout.taps % 2 else "none",
        not any(image.data_ptr() % 16 for image in images),
        max(extent(image) for image in images) >= 2**31,
    )


def dtype_of(dtype: torch.dtype) -> Dtype:
    """The list of candidates that serves a dtype, under PyTorch's setting for TF32."""
    if dtype == torch.float32 and input_precision(dtype) == "ieee":
        return "float32_ieee"
    return _DTYPES[dtype]


def config_for(problem: Problem, device: torch.device | str | None = None) -> Config:
    """The config that serves a problem on a device, by default the current GPU. Nothing is timed.

    Raises:
        KeyError: no kernel was compiled for a problem like this.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    entry = _entry(problem, device)
    return entry.config if entry else sieve(problem, gpus.of_device(device)).untimed


@contextlib.contextmanager
def using(
    *, conv: ConvConfig | None = None, weight_grad: WeightGradConfig | None = None
) -> Iterator[None]:
    """Inside this block the kernels take these configs, whatever the problem, on all threads.

    A config that cannot serve a problem raises ValueError at the launch.
    """
    global _override
    outer, given = _override, {"conv": conv, "weight_grad": weight_grad}
    _override = {**outer, **{name: config for name, config in given.items() if config is not None}}
    try:
        yield
    finally:
        _override = outer


def _find(problem: Problem, device: torch.device, fault: Fault = no_fault) -> tuple[Config, bool]:
    """The config, and whether that is the last word while tables stay as they are."""
    entry = _entry(problem, device)
    if entry and fault(entry.config) is None:
        return entry.config, True
    if not torch.backends.cudnn.benchmark or device.type != "cuda":
        return _untimed(problem, device, fault), True
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return _untimed(problem, device, fault), False
    winner = _winner_on_first_use(problem, device)
    if winner is not None and fault(winner) is None:
        return winner, True
    return _untimed(problem, device, fault), True


def _winner_on_first_use(problem: Problem, device: torch.device) -> Config | None:
    if (origin_of(device).gpu, problem.key) in _unsaved:
        return None  # what it won is no good here, or nothing won
    try:
        return tune_problem(problem, device).winner
    except torch.cuda.OutOfMemoryError:
        # The tensors to time on do not fit beside the user's: no reason to fail, nor to try again.
        _unsaved[origin_of(device).gpu, problem.key] = None
        return None


def _untimed(problem: Problem, device: torch.device, fault: Fault) -> Config:
    """The first in the order of the cost model that has no fault; the first where all have."""
    ranked = sieve(problem, gpus.of_device(device)).ranked
    return next((config for config in ranked if fault(config) is None), ranked[0])


def tune_problem(
    problem: Problem,
    device: torch.device,
    budget_s: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
    again: bool = False,
) -> Tuned:
    """Times a problem on a GPU and keeps the winner in the user's table.

    Another process that is tuning the same kind of GPU is waited for, and its choice taken, unless
    ``again``. Where the table cannot be locked or written, a warning says so, and the winner is
    kept for this process alone.
    """
    origin = origin_of(device)
    path = table.path_of(origin)
    with _tuning, table.locked(path):
        _tables.pop(origin.gpu, None)
        known = None if again else _entry(problem, device)
        if known:
            return Tuned({known.config: known.median_us})
        sieved = sieve(problem, gpus.of_device(device))
        tuned = trial.tune_on(device, problem, sieved, budget_s, progress)
        _keep(path, origin, problem, _as_entry(sieved, tuned))
        _reread()
    return tuned


def _keep(path: Path, origin: Origin, problem: Problem, entry: Entry | None) -> None:
    """In the table if possible, else in memory."""
    _unsaved[origin.gpu, problem.key] = entry
    if entry is None:
        return
    try:
        table.save(path, origin, {problem.key: entry})
    except OSError as error:
        warnings.warn(f"a tuned config is kept for this process only: {error}", stacklevel=2)
    else:
        del _unsaved[origin.gpu, problem.key]


def _as_entry(sieved: Sieved, tuned: Tuned) -> Entry | None:
    predicted = {candidate.config: candidate.predicted_us for candidate in sieved.candidates}
    winner = tuned.winner
    if winner is None:
        return None
    first_us = tuned.medians.get(sieved.untimed)
    return Entry(winner, tuned.medians[winner], first_us, predicted[winner])


def _entry(problem: Problem, device: torch.device) -> Entry | None:
    """What a table holds for the problem's key, if it serves this very problem."""
    origin = origin_of(device)
    known = _tables.get(origin.gpu)
    if known is None:
        shipped = table.load(table.path_of(origin, table.SHIPPED), origin)
        known = {**shipped, **table.load(table.path_of(origin), origin)}
        _tables[origin.gpu] = known
    entry = _unsaved.get((origin.gpu, problem.key)) or known.get(problem.key)
    if entry is None or not serves(problem, gpus.of_device(device), entry.config):
        return None
    return entry


def _reread() -> None:
    """Reads the tables at the next choice."""
    _tables.clear()
    _chosen.clear()
    _unpacking.clear()


def forget() -> None:
    """Reads the tables anew at the next choice, which stand against what was timed without them."""
    _unsaved.clear()
    _reread()


def record(
    kernel: Kernel, layout: Layout, geometry: Geometry, centre: Centre, *images: Tensor
) -> None:
    """Notes a problem, where a block asked for it."""
    found = _recorded
    if found is not None:
        found[describe(kernel, layout, geometry, centre, *images)] = None


@contextlib.contextmanager
def recording() -> Iterator[dict[Problem, None]]:
    """Collects the problems that are met inside this block, on any thread, in order, each once."""
    global _recorded
    outer, found = _recorded, dict[Problem, None]()
    _recorded = found
    try:
        yield found
    finally:
        _recorded = outer


@functools.lru_cache(maxsize=16)
def origin_of(device: torch.device) -> Origin:
    """What the figures of a device's table depend on."""
    if device.type != "cuda":
        return Origin("cpu", "", 0, torch.__version__, triton.__version__, "")
    properties = torch.cuda.get_device_properties(device)
    return Origin(
        properties.name,
        f"{properties.major}.{properties.minor}",
        properties.multi_processor_count,
        torch.__version__,
        triton.__version__,
        _assembler_version(),
    )


def _assembler_version() -> str:
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    return triton.knobs.nvidia.ptxas.version
