"""What is asked of compiled code, and in which forms a config is compiled to ask it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..autotune.gpus import KNOWN, MODEL_OF
from ..autotune.problem import Problem
from ..kernels.configs import Config, ConvConfig
from ..kernels.stored_taps import UNPACKED_FROM
from .compiled import (
    Compiled,
    DoesNotCompile,
    Form,
    Instructions,
    Resources,
    compile_config,
)

SHARED_LIMIT = {target: KNOWN[name].block_shared_bytes for target, name in MODEL_OF.items()}
# In a loop with products of a config for large problems. A barrier each for what was read, what is
# copied next and what has arrived; of the weight gradient's two products one more.
MAX_LOOP_BARRIERS = 4
MAX_LOOP_WAITS = 1


def is_for_large_problems(config: Config) -> bool:
    """Configs that must keep the matrix units of sm_90 busy. In the weight gradient a box of
    several sides is never the first operand as it stands, so those are for small images."""
    if config.loader != "channels_last_descriptor":
        return False
    if isinstance(config, ConvConfig):
        return config.BLOCK_M * config.BLOCK_N >= 64 * 64
    return config.BLOCK_N * config.BLOCK_K >= 64 * 64 and config.box[:2] == (1, 1)


def resource_faults(target: str, code: Resources) -> list[str]:
    """What no form of a config may do: spill, or ask for more shared memory than there is."""
    faults = []
    if code.spill_bytes:
        faults.append(f"spills {code.spill_bytes} bytes")
    if code.shared_bytes > SHARED_LIMIT[target]:
        faults.append(f"{code.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[target]}")
    return faults


def faults(config: Config, target: str, dtype: str, code: Compiled) -> list[str]:
    """What is wrong with the plain form of a config, in words; empty if nothing is."""
    found = resource_faults(target, code.resources)
    holds = code.instructions
    if not holds.matrix_instructions and (dtype != "float32_ieee" or target == "gfx942"):
        found.append("no matrix instructions")
    if config.loader != "pointer" and not holds.bulk_copies:
        found.append("no bulk copies")
    if target == "sm_80" and not holds.async_copies_16b:
        found.append("no asynchronous copies of 16 bytes")
    if target == "sm_90" and dtype in ("float16", "bfloat16") and is_for_large_problems(config):
        if holds.register_operands:
            found.append(f"{holds.register_operands} products read registers")
        found += _loop_faults(holds)
    return found


def _loop_faults(holds: Instructions) -> list[str]:
    """What keeps the matrix units waiting."""
    found = []
    if holds.redundancy != 1:
        found.append(f"a loop multiplies {holds.redundancy} times what it needs")
    if not 0 < holds.loop_waits <= MAX_LOOP_WAITS:
        found.append(f"{holds.loop_waits} waits in a loop")
    if holds.loop_barriers > MAX_LOOP_BARRIERS:
        found.append(f"{holds.loop_barriers} barriers in a loop")
    if holds.layout_changes:
        found.append(f"{holds.layout_changes} changes of layout in loops")
    if holds.narrow_accesses or holds.loop_fences:
        found.append(
            f"{holds.narrow_accesses} narrow accesses, {holds.loop_fences} fences in a loop"
        )
    return found


def plain_form(config: Config) -> Form:
    """The memory that its loader likes best, aligned, two tiles of channels or more, so many that
    the centre is not gathered."""
    return Form(max(2 * max(config.BLOCK_N, config.BLOCK_K), UNPACKED_FROM))


def demanding_form(config: Config, needs: Collection[str], one_tile: bool = False) -> Form:
    """All of ``needs`` at once."""
    channels = max(config.BLOCK_N, config.BLOCK_K) * (1 if one_tile else 2)
    scattered = "scattered" in needs
    return Form(
        channels - scattered,
        sign=-1,
        scattered=scattered,
        scattered_output="scattered_output" in needs,
        ragged_boxes="ragged_boxes" in needs,
        wide="wide" in needs,
    )


def form_of(problem: Problem, config: Config) -> Form:
    """What a config is compiled to for a problem."""
    layout, form = problem.layout, demanding_form(config, problem.needs(config))
    dense = problem.memory == "channels_last" and problem.aligned
    return replace(
        form,
        channels=layout.group_channels,
        sign=layout.sign,
        scattered=form.scattered and not dense,
        split=isinstance(config, ConvConfig) and config.splits > 1,
        kernel_size=layout.kernel_size,
        dilation=problem.geometry.dilation,
        groups=layout.groups,
    )


def all_needs(config: Config) -> frozenset[str]:
    """What a problem can ask of a config."""
    needs = {"wide"} | ({"scattered"} if config.loader == "pointer" else set())
    own = "scattered_output" if isinstance(config, ConvConfig) else "ragged_boxes"
    return frozenset(needs | {own})


def faults_when_compiled(config: Config, target: str, dtype: str, form: Form) -> list[str]:
    """What is wrong with one form of a config."""
    try:
        code = compile_config(config, target, dtype, form)
    except DoesNotCompile as error:
        return [str(error)]
    if form == plain_form(config):
        return faults(config, target, dtype, code)
    return resource_faults(target, code.resources)
