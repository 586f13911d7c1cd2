"""The benchmark: that what it compares is the same, counts are right, turns are fair. No test asks
how long anything takes."""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import triton_tied as tt
from triton_tied.benchmark import clocks, passes, peers, plots, results, roofline, suite, workloads
from triton_tied.benchmark.agreement import Truth
from triton_tied.benchmark.workloads import Workload
from triton_tied.cli import main
from triton_tied.dispatch import INTERPRETED

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Compiling takes seconds; what is compiled is averaged and gathered, which are tested as they are.
EAGER = [name for name, peer in peers.PEERS.items() if not peer.whole]
SAME = [name for name in EAGER if peers.PEERS[name].same]
TYING = [name for name in EAGER if peers.PEERS[name].ties]
SMALL = [
    Workload("ragged", 2, 6, (5, 4), 3, "fp32"),
    Workload("ragged", 2, 6, (5, 4), 3, "fp32", "skew_adjoint"),
    Workload("ragged", 2, 5, (4, 7), 5, "fp32", "skew_adjoint"),
    Workload("ragged", 3, 3, (4, 4), 1, "fp32"),
    Workload("ragged", 2, 4, (1, 1), 1, "fp32", "skew_adjoint"),
    Workload("ragged", 2, 6, (5, 5), 3, "fp32", "skew_adjoint", "circular", groups=3),
    Workload("ragged", 2, 4, (6, 5), 3, "fp32", "self_adjoint", "reflect", groups=4),
    Workload("ragged", 2, 4, (9,), 3, "fp32", "skew_adjoint"),
]
small = pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)


