"""The order of choice, when timing happens, and what a call costs; no GPU is asked."""

import threading
from dataclasses import replace

import pytest
import torch
from stand_ins import (
    DEVICE,
    GEOMETRY,
    GPU,
    ORIGIN,
    PROBLEM,
    config_of,
    convolution_of,
    gradient_of,
    others,
    store,
)

from triton_tied.autotune import disk_cache, select, shortlist, trial, tuned_configs
from triton_tied.autotune.candidates import list_of
from triton_tied.autotune.disk_cache import Entry
from triton_tied.autotune.problem import Problem, problems_of_layer
from triton_tied.autotune.race import Outcome
from triton_tied.autotune.recording import recording
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.tuned_configs import config_for
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig, as_listed
from triton_tied.packing import Layout

pytestmark = pytest.mark.usefixtures("absent_h200")


def test_order_of_choice():
    user, shipped = others()
    assert config_for(PROBLEM, DEVICE) == make_shortlist(PROBLEM, GPU).candidates[0].config
    store(shipped, disk_cache.SHIPPED)
    assert config_for(PROBLEM, DEVICE) == shipped
    store(user)
    assert config_for(PROBLEM, DEVICE) == user
    x = torch.zeros(8, 64, 32, 32)
    mine = ConvConfig((1, 1, 32), 16, 16)
    with select.using(conv=mine):
        assert config_of(convolution_of(x, PROBLEM.layout, GEOMETRY)) == mine
        assert config_of(gradient_of(x, x, PROBLEM.layout, GEOMETRY)) != mine
    assert config_of(convolution_of(x, PROBLEM.layout, GEOMETRY)) != mine


def test_an_entry_that_does_not_serve_this_problem_is_not_taken():
    best = config_for(PROBLEM, DEVICE)
    unknown = ConvConfig((1, 2, 8), 16, 16, num_warps=1)
    store(unknown)  # no candidate, so never compiled
    assert config_for(PROBLEM, DEVICE) == best


def test_an_entry_of_a_neighbour_is_not_taken_where_registers_would_spill(monkeypatch):
    """Neighbours share an entry, and one of them may ask more of the compiled code."""
    whole = Problem("weight_grad", "bfloat16", Layout(64, (3, 3)), (8, 32, 32), GEOMETRY)
    ragged = replace(whole, image=(8, 31, 31))
    ranked = make_shortlist(whole, GPU).ranked
    config = next(c for c in ranked if "ragged_boxes" in c.needs and not whole.needs(c))
    store(config, problem=whole)
    assert ragged.key == whole.key and config_for(ragged, DEVICE) == config

    def list_of_spilling(*key):
        spilling = {as_listed(config): frozenset({"ragged_boxes"})}
        found = list_of(*key)
        return tuple(c._replace(not_for=spilling.get(c.config, c.not_for)) for c in found)

    monkeypatch.setattr(shortlist, "list_of", list_of_spilling)
    assert config_for(whole, DEVICE) == config
    assert config_for(ragged, DEVICE) != config


def test_nothing_is_timed_without_benchmark_mode():
    x = torch.zeros(2, 64, 8, 8)
    assert select.choose(PROBLEM, DEVICE) == config_for(PROBLEM, DEVICE)
    first = config_of(convolution_of(x, PROBLEM.layout, GEOMETRY))
    assert config_of(convolution_of(x, PROBLEM.layout, GEOMETRY)) == first


def test_first_use_is_timed_once(timed):
    config = select.choose(PROBLEM, DEVICE, times=True)
    assert timed == [PROBLEM]
    assert config == make_shortlist(PROBLEM, GPU).candidates[3].config
    assert select.choose(PROBLEM, DEVICE, times=True) == config
    tuned_configs.forget()  # as another process would
    assert select.choose(PROBLEM, DEVICE, times=True) == config
    assert timed == [PROBLEM]
    entry = disk_cache.load(disk_cache.path_of(ORIGIN), ORIGIN).entries[PROBLEM.key]
    assert (entry.median_us, entry.first_us) == (10.0, 12.0)
    # From now on the table decides: what another process writes there is taken at the next reading.
    theirs, _ = others()
    disk_cache.save(disk_cache.path_of(ORIGIN), ORIGIN, {PROBLEM.key: Entry(theirs, 1.0, 2.0, 3.0)})
    tuned_configs.read_again()
    assert select.choose(PROBLEM, DEVICE, times=True) == theirs


