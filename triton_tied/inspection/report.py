"""A report on the committed configs: each compiled for a target, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ..autotune.candidates import Candidate, committed
from ..kernels.configs import as_json
from ..kernels.launch import MATRICES_BLOCK
from .compiled import Compiled, compile_config, compile_matrices
from .requirements import (
    SHARED_LIMIT,
    demanding_form,
    faults,
    faults_when_compiled,
    plain_form,
    resource_faults,
)

KERNELS = ("conv", "weight_grad")
LISTS = ("half", "float32", "float32_ieee")


class CompiledConfig(NamedTuple):
    """A line of the report, in the names and the order of its JSON."""

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
    register_operands: int
    loop_barriers: int
    loop_fences: int
    loop_waits: int
    narrow_accesses: int
    layout_changes: int
    redundancy: float


def rows(target: str) -> Iterator[tuple[CompiledConfig, list[str]]]:
    """Each committed config of a target compiled, and what is wrong with it."""
    for kernel in KERNELS:
        for list_name in LISTS:
            found = committed().get((kernel, target, list_name), ())
            dtypes = ("bfloat16", "float16") if list_name == "half" else (list_name,)
            for dtype in dtypes:
                for candidate in found:
                    yield _row(kernel, target, dtype, candidate)
    for dtype in ("float32", "float16", "bfloat16"):
        both = [compile_matrices(MATRICES_BLOCK, target, dtype, sign) for sign in (1, -1)]
        config = {"BLOCK_N": MATRICES_BLOCK, "BLOCK_K": MATRICES_BLOCK, "num_warps": 4}
        row = _fill("matrices", "pointer", None, dtype, config, target, both[0])
        yield row, [fault for code in both for fault in resource_faults(target, code.resources)]


def _row(
    kernel: str, target: str, dtype: str, candidate: Candidate
) -> tuple[CompiledConfig, list[str]]:
    config = candidate.config
    code = compile_config(config, target, dtype, plain_form(config))
    roles = getattr(config, "roles", None)
    row = _fill(kernel, config.loader, roles, dtype, as_json(config), target, code)
    needs = config.needs - candidate.not_for
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
) -> CompiledConfig:
    measured = asdict(code.resources) | asdict(code.instructions)
    return CompiledConfig(
        kernel, loader, roles, dtype, config, shared_limit=SHARED_LIMIT[target], **measured
    )
