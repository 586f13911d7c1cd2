"""The compiler's word on a config: asked before it is taken, for all that it is compiled for."""

import os
import uuid
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from stand_ins import GEOMETRY, GPU, config_of, convolution_of, gradient_of

from triton_tied.autotune import disk_cache, tuned_configs
from triton_tied.autotune.disk_cache import Entry
from triton_tied.autotune.problem import problem_of
from triton_tied.autotune.race import race
from triton_tied.autotune.shortlist import Predicted, Shortlist, make_shortlist
from triton_tied.kernels import launch, plans
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.toolchain import ToolchainError, explain
from triton_tied.packing import Layout

FAULT = launch.fault
LAYOUT = Layout(64, (3, 3))


@pytest.fixture
def compiler(absent_h200, monkeypatch):
    """A compiler that finds a fault in the configs that it is told, and lists what it is asked."""
    asked = []

    def says(*refused):
        def fault(convolution, config):
            asked.append(config)
            return "spills" if config in refused or not refused else None

        monkeypatch.setattr(launch, "fault", fault)
        return asked

    return says


@pytest.fixture
def x():
    return torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)


def problem(x):
    return problem_of("conv", LAYOUT, GEOMETRY, [x], "channels_last")


def ranked(x):
    return make_shortlist(problem(x), GPU).ranked


def chosen(x):
    return config_of(convolution_of(x, LAYOUT, GEOMETRY))


@pytest.mark.parametrize("bad", [1, 3])
def test_the_best_prediction_without_a_fault_is_taken(x, compiler, bad):
    order = ranked(x)
    asked = compiler(*order[:bad])
    assert chosen(x) == order[bad]
    assert asked == list(order[: bad + 1])


def test_the_reference_serves_where_all_have_a_fault(x, compiler):
    asked = compiler()
    with pytest.warns(UserWarning, match="plain PyTorch serves .* spills"):
        assert chosen(x) is None
    assert asked == list(ranked(x)[:8])  # each takes seconds to compile


def test_other_compiled_code_is_asked_about_anew(x, compiler):
    first, second = ranked(x)[:2]
    assert compiler(second) == []
    assert chosen(x) == first
    compiler(first)
    with_residual = convolution_of(x, LAYOUT, GEOMETRY)._replace(residual=x)
    assert config_of(with_residual) == second
    asked = len(compiler())
    assert chosen(x) == first and len(compiler()) == asked  # a known call asks nothing


def test_an_entry_of_the_table_with_a_fault_is_passed_over(x, compiler, absent_h200):
    order, key = ranked(x), problem(x).key
    path = disk_cache.path_of(absent_h200)
    disk_cache.save(path, absent_h200, {key: Entry(order[2], 1.0, 2.0, 3.0)})
    tuned_configs.forget()
    compiler(order[3])
    assert chosen(x) == order[2]
    tuned_configs.forget()
    compiler(order[2])
    assert chosen(x) == order[0]


def test_a_config_with_a_fault_is_recorded_and_never_timed():
    configs = [ConvConfig((1, 8, 8), n, 16) for n in (16, 32, 64)]
    predicted = tuple(Predicted(c, 1.0) for c in configs)
    shortlist = Shortlist(predicted, (), 0.1, predicted)
    ran = []

    def clock(call):
        call()
        return 1.0

    tuned = race(
        shortlist, lambda config: partial(ran.append, config), lambda config: True, clock,
        fault=lambda config: "spills" if config == configs[0] else None,
    )  # fmt: skip
    assert configs[0] not in ran and tuned.winner in configs[1:]
    assert tuned.failures == [(configs[0], "spills")]


class Kernel:
    """Stands in for a kernel: what it would be compiled to, and how often it was launched."""

    arg_names = conv_kernel.arg_names

    def __init__(self, spills=0, error=None):
        self.spills, self.error, self.launched = spills, error, 0

    def run(self, *arguments, grid, warmup, **options):
        self.launched += 1

    def warmup(self, *arguments, grid, **constants):
        if self.error:
            raise self.error
        return SimpleNamespace(n_spills=self.spills, _init_handles=lambda: None)