def test_when_a_first_use_is_timed(benchmark_mode, monkeypatch):
    assert select.times_on_first_use(DEVICE)
    assert not select.times_on_first_use(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    assert not select.times_on_first_use(DEVICE)
    torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        assert not select.times_on_first_use(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not select.times_on_first_use(DEVICE)


def test_nothing_is_timed_once_torch_distributed_is_there(benchmark_mode, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert not select.times_on_first_use(DEVICE)
    finally:
        distributed.destroy_process_group()
    assert select.times_on_first_use(DEVICE)


@pytest.mark.parametrize("deterministic", [False, True])
def test_choices_are_remembered_in_every_mode(benchmark_mode, monkeypatch, timed, deterministic):
    x = torch.zeros(2, 64, 8, 8)
    monkeypatch.setattr(select, "times_on_first_use", lambda device: not deterministic)
    call = convolution_of(x, PROBLEM.layout, GEOMETRY)
    first = config_of(call)
    assert len(timed) == (not deterministic)
    monkeypatch.setattr(select, "choose", None)
    assert config_of(call) == first


def test_what_was_chosen_before_a_capture_serves_in_it_but_not_the_other_way(
    benchmark_mode, monkeypatch, timed
):
    def plan_of(x, capturing):
        monkeypatch.setattr(select, "times_on_first_use", lambda device: not capturing)
        return select.conv_plan(convolution_of(x, PROBLEM.layout, GEOMETRY))

    before, inside = torch.zeros(2, 64, 8, 8), torch.zeros(16, 64, 8, 8)
    first = plan_of(before, False)
    assert len(timed) == 1
    assert plan_of(before, True) is first and plan_of(before, False) is first
    plan_of(inside, True)
    assert len(timed) == 1
    plan_of(inside, False)
    assert len(timed) == 2


def test_all_failing_leaves_the_first_choice(monkeypatch):
    monkeypatch.setattr(trial, "race_on", lambda *_: Outcome({}))
    assert select.choose(PROBLEM, DEVICE, times=True) == config_for(PROBLEM, DEVICE)
    assert not disk_cache.path_of(ORIGIN).exists()


def test_a_known_call_is_one_look_up(monkeypatch):
    x = torch.zeros(2, 64, 8, 8)
    first = select.conv_plan(convolution_of(x, PROBLEM.layout, GEOMETRY))
    monkeypatch.setattr(select, "problem_of", None)
    assert select.conv_plan(convolution_of(x, PROBLEM.layout, GEOMETRY)) is first


def test_settings_that_change_the_choice_are_part_of_the_look_up(
    monkeypatch, convolution_precision
):
    x = torch.zeros(2, 64, 8, 8)
    seen = []
    problem_of = select.problem_of

    def spy(*arguments):
        seen.append(problem_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(select, "problem_of", spy)
    for precision in ("tf32", "ieee", "tf32"):
        convolution_precision.fp32_precision = precision
        config_of(convolution_of(x, PROBLEM.layout, GEOMETRY))
    assert [problem.dtype for problem in seen] == ["float32", "float32_ieee"]


def test_blocks_hold_on_the_threads_of_the_backward():
    # On a GPU the backward runs on threads that PyTorch starts, outside of Python's contexts.
    x = torch.zeros(8, 64, 32, 32)
    mine, found = WeightGradConfig((1, 1, 64), 64, 64), []

    def backward():
        found.append(config_of(gradient_of(x, x, PROBLEM.layout, GEOMETRY)))

    with select.using(weight_grad=mine), recording() as seen:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert found == [mine] and [problem.kernel for problem in seen] == ["weight_grad"]
    config_of(convolution_of(x, PROBLEM.layout, GEOMETRY))
    backward()
    assert found[1] != mine and len(seen) == 1


def test_blocks_nest():
    x = torch.zeros(8, 64, 32, 32)
    outer, inner = ConvConfig((1, 1, 32), 16, 16), ConvConfig((1, 1, 32), 32, 16)
    mine = WeightGradConfig((1, 1, 64), 64, 64)

    def choices():
        return (
            config_of(convolution_of(x, PROBLEM.layout, GEOMETRY)),
            config_of(gradient_of(x, x, PROBLEM.layout, GEOMETRY)),
        )

    with select.using(conv=outer, weight_grad=mine):
        with select.using(conv=inner):
            assert choices() == (inner, mine)
        assert choices() == (outer, mine)


def test_choosing_without_a_folder_is_silent(no_folder, recwarn):
    assert config_for(PROBLEM, DEVICE) == make_shortlist(PROBLEM, GPU).untimed
    assert not recwarn


def test_no_memory_to_time_on_leaves_the_first_choice(monkeypatch):
    seen = []

    def race_on(device, problem, *_):
        seen.append(problem)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(trial, "race_on", race_on)
    for _ in range(2):
        assert select.choose(PROBLEM, DEVICE, times=True) == config_for(PROBLEM, DEVICE)
    assert seen == [PROBLEM]


def test_threads_may_choose_while_tables_are_read_anew(monkeypatch):
    # Where a look-up finds the table gone that it has just read, this fails at once.
    class Vanishing(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(tuned_configs, "_tables", Vanishing())
    assert config_for(PROBLEM, DEVICE) == make_shortlist(PROBLEM, GPU).untimed


def test_weight_gradients_are_split_in_the_table_as_tuned():
    problem = problems_of_layer(PROBLEM)[-1]
    config = make_shortlist(problem, GPU).candidates[0].config
    assert config.splits > 1 and problem.kernel == "weight_grad"
    store(config, problem=problem)
    assert config_for(problem, DEVICE) == config
