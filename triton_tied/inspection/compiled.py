"""One kernel compiled for a target that need not be there, and what its machine code holds."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dispatch import INTERPRETED
from ..kernels.centre import centre_kernel
from ..kernels.configs import Config, ConvConfig, compile_options, constants
from ..kernels.conv import conv_kernel
from ..kernels.weight_grad import weight_grad_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {"float32": "fp32", "float32_ieee": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_MATRIX = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\bHG?MMA",
    "sm_100": r"\b(?:UTC\w*MMA|HMMA)",
    "gfx942": r"v_mfma",
}
_POINTERS = {"x", "grad", "packed", "centre", "bias", "residual", "y", "partial"}


@dataclass(frozen=True)
class Form:
    """What compiled code depends on, besides a config.

    Args:
        channels: of one group.
        sign: +1 (self-adjoint) or -1.
        scattered: pointers to images of any strides, not to channels-last ones without gaps.
        gathered_centre: the centre comes from its triangle; else it was unpacked.
        residual: there is one.
        ragged_boxes: weight gradient: boxes reach beyond the output.
        wide: offsets of 64 bits.
    """

    channels: int
    sign: int = 1
    scattered: bool = False
    gathered_centre: bool = False
    residual: bool = False
    ragged_boxes: bool = False
    wide: bool = False
    kernel_size: tuple[int, ...] = (3, 3)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Resources:
    """What a program asks of the machine.

    Args:
        registers: for each thread, of 32 bits. On gfx942 those of both kinds together.
        spill_bytes: of each thread's memory of its own; 0 unless registers ran out.
        shared_bytes: of shared memory, for each program.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Instructions:
    """How many of each kind its machine code holds.

    Args:
        matrix_instructions: wgmma (sm_90), tcgen05.mma (sm_100), and mma on both for small tiles
            and on sm_80; mfma (gfx942).
        bulk_copies, async_copies_16b: TMA loads; 16-byte cp.async.
        matrix_waits: for wgmma, sm_90 only.
        register_operands: wgmma whose first operand comes from registers, sm_90 only.
    """

    matrix_instructions: int
    bulk_copies: int = 0
    async_copies_16b: int = 0
    matrix_waits: int | None = None
    register_operands: int = 0


