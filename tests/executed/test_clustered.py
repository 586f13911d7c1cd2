"""The kernel whose programs come in clusters of two: as compiled for sm_90, executed with its
copies and products early and late, and with faults planted in it."""

import itertools
import random
import re
from collections import Counter

import pytest
import torch
from ptx_machine import EARLY, LATE
from ptx_machine.mbarriers import MemoryBarriers
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from executed.cases import Case, inputs_of, run
from executed.checks import assert_exact_of_small_integers
from executed.execution import KERNELS, compiled, execute
from executed.planted import fault_of, plant
from triton_tied.geometry import Geometry
from triton_tied.kernels import toolchain
from triton_tied.kernels.configs import ClusteredConfig
from triton_tied.packing import Layout

pytestmark = pytest.mark.skipif(
    toolchain.why_no_clusters() is not None, reason=str(toolchain.why_no_clusters())
)
if toolchain.why_no_clusters() is None:
    from triton_tied.kernels import clustered

SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
SHARED = ("pixels", "weights")
SYMMETRIES = ("self_adjoint", "skew_adjoint")
CONFIGS = [
    ClusteredConfig((1, 8, 8), 128, 3, "pixels"),
    ClusteredConfig((2, 4, 8), 256, 4, "pixels"),
    ClusteredConfig((8, 2, 2), 128, 6, "pixels"),
    ClusteredConfig((1, 1, 64), 128, 3, "pixels"),
    ClusteredConfig((1, 16, 8), 64, 3, "weights"),
    ClusteredConfig((2, 8, 8), 128, 4, "weights"),
    ClusteredConfig((16, 2, 2), 64, 6, "weights"),
    ClusteredConfig((1, 1, 64), 64, 4, "weights"),
]


