"""Compiled for real targets, none of which need be there: no spills, and the instructions that
each kernel is meant to have. Long: what it compiles is drawn, and another draw each time."""

import itertools
import json
import random
import re

import pytest
import torch
import triton

from triton_tied import dispatch
from triton_tied.autotune import candidates
from triton_tied.cli import main
from triton_tied.inspection import compiled, regenerate_candidates, report, requirements
from triton_tied.kernels.configs import (
    KINDS,
    ClusteredConfig,
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    WeightGradConfig,
)
from triton_tied.kernels.launch import MATRICES_BLOCK
from triton_tied.kernels.toolchain import why_no_clusters

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="interpreted kernels are not compiled")

_DRAWN = 20
_LISTS = {
    (kernel, target, name)
    for kernel, target, name in itertools.product(report.KERNELS, compiled.TARGETS, report.LISTS)
    if (target, name) != ("gfx942", "float32")  # it has no TF32
}
_COMMITTED = candidates.committed()


@pytest.fixture
def chance():
    """Follows the seed that the run prints."""
    return random.Random(torch.initial_seed())


def _dtype(name):
    return "bfloat16" if name == "half" else name


def _compiled(key, config, form=None):
    _, target, name = key
    form = form or requirements.plain_form(config)
    return compiled.compile_config(config, target, _dtype(name), form)


