"""Which peers run which passes of which workloads, within a limit of time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..autotune.problem import problems_of_layer
from . import roofline
from .agreement import Truth
from .clocks import Clock, Turn, interleave
from .formulas import peers_of, random_weight
from .passes import PASSES, Call, Pass, random_images
from .peers import PEERS, Peer, Tied
from .results import LeftOut, Measurement, Result, machine_of, measurements_of
from .workloads import (
    TORCH_DTYPES,
    Dtype,
    Format,
    Workload,
    every,
    formulas,
    on_cpu,
    quick,
    sweeps,
)

Progress = Callable[[int, int, str], None]

_UNCOMPILED = tuple(name for name, peer in PEERS.items() if not peer.whole)
_EVERYWHERE = tuple(name for name, peer in PEERS.items() if peer.in_every_workload)
_IN_SWEEPS = tuple(name for name, peer in PEERS.items() if peer.in_sweeps)
_TRAINING = ("forward_backward", "forward")
_PARTS = tuple(name for name in PASSES if name not in _TRAINING)
_OF_FORMULAS = (*_TRAINING, "evaluation")
# Each shape is compiled anew, which takes seconds.
_COMPILED_FAMILIES = ("resnet", "lca")
_COMPILED_IN_QUICK = 2
_NO_TIME = "the limit of time"
_CALL_S = 5e-3  # of a call, besides its arithmetic: Python, memory, and its part of the checks
_COMPILE_S = 30.0  # the first time; the others take a tenth of it


@dataclass(frozen=True)
class Cell:
    """One workload in one memory format."""

    workload: Workload
    memory: Format
    passes: tuple[str, ...]
    peers: tuple[str, ...]


def plan(device: torch.device, is_quick: bool) -> list[Cell]:
    """What is timed, the most telling first, since the limit of time cuts the end. A CPU gets what
    is in float32."""
    on_gpu = device.type == "cuda"
    if is_quick:
        headline, rest = quick(on_gpu), []
    else:
        found = every() if on_gpu else on_cpu()
        headline = [workload for workload in found if workload.headline]
        rest = [workload for workload in found if not workload.headline]
    swept = sweeps(32, "bf16", is_quick) if on_gpu else sweeps(1, "fp32", is_quick)
    compiled = [each for each in headline if each.family in _COMPILED_FAMILIES]
    compiled = compiled[: _COMPILED_IN_QUICK if is_quick else None]
    both = [workload for workload in headline if len(workload.formats) > 1]
    more = ("forward_backward", "inference", "evaluation")
    built = formulas(on_gpu, is_quick)
    return [
        *(
            Cell(
                each, each.formats[0], _TRAINING, tuple(PEERS) if each in compiled else _UNCOMPILED
            )
            for each in headline
        ),
        *(Cell(each, "channels_last", _TRAINING[:1], _IN_SWEEPS) for each in swept),
        *(Cell(each, each.formats[0], _OF_FORMULAS, tuple(peers_of(each))) for each in built),
        *(Cell(each, "contiguous", (*_TRAINING, "inference"), _EVERYWHERE) for each in both),
        *(Cell(each, each.formats[0], _PARTS, _UNCOMPILED) for each in headline),
        *(Cell(each, memory, more, _EVERYWHERE) for each in rest for memory in each.formats),
    ]


def tune(cells: Sequence[Cell], device: torch.device, budget_s: float) -> Iterator[Any]:
    """Tunes this package for the headline on a GPU; returns the reports of
    :func:`triton_tied.tune`. What is not tuned runs as the cost model says."""
    from ..autotune import tuning  # needs Triton

    problems: dict[str, Any] = {}  # by key, since neighbours share an entry
    for cell in cells:
        layer = cell.workload.problem
        if cell.workload.headline and cell.memory == "channels_last":
            for problem in problems_of_layer(layer):
                problems.setdefault(problem.key, problem)
    return tuning.tune_each(list(problems.values()), device, budget_s)


def run(
    cells: Sequence[Cell],
    device: torch.device,
    budget_s: float,
    progress: Progress = lambda done, total, text: None,
) -> Result:
    """Times the cells. Each gets a share of the time that is left, the larger the longer its calls
    should take; what no time is left for is left out, and the result says so."""
    end = time.monotonic() + budget_s
    clock = Clock(device)
    dtypes: set[Dtype] = {cell.workload.dtype for cell in cells}
    progress(0, len(cells), "ceilings")
    result = Result(machine_of(device), roofline.measure(clock, dtypes))
    weights = [_weight(cell, result.ceilings.tflops) for cell in cells]
    done = 0
    try:
        for done, cell in enumerate(cells):
            progress(done, len(cells), cell.workload.name)
            left = end - time.monotonic()
            if left > 0:
                share = left * weights[done] / sum(weights[done:])
                _run_cell(cell, clock, result, share, end)
            else:
                out = LeftOut(_NO_TIME, cell.workload.name, cell.memory)
                result.left_out.append(out)
    except KeyboardInterrupt:
        result.left_out.append(LeftOut(f"interrupted, {len(cells) - done} of {len(cells)} left"))
    progress(len(cells), len(cells), "")
    return result


def _weight(cell: Cell, tflops: dict[str, float]) -> float:
    """Seconds for one call of each peer and pass, at the ceiling and with what else it takes."""
    arithmetic = cell.workload.flops / (tflops[cell.workload.dtype] * 1e12)
    return len(cell.passes) * len(cell.peers) * (arithmetic + _CALL_S)


def _run_cell(cell: Cell, clock: Clock, result: Result, share_s: float, end: float) -> None:
    """What goes wrong outside of a peer's first call ends the cell alone."""
    try:
        _Bench(cell, clock, result, share_s, end).run()
    except torch.OutOfMemoryError as error:
        result.left_out.append(LeftOut(_first_line(error), cell.workload.name, cell.memory))
    except Exception as error:
        result.faults.append(f"{cell.workload.name} {cell.memory}: {_first_line(error)}")


