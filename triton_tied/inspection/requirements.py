"""What is asked of compiled code, and in which forms a config is compiled to ask it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ..autotune.gpus import KNOWN, MODEL_OF
from ..autotune.problem import Problem
from ..kernels.configs import (
    ClusteredConfig,
    Config,
    ConvConfig,
    DepthwiseConfig,
    DepthwiseGradConfig,
    HaloConfig,
    OnePassConfig,
    OnePassTf32Config,
    RowByRowConfig,
    WeightGradConfig,
)
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
    """Configs that must keep the matrix units of sm_90 busy."""
    return config.loader == "channels_last_descriptor" and _KINDS[type(config)].is_large(config)


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
    return resource_faults(target, code.resources) + _KINDS[type(config)].faults(
        config, target, dtype, code.instructions
    )


def _product_faults(config: Config, target: str, dtype: str, holds: Instructions) -> list[str]:
    """Of a kernel of matrix products."""
    found = []
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


def _one_pass_faults(
    config: OnePassConfig, target: str, dtype: str, holds: Instructions
) -> list[str]:
    found = _copy_faults(holds) + _one_wait_faults(holds)
    if holds.register_operands:
        found.append(f"{holds.register_operands} products read registers")
    return found


def _one_pass_tf32_faults(
    config: OnePassTf32Config, target: str, dtype: str, holds: Instructions
) -> list[str]:
    """Its products have nothing to wait for."""
    return _copy_faults(holds) + _redundancy_faults(holds) + _layout_faults(holds)


def _row_by_row_faults(
    config: RowByRowConfig, target: str, dtype: str, holds: Instructions
) -> list[str]:
    found = _copy_faults(holds) + _one_wait_faults(holds)
    if not holds.register_operands:
        found.append("no products of the output gradient in registers")
    return found


def _copy_faults(holds: Instructions) -> list[str]:
    return [] if holds.bulk_copies else ["no bulk copies"]


def _one_wait_faults(holds: Instructions) -> list[str]:
    """Of a loop that waits for its products once, together."""
    waits = [] if holds.loop_waits == 1 else [f"{holds.loop_waits} waits in a loop"]
    return waits + _layout_faults(holds)


def _redundancy_faults(holds: Instructions) -> list[str]:
    if holds.redundancy == 1:
        return []
    return [f"a loop multiplies {holds.redundancy} times what it needs"]


def _layout_faults(holds: Instructions) -> list[str]:
    if not holds.layout_changes:
        return []
    return [f"{holds.layout_changes} changes of layout in loops"]


def _shared_operand_faults(holds: Instructions) -> list[str]:
    """Of a kernel whose products read both operands in shared memory, where copies put them."""
    found = _copy_faults(holds)
    if not holds.matrix_instructions or holds.register_operands:
        found.append("no products of two operands in shared memory")
    return found


def _loop_faults(holds: Instructions, parts: int = 1) -> list[str]:
    """What keeps the matrix units waiting, in a loop whose steps have so many parts."""
    found = _redundancy_faults(holds) + _layout_faults(holds)
    if not 0 < holds.loop_waits <= parts * MAX_LOOP_WAITS:
        found.append(f"{holds.loop_waits} waits in a loop")
    if holds.loop_barriers > parts * MAX_LOOP_BARRIERS:
        found.append(f"{holds.loop_barriers} barriers in a loop")
    if holds.narrow_accesses or holds.loop_fences:
        found.append(
            f"{holds.narrow_accesses} narrow accesses, {holds.loop_fences} fences in a loop"
        )
    return found


def plain_form(config: Config) -> Form:
    """The memory that its loader likes best, aligned, two tiles of channels or more, so many that
    the centre is not gathered."""
    return _KINDS[type(config)].plain_form(config)


def demanding_form(config: Config, needs: Collection[str]) -> Form:
    """All of ``needs`` at once."""
    return _demanding(_KINDS[type(config)].sizes(config, "scattered" in needs)[0], needs)


def _demanding(form: Form, needs: Collection[str]) -> Form:
    return replace(
        form,
        sign=-1,
        scattered="scattered" in needs,
        scattered_output="scattered_output" in needs,
        ragged_boxes="ragged_boxes" in needs,
        wide="wide" in needs,
    )


def form_of(problem: Problem, config: Config) -> Form:
    """What a config is compiled to for a problem."""
    merges = config.merged > 1
    problem, config = problem.as_read(config)
    layout, form = problem.layout, demanding_form(config, problem.needs(config))
    dense = problem.memory == "channels_last" and problem.aligned
    return replace(
        form,
        channels=layout.group_channels,
        sign=layout.sign,
        scattered=form.scattered and not dense,
        split=config.kernel == "conv" and config.splits > 1,
        kernel_size=layout.kernel_size,
        dilation=problem.geometry.dilation,
        groups=layout.groups,
        merged=merges,
    )


def faults_when_compiled(config: Config, target: str, dtype: str, form: Form) -> list[str]:
    """What is wrong with one form of a config."""
    try:
        code = compile_config(config, target, dtype, form)
    except DoesNotCompile as error:
        return [str(error)]
    if form == plain_form(config):
        return faults(config, target, dtype, code)
    return resource_faults(target, code.resources)


def forms(config: Config, list_name: str, needs: Collection[str]) -> Iterator[tuple[str, Form]]:
    """The dtypes and forms to compile a config for, to believe that it serves ``needs``."""
    dtypes = ("bfloat16", "float16") if list_name == "half" else (list_name,)
    for dtype in dtypes:
        yield dtype, demanding_form(config, needs)
    yield dtypes[0], plain_form(config)
    for form in _KINDS[type(config)].sizes(config, "scattered" in needs)[1:]:
        yield dtypes[0], _demanding(form, needs)


def _plain_form(config: ConvConfig | WeightGradConfig) -> Form:
    return Form(max(2 * max(config.BLOCK_N, config.BLOCK_K), UNPACKED_FROM))


def _sizes(config: ConvConfig | WeightGradConfig, fewer: bool) -> tuple[Form, ...]:
    block = max(config.BLOCK_N, config.BLOCK_K)
    tiles = (2, 1) if config.BLOCK_N == config.BLOCK_K else (2,)
    return tuple(Form(count * block - fewer) for count in tiles)


def _one_pass_plain_form(config: OnePassConfig) -> Form:
    return Form(config.BLOCK_C, kernel_size=config.taps)


def _one_pass_sizes(config: OnePassConfig, fewer: bool) -> tuple[Form, ...]:
    """Several blocks of taps and tiles of channels, and one of each."""
    more = tuple(taps + 2 for taps in config.taps)
    plain = _one_pass_plain_form(config)
    return replace(plain, channels=2 * config.BLOCK_C - 8, kernel_size=more), plain


def _is_large_conv(config: ConvConfig) -> bool:
    return config.BLOCK_M * config.BLOCK_N >= 64 * 64


def _is_large_weight_grad(config: WeightGradConfig) -> bool:
    """A box of several sides is never the first operand as it stands, so those are for small
    images."""
    return config.BLOCK_N * config.BLOCK_K >= 64 * 64 and config.box[:2] == (1, 1)


def _plain_depthwise(config: DepthwiseConfig | DepthwiseGradConfig) -> Form:
    return Form(1, groups=2 * config.BLOCK_C)


def _depthwise_sizes(
    config: DepthwiseConfig | DepthwiseGradConfig, fewer: bool
) -> tuple[Form, ...]:
    return (Form(1, groups=2 * config.BLOCK_C - fewer),)


def _halo_faults(config: HaloConfig, target: str, dtype: str, holds: Instructions) -> list[str]:
    """A box's result changes its layout, in the outer loop."""
    rows = _plain_halo(config).kernel_size[0]
    parts = math.ceil(rows / (config.streamed or rows))  # of a column of the kernel
    in_loop = replace(holds, layout_changes=0)
    return _shared_operand_faults(holds) + _loop_faults(in_loop, parts)