class Compiled:
    """A kernel as Triton compiled it for a target, read when asked."""

    def __init__(self, compiled: Any, target: str):
        self._compiled, self._target = compiled, target

    @functools.cached_property
    def resources(self) -> Resources:
        shared = self._compiled.metadata.shared
        if "amdgcn" in self._compiled.asm:
            scratch = self._metadata("private_segment_fixed_size")
            spilled = max(scratch, 4 * self._metadata("vgpr_spill_count"))
            return Resources(self._metadata("vgpr_count"), spilled, shared)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", self._cuobjdump("-res-usage")))
        return Resources(int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), shared)

    @functools.cached_property
    def instructions(self) -> Instructions:
        matrix = _MATRIX[self._target]
        if "amdgcn" in self._compiled.asm:
            return Instructions(len(re.findall(matrix, self._compiled.asm["amdgcn"])))
        sass = self._cuobjdump("-sass")
        waits = len(re.findall(r"\bWARPGROUP\.DEPBAR", sass))
        firsts = re.findall(r"ttng\.warp_group_dot .* : (\S+)", self._compiled.asm["ttgir"])
        return Instructions(
            matrix_instructions=len(re.findall(matrix, sass)),
            bulk_copies=len(re.findall(r"\bUTMALDG", sass)),
            async_copies_16b=len(re.findall(r"\bLDGSTS\.\S*128", sass)),
            matrix_waits=waits if self._target == "sm_90" else None,
            register_operands=sum(not first.startswith("!ttg.memdesc") for first in firsts),
        )

    def _metadata(self, name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", self._compiled.asm["amdgcn"])[-1])

    def _cuobjdump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


class DoesNotCompile(RuntimeError):
    """The compiler, or the assembler, gave up."""


@functools.lru_cache(maxsize=16)
def compile_config(config: Config, target: str, dtype: str, form: Form) -> Compiled:
    """Compiles the kernel that a config is for.

    Raises:
        DoesNotCompile: with the compiler's last words.
        RuntimeError: where Triton interprets its kernels.
    """
    kernel = conv_kernel if isinstance(config, ConvConfig) else weight_grad_kernel
    options = compile_options(config, on_nvidia=target != "gfx942")
    return _compile(kernel, _compiled_in(config, dtype, form), dtype, target, options)


def compile_centre(block: int, target: str, dtype: str) -> Compiled:
    """Compiles the kernel that unpacks the centre, for tiles of ``block`` squared."""
    names = {"CHANNELS": 2 * block, "GROUPS": 1, "SIGN": 1, "PAIRS": 4}
    blocks = {"BLOCK_N": block, "BLOCK_K": block}
    return _compile(centre_kernel, {**names, **blocks}, dtype, target, {})


def _compile(
    kernel: Any,
    compiled_in: dict[str, Any],
    dtype: str,
    target: str,
    options: dict[str, int],
) -> Compiled:
    if INTERPRETED:
        raise RuntimeError(
            "nothing is compiled where TRITON_INTERPRET is set: "
            "expected it unset when triton_tied is imported"
        )
    signature, attributes = _signature(kernel, compiled_in, dtype)
    source = ASTSource(kernel, signature, compiled_in, attributes)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a failure prints all of its source
            compiled = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise DoesNotCompile(f"{type(error).__name__}: {words[-1][:200]}") from error
    return Compiled(compiled, target)


def _compiled_in(config: Config, dtype: str, form: Form) -> dict[str, Any]:
    """Arguments that are compiled in: constants, strides of 1, and what is absent."""
    planar = config.loader == "planar_descriptor"
    dense = not form.scattered and not planar
    # Of dense memory all strides are 1, for what the kernel is told of it; of a row its last.
    axes = "nchw" if dense else "w" if planar else ""
    images = "xry" if isinstance(config, ConvConfig) else "xg"
    ones = [f"stride_{image}{axis}" for image in images for axis in axes]
    absent: list[str] = []
    if isinstance(config, ConvConfig):
        ones += ["stride_yw"] * form.scattered  # a result has no gaps
        absent += ["centre"] * form.gathered_centre + ["residual"] * (not form.residual)
    return {
        **constants(
            config,
            channels=form.channels,
            groups=form.groups,
            sign=form.sign,
            kernel_size=form.kernel_size,
            dilation=form.dilation,
            input_precision="ieee" if dtype == "float32_ieee" else "tf32",
            dense=dense,
            wide=form.wide,
            masked=form.ragged_boxes,
        ),
        **dict.fromkeys(ones, 1),
        **dict.fromkeys(absent),
    }


def _signature(
    kernel: Any, compiled_in: dict[str, Any], dtype: str
) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """Types of the arguments, and which of them Triton would see to be divisible by 16."""
    signature, attributes = {}, {}
    blocks = [compiled_in.get(f"BLOCK_{axis}") for axis in "IHWK"]
    if "planar" in compiled_in.get("LOADER", ""):
        order = (0, 1, 3, 2) if blocks[1] == 1 else (0, 3, 1, 2)
        blocks = [blocks[axis] for axis in order]
    for i, name in enumerate(kernel.arg_names):
        aligned = name in _POINTERS
        if name in compiled_in or kernel.params[i].is_constexpr:
            signature[name] = "constexpr"
            continue
        if name in ("x", "grad") and compiled_in["LOADER"] != "pointer":
            signature[name], aligned = f"tensordesc<{_TYPES[dtype]}{blocks}>", False
        elif name in _POINTERS:
            signature[name] = "*fp32" if name == "partial" else f"*{_TYPES[dtype]}"
        elif name == "alpha":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, attributes
