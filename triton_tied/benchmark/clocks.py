"""Clocks for the CPU and for GPUs, and turns that are fair: every round runs each call once, in an
order that rotates, so that a slow moment of the machine strikes all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
_MIN_ROUNDS, _MAX_ROUNDS = 3, 40


@dataclass(frozen=True)
class Turn:
    """A call, and what must be set before it is timed."""

    call: Call
    before: Call = lambda: None


@dataclass(frozen=True)
class Timed:
    medians: dict[str, float]  # milliseconds
    rounds: int


def interleave(
    turns: Mapping[str, Turn],
    clock: Callable[[Call], float],
    budget_s: float,
    now: Callable[[], float] = time.monotonic,
) -> Timed:
    """Medians over rounds in which all take turns, after one round that warms up and tells how
    many fit into the time."""
    start = now()
    _round(turns, 0, clock)
    took = max(now() - start, 1e-6)
    rounds = min(max(int(budget_s / took), _MIN_ROUNDS), _MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds):
        for name, milliseconds in _round(turns, turn, clock).items():
            samples[name].append(milliseconds)
    return Timed({name: statistics.median(found) for name, found in samples.items()}, rounds)


def _round(
    turns: Mapping[str, Turn], shift: int, clock: Callable[[Call], float]
) -> dict[str, float]:
    names = list(turns)
    shift %= len(names)
    found = {}
    for name in names[shift:] + names[:shift]:
        turns[name].before()
        found[name] = clock(turns[name].call)
    return found


class Clock:
    """Milliseconds, extra bytes and launches of calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._cache = torch.empty(size, dtype=torch.int8, device=device)

    def eager(self, call: Call) -> float:
        """One call as Python makes it, its launches included. On a GPU the cache is cold, as it is
        when a layer's turn comes in a net."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self._cache.zero_()
        torch.cuda.synchronize(self.device)
        return self._between_events(call)

    def replayed(self, call: Call) -> float:
        """A replay of a graph, enqueued while the GPU is still busy, so that no launch is seen."""
        self._cache.zero_()
        return self._between_events(call)

    def _between_events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def capture(self, prepare: Callable[[], Call]) -> torch.cuda.CUDAGraph:
        """The graph of a call. What it needs is made on the stream that is captured, where its
        backward then runs too."""
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call = prepare()
            call()
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=stream):
            call()
        return graph

    def extra_bytes(self, call: Call) -> int:
        """The peak of what PyTorch's allocator held above the start, results included. What a
        library allocates by itself on a CPU is not seen."""
        if not self.on_gpu:
            return _peak_on_cpu(call)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def kept_bytes(self, call: Call) -> int:
        """Those that autograd holds after a forward until the backward: inputs and parameters too,
        each tensor's memory once."""
        storages: dict[int, int] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            output = call()  # which keeps the memory, so that no place is taken twice
        del output
        return sum(storages.values())

    def launches(self, call: Call) -> int | None:
        """Kernels, copies and fills that a call starts on a GPU."""
        if not self.on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize(self.device)
        on_gpu = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_gpu for event in profiled.events())


def _peak_on_cpu(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    assert profiled.profiler is not None
    recorded = profiled.profiler.kineto_results.events()
    changes = [event for event in recorded if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
