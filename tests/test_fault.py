"""The compiler's word on a config: asked before it is taken, for all that it is compiled for."""

from types import SimpleNamespace

import pytest
import torch

autotune = pytest.importorskip("triton_tied.autotune", reason="there are no kernels without Triton")

from triton_tied import cost, gpus, launch, table  # noqa: E402 (after the check for Triton)
from triton_tied.configs import ConvConfig, WeightGradConfig  # noqa: E402
from triton_tied.cost import Predicted, Sieved  # noqa: E402
from triton_tied.geometry import Geometry  # noqa: E402
from triton_tied.packing import Layout  # noqa: E402
from triton_tied.table import Entry  # noqa: E402
from triton_tied.tuner import tune  # noqa: E402

pytestmark = pytest.mark.usefixtures("absent_h200")
LAYOUT = Layout(64, (3, 3))
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.fixture
def x():
    return torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)


def problem_of(x):
    return autotune.describe("conv", LAYOUT, GEOMETRY, "gathered", x)


def ranked(x):
    return cost.sieve(problem_of(x), gpus.KNOWN["H200"]).ranked


def refuse(*refused):
    return lambda config: "spills" if config in refused else None


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_the_best_prediction_without_a_fault_is_taken(x, bad):
    order = ranked(x)
    found = autotune.conv_config(x, LAYOUT, GEOMETRY, False, refuse(*order[:bad]))
    assert found == order[bad]


def test_the_first_is_taken_where_all_have_a_fault(x):
    found = autotune.conv_config(x, LAYOUT, GEOMETRY, False, lambda config: "spills")
    assert found == ranked(x)[0]


def test_other_compiled_code_is_asked_about_anew(x):
    first, second = ranked(x)[:2]
    plain = autotune.conv_config(x, LAYOUT, GEOMETRY, False, refuse(), form=("plain",))
    with_residual = autotune.conv_config(
        x, LAYOUT, GEOMETRY, False, refuse(first), form=("residual",)
    )
    assert (plain, with_residual) == (first, second)
    never = autotune.conv_config(x, LAYOUT, GEOMETRY, False, pytest.fail, form=("plain",))
    assert never == first  # a known call asks nothing


def test_an_entry_of_the_table_with_a_fault_is_passed_over(x, absent_h200):
    order, key = ranked(x), problem_of(x).key
    origin = absent_h200
    table.save(table.path_of(origin), origin, {key: Entry(order[2], 1.0, 2.0, 3.0)})
    autotune.forget()
    assert autotune.conv_config(x, LAYOUT, GEOMETRY, False, refuse()) == order[2]
    autotune.forget()
    assert autotune.conv_config(x, LAYOUT, GEOMETRY, False, refuse(order[2])) == order[0]


def test_a_config_with_a_fault_is_recorded_and_never_timed():
    configs = [ConvConfig((1, 8, 8), n, 16) for n in (16, 32, 64)]
    sieved = Sieved(tuple(Predicted(c, 1.0) for c in configs), (), 0.1, tuple(configs))
    ran = []

    def clock(call):
        call()
        return 1.0

    tuned = tune(sieved, ran.append, lambda config: True, clock, fault=refuse(configs[0]))
    assert configs[0] not in ran and tuned.winner in configs[1:]
    assert tuned.failures == [(configs[0], "spills")]


class Kernel:
    """Stands in for a kernel: what it would be compiled to, and how often it was launched."""

    def __init__(self, spills=0, error=None):
        self.spills, self.error, self.launched = spills, error, 0

    def __getitem__(self, grid):
        self.launched += 1
        return lambda *arguments, **constants: None

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
    monkeypatch.setattr(launch, "conv_kernel", kernel)
    monkeypatch.setattr(launch, "weight_grad_kernel", kernel)
    packed = torch.randn(LAYOUT.size)
    conv = (x, packed, None, None, None, LAYOUT, GEOMETRY, 1.0, True)
    call, _ = launch.conv_call(*conv, ConvConfig((1, 8, 8), 16, 16))
    assert call.fault() == fault
    config = WeightGradConfig((1, 8, 8), 16, 16)
    call, _ = launch.weight_grad_call(x, x, LAYOUT, GEOMETRY, 1.0, config)
    assert call.fault() == fault
    assert not kernel.launched


def test_interpreted_kernels_have_no_fault(monkeypatch, x):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "weight_grad_kernel", Kernel(spills=2))
    config = WeightGradConfig((1, 8, 8), 16, 16)
    call, _ = launch.weight_grad_call(x, x, LAYOUT, GEOMETRY, 1.0, config)
    assert call.fault() is None