def _draw(chance, count, wanted):
    """Committed candidates that are wanted, spread over the lists."""
    lists = [
        (key, [found for found in _COMMITTED[key] if wanted(key, found.config)])
        for key in sorted(_LISTS)
    ]
    lists = [(key, found) for key, found in lists if found]
    chance.shuffle(lists)
    drawn = itertools.islice(itertools.cycle(lists), count)
    return [(key, chance.choice(found)) for key, found in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_committed_list_was_made_of_these_kernels(kind):
    assert candidates.read_file()["sources"][kind] == candidates.kind_hash(kind), (
        "the kernels changed since their configs were compiled: run `make inspect`"
    )


def test_every_list_is_short_and_none_is_empty():
    assert set(_COMMITTED) == _LISTS
    for key, found in _COMMITTED.items():
        for kind in {each.config.kind for each in found}:
            mine = [each for each in found if each.config.kind == kind]
            for other in ("channels_last_descriptor", "planar_descriptor"):
                readable = [each for each in mine if each.config.loader != other]
                assert len(readable) <= candidates.MAX_CANDIDATES, (key, kind)
        assert any(each.config.loader == "pointer" for each in found), key
        assert len({candidate.config for candidate in found}) == len(found), key


@pytest.mark.parametrize("key", sorted(_LISTS), ids="-".join)
def test_small_pointer_config_serves_everything(key):
    fits = [
        found
        for found in _COMMITTED[key]
        if found.config.kind == key[0] and found.config.loader == "pointer" and not found.not_for
    ]
    assert any(found.config.BLOCK_N <= 16 and found.config.BLOCK_K <= 16 for found in fits)
    assert min(found.shared_bytes for found in fits) <= 48 * 1024  # what any GPU has


@pytest.mark.parametrize("key", sorted(_LISTS), ids="-".join)
def test_a_depthwise_config_serves_everything(key):
    kind = {"conv": "depthwise", "weight_grad": "depthwise_grad"}[key[0]]
    mine = [found for found in _COMMITTED[key] if found.config.kind == kind]
    assert mine and any(not found.not_for for found in mine)


def test_drawn_candidates_compile_as_committed(chance):
    same_compiler = candidates.read_file()["triton"] == triton.__version__
    for key, candidate in _draw(chance, _DRAWN, lambda key, config: True):
        config, (_, target, name) = candidate.config, key
        needs = config.needs - candidate.not_for
        found = []
        for dtype, form in requirements.forms(config, name, needs):
            assert not requirements.faults_when_compiled(config, target, dtype, form), (
                key,
                config,
                dtype,
                form,
            )
            found.append(compiled.compile_config(config, target, dtype, form).resources)
        if same_compiler:
            assert max(code.registers for code in found) == candidate.registers, (key, config)
            assert max(code.shared_bytes for code in found) == candidate.shared_bytes, (key, config)


def test_large_problems_on_sm_90_are_asynchronous(chance):
    def large(key, config):
        return key[1:] == ("sm_90", "half") and requirements.is_for_large_problems(config)

    for key, candidate in _draw(chance, 4, large):
        holds = _compiled(key, candidate.config).instructions
        assert holds.matrix_instructions > 0
        assert holds.register_operands == holds.layout_changes == holds.narrow_accesses == 0
        assert holds.loop_waits == 1 and holds.loop_barriers <= requirements.MAX_LOOP_BARRIERS
        assert holds.redundancy == 1 and not holds.loop_fences
        assert holds.bulk_copies > 0


@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_that_holds_the_weight_waits_once_for_each_column(dtype, kernel_size, chance):
    config = HaloConfig((1, 8, 16), 32, 4, 2, "pixels_first")
    form = compiled.Form(32, chance.choice((1, -1)), kernel_size=kernel_size)
    code = compiled.compile_config(config, "sm_90", dtype, form)
    assert not requirements.faults(config, "sm_90", dtype, code)
    holds, depth = code.instructions, 32 // (8 if dtype == "float32" else 16)
    # of consumers, loops over columns, the taps of one, and blocks of 64 pixels
    loops = 2 if dtype == "bfloat16" and kernel_size[0] % 2 else 1
    assert holds.matrix_instructions == 2 * loops * kernel_size[0] * depth * 2
    assert holds.loop_waits == 1 and holds.loop_barriers <= 2


@pytest.mark.parametrize("dtype, channels", [("bfloat16", 40), ("float32", 24)])
def test_channels_that_a_tile_has_in_excess_are_not_multiplied(dtype, channels):
    block = 64 if dtype == "bfloat16" else 32
    config = HaloConfig((1, 16, 8), block, 4, 2, "weights_first" if block == 64 else "pixels_first")
    code = compiled.compile_config(config, "sm_90", dtype, compiled.Form(channels))
    assert code.instructions.redundancy == 0.75  # in units of 32 bytes 3 of 4


def test_where_the_weight_is_streamed_it_waits_once_for_each_part_of_a_column(chance):
    config = HaloConfig((1, 8, 8), 32, 4, 2, "pixels_first", chance.choice((2, 3, 5)))
    rows = chance.choice((3, 5))
    form = compiled.Form(32, chance.choice((1, -1)), kernel_size=(rows, 3))
    holds = compiled.compile_config(config, "sm_90", "bfloat16", form).instructions
    assert holds.loop_waits == -(-rows // config.streamed)
    assert holds.redundancy == 1 and not holds.register_operands


@pytest.mark.skipif(why_no_clusters() is not None, reason=str(why_no_clusters()))
@pytest.mark.parametrize("symmetry", [1, -1])
@pytest.mark.parametrize("shared", ["pixels", "weights"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_of_clusters_waits_once_a_step(dtype, shared, symmetry):
    config = ClusteredConfig((1, 16, 16), 256 if shared == "pixels" else 128, 4, shared)
    code = compiled.compile_config(config, "sm_90", dtype, compiled.Form(256, symmetry))
    holds, loops = code.instructions, 1 if dtype == "float32" else 2
    assert holds.matrix_instructions == loops * 4  # rows of 128 bytes in parts of 32
    assert holds.loop_waits == 1 and holds.loop_barriers == 2 and holds.redundancy == 1
    assert holds.register_operands == code.resources.spill_bytes == 0


def test_sums_that_do_not_fit_into_registers_are_noticed():
    config = HaloConfig((1, 16, 16), 64, 4, 2, "weights_first")
    form = compiled.Form(64, sign=-1)
    found = requirements.faults_when_compiled(config, "sm_90", "bfloat16", form)
    assert any("spills" in fault for fault in found)


def test_wgmma_of_a_several_sided_box_as_first_operand_is_noticed():
    config = ConvConfig((1, 8, 16), 64, 64, 4, 3, "channels_last_descriptor", "pixels_first")
    form = requirements.plain_form(config)
    found = requirements.faults_when_compiled(config, "sm_90", "bfloat16", form)
    assert any("registers" in fault for fault in found)


def test_spills_are_noticed():
    config = ConvConfig((1, 16, 16), 128, 16, 4, 2)  # a sum of 256 numbers a thread
    form = requirements.demanding_form(config, config.needs)
    found = requirements.faults_when_compiled(config, "sm_80", "bfloat16", form)
    assert any("spills" in fault for fault in found)


def test_too_much_shared_memory_is_noticed():
    config = ConvConfig((1, 16, 16), 128, 64, 8, 5)
    form = requirements.plain_form(config)
    found = requirements.faults_when_compiled(config, "sm_80", "bfloat16", form)
    assert any("shared memory" in fault for fault in found)


@pytest.mark.parametrize("kernel", report.KERNELS)
def test_pointers_on_sm_80_copy_16_bytes_at_a_time(kernel, chance):
    drawn = _draw(chance, 2, lambda key, config: (config.kind, key[1]) == (kernel, "sm_80"))
    for key, candidate in drawn:
        assert _compiled(key, candidate.config).instructions.async_copies_16b > 0


@pytest.mark.parametrize("kind", [DepthwiseConfig, DepthwiseGradConfig])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32_ieee"])
def test_depthwise_kernels_go_down_rows_16_bytes_at_a_time(kind, dtype):
    numbers = 8 if dtype == "bfloat16" else 4  # of a thread
    config = kind((1, 16, 2 * numbers), 64)
    code = compiled.compile_config(config, "sm_90", dtype, requirements.plain_form(config))
    loops = loops_of_rows(code)
    assert len(loops) == 1
    (loop,) = loops
    sides = [text.split()[0] for text in loop if re.match(r"(LDG|STG)\b", text)]
    assert len(sides) >= 4 and all("128" in side.split(".") for side in sides)
    assert sum(text.startswith("FFMA") for text in loop) >= 9 * numbers
    assert not any(re.match(r"(BAR|LDS|STS|LDL|STL)\b", text) for text in loop)


@pytest.mark.parametrize("kind", [DepthwiseConfig, DepthwiseGradConfig])
@pytest.mark.parametrize("channels", [2, 4])
def test_no_number_of_a_group_leaves_its_thread(kind, channels):
    config = kind((1, 16, 8), 64)  # 4 numbers a thread
    form = compiled.Form(channels, groups=128 // channels)
    code = compiled.compile_config(config, "sm_90", "bfloat16", form)
    (loop,) = loops_of_rows(code)
    assert not any(re.match(r"(BAR|LDS|STS|SHFL|LDL|STL)\b", text) for text in loop)
    assert sum(text.startswith("FFMA") for text in loop) >= 9 * channels * 4
    assert not code.resources.spill_bytes


def loops_of_rows(code):
    """The innermost loops that read images: their instructions, without conditions."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", code._cuobjdump("-sass"))
    places = [(int(address, 16), re.sub(r"^@\S+\s+", "", text)) for address, text in found]
    jumps = [(re.search(r"^BRA\b.*\b0x([0-9a-f]+)", text), at) for at, text in places]
    spans = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) < at]
    inner = [s for s in spans if not any(s[0] <= t[0] and t[1] <= s[1] for t in spans if t != s)]
    bodies = [[text for at, text in places if start <= at <= end] for start, end in inner]
    return [body for body in bodies if any(text.startswith("LDG") for text in body)]


@pytest.mark.parametrize("kernel", report.KERNELS)
def test_matrix_instructions_on_gfx942(kernel, chance):
    drawn = _draw(chance, 2, lambda key, config: (config.kind, key[1]) == (kernel, "gfx942"))
    for key, candidate in drawn:
        assert _compiled(key, candidate.config).instructions.matrix_instructions > 0


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_that_unpacks_matrices_does_not_spill(target, sign, dtype):
    code = compiled.compile_matrices(MATRICES_BLOCK, target, dtype, sign)
    assert not requirements.resource_faults(target, code.resources)


def test_planar_memory_has_no_boxes_of_several_images():
    for candidate in candidates.list_of("conv", "sm_90", "float16"):
        assert candidate.config.loader != "planar_descriptor" or candidate.config.box[0] == 1


def test_capabilities_have_targets():
    named = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}
    assert {capability: candidates.target_of(capability) for capability in named} == named
    assert candidates.target_of((12, 0)) is None


def test_report_has_exactly_the_promised_fields(capsys, monkeypatch):
    two = {key: found[:1] for key, found in _COMMITTED.items() if key[2] == "half"}
    monkeypatch.setattr(report, "committed", lambda: two)
    assert main.main(["inspect", "--target", "sm_90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    fields = (
        "kernel loader roles dtype config registers spill_bytes shared_bytes shared_limit "
        "matrix_instructions bulk_copies async_copies_16b register_operands loop_barriers "
        "loop_fences loop_waits narrow_accesses layout_changes redundancy"
    )
    assert all(" ".join(row) == fields for row in rows)
    assert {row["kernel"] for row in rows} == {"conv", "weight_grad", "matrices"}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}


def test_report_fails_where_a_requirement_is_broken(capsys, monkeypatch):
    waiting = ConvConfig((1, 8, 16), 64, 64, 4, 3, "channels_last_descriptor", "pixels_first")
    broken = candidates.Candidate(waiting, frozenset(), 168, 0)
    monkeypatch.setattr(report, "committed", lambda: {("conv", "sm_90", "half"): (broken,)})
    assert main.main(["inspect", "--target", "sm_90"]) == 1
    assert "products read registers" in capsys.readouterr().out


def test_refused_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(compiled, "INTERPRETED", True)
    config = WeightGradConfig((1, 1, 64), 16, 16)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled.compile_config(config, "sm_80", "float16", compiled.Form(16))


def test_one_kind_made_anew_keeps_the_rows_of_the_others():
    sources = {kind: candidates.kind_hash(kind) for kind in KINDS}
    kept = regenerate_candidates._kept(["conv"], sources)
    assert kept == [
        row for row in candidates.read_file()["candidates"] if row["config"]["kind"] != "conv"
    ]


def test_rows_of_other_kernels_are_not_kept():
    sources = {kind: candidates.kind_hash(kind) for kind in KINDS} | {"weight_grad": "another"}
    with pytest.raises(RuntimeError, match="weight_grad.*make all kinds"):
        regenerate_candidates._kept(["conv"], sources)