def by_path(path):
    """A script of ``bench/``, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def truth_of(workload):
    """A tied weight by the formula, independent of the package."""
    layout = workload.layout
    packed = torch.randn(layout.size, dtype=torch.float64)
    expanded = oracle.expand(
        packed, layout.channels, layout.kernel_size, layout.groups, layout.symmetry
    )
    return packed, expanded


def made(name, workload, tied, memory=None):
    kind = peers.PEERS[name]
    if kind.why_not(workload, CPU):
        pytest.skip(kind.why_not(workload, CPU))
    return kind(workload, tied, memory or workload.formats[0])


@small
@pytest.mark.parametrize("name", SAME)
def test_a_peer_holds_and_makes_the_weight_of_the_oracle(name, workload):
    packed, weight = truth_of(workload)
    for memory in workload.formats:
        peer = made(name, workload, weight, memory)
        torch.testing.assert_close(peer.weight(), weight, rtol=1e-13, atol=1e-14)
    held = sum(parameter.numel() for parameter in peer.parameters)
    minimal = name in ("assembled", "gathered", "tied")
    assert held == (packed.numel() if minimal else weight.numel())


@small
@pytest.mark.parametrize("name", TYING)
def test_a_peer_that_ties_stays_tied_after_a_step(name, workload):
    peer = made(name, workload, truth_of(workload)[1])
    upstream = torch.randn(workload.layout.weight_shape, dtype=torch.float64)
    (peer.weight() * upstream).sum().backward()
    before = peer.weight().detach().clone()
    with torch.no_grad():
        for parameter in peer.parameters:
            parameter -= 0.1 * parameter.grad
    weight = peer.weight().detach().unflatten(0, (workload.groups, -1))
    turned = weight.flip(tuple(range(3, weight.dim()))).transpose(1, 2)
    torch.testing.assert_close(weight, workload.layout.sign * turned, rtol=1e-13, atol=1e-14)
    free = workload.layout.size
    assert not free or not torch.equal(before, weight.flatten(0, 1))


@small
@pytest.mark.parametrize("name", SAME)
def test_a_peer_computes_the_same_outputs_and_gradients(name, workload):
    weight = truth_of(workload)[1]
    images = passes.random_images(workload, workload.formats[0], torch.float64, CPU)
    peer = made(name, workload, weight)
    dense = peers.PEERS["dense"](workload, weight, workload.formats[0])
    for each in passes.PASSES.values():
        if each.name in ("weight_build", "weight_gradient"):
            continue  # each in its own parameters
        with each.around():
            found, wanted = (each.prepare(p, images, 3)() for p in (peer, dense))
        if isinstance(found, tuple):  # gradients, of the input first
            found, wanted = found[0], wanted[0]
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_gradient_passes_are_parts_of_the_backward():
    workload = SMALL[0]
    images = passes.random_images(workload, "channels_last", torch.float64, CPU)
    peer = made("averaged", workload, truth_of(workload)[1])
    dx, dw = passes.PASSES["forward_backward"].prepare(peer, images, 1)()
    (only_dx,) = passes.PASSES["input_gradient"].prepare(peer, images, 1)()
    (only_dw,) = passes.PASSES["weight_gradient"].prepare(peer, images, 1)()
    torch.testing.assert_close(only_dx, dx)
    torch.testing.assert_close(only_dw, dw)


def test_the_floor_is_two_copies_of_half_a_weight():
    workload = SMALL[0]
    weight = truth_of(workload)[1]
    half = weight[:3]
    assert torch.equal(made("copied", workload, weight).weight(), torch.cat([half, half]))


@pytest.mark.parametrize("name", [name for name in SAME if not name.startswith("dense")])
def test_a_peer_that_computes_another_function_is_found(name, monkeypatch):
    workload = SMALL[1]
    tied = peers.random_tied_weight(workload, torch.float32, CPU)
    images = passes.random_images(workload, "channels_last", torch.float32, CPU)
    truth = Truth(workload, tied, images, "channels_last")
    peer = made(name, workload, tied)
    assert truth.why_wrong(peer, images) is None
    forward = peer.forward
    monkeypatch.setattr(peer, "forward", lambda x: forward(x.flip(3)).flip(3))
    assert "output is off" in truth.why_wrong(peer, images)
    monkeypatch.setattr(peer, "forward", lambda x: forward(x) * math.nan)
    assert "output is off" in truth.why_wrong(peer, images)


@small
def test_flops_and_bytes_are_what_counting_finds(workload):
    layout, image = workload.layout, list(itertools.product(*map(range, workload.image)))
    taps = list(itertools.product(*[range(workload.kernel)] * len(workload.image)))
    c = layout.group_channels
    operations, read, written = 0, set(), set()
    for n, group, out, pixel in itertools.product(
        range(workload.batch), range(layout.groups), range(c), image
    ):
        written.add((n, group, out, pixel))
        for channel, tap in itertools.product(range(c), taps):
            operations += 2
            # "Same" padding: every pixel of the input is under some tap of some output.
            place = tuple(p + t - workload.kernel // 2 for p, t in zip(pixel, tap, strict=True))
            if place in image:
                read.add((n, group, channel, place))
    packed = truth_of(workload)[0].numel()
    work = roofline.work_of(workload, "forward", 1)
    assert work == (operations, 4 * (len(read) + len(written) + packed))
    for name in ("input_gradient", "weight_gradient", "inference"):
        assert roofline.work_of(workload, name, 1) == work
    step = roofline.work_of(workload, "forward_backward", 1)
    # Forward: x and packed to y. Backward: x, packed and dy to dx and dpacked.
    moved = len(read) + packed + len(written) + 2 * len(read) + 2 * packed + len(written)
    assert step == (3 * operations, 4 * moved)


@pytest.mark.parametrize("name", passes.PASSES)
def test_flops_are_those_that_pytorch_counts(name):
    workload = Workload("lip", 2, 6, (5, 4), 3, "fp32", applications=3, evaluations=4)
    each = passes.PASSES[name]
    times = each.times(workload)
    images = passes.random_images(workload, "channels_last", torch.float32, CPU)
    peer = made("dense", workload, peers.random_tied_weight(workload, torch.float32, CPU))
    with each.around():
        call = each.prepare(peer, images, times)
        with FlopCounterMode(display=False) as counter:
            call()
    assert counter.get_total_flops() == roofline.work_of(workload, name, times).flops


def test_the_roofline_is_the_later_of_arithmetic_and_memory():
    ceilings = roofline.Ceilings({"fp32": 2.0}, 10.0)
    assert ceilings.least_ms(roofline.Work(4 * 10**9, 1), "fp32") == pytest.approx(2)
    assert ceilings.least_ms(roofline.Work(1, 3 * 10**7), "fp32") == pytest.approx(3)


class FakeClock:
    """Time passes only in calls, by what each is said to take, twice that in its third."""

    def __init__(self, takes):
        self.takes, self.order, self.time = takes, [], 0.0

    def turns(self):
        return {name: clocks.Turn(lambda name=name: self.order.append(name)) for name in self.takes}

    def clock(self, call):
        call()
        name = self.order[-1]
        took = self.takes[name] * (2 if self.order.count(name) == 3 else 1)
        self.time += took
        return took * 1e3

    def interleave(self, budget_s):
        return clocks.interleave(self.turns(), self.clock, budget_s, now=lambda: self.time)


def test_turns_rotate_and_medians_ignore_a_slow_moment():
    fake = FakeClock({"a": 1.0, "b": 2.0, "c": 3.0})
    timed = fake.interleave(budget_s=24.5)  # a round takes 6 seconds
    assert timed.rounds == 4
    assert "".join(fake.order) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first one warms up
    assert timed.medians == {"a": 1000.0, "b": 2000.0, "c": 3000.0}


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 3), (-5.0, 3), (1e9, 40)])
def test_rounds_shrink_and_grow_with_the_time_that_there_is(budget_s, rounds):
    assert FakeClock({"a": 1.0, "b": 2.0}).interleave(budget_s).rounds == rounds


def test_what_a_peer_needs_is_set_before_each_of_its_turns():
    log = []
    turns = {
        name: clocks.Turn(
            lambda name=name: log.append(f"call {name}"),
            lambda name=name: log.append(f"set {name}"),
        )
        for name in "ab"
    }
    clocks.interleave(turns, lambda call: call() or 1.0, 0.0)
    sets = [entry.removeprefix("set ") for entry in log[::2]]
    assert [f"call {name}" for name in sets] == log[1::2]


def test_extra_memory_is_the_peak_above_the_start():
    held = torch.empty(10**6)

    def call():
        first = held.clone()
        del first
        second = torch.empty(10**5)
        return second.clone()

    assert clocks.Clock(CPU).extra_bytes(call) == 4 * 10**6
    assert clocks.Clock(CPU).extra_bytes(lambda: None) == 0
    assert clocks.Clock(CPU).launches(call) is None


def row(**changes):
    values = {
        "workload": "w", "family": "lip", "shape": (2, 6, 5, 4), "kernel": 3, "dtype": "fp32",
        "memory_format": "channels_last", "symmetry": "self_adjoint", "padding_mode": "zeros",
        "groups": 1, "headline": True, "pass_": "forward", "applications": 1, "peer": "tied",
        "rounds": 3, "median_ms": 1.0, "ratio_to_dense": 1.0, "ratio_to_best_tied_peer": 1.0,
        "roofline_share": 0.5, "flops": 10, "least_bytes": 10, "extra_bytes": 7,
    }  # fmt: skip
    return results.Measurement(**{**values, **changes})


def test_ratios_are_to_the_faster_dense_and_to_the_fastest_other_that_ties():
    medians = {"dense": 4.0, "dense_channels_last": 2.0, "averaged": 5.0, "gathered": 4.0,
               "copied": 1.0, "tied": 3.0}  # fmt: skip
    found = {each.peer: each for each in results.measurements_of(medians, False, row)}
    assert found["tied"].ratio_to_dense == 1.5
    assert found["dense"].ratio_to_dense == 2.0
    assert found["tied"].ratio_to_best_tied_peer == 0.75
    assert found["averaged"].ratio_to_best_tied_peer == 1.25
    assert all(each.ratio_to_dense is None for each in results.measurements_of(medians, True, row))


def test_geometric_means_are_of_the_headline_and_workload_by_workload():
    rows = [
        row(workload="a", ratio_to_dense=2.0, median_ms=2.0),
        row(workload="b", ratio_to_dense=8.0, median_ms=6.0, ratio_to_best_tied_peer=4.0),
        row(workload="a", peer="averaged", ratio_to_dense=3.0, median_ms=4.0),
        row(workload="c", ratio_to_dense=100.0, headline=False),
        row(workload="a", ratio_to_dense=None, pass_="weight_build"),
    ]
    means = results.geometric_means(rows)["channels_last"]
    assert means["forward"]["tied"] == {
        "ratio_to_dense": 4.0,
        "ratio_to_best_tied_peer": 2.0,
        "workloads": 2,
        "tied_over_it": None,
        "tied_over_it_as_graph": None,
    }
    assert means["forward"]["averaged"]["tied_over_it"] == 0.5
    assert means["weight_build"]["tied"]["ratio_to_dense"] is None
    pairs = results.pairwise_means(rows, "channels_last", "forward")
    assert pairs == {"averaged": (0.5, 1)}


def test_a_result_is_written_and_read_again(tmp_path):
    result = results.Result(
        results.machine_of(CPU),
        roofline.Ceilings({"fp32": 0.1}, 10.0),
        [row(), row(peer="dense", graph_ms=0.5)],
        [results.LeftOut("no time", "w", "contiguous", "forward", "averaged")],
        ["a fault"],
    )
    path = tmp_path / "new" / "result.json"
    result.write(path)
    assert results.read(path) == result
    found = json.loads(path.read_text())
    assert list(found) == ["machine", "ceilings", "geometric_means", "faults", "left_out", "rows"]
    assert set(found["machine"]) >= {
        "device", "processor", "threads", "torch", "triton", "triton_tied", "commit", "date",
    }  # fmt: skip
    assert list(found["rows"][0]) == [
        "workload", "family", "shape", "kernel", "dtype", "memory_format", "symmetry",
        "padding_mode", "groups", "headline", "pass", "applications", "peer", "rounds",
        "median_ms", "ratio_to_dense", "ratio_to_best_tied_peer", "roofline_share", "flops",
        "least_bytes", "extra_bytes", "launches", "graph_ms", "kept_bytes",
    ]  # fmt: skip


def test_every_workload_is_there_with_its_source():
    found = workloads.every()
    names = [workload.name for workload in found]
    assert len(names) == len(set(names))
    counts = {family: sum(w.family == family for w in found) for family in workloads.SOURCES}
    assert {family: count for family, count in counts.items() if count} == {
        "soc": 27, "soc-1x1": 4, "lip": 32, "mondeq": 3, "lca": 2, "antisym": 2, "denoise": 24,
        "resnet": 48, "wide": 3, "thin": 15, "ragged": 128, "depthwise": 8, "oned": 4, "launch": 2,
    }  # fmt: skip
    headline = [workload for workload in found if workload.headline]
    assert headline == found[: len(headline)]  # the limit of time cuts the end
    assert {(w.family, w.dtype) for w in headline} == {
        ("soc", "bf16"), ("lip", "tf32"), ("lca", "bf16"), ("resnet", "bf16"), ("wide", "bf16"),
        ("thin", "bf16"),
    }  # fmt: skip
    few = workloads.quick(on_gpu=True) + workloads.quick(on_gpu=False)
    assert all(workload.source for workload in found + few)
    assert {workload.name for workload in few} <= set(names)


def test_sweeps_reach_as_far_as_they_should():
    found = workloads.sweeps(32, "bf16")

    def sizes(axis, of):
        return [of(w) for w in found if w.family == f"scaling {axis}"]

    channels = sizes("channels", lambda w: w.channels)
    sides, kernels = sizes("side", lambda w: w.image[0]), sizes("kernel", lambda w: w.kernel)
    batches = sizes("batch", lambda w: w.batch)
    ends = [(each[0], each[-1]) for each in (channels, sides, batches, kernels)]
    assert ends == [(16, 1024), (7, 512), (1, 256), (1, 11)]


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_plan_times_each_thing_once(kind, is_quick):
    cells = suite.plan(torch.device(kind), is_quick)
    things = [
        (cell.workload.name, cell.workload.family, cell.memory, pass_)
        for cell in cells
        for pass_ in cell.passes
    ]
    assert len(things) == len(set(things))
    timed = {cell.workload.name for cell in cells}
    full = workloads.every() if kind == "cuda" else workloads.on_cpu()
    wanted = workloads.quick(kind == "cuda") if is_quick else full
    assert timed >= {workload.name for workload in wanted}


@pytest.fixture
def tiny(monkeypatch):
    """One workload of every pass, two sweeps' ends, and ceilings that need no time."""
    workload = Workload(
        "lip", 2, 4, (5, 5), 3, "fp32", "skew_adjoint", applications=2, evaluations=2, headline=True
    )
    swept = [Workload("scaling channels", 1, c, (5, 5), 3, "fp32") for c in (2, 4)]
    eager = tuple(EAGER)
    cells = [
        suite.Cell(workload, "channels_last", tuple(passes.PASSES), eager),
        suite.Cell(workload, "contiguous", ("forward_backward",), eager),
        *(suite.Cell(w, "channels_last", ("forward_backward",), ("dense", "tied")) for w in swept),
    ]
    ceilings = roofline.Ceilings({"fp32": 0.1}, 10.0)
    monkeypatch.setattr(clocks, "_MAX_ROUNDS", 3)
    monkeypatch.setattr(suite, "plan", lambda device, is_quick: cells)
    monkeypatch.setattr(suite.roofline, "measure", lambda clock, dtypes: ceilings)


