"""The search for configs that compile well, and the file that they are committed in.

python -m triton_tied.inspection.regenerate_candidates [--jobs N] [--kind NAME ...]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from typing import Any

import triton

from ..autotune.candidates import Candidate, kind_hash, read_file, write_file
from ..kernels.configs import KINDS, Config, as_json
from . import proposals
from .compiled import TARGETS, compile_config
from .report import LISTS
from .requirements import demanding_form, faults_when_compiled, forms, plain_form

_DROPPED_FIRST = ("scattered_output", "ragged_boxes", "scattered")
# From here on, of 255, a part of what is served may spill although the whole does not: then
# the smallest parts and the largest are compiled too.
_NEARLY_ALL = 240
_Key = tuple[str, str, str]  # kind, target, list


def regenerate(kinds: Sequence[str], jobs: int, say: Callable[[str], None]) -> None:
    """Compiles all proposals of some kinds for all targets in ``jobs`` processes, and commits the
    good ones; what is committed of other kinds is kept.

    Raises:
        RuntimeError: what would be kept was made of other kernels, or by another Triton; or the
            kernels were edited meanwhile.
    """
    sources = {kind: kind_hash(kind) for kind in KINDS}
    kept = _kept(kinds, sources)
    lists = [(kind, target, name) for kind in kinds for target in TARGETS for name in LISTS]
    work = [(key, config) for key in lists for config in proposals.propose(*key)]
    found: dict[_Key, list[Candidate]] = {key: [] for key in lists}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(_examine, work)
        for number, (key, config) in enumerate(work, 1):
            candidate, verdict = next(results)
            say(f"{number}/{len(work)} {' '.join(key)} {config}: {verdict}")
            if candidate is not None:
                found[key].append(candidate)
    if {kind: kind_hash(kind) for kind in KINDS} != sources:
        raise RuntimeError("the kernels were edited while they were compiled: run this again")
    _write(sources, kept, found)


def _kept(kinds: Sequence[str], sources: dict[str, str]) -> list[dict[str, Any]]:
    """The committed rows of other kinds."""
    others = [kind for kind in KINDS if kind not in kinds]
    if not others:
        return []
    listed = read_file()
    stale = [kind for kind in others if listed["sources"].get(kind) != sources[kind]]
    if stale or listed["triton"] != triton.__version__:
        reason = f"the kernels of {stale} changed" if stale else "another Triton made it"
        raise RuntimeError(f"the rest of the list cannot be kept, since {reason}: make all kinds")
    return [row for row in listed["candidates"] if row["config"]["kind"] in others]


def _examine(work: tuple[_Key, Config]) -> tuple[Candidate | None, str]:
    (_, target, name), config = work
    result = examine(config, target, name)
    if isinstance(result, str):
        return None, result
    lacks = ", ".join(sorted(result.not_for))
    return result, f"{result.registers} registers" + (f", not for {lacks}" if lacks else "")


def examine(config: Config, target: str, list_name: str) -> Candidate | str:
    """What may be committed of a config, or why nothing may."""
    plain_dtype = "bfloat16" if list_name == "half" else list_name
    found = faults_when_compiled(config, target, plain_dtype, plain_form(config))
    if found:
        return "; ".join(found)

    def serves(needs: Collection[str]) -> bool:
        form = demanding_form(config, needs)
        return not faults_when_compiled(config, target, plain_dtype, form)

    def serves_parts(needs: Collection[str]) -> bool:
        if not serves(needs):
            return False
        whole = compile_config(config, target, plain_dtype, demanding_form(config, needs))
        if whole.resources.registers < _NEARLY_ALL:
            return True
        sizes = {len(needs) - 1, 1, 0} - {-1, len(needs)}
        return all(serves(part) for size in sizes for part in combinations(sorted(needs), size))

    needs = _find_needs(config.needs, serves_parts)
    if needs is None:
        return "spills"
    codes = []
    for dtype, form in forms(config, list_name, needs):
        found = faults_when_compiled(config, target, dtype, form)
        if found:
            return f"{'; '.join(found)} in {dtype} for {form}"
        codes.append(compile_config(config, target, dtype, form).resources)
    loop = compile_config(config, target, plain_dtype, plain_form(config)).instructions
    return Candidate(
        config,
        config.needs - needs,
        max(code.registers for code in codes),
        max(code.shared_bytes for code in codes),
        loop.loop_barriers,
        loop.loop_waits,
    )


def _find_needs(
    possible: frozenset[str], serves: Callable[[Collection[str]], bool]
) -> frozenset[str] | None:
    """The largest set found of needs that are served together."""
    narrow = possible - {"wide"}
    for needs in (possible, narrow):
        if serves(needs):
            return needs
    left = {need for need in sorted(narrow) if serves({need})}
    for dropped in ("", *_DROPPED_FIRST):
        left.discard(dropped)
        if serves(left):
            return frozenset(left)
    return None


def _write(
    sources: dict[str, str], kept: list[dict[str, Any]], found: dict[_Key, list[Candidate]]
) -> None:
    """One candidate a line, in the order of the kinds."""
    rows = list(kept)
    for (kind, target, name), candidates in found.items():
        head = {"kernel": KINDS[kind].kernel, "target": target, "list": name}
        for candidate in candidates:
            row = {**head, **candidate._asdict(), "config": as_json(candidate.config)}
            rows.append({**row, "not_for": sorted(candidate.not_for)})
    order = list(KINDS)
    rows.sort(key=lambda row: order.index(row["config"]["kind"]))
    write_file({"triton": triton.__version__, "sources": sources, "candidates": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--kind", action="append", choices=list(KINDS), help="the others are kept; default: all"
    )
    given = parser.parse_args()
    regenerate(given.kind or list(KINDS), given.jobs, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
