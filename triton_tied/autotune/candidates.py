"""The configs that may be picked: a committed list, every entry of which was compiled for its
target and found good by ``make inspect``. Needs neither Triton nor a GPU."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..kernels import configs
from ..kernels.base_config import Kernel
from ..kernels.configs import KINDS, Config

Target = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
# "float32" is TF32, where the target has it; "float32_ieee" is exact.
Dtype = Literal["float32", "float32_ieee", "float16", "bfloat16"]
_LISTS = {"float16": "half", "bfloat16": "half"}  # one list, compiled for both

FILE = Path(__file__).with_name("candidates.json")
MAX_CANDIDATES = 40  # of one kind, target and dtype that can read one memory format
_JIT = ("\n@triton.jit", "\n@gluon.jit")


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
        numbers = (row[name] for name in ("registers", "shared_bytes", "barriers", "waits"))
        config = configs.from_json(row["config"])
        candidate = Candidate(config, frozenset(row["not_for"]), *numbers)
        found[key] = (*found.get(key, ()), candidate)
    return found


@functools.cache
def read_file() -> dict[str, Any]:
    """``sources``: the hash of what was compiled, by the kind of config; ``triton``: by which
    version; and ``candidates``, a list."""
    return json.loads(FILE.read_text())


def write_file(listed: dict[str, Any]) -> None:
    """What :func:`read_file` reads, one candidate a line."""
    head = {name: value for name, value in listed.items() if name != "candidates"}
    lines = ",\n".join(json.dumps(row) for row in listed["candidates"])
    FILE.write_text(f'{json.dumps(head)[:-1]}, "candidates": [\n{lines}\n]}}\n')


def source_hash() -> str:
    """Of the kernels of all kinds; see :func:`kind_hash`."""
    return _hash_of(_jit_files(), KINDS)


def kind_hash(kind: str) -> str:
    """SHA-256 of what the compiler is given for a kind of config: the source of its kernel and of
    what that imports, but for comments, docstrings and the breaks of lines inside brackets, and how
    they are compiled."""
    files = _jit_files()
    found, waiting = {}, [kind]
    while waiting:
        name = waiting.pop()
        if name in files and name not in found:
            found[name] = files[name]
            tree = ast.walk(ast.parse(files[name]))
            imports = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level]
            waiting += [node.module or "" for node in imports]
    return _hash_of(found, (kind,))


def _jit_files() -> dict[str, str]:
    """Names and source."""
    paths = Path(configs.__file__).parent.glob("*.py")
    sources = {path.stem: path.read_text() for path in paths}
    return {name: source for name, source in sources.items() if any(jit in source for jit in _JIT)}


def _hash_of(files: dict[str, str], kinds: Iterable[str]) -> str:
    options = {inspect.getsource(KINDS[kind].compile_options) for kind in kinds}
    digest = hashlib.sha256()
    for source in (*(files[name] for name in sorted(files)), *sorted(options)):
        for token in _code(textwrap.dedent(source)):
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