def bench(*options):
    return main.main(["bench", "--quick", "--device", "cpu", "--budget", "60", *map(str, options)])


def test_the_command_writes_its_result_and_pictures(tiny, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench("--json", path, "--plots", tmp_path / "plots") == 0
    result = results.read(path)
    first = [
        row for row in result.rows if row.family == "lip" and row.memory_format != "contiguous"
    ]
    assert {(row.pass_, row.peer) for row in first} == set(itertools.product(passes.PASSES, EAGER))
    assert all(row.median_ms > 0 and row.extra_bytes is not None for row in result.rows)
    assert not result.left_out
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        "ratios.png", "ratios.svg", "roofline.png", "roofline.svg", "scaling.png", "scaling.svg",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "geometric means" in printed and "left out" not in printed


def test_a_peer_that_dies_is_left_out_and_one_that_is_wrong_is_a_fault(tiny, tmp_path, monkeypatch):
    def dies(self):
        raise RuntimeError("no such thing here\nat all")

    path = tmp_path / "result.json"
    monkeypatch.setattr(peers.Gathered, "weight", dies)
    assert bench("--json", path) == 0
    result = results.read(path)
    assert {(each.peer, each.reason) for each in result.left_out if each.peer} == {
        ("gathered", "RuntimeError: no such thing here")
    }
    assert {row.peer for row in result.rows} == set(EAGER) - {"gathered"}
    monkeypatch.setattr(peers.Averaged, "weight", lambda self: self.parameters[0])  # no averaging
    assert bench("--json", path) == 1
    result = results.read(path)
    assert all("averaged: the output is off" in fault for fault in result.faults)
    assert "averaged" not in {row.peer for row in result.rows}


def test_this_package_may_not_die(tiny, tmp_path, monkeypatch):
    def dies(*arguments, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(tt.functional, "tied_conv2d", dies)
    assert bench("--json", tmp_path / "result.json") == 1
    assert "tied: RuntimeError: out of order" in results.read(tmp_path / "result.json").faults[0]


def test_what_was_timed_before_an_interruption_is_kept(tiny, tmp_path, monkeypatch):
    time_pass, calls = suite._Bench._time, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return time_pass(*arguments)

    monkeypatch.setattr(suite._Bench, "_time", interrupted)
    assert bench("--json", tmp_path / "result.json") == 0
    result = results.read(tmp_path / "result.json")
    assert {row.pass_ for row in result.rows} == set(list(passes.PASSES)[:2])
    assert result.left_out[-1].reason == "interrupted, 4 of 4 left"


def test_what_no_time_is_left_for_is_said(tiny, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench("--json", path, "--budget", "1e-9") == 0
    result = results.read(path)
    assert not result.rows
    assert [each.reason for each in result.left_out] == ["the limit of time"] * 4
    assert "left out: workloads (4): the limit of time" in capsys.readouterr().out


class GraphClock(clocks.Clock):
    """A GPU's way, on the CPU: a graph is the call itself, and one peer cannot be captured."""

    def __init__(self, device):
        super().__init__(device)
        self.eager = self.replayed = clocks.Clock(device).eager
        self.on_gpu = True

    def capture(self, prepare):
        (peer,) = prepare.__defaults__
        if peer.name == "assembled":
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=prepare())

    def extra_bytes(self, call):
        return 5

    def launches(self, call):
        return 3


def test_graphs_are_timed_beside_eager_calls(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "Clock", GraphClock)
    path = tmp_path / "result.json"
    assert bench("--json", path) == 0
    result = results.read(path)
    captured = {row.peer for row in result.rows if row.graph_ms}
    assert captured == set(EAGER) - {"assembled"}
    assert {row.launches for row in result.rows} == {3}
    assert {each.reason for each in result.left_out if each.peer == "assembled"} == {
        "no graph: RuntimeError: operation not permitted when stream is capturing"
    }
    assert plots.graph_ratios(result) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_launches_graphs_and_peaks(tiny, tmp_path):
    path = tmp_path / "result.json"
    assert bench("--json", path, "--device", "cuda", "--plots", tmp_path) == 0
    result = results.read(path)
    assert not [each for each in result.left_out if each.reason.startswith("no graph")]
    steps = [row for row in result.rows if row.pass_ == "forward_backward"]
    assert all(row.launches and row.graph_ms and row.extra_bytes for row in steps)
    assert (tmp_path / "graph-ratios.png").exists()


def test_tuning_without_a_gpu_is_refused(tiny, capsys):
    assert bench("--tune", "5") == 2
    assert "no GPU" in capsys.readouterr().err


def test_requests_that_cannot_be_met_are_refused_before_anything_is_timed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(suite, "run", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench: there is no GPU here\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--plots", tmp_path) == 2
    assert "needs matplotlib" in capsys.readouterr().err
    assert bench("--budget", "0") == 2 and bench("--tune-json", tmp_path / "tuned.json") == 2


@pytest.mark.parametrize(
    "option", [("--budget", "-1"), ("--budget", "nan"), ("--tune", "0"), ("--json", "{file}/x")]
)
def test_options_that_cannot_be_met_are_refused_at_once(tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(suite, "run", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main.main(["bench", option[0], option[1].format(file=tmp_path / "file")])
    assert option[0] in capsys.readouterr().err


def test_the_page_shows_the_newest_results():
    figures = by_path(ROOT / "bench" / "figures.py")
    page = figures.PAGE.read_text()
    newest = figures.newest_of(figures.RESULTS)
    assert newest
    assert figures.replaced(page, figures.block(newest)) == page, "run `make figures`"
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", page))
    wanted = {f"images/{device}-{name}.png" for device in newest for name in ("ratios", "roofline")}
    assert wanted <= shown
    assert all((figures.PAGE.parent / image).exists() for image in shown)


def test_the_look_up_that_is_timed_is_of_a_known_call(monkeypatch):
    pytest.importorskip("triton")
    from triton_tied.autotune.problem import dtype_of

    lookup = by_path(ROOT / "bench" / "lookup.py")
    x = torch.zeros(8, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(lookup.launch, "fault", lambda call, config: None)
    look_up = lookup.ours_for(x, torch.zeros(lookup.LAYOUT.size))
    dtype = dtype_of(x.dtype)  # as TF32 is set
    problem = tt.Problem("conv", dtype, lookup.LAYOUT, (8, 32, 32), lookup.GEOMETRY)
    found = look_up()
    assert found.config == tt.config_for(problem, "cpu")
    monkeypatch.setattr(lookup.select, "choose", None)  # what an unknown call would ask
    assert look_up() is found


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not launched by Triton")
def test_host_time_is_that_of_the_launches_of_a_layer(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "host_time.py"), "--rounds", "1"]
    path = tmp_path / "host.json"
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["host_time"]
    assert {name: row["launches"] for name, row in rows.items()} == {
        "forward": 1,
        "forward and backward": 3,
    }


def test_what_pytest_times_was_seen_to_be_right(monkeypatch):
    script = by_path(ROOT / "bench" / "test_passes.py")
    workload = next(name for name in script.WORKLOADS if name.startswith("ragged"))
    timed = []
    benchmark = SimpleNamespace(pedantic=lambda call, **options: timed.append(call()))
    script.test_pass(benchmark, workload, "forward", "averaged")
    assert benchmark.group == f"{workload}, forward" and len(timed) == 1
    monkeypatch.setattr(peers.Averaged, "weight", lambda self: self.parameters[0])  # no averaging
    with pytest.raises(AssertionError):
        script.test_pass(benchmark, workload, "forward", "averaged")
    assert len(timed) == 1


def test_the_parts_for_a_gpu_end_within_nine_minutes(tmp_path, monkeypatch):
    gpu = by_path(ROOT / "bench" / "gpu.py")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    assert sum(part.limit_s for part in gpu.parts(tmp_path, "x")) <= 540


def test_every_gpu_test_runs_in_one_process():
    gpu_tests = by_path(ROOT / "bench" / "gpu_tests.py")
    names = [f"test_{i}" for i in range(11)]
    shares = gpu_tests.spread(names, 4)
    assert sorted(itertools.chain(*shares)) == sorted(names)
    assert {len(share) for share in shares} == {2, 3}
    assert gpu_tests.spread(names, 20) == [[name] for name in names]


CHILD = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("what it has", flush=True)
    raise
"""


def test_a_part_that_runs_out_of_time_is_ended_with_all_that_it_started(tmp_path):
    gpu = by_path(ROOT / "bench" / "gpu.py")
    slow = gpu.Part("slow", [gpu.sys.executable, "-c", CHILD], 1.0)
    assert gpu.run(slow, tmp_path)["status"] == "out of time"
    child, *rest = (tmp_path / "slow.txt").read_text().splitlines()
    assert rest[0] == "what it has"
    with pytest.raises(ProcessLookupError):
        while True:  # until the system has taken it away
            os.kill(int(child), 0)
            gpu.time.sleep(0.01)


def test_how_a_part_ended_is_told(tmp_path):
    gpu = by_path(ROOT / "bench" / "gpu.py")
    fails = gpu.Part("fails", [gpu.sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30)
    assert gpu.run(fails, tmp_path)["status"] == 3
    assert (tmp_path / "fails.txt").read_text() == "why\n"


@pytest.mark.skipif(INTERPRETED, reason="a run without the interpreter has it")
def test_all_that_wants_a_gpu_can_be_rehearsed_without_one(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), str(tmp_path), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    ends = {end["part"]: end["status"] for end in summary["parts"]}
    expected = ("tests", "check", "falsify", "tune", "cost_model", "bench", "table")
    assert ends == dict.fromkeys(expected, 0), done.stdout + done.stderr
    assert "passed" in (tmp_path / "tests.txt").read_text()
    assert "rho" in (tmp_path / "cost_model.txt").read_text()
    tuned = json.loads((tmp_path / "tune-rehearsal.json").read_text())
    table = json.loads((tmp_path / "table.json").read_text())["entries"]
    assert tuned and {row["problem"]["key"] for row in tuned} == set(table)