def draw(dtype):
    """A problem of a few tiles, with the centre unpacked or all taps, or none of an even number."""
    chance = random.Random(int(torch.randint(2**31, ())))
    while True:
        config = chance.choice(CONFIGS)
        config = ClusteredConfig(
            config.box, config.BLOCK_N, config.num_stages, config.shared, chance.choice((1, 1, 3))
        )
        kernel = chance.choice([(3, 3), (3, 3), (1, 1), (2, 2), (1, 3), (4, 1)])
        groups = chance.choice([1, 1, 2])
        channels = chance.choice([128, 128, 136, 192])
        if groups > 1:
            channels = config.BLOCK_N if config.BLOCK_N > 64 else 128
        layout = Layout(channels * groups, kernel, groups, chance.choice(SYMMETRIES))
        dilation = tuple(chance.choice([1, 1, 2]) for _ in kernel)
        padding = tuple(
            (chance.choice([-1, 0, d * (k - 1) // 2, d * k]), chance.choice([0, 1, d * (k - 1)]))
            for d, k in zip(dilation, kernel, strict=True)
        )
        image = tuple(side + chance.choice([0, 0, -1, 1]) for side in config.box)
        case = Case(
            "sm_90", dtype, config, layout, image, Geometry((1, 1), padding, dilation),
            stored=layout.taps if dtype == "float32" else (layout.taps + 1) // 2,
            bias=chance.random() < 0.5, residual=chance.random() < 0.5,
            alpha=chance.choice([1.0, -1.5]), beta=chance.choice([1.0, -0.5]),
            widens=chance.random() < 0.3, wide=chance.random() < 0.2, seed=chance.randrange(2**31),
        )  # fmt: skip
        if min(image) > 0 and min(case.output) > 0:
            return case


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("number", range(2))
def test_drawn_problems(compiler, dtype, number):
    outcome = execute(draw(dtype))
    assert not outcome.faults, outcome


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=str)
def test_small_integers_are_exact(compiler, config, symmetry):
    layout = Layout(128, (3, 3), symmetry=symmetry)
    case = Case(
        "sm_90", "float16", config, layout, (2, 9, 11), SAME, stored=5, residual=True, alpha=0.5,
        beta=-2.0,
    )  # fmt: skip
    assert_exact_of_small_integers(case, largest=1)


@pytest.mark.parametrize("config", CONFIGS[:4:3] + CONFIGS[5:6], ids=str)
def test_barriers_start_the_shared_memory(compiler, config):
    """Where warps arrive at those of the other program."""
    case = Case("sm_90", "float16", config, Layout(128, (3, 3)), (1, 8, 8), SAME, stored=5)
    text = compiled(case)
    base = re.search(r"mov\.b32\s+(%r\d+), global_smem;", text)
    first = re.search(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", text)
    assert base and first and base[1] == first[1]


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=str)
def test_a_program_sends_the_other_only_what_that_waits_for(compiler, monkeypatch, config):
    """So none is spoken to once it has ended. 18 steps fill each of 3 stages 6 times; but for the
    first time that waits until each warp of both programs, 4 that multiply, has left the stage."""
    case = Case("sm_90", "float16", config, Layout(128, (3, 3)), (1, 8, 8), SAME, stored=5)
    arrivals = Counter()
    arrive = MemoryBarriers.arrive

    def count(self, lanes, programs, address, counts, expected, releases):
        for program, number in zip(programs, counts, strict=True):
            arrivals[int(program), address] += int(number)
        return arrive(self, lanes, programs, address, counts, expected, releases)

    monkeypatch.setattr(MemoryBarriers, "arrive", count)
    with emulated(EmulatedGpu(90), *KERNELS):
        run(case, inputs_of(case))
    empty = {where: count for where, count in arrivals.items() if count > 6}
    assert len(empty) == 2 * 3 * (128 // config.BLOCK_N) and set(empty.values()) == {5 * 2 * 4}


# What is planted: edits of the source, and the fault that is found.
ARRIVES = "cluster.arrive(relaxed=True)\n    cluster.wait()\n    "
OWN_ONLY = {
    "is_one_of_two, $1, 2;": "is_one_of_two, $1, 1;",
    "and.b32 $0, $1, 1;": "mov.u32 $0, %cluster_ctarank;",
}
PLANTED = {
    "a stage is filled again once its own program has left it": (
        {**OWN_ONLY, "count=2 * gl.num_warps()": "count=gl.num_warps()"}, "race",
    ),
    "the barriers count one program only": (
        {"count=2 * gl.num_warps()": "count=gl.num_warps()"}, "race|more arrivals|deadlock",
    ),
    "warps arrive in their own program only": (OWN_ONLY, "deadlock"),
    "half of the bytes are expected": ({"PROGRAM_N) * 128": "PROGRAM_N) * 64"}, "race|mbarrier"),
    "what is shared reaches one program only": ({}, "deadlock"),  # see to_one_program
    "no barrier of the cluster at the start": ({ARRIVES: ""}, "initialised|no mbarrier"),
    "some warps do not come to it": (
        {
            ARRIVES: "",
            "mbarrier.fence_init_release_cluster()": "mbarrier.sync_cluster_init()",
        },
        "deadlock",
    ),
    "no fence behind the making of barriers": (
        {"mbarrier.fence_init_release_cluster()": "pass"}, "initialised",
    ),
    "a stage is left too early": (
        {"acc = warpgroup_mma_wait(1, (acc,))": "acc = warpgroup_mma_wait(2, (acc,))"}, "race",
    ),
    "no wait for an empty stage": (
        {"mbarrier.wait(full_and_empty.index(STAGES + stage)": "full_and_empty.index(stage); (0"},
        "race|mbarrier|arriv",
    ),
    "no wait for a full stage": (
        {"mbarrier.wait(full.index(stage), use // STAGES & 1)": "pass"}, "race|deadlock",
    ),
    "sums leave over operands": (
        {"acc = warpgroup_mma_wait(0, (acc,))": "pass"}, "race|use",
    ),
}  # fmt: skip


def planted_case(shared, symmetry="self_adjoint"):
    config = ClusteredConfig((1, 8, 8), 128, 3, "pixels")
    if shared == "weights":
        config = ClusteredConfig((1, 16, 8), 64, 3, "weights")
    layout = Layout(128, (3, 3), symmetry=symmetry)
    return Case("sm_90", "bfloat16", config, layout, (1, 9, 8), SAME, stored=5)


def to_one_program(text):
    """Of a multicast to both."""
    return re.sub(r"(mov\.b16\s+%rs\d+), 3;", r"\1, 1;", text)


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found(compiler, monkeypatch, tmp_path, what):
    edits, message = PLANTED[what]
    kernel = plant(clustered, edits, tmp_path, monkeypatch)
    case = planted_case(SHARED[int(torch.randint(2, ()))])
    rewrite = None if edits else to_one_program
    found = fault_of(kernel, case, LATE, rewrite) or fault_of(kernel, case, EARLY, rewrite)
    assert any(word in found for word in message.split("|")), found


@pytest.mark.parametrize("shared", SHARED)
def test_with_nothing_planted_no_fault_is_found(compiler, monkeypatch, tmp_path, shared):
    kernel = plant(clustered, {}, tmp_path, monkeypatch)
    for timing, symmetry in itertools.product((EARLY, LATE), SYMMETRIES):
        assert not fault_of(kernel, planted_case(shared, symmetry), timing)
