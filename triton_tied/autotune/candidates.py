"""The configs that may be picked: a committed list, every entry of which was compiled for its
target and found good by ``make inspect``. Needs neither Triton nor a GPU."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..kernels import configs
from ..kernels.configs import Config, ConvConfig, WeightGradConfig

Kernel = Literal["conv", "weight_grad"]
Target = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
# "float32" is TF32, where the target has it; "float32_ieee" is exact.
Dtype = Literal["float32", "float32_ieee", "float16", "bfloat16"]
_LISTS = {"float16": "half", "bfloat16": "half"}  # one list, compiled for both

# What a problem may ask of the compiled code, beyond the plain one: images of channels-last
# memory, pixels of a multiple of 16 bytes, boxes that end with the output, offsets of 32 bits.
Need = Literal[
    "scattered_output",  # convolution: what is written, or a residual, is not channels-last
    "ragged_boxes",  # weight gradient: boxes reach beyond the output
    "scattered",  # "pointer": any other memory, or another number of channels
    "wide",  # offsets of 64 bits
]

FILE = Path(__file__).with_name("candidates.json")
MAX_CANDIDATES = 40  # of one kernel, target and dtype that can read one memory format
_CONFIGS: dict[str, type[ConvConfig] | type[WeightGradConfig]] = {
    "conv": ConvConfig,
    "weight_grad": WeightGradConfig,
}


class Candidate(NamedTuple):
    """A config; the needs that it does not serve (where it would spill registers); the most
    registers per thread and bytes of shared memory per program of what it does serve; and the
    barriers, and the waits for wgmma, in its loop."""

    config: Config
    not_for: frozenset[str]
    registers: int
    shared_bytes: int
    barriers: int = 0
    waits: int = 0


def list_of(kernel: Kernel, target: Target, dtype: Dtype) -> tuple[Candidate, ...]:
    """All there are, with what is known of them. ``splits`` is 1 in all: it compiles nothing anew.

    Raises:
        KeyError: "float32" on gfx942, which has no TF32.
    """
    return committed()[kernel, target, _LISTS.get(dtype, dtype)]


@functools.cache
def committed() -> dict[tuple[str, str, str], tuple[Candidate, ...]]:
    """All of them, by kernel, target and list: "half", "float32" or "float32_ieee"."""
    found: dict[tuple[str, str, str], tuple[Candidate, ...]] = {}
    for row in read_file()["candidates"]:
        key = row["kernel"], row["target"], row["list"]
        box = tuple(row["config"]["box"])
        config = _CONFIGS[row["kernel"]](**{**row["config"], "box": box})
        numbers = (row[name] for name in ("registers", "shared_bytes", "barriers", "waits"))
        candidate = Candidate(config, frozenset(row["not_for"]), *numbers)
        found[key] = (*found.get(key, ()), candidate)
    return found


@functools.cache
def read_file() -> dict[str, Any]:
    """``source``: the hash of the kernels that were compiled; ``triton``: by which version; and
    ``candidates``, a list."""
    return json.loads(FILE.read_text())


def source_hash() -> str:
    """SHA-256 of what the compiler is given: the kernels' source, but for comments, docstrings and
    the breaks of lines inside brackets, and how they are compiled."""
    paths = sorted(Path(configs.__file__).parent.glob("*.py"))
    kernels = [source for path in paths if "\n@triton.jit" in (source := path.read_text())]
    digest = hashlib.sha256()
    for source in (*kernels, inspect.getsource(configs.compile_options)):
        for token in _code(source):
            digest.update(f"{tokenize.tok_name[token.type]} {token.string}\0".encode())
    return digest.hexdigest()


def _code(source: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens but for comments and strings that are a statement."""
    ignored, starts = (tokenize.COMMENT, tokenize.NL), (tokenize.NEWLINE, tokenize.INDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    before, in_docstring = tokenize.NEWLINE, False
    for token in tokens:
        if token.type in ignored:
            continue
        in_docstring = in_docstring or (token.type == tokenize.STRING and before in starts)
        if not in_docstring:
            yield token
        elif token.type == tokenize.NEWLINE:
            in_docstring = False
        before = token.type


def target_of(capability: tuple[int, int]) -> Target | None:
    """The target whose list serves an NVIDIA GPU of this compute capability. None for one that
    nothing was compiled for: there the "pointer" configs of sm_80 are the safest."""
    targets: dict[int, Target] = {8: "sm_80", 9: "sm_90", 10: "sm_100"}
    return targets.get(capability[0])
