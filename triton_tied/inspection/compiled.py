"""One kernel compiled for a target that need not be there, and what its machine code holds."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dispatch import INTERPRETED
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
    constants,
    swizzled_channels,
)
from ..kernels.conv import conv_kernel
from ..kernels.depthwise import depthwise_kernel
from ..kernels.depthwise_grad import depthwise_grad_kernel
from ..kernels.descriptors import halved_layout
from ..kernels.launch import matrices_options
from ..kernels.matrices import matrices_kernel
from ..kernels.precision import InputPrecision
from ..kernels.stored_taps import stored_taps
from ..kernels.toolchain import why_no_clusters, why_no_gluon
from ..kernels.weight_grad import weight_grad_kernel
from ..packing import SIGNS, Layout, Symmetry
from .loops import layout_changes, loops_of

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
_IMAGES = {"x", "opposite_x", "grad", "opposite_grad"}
_SYMMETRY: dict[int, Symmetry] = {sign: name for name, sign in SIGNS.items()}  # type: ignore[misc]
_WEIGHTS = {"weights", "opposite_weights"}
_OTHERS = {"triangles", "bias", "residual", "y", "partial", "packed", "matrices"}


@dataclass(frozen=True)
class Form:
    """What compiled code depends on, besides a config.

    Args:
        channels: of one group.
        sign: +1 (self-adjoint) or -1.
        scattered: pointers to images of any strides, not to channels-last ones without gaps.
        scattered_output: convolution: the same of what is written, and of a residual.
        split: convolution: sums in float32 are written, for another kernel to sum.
        ragged_boxes: weight gradient: boxes reach beyond the output.
        wide: offsets of 64 bits.
        merged: convolution: of merged columns, whose centre is a matrix of any size.
    """

    channels: int
    sign: int = 1
    scattered: bool = False
    scattered_output: bool = False
    split: bool = False
    ragged_boxes: bool = False
    wide: bool = False
    kernel_size: tuple[int, ...] = (3, 3)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    merged: bool = False


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
        register_operands: wgmma whose first operand comes from registers, sm_90 only.
        loop_barriers, loop_fences, loop_waits, narrow_accesses: the most in a loop with products;
            see :class:`.loops.Loops`.
        layout_changes: of tiles of float32 in loops.
        redundancy: products of such a loop over those of a tile; 0 where no loop was found.
    """

    matrix_instructions: int
    bulk_copies: int = 0
    async_copies_16b: int = 0
    register_operands: int = 0
    loop_barriers: int = 0
    loop_fences: int = 0
    loop_waits: int = 0
    narrow_accesses: int = 0
    layout_changes: int = 0
    redundancy: float = 0.0


class Compiled:
    """A kernel as Triton compiled it for a target, read when asked."""

    def __init__(self, compiled: Any, target: str, products: int = 1, warps: int = 4):
        """``products``: multiplications of a tile; ``warps``: that share a loop."""
        self._compiled, self._target = compiled, target
        self._products, self._warps = products, warps

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
        loops = loops_of(sass, self._warps)
        firsts = re.findall(r"ttng\.warp_group_dot .* : (\S+)", self._compiled.asm["ttgir"])
        return Instructions(
            matrix_instructions=len(re.findall(matrix, sass)),
            bulk_copies=len(re.findall(r"\bUTMALDG", sass)),
            async_copies_16b=len(re.findall(r"\bLDGSTS\.\S*128", sass)),
            register_operands=sum(not first.startswith("!ttg.memdesc") for first in firsts),
            loop_barriers=loops.barriers,
            loop_fences=loops.fences,
            loop_waits=loops.waits,
            narrow_accesses=loops.narrow_accesses,
            layout_changes=layout_changes(self._compiled.asm["ttgir"]),
            redundancy=round(loops.multiplications / self._products, 2),
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
    kind = _KINDS.get(type(config))
    if kind is None:
        raise DoesNotCompile(why_no_clusters())
    options = config.compile_options(on_nvidia=target != "gfx942")
    compiled_in = _compiled_in(config, dtype, form)
    described = kind.described and kind.described(config, compiled_in, dtype)
    return _compile(kind.kernel, compiled_in, dtype, target, options, form.split, described)


def compile_matrices(block: int, target: str, dtype: str, sign: int) -> Compiled:
    """Compiles the kernel that unpacks matrices, for tiles of ``block`` squared."""
    compiled_in = {
        "SIGN": sign,
        "ROUNDS": dtype == "float32" and target != "gfx942",
        "BLOCK": block,
    }
    options = matrices_options(on_nvidia=target != "gfx942")
    return _compile(matrices_kernel, compiled_in, dtype, target, options)


def _compile(
    kernel: Any,
    compiled_in: dict[str, Any],
    dtype: str,
    target: str,
    options: dict[str, int],
    split: bool = False,
    described: dict[str, str] | None = None,
) -> Compiled:
    if INTERPRETED:
        raise RuntimeError(
            "nothing is compiled where TRITON_INTERPRET is set: "
            "expected it unset when triton_tied is imported"
        )
    signature, attributes = _signature(kernel, compiled_in, dtype, split, described or {})
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, compiled_in, attributes)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a failure prints all of its source
            compiled = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise DoesNotCompile(f"{type(error).__name__}: {words[-1][:200]}") from error
    return Compiled(compiled, target, _products(compiled_in, dtype), options.get("num_warps", 4))


