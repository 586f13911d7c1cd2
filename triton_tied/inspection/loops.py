"""What the machine code of NVIDIA's GPUs holds in its innermost loops with matrix products."""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
# Without a condition it leads back from code that was put out of the way: from a wait, say.
_JUMP = re.compile(r"@\S+\s+BRA\b.*\b0x([0-9a-f]+)")
_CONDITION = re.compile(r"@\S+\s+")
# Rows, columns and depth of a product: of four warps (wgmma), or of one.
_WARP_GROUP = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WARP = re.compile(r"HMMA\.(16)(8)(\d+)")
_WIDE = ("128", "64")


class Loop(NamedTuple):
    """The instructions of one loop, in order."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, each)) for each in self.instructions)

    @property
    def multiplications(self) -> int:
        """Of all products of one warp."""
        return sum(_multiplications(each) for each in self.instructions)

    @property
    def narrow_accesses(self) -> int:
        """Loads and stores of memory, or copies into shared memory, of at most 32 bits a thread."""
        accesses = [e for e in self.instructions if re.match(r"(LDG|STG|LDGSTS|LDS|STS)\b", e)]
        return sum(not any(size in e.split()[0].split(".") for size in _WIDE) for e in accesses)


class Loops(NamedTuple):
    """The most that one of the loops with matrix products holds.

    Args:
        barriers: of all threads of a program.
        fences: of memory.
        waits: for wgmma.
        narrow_accesses: see :class:`Loop`.
        multiplications: of all warps.
    """

    barriers: int
    fences: int
    waits: int
    narrow_accesses: int
    multiplications: int


def layout_changes(ttgir: str) -> int:
    """How often a loop moves a tile of float32, a sum say, from one layout of registers to another,
    by Triton's intermediate code."""
    depths: list[int] = []  # of the braces around the bodies of loops
    depth = found = 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            depths.append(depth)
        found += bool(depths) and "ttg.convert_layout" in line and "xf32," in line
        depth += line.count("{") - line.count("}")
        while depths and depth <= depths[-1]:
            depths.pop()
    return found


def loops_of(sass: str, warps: int) -> Loops:
    """The innermost loops with products, by the disassembler's text; all 0 if there is none."""
    found = [loop for loop in _innermost(_parse(sass)) if loop.multiplications]

    def most(pattern: str) -> int:
        return max((loop.count(pattern) for loop in found), default=0)

    return Loops(
        most(r"BAR\."),
        most(r"(MEMBAR|FENCE)\b"),
        most(r"WARPGROUP\.DEPBAR"),
        max((loop.narrow_accesses for loop in found), default=0),
        max((warps * loop.multiplications for loop in found), default=0),
    )


def _multiplications(instruction: str) -> int:
    for pattern, warps in ((_WARP_GROUP, 4), (_WARP, 1)):
        found = pattern.match(instruction)
        if found:
            rows, columns, depth = map(int, found.groups())
            return rows * columns * depth // warps
    return 0


def _parse(sass: str) -> list[tuple[int, str]]:
    return [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]


def _innermost(instructions: list[tuple[int, str]]) -> list[Loop]:
    """A jump back is the end of a loop; those that hold another one with products fall."""
    spans = []
    for address, text in instructions:
        jump = _JUMP.match(text)
        if jump and int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    plain = [(address, _CONDITION.sub("", text)) for address, text in instructions]
    loops = {
        span: Loop(tuple(text for address, text in plain if span[0] <= address <= span[1]))
        for span in spans
    }

    def holds_another(span: tuple[int, int]) -> bool:
        return any(
            other != span
            and span[0] <= other[0]
            and other[1] <= span[1]
            and loops[other].multiplications
            for other in spans
        )

    return [loop for span, loop in loops.items() if not holds_another(span)]