def _plain_halo(config: HaloConfig) -> Form:
    """Streamed weights are for large kernels."""
    return Form(config.BLOCK_C, kernel_size=(7, 7) if config.streamed else (3, 3))


def _clustered_faults(
    config: ClusteredConfig, target: str, dtype: str, holds: Instructions
) -> list[str]:
    return _shared_operand_faults(holds) + _loop_faults(holds)


class _Kind(NamedTuple):
    """What is asked of a kind of config.

    Args:
        plain_form: see :func:`plain_form`.
        sizes: forms of as many tiles of channels as make other code, first of two; the last tile
            is whole, or fewer by one channel.
        faults: what is wrong with its plain form's instructions for a target and dtype; for
            kernels without matrix products nothing.
        is_large: see :func:`is_for_large_problems`.
    """

    plain_form: Callable[[Any], Form]
    sizes: Callable[[Any, bool], tuple[Form, ...]]
    faults: Callable[[Any, str, str, Instructions], list[str]] = lambda *_: []
    is_large: Callable[[Any], bool] = lambda _: False


_KINDS: dict[type[Config], _Kind] = {
    ConvConfig: _Kind(_plain_form, _sizes, _product_faults, _is_large_conv),
    WeightGradConfig: _Kind(_plain_form, _sizes, _product_faults, _is_large_weight_grad),
    OnePassConfig: _Kind(_one_pass_plain_form, _one_pass_sizes, _one_pass_faults),
    OnePassTf32Config: _Kind(_one_pass_plain_form, _one_pass_sizes, _one_pass_tf32_faults),
    RowByRowConfig: _Kind(_one_pass_plain_form, _one_pass_sizes, _row_by_row_faults),
    DepthwiseConfig: _Kind(_plain_depthwise, _depthwise_sizes),
    DepthwiseGradConfig: _Kind(_plain_depthwise, _depthwise_sizes),
    ClusteredConfig: _Kind(
        lambda config: Form(max(2 * config.BLOCK_N, UNPACKED_FROM)),
        lambda config, fewer: (Form(2 * config.BLOCK_N),),
        _clustered_faults,
        lambda config: True,
    ),
    HaloConfig: _Kind(
        _plain_halo,
        lambda config, fewer: (_plain_halo(config),),
        _halo_faults,
    ),
}