def _products(compiled_in: dict[str, Any], dtype: str) -> int:
    """Multiplications of one step of a kernel's loop; 1 of a kernel without products."""
    if "CONSUMERS" in compiled_in:  # a step is a column of the kernel
        sizes = [compiled_in[f"BLOCK_{axis}"] for axis in "IHWCC"]
        return math.prod(sizes) * compiled_in["KERNEL_H"]
    if "SHARED" in compiled_in:  # of one program of two
        sizes = [compiled_in[f"BLOCK_{axis}"] for axis in "IHWN"]
        return math.prod(sizes) // 2 * swizzled_channels(4 if dtype == "float32" else 2)
    if "TAPS_H" in compiled_in and dtype == "float32":  # of all taps of a block
        taps = compiled_in["TAPS_H"] * compiled_in["TAPS_W"]
        if "BLOCK_C" not in compiled_in:  # a step is a row
            return 32 * 64 * 64 * taps
        sizes = [compiled_in[f"BLOCK_{axis}"] for axis in "IHWCC"]
        return math.prod(sizes) * taps
    if "BLOCK_K" not in compiled_in:
        return 1
    blocks = [compiled_in[f"BLOCK_{axis}"] for axis in "IHWNK"]
    n, k = blocks[-2:]
    # where one tile covers the channels, the weight gradient's loop has both products
    both = "MASKED" in compiled_in and n == k >= compiled_in["CHANNELS"]
    return math.prod(blocks) * (2 if both else 1)


def _compiled_in(config: Config, dtype: str, form: Form) -> dict[str, Any]:
    """Arguments that are compiled in: constants, strides of 1, and what is absent."""
    precision: InputPrecision = "tf32" if dtype == "float32" else "ieee"
    layout = Layout(
        form.channels * form.groups, form.kernel_size, form.groups, _SYMMETRY[form.sign]
    )
    dense = not form.scattered and config.loader != "planar_descriptor"
    kind = _KINDS[type(config)]
    known = constants(config, layout, form.dilation, precision, dense, form.wide)
    known |= kind.compiled_in(config, layout, precision, form)
    return {name: value for name, value in known.items() if name in kind.kernel.arg_names}


