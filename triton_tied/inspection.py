"""What is asked of compiled code, and a report on the committed configs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from .candidates import Candidate, committed
from .compiled import (
    Compiled,
    DoesNotCompile,
    Form,
    Resources,
    compile_centre,
    compile_config,
)
from .configs import ConvConfig, WeightGradConfig
from .gpus import KNOWN, MODEL_OF
from .problem import Problem

SHARED_LIMIT = {target: KNOWN[name].block_shared_bytes for target, name in MODEL_OF.items()}
MOST_WAITS = 6
KERNELS = ("conv", "weight_grad")
LISTS = ("half", "float32", "float32_ieee")
CENTRE_BLOCK = 64


class Row(NamedTuple):
    """One line of the report, in the names and the order of its JSON."""

    kernel: str
    loader: str
    roles: str | None
    dtype: str
    config: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: int
    bulk_copies: int
    async_copies_16b: int
    matrix_waits: int | None


def is_for_large_problems(config: ConvConfig | WeightGradConfig) -> bool:
    """Configs that must keep the matrix units of sm_90 busy. In the weight gradient a box of
    several sides is never the first operand as it stands, so those are for small images."""
    if config.loader != "descriptor":
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


def faults(
    config: ConvConfig | WeightGradConfig, target: str, dtype: str, code: Compiled
) -> list[str]:
    """What is wrong with the plain form of a config, in words; empty if nothing is."""
    found = resource_faults(target, code.resources)
    holds = code.instructions
    if not holds.matrix_instructions and (dtype != "float32_ieee" or target == "gfx942"):
        found.append("no matrix instructions")
    if config.loader == "descriptor" and not holds.bulk_copies:
        found.append("no bulk copies")
    if target == "sm_80" and not holds.async_copies_16b:
        found.append("no asynchronous copies of 16 bytes")
    if target == "sm_90" and dtype in ("float16", "bfloat16") and is_for_large_problems(config):
        if holds.register_operands:
            found.append(f"{holds.register_operands} products read registers")
        if not 0 < (holds.matrix_waits or 0) <= MOST_WAITS:
            found.append(f"{holds.matrix_waits} waits")
    return found


def plain_form(config: ConvConfig | WeightGradConfig) -> Form:
    """Channels-last, aligned, two tiles of channels."""
    return Form(2 * max(config.BLOCK_N, config.BLOCK_K))


def demanding_form(
    config: ConvConfig | WeightGradConfig, needs: Collection[str], one_tile: bool = False
) -> Form:
    """All of ``needs`` at once, and a residual."""
    channels = max(config.BLOCK_N, config.BLOCK_K) * (1 if one_tile else 2)
    memory = next((need for need in ("scattered", "planar") if need in needs), "channels_last")
    return Form(
        channels - (memory == "scattered"),
        sign=-1 if "two_sums" in needs else 1,
        memory=memory,
        gathered_centre="gathered_centre" in needs,
        residual=True,
        ragged_boxes="ragged_boxes" in needs,
        wide="wide" in needs,
    )


def form_of(problem: Problem, config: ConvConfig | WeightGradConfig, residual: bool) -> Form:
    """What a config is compiled to for a problem, with or without a residual."""
    layout, form = problem.layout, demanding_form(config, problem.needs(config))
    dense = problem.memory == "channels_last" and problem.aligned
    return replace(
        form,
        channels=layout.group_channels,
        memory="channels_last" if dense else form.memory,
        residual=residual,
        kernel_size=layout.kernel_size,
        dilation=problem.geometry.dilation,
        groups=layout.groups,
    )


def all_needs(config: ConvConfig | WeightGradConfig) -> frozenset[str]:
    """What a problem can ask of a config's loader."""
    needs = {"two_sums", "wide", "scattered" if config.loader == "pointer" else "planar"}
    needs.add("gathered_centre" if isinstance(config, ConvConfig) else "ragged_boxes")
    return frozenset(needs)


def possible_needs(config: ConvConfig | WeightGradConfig) -> frozenset[str]:
    """Those but for bulk copies of several images, which planar memory cannot have."""
    return all_needs(config) - ({"planar"} if config.box[0] > 1 else set())


def faults_when_compiled(
    config: ConvConfig | WeightGradConfig, target: str, dtype: str, form: Form
) -> list[str]:
    """What is wrong with one form of a config."""
    try:
        code = compile_config(config, target, dtype, form)
    except DoesNotCompile as error:
        return [str(error)]
    if form == plain_form(config):
        return faults(config, target, dtype, code)
    return resource_faults(target, code.resources)


def rows(target: str) -> Iterator[tuple[Row, list[str]]]:
    """Each committed config of a target compiled, and what is wrong with it."""
    for kernel in KERNELS:
        for list_name in LISTS:
            found = committed().get((kernel, target, list_name), ())
            dtypes = ("bfloat16", "float16") if list_name == "half" else (list_name,)
            for dtype in dtypes:
                for candidate in found:
                    yield _row(kernel, target, dtype, candidate)
    for dtype in ("float32", "float16", "bfloat16"):
        code = compile_centre(CENTRE_BLOCK, target, dtype)
        blocks = {"BLOCK_N": CENTRE_BLOCK, "BLOCK_K": CENTRE_BLOCK}
        config = {**blocks, "num_warps": 4}
        row = _fill("centre", "pointer", None, dtype, config, target, code)
        yield row, resource_faults(target, code.resources)


def _row(kernel: str, target: str, dtype: str, candidate: Candidate) -> tuple[Row, list[str]]:
    config = candidate.config
    code = compile_config(config, target, dtype, plain_form(config))
    roles = getattr(config, "roles", None)
    row = _fill(kernel, config.loader, roles, dtype, asdict(config), target, code)
    needs = possible_needs(config) - candidate.not_for
    demanding = demanding_form(config, needs)
    found = faults(config, target, dtype, code)
    return row, found + faults_when_compiled(config, target, dtype, demanding)


def _fill(
    kernel: str,
    loader: str,
    roles: str | None,
    dtype: str,
    config: dict,
    target: str,
    code: Compiled,
) -> Row:
    measured = asdict(code.resources) | asdict(code.instructions)
    measured.pop("register_operands")
    return Row(kernel, loader, roles, dtype, config, shared_limit=SHARED_LIMIT[target], **measured)