class _Bench:
    """One cell: its tensors, its peers and its share of the time, which ends at ``end_of_cell``;
    what no time is left for in the whole run is left out."""

    def __init__(
        self, cell: Cell, clock: Clock, result: Result, share_s: float, end_of_run: float
    ) -> None:
        self.cell, self.clock, self.result = cell, clock, result
        self.end_of_run, self.end_of_cell = end_of_run, time.monotonic() + share_s
        self.workload, dtype = cell.workload, TORCH_DTYPES[cell.workload.dtype]
        self.peers = peers_of(self.workload)
        self.tied = random_weight(self.workload, dtype, clock.device)
        self.images = random_images(self.workload, cell.memory, dtype, clock.device)

    def run(self) -> None:
        if any(self.peers[name].whole for name in self.cell.peers):
            torch._dynamo.reset()  # it would refuse to compile the same lines for ever new shapes
        with ExitStack() as settings:
            settings.enter_context(roofline.precision(self.workload.dtype))
            settings.callback(_let_cudnn_search, torch.backends.cudnn.benchmark)
            settings.callback(_free, self.clock.device)
            self._run_passes()

    def _run_passes(self) -> None:
        truth = Truth(self.workload, self.tied, self.images, self.cell.memory)
        peers: dict[str, Peer] = {}
        for name in self.cell.peers:
            made = self._make(name, truth)
            if made is not None:
                peers[name] = made
        wanted = [PASSES[name] for name in self.cell.passes]
        wanted = [each for each in wanted if each.applies_to(self.workload)]
        for i, each in enumerate(wanted):
            now = time.monotonic()
            if now >= self.end_of_run:
                self._leave_out(_NO_TIME, pass_=each.name)
                continue
            share = (self.end_of_cell - now) / (len(wanted) - i)
            with each.around():
                self.result.rows += self._time(each, peers, share)

    def _make(self, name: str, truth: Truth) -> Peer | None:
        """A peer that was seen to compute the same convolution."""
        kind = self.peers[name]
        reason = kind.why_not(self.workload, self.clock.device)
        if self.end_of_run - time.monotonic() < (_COMPILE_S if kind.whole else 0):
            reason = _NO_TIME
        if reason:
            self._leave_out(reason, peer=name)
            return None
        try:
            peer = kind(self.workload, self.tied, self.cell.memory)
            _let_cudnn_search(kind.searches)
            wrong = truth.why_wrong(peer, self.images)
        except Exception as error:  # whatever a peer dies of, the others are timed
            self._fail(name, error)
            return None
        if wrong:
            self._fault(name, wrong)
            return None
        return peer

    def _time(self, each: Pass, peers: dict[str, Peer], share_s: float) -> list[Measurement]:
        times = each.times(self.workload)
        turns = {}
        for name, peer in peers.items():
            reason = each.why_not(type(peer))
            if reason:
                self._leave_out(reason, each.name, name)
                continue
            try:
                turns[name] = self._turn(peer, each.prepare(peer, self.images, times))
            except Exception as error:
                self._fail(name, error, each.name)
        if not turns:
            return []
        on_gpu = self.clock.on_gpu
        timed = interleave(turns, self.clock.eager, share_s / 2 if on_gpu else share_s)
        graphs = self._time_graphs(each, turns, peers, share_s / 2) if on_gpu else {}
        work = roofline.work_of(self.workload, each.name, times)
        least_ms = self.result.ceilings.least_ms(work, self.workload.dtype)

        def make(peer: str, median_ms: float, **ratios: Any) -> Measurement:
            turns[peer].before()
            graph_ms = graphs.get(peer)
            return Measurement(
                **self._facts(),
                pass_=each.name,
                applications=times,
                peer=peer,
                rounds=timed.rounds,
                median_ms=median_ms,
                **ratios,
                # What makes no dense weight is not bound by the bytes of one.
                roofline_share=least_ms / (graph_ms or median_ms) if work.flops else None,
                flops=work.flops,
                least_bytes=work.least_bytes,
                extra_bytes=self.clock.extra_bytes(turns[peer].call),
                kept_bytes=self.clock.kept_bytes(turns[peer].call) if each.keeps else None,
                launches=self.clock.launches(turns[peer].call),
                graph_ms=graph_ms,
            )

        return measurements_of(timed.medians, each.name == "weight_build", make)

    def _time_graphs(
        self, each: Pass, turns: dict[str, Turn], peers: dict[str, Peer], share_s: float
    ) -> dict[str, float]:
        """CUDA graphs of the same calls; a call that cannot be captured has none."""
        times, replays = each.times(self.workload), {}
        for name in turns:
            turns[name].before()
            try:
                graph = self.clock.capture(
                    lambda peer=peers[name]: each.prepare(peer, self.images, times)  # type: ignore[misc]
                )
            except Exception as error:
                self._leave_out(f"no graph: {_first_line(error)}", each.name, name)
            else:
                replays[name] = Turn(graph.replay)
        return interleave(replays, self.clock.replayed, share_s).medians if replays else {}

    def _turn(self, peer: Peer, call: Call) -> Turn:
        turn = Turn(call, lambda: _let_cudnn_search(peer.searches))
        turn.before()
        turn.call()
        return turn

    def _facts(self) -> dict[str, Any]:
        workload = self.workload
        return {
            "workload": workload.name,
            "memory_format": self.cell.memory,
            **{
                name: getattr(workload, name)
                for name in (
                    "family", "shape", "kernel", "dtype", "symmetry", "padding_mode", "groups",
                    "headline",
                )
            },
        }  # fmt: skip

    def _fail(self, peer: str, error: Exception, pass_: str = "") -> None:
        if issubclass(self.peers[peer], Tied):
            self._fault(peer, _first_line(error))
        else:
            self._leave_out(_first_line(error), pass_, peer)

    def _fault(self, peer: str, what: str) -> None:
        self.result.faults.append(f"{self.workload.name} {self.cell.memory} {peer}: {what}")

    def _leave_out(self, reason: str, pass_: str = "", peer: str = "") -> None:
        left_out = LeftOut(reason, self.workload.name, self.cell.memory, pass_, peer)
        self.result.left_out.append(left_out)


def _let_cudnn_search(allowed: bool) -> None:
    """``torch.backends.cudnn.benchmark``, also where PyTorch's test utilities have locked it."""
    torch._C._set_cudnn_benchmark(allowed)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _free(device: torch.device) -> None:
    """What graphs held is not lent to others before it is given back; that takes a while."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if torch.cuda.memory_reserved(device) > total / 2:
            gc.collect()
            torch.cuda.empty_cache()