def _conv_compiled_in(
    config: ConvConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    stored = _stored(layout, precision, form)
    axes = "w" if form.scattered_output else "nchw"  # a result has no gaps
    absent = ["opposite_weights"] * (_has_one_tile(config) or stored == layout.taps)
    absent += ["triangles"] * (stored > layout.pairs)
    return {
        "STORED": stored,
        "DENSE_OUTPUT": not form.scattered_output,
        **_strides_of_1("x", _known_axes(config, form)),
        **_strides_of_1("ry", axes),
        **dict.fromkeys(absent),
    }


def _weight_grad_compiled_in(
    config: WeightGradConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    return {
        "MASKED": form.ragged_boxes,
        "ROUNDS": precision == "tf32",
        **_strides_of_1("xg", _known_axes(config, form)),
        **dict.fromkeys(["opposite_x", "opposite_grad"] * _has_one_tile(config)),
    }


def _halo_compiled_in(
    config: HaloConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    stored = _stored(layout, precision, form)
    absent = ["triangles"] * (stored > layout.pairs) + ["x_tail"] * (form.kernel_size[0] == 1)
    return {"STORED": stored, **dict.fromkeys(absent)}


def _one_pass_compiled_in(
    config: OnePassConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    rows, columns = config.taps_of(layout.kernel_size)
    absent = ["x_tail"] * (rows == 1)
    return {"TAPS_H": rows, "TAPS_W": columns, "HAS_BIAS": True, **dict.fromkeys(absent)}


def _depthwise_compiled_in(
    config: DepthwiseConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    stored = stored_taps(layout, precision)
    return {
        "STORED": stored,
        "DENSE_OUTPUT": not form.scattered_output,
        **_strides_of_1("x", _known_axes(config, form)),
        **_strides_of_1("ry", "w" if form.scattered_output else "nchw"),
        **dict.fromkeys(["triangles"] * (stored > layout.pairs)),
    }


def _depthwise_grad_compiled_in(
    config: DepthwiseGradConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    return _strides_of_1("xg", _known_axes(config, form))


def _clustered_compiled_in(
    config: ClusteredConfig, layout: Layout, precision: InputPrecision, form: Form
) -> dict[str, Any]:
    stored = stored_taps(layout, precision)
    absent = ["opposite_weights"] * (stored == layout.taps)
    return {"STORED": stored, **dict.fromkeys(absent)}


def _stored(layout: Layout, precision: InputPrecision, form: Form) -> int:
    """How many taps are matrices."""
    with_centre = layout.pairs + layout.taps % 2 if form.merged else 0
    return max(stored_taps(layout, precision), with_centre)


def _has_one_tile(config: ConvConfig | WeightGradConfig) -> bool:
    """Whether one descriptor serves both tiles, or none is needed."""
    return config.BLOCK_N == config.BLOCK_K or config.loader == "pointer"


def _known_axes(config: Config, form: Form) -> str:
    """Of dense memory all strides are 1, for what the kernel is told of it; of a row its last."""
    if config.loader == "planar_descriptor":
        return "w"
    return "" if form.scattered else "nchw"


def _strides_of_1(images: str, axes: str) -> dict[str, int]:
    return {f"stride_{image}{axis}": 1 for image in images for axis in axes}


def _halo_descriptors(
    config: HaloConfig, compiled_in: dict[str, Any], dtype: str
) -> dict[str, str]:
    """Types of descriptors; see :mod:`..kernels.plans`."""
    bits, channels = 8 * (4 if dtype.startswith("float32") else 2), compiled_in["BLOCK_C"]
    block = min(channels, 1024 // bits)
    boxes = {**_rows_of_boxes(compiled_in, "KERNEL_H", block), "weights": [1, channels, block]}
    return _swizzled(boxes, bits, dtype)


def _one_pass_descriptors(
    config: OnePassConfig, compiled_in: dict[str, Any], dtype: str
) -> dict[str, str]:
    boxes = _rows_of_boxes(compiled_in, "TAPS_H", compiled_in["BLOCK_C"])
    bits = 32 if dtype == "float32" else 16
    return _swizzled({**boxes, "grad": boxes["x"]}, bits, dtype)


def _row_by_row_descriptors(
    config: RowByRowConfig, compiled_in: dict[str, Any], dtype: str
) -> dict[str, str]:
    images, _, columns = config.box
    depth = swizzled_channels(4)
    box = [1, config.BLOCK_C // depth, images, columns, depth]
    return _swizzled({"x": box, "grad": box}, 32, dtype)


def _rows_of_boxes(compiled_in: dict[str, Any], taps: str, channels: int) -> dict[str, list[int]]:
    """Of a box its own rows, and those below it that so many rows of taps read, at once."""
    images, rows, columns = (compiled_in[f"BLOCK_{axis}"] for axis in "IHW")
    below = (compiled_in[taps] - 1) * compiled_in["DILATION_H"]
    boxes = {"x": rows, "x_tail": below & -below}
    return {name: [rows, images, columns, channels] for name, rows in boxes.items()}


def _swizzled(boxes: dict[str, list[int]], bits: int, dtype: str) -> dict[str, str]:
    return {
        name: f"tensordesc<{_TYPES[dtype]}{box},"
        f"{NVMMASharedLayout(box[-1] * bits // 8, bits, len(box))!r}>"
        for name, box in boxes.items()
    }


def _clustered_descriptors(
    config: ClusteredConfig, compiled_in: dict[str, Any], dtype: str
) -> dict[str, str]:
    itemsize = 4 if dtype.startswith("float32") else 2
    return {
        name: f"tensordesc<{_TYPES[dtype]}{block},"
        f"{halved_layout(8 * itemsize, len(block), axis)!r}>"
        for name, (block, axis) in config.copied(itemsize).items()
    }


class _Kind(NamedTuple):
    """The kernel of a kind of config; what is compiled in, beside the constants of all kinds, for a
    config, a layout, a precision of products and a form; and, of a kernel in Gluon, the types of
    its descriptors for a config, what is compiled in, and a dtype."""

    kernel: Any
    compiled_in: Callable[[Any, Layout, InputPrecision, Form], dict[str, Any]]
    described: Callable[[Any, dict[str, Any], str], dict[str, str]] | None = None


_KINDS: dict[type[Config], _Kind] = {
    ConvConfig: _Kind(conv_kernel, _conv_compiled_in),
    WeightGradConfig: _Kind(weight_grad_kernel, _weight_grad_compiled_in),
    DepthwiseConfig: _Kind(depthwise_kernel, _depthwise_compiled_in),
    DepthwiseGradConfig: _Kind(depthwise_grad_kernel, _depthwise_grad_compiled_in),
}
if why_no_gluon() is None:
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from ..kernels.halo import halo_kernel
    from ..kernels.one_pass import one_pass_kernel
    from ..kernels.one_pass_tf32 import one_pass_tf32_kernel
    from ..kernels.row_by_row import row_by_row_kernel

    _KINDS[HaloConfig] = _Kind(halo_kernel, _halo_compiled_in, _halo_descriptors)
    _KINDS[OnePassConfig] = _Kind(one_pass_kernel, _one_pass_compiled_in, _one_pass_descriptors)
    _KINDS[OnePassTf32Config] = _Kind(
        one_pass_tf32_kernel, _one_pass_compiled_in, _one_pass_descriptors
    )
    _KINDS[RowByRowConfig] = _Kind(
        row_by_row_kernel, _one_pass_compiled_in, _row_by_row_descriptors
    )
if why_no_clusters() is None:
    from ..kernels.clustered import clustered_kernel

    _KINDS[ClusteredConfig] = _Kind(
        clustered_kernel, _clustered_compiled_in, _clustered_descriptors
    )


def _signature(
    kernel: Any, compiled_in: dict[str, Any], dtype: str, split: bool, described: dict[str, str]
) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """Types of the arguments, and which of them Triton would see to be divisible by 16."""
    signature, attributes = {}, {}
    by_pointer = compiled_in.get("LOADER", "pointer") == "pointer"
    sums = {"partial"} | ({"y"} if split else set())  # written in float32
    for i, name in enumerate(kernel.arg_names):
        if name in compiled_in or kernel.params[i].is_constexpr:
            signature[name] = "constexpr"
        elif name in described:
            signature[name] = described[name]
        elif name in _IMAGES | _WEIGHTS and not by_pointer:
            box = _box_of(name, compiled_in)
            signature[name] = f"tensordesc<{_TYPES[dtype]}{box}>"
        elif name in _IMAGES | _WEIGHTS | _OTHERS:
            signature[name] = "*fp32" if name in sums else f"*{_TYPES[dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("alpha", "beta") else "i32"
    return signature, attributes


def _box_of(name: str, compiled_in: dict[str, Any]) -> list[int]:
    """What a descriptor reads at once; see :mod:`..kernels.plans`."""
    n, k = compiled_in["BLOCK_N"], compiled_in["BLOCK_K"]
    if name in _WEIGHTS:
        return [1, k, n] if name == "opposite_weights" else [1, n, k]
    box = [compiled_in[f"BLOCK_{axis}"] for axis in "IHW"]
    box.append(n if name in ("grad", "opposite_x") else k)
    if "planar" not in compiled_in["LOADER"]:
        return box
    return [box[axis] for axis in ((0, 1, 3, 2) if box[1] == 1 else (0, 3, 1, 2))]