@pytest.mark.parametrize(
    "kernel, fault",
    [
        (Kernel(), None),
        (Kernel(spills=2), "spills 8 bytes of registers"),
        (Kernel(error=MemoryError("shared memory")), "MemoryError: shared memory"),
    ],
    ids=["clean", "spills", "fails"],
)
def test_fault_is_what_the_compiler_says_and_nothing_is_launched(monkeypatch, x, kernel, fault):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(plans, "conv_kernel", kernel)
    monkeypatch.setattr(plans, "weight_grad_kernel", kernel)
    convolution = convolution_of(x, LAYOUT, GEOMETRY)
    assert FAULT(convolution, ConvConfig((1, 8, 8), 16, 16)) == fault
    gradient = gradient_of(x, x, LAYOUT, GEOMETRY)
    assert FAULT(gradient, WeightGradConfig((1, 8, 8), 16, 16)) == fault
    assert not kernel.launched


@pytest.mark.parametrize("splits, fault", [(1, None), (2, "spills 12 bytes of registers")])
def test_the_sum_of_splits_is_asked_about_where_there_are_any(monkeypatch, x, splits, fault):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for name in ("conv_kernel", "weight_grad_kernel"):
        monkeypatch.setattr(plans, name, Kernel())
    monkeypatch.setattr(plans, "sum_splits_kernel", Kernel(spills=3))
    convolution = convolution_of(x, LAYOUT, GEOMETRY)
    assert FAULT(convolution, ConvConfig((1, 8, 8), 16, 16, splits=splits)) == fault
    gradient = gradient_of(x, x, LAYOUT, GEOMETRY)
    assert FAULT(gradient, WeightGradConfig((1, 8, 8), 16, 16, splits)) == fault


def broken_toolchains():
    """What Triton raises where it can compile nothing, by running into it."""
    from triton.runtime import build, cache

    yield "C compiler", "Install gcc or clang", {"PATH": "", "CC": None}, build_library(build)
    yield "no such C compiler", "Install gcc or clang", {"CC": "/no/such/cc"}, build_library(build)
    yield "Python.h", "Python's headers", {"CC": "false"}, build_library(build)
    folder = {"TRITON_CACHE_DIR": os.devnull + "/triton"}
    yield "cache", "TRITON_CACHE_DIR", folder, lambda: cache.get_cache_manager("ab").put("", "a")


def build_library(build):
    return lambda: build.compile_module_from_src(f"// {uuid.uuid4()}", "nothing")


def test_a_full_disk_is_no_missing_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert "TRITON_CACHE_DIR" in str(explain(OSError(28, "No space left on device")))


@pytest.mark.parametrize(
    "remedy, environment, fail",
    [pytest.param(*parts, id=name) for name, *parts in broken_toolchains()],
)
def test_a_broken_toolchain_is_one_clear_error(monkeypatch, x, remedy, environment, fail):
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    tried = []

    class Broken(Kernel):
        def run(self, *arguments, grid, warmup, **options):
            self.warmup(grid=grid)

        def warmup(self, *arguments, grid, **constants):
            tried.append(grid)
            fail()

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(plans, "conv_kernel", Broken())
    tuned_configs.forget()
    convolution = convolution_of(x, LAYOUT, GEOMETRY)
    with pytest.raises(ToolchainError, match=remedy):
        config_of(convolution)
    assert len(tried) == 1  # and not once for each config
    config = ConvConfig((1, 8, 8), 16, 16)
    with pytest.raises(ToolchainError, match=remedy):
        launch.conv(convolution, config)
    predicted = (Predicted(config, 1.0),) * 3
    shortlist = Shortlist(predicted, (), 0.1, predicted)

    def prepare(config):
        return launch.prepared(plans.make_plan(convolution, config), convolution)

    with pytest.raises(ToolchainError, match=remedy):
        race(shortlist, prepare, lambda config: True, lambda call: call() or 1.0)


def test_interpreted_kernels_have_no_fault(monkeypatch, x):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(plans, "weight_grad_kernel", Kernel(spills=2))
    gradient = gradient_of(x, x, LAYOUT, GEOMETRY)
    assert FAULT(gradient, WeightGradConfig((1, 8, 8), 16, 16)) is None
