"""The search for configs that compile well, and the file that they are committed in.

python -m triton_tied.inspection.regenerate_candidates [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import combinations
from multiprocessing import get_context

import triton

from ..autotune.candidates import FILE, Candidate, source_hash
from ..kernels.configs import Config
from . import proposals
from .compiled import TARGETS, Form, compile_config
from .report import KERNELS, LISTS
from .requirements import all_needs, demanding_form, faults_when_compiled, plain_form

_DROPPED_FIRST = ("scattered_output", "ragged_boxes", "scattered")
# From here on, of 255, a part of what is served may spill although the whole does not: then
# the smallest parts and the largest are compiled too.
_NEARLY_ALL = 240
_Key = tuple[str, str, str]  # kernel, target, list


def regenerate(jobs: int, say: Callable[[str], None]) -> None:
    """Compiles all proposals for all targets in ``jobs`` processes, and commits the good ones.

    Raises:
        RuntimeError: the kernels were edited meanwhile.
    """
    source = source_hash()
    lists = [(kernel, target, name) for kernel in KERNELS for target in TARGETS for name in LISTS]
    work = [(key, config) for key in lists for config in proposals.propose(*key)]
    found: dict[_Key, list[Candidate]] = {key: [] for key in lists}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(_examine, work)
        for number, (key, config) in enumerate(work, 1):
            candidate, verdict = next(results)
            say(f"{number}/{len(work)} {' '.join(key)} {config}: {verdict}")
            if candidate is not None:
                found[key].append(candidate)
    if source_hash() != source:
        raise RuntimeError("the kernels were edited while they were compiled: run this again")
    _write(source, found)


def _examine(work: tuple[_Key, Config]) -> tuple[Candidate | None, str]:
    (_, target, name), config = work
    result = examine(config, target, name)
    if isinstance(result, str):
        return None, result
    lacks = ", ".join(sorted(result.not_for))
    return result, f"{result.registers} registers" + (f", not for {lacks}" if lacks else "")


def forms(config: Config, list_name: str, needs: Collection[str]) -> Iterator[tuple[str, Form]]:
    """The dtypes and forms to compile a config for, to believe that it serves ``needs``."""
    dtypes = ("bfloat16", "float16") if list_name == "half" else (list_name,)
    for dtype in dtypes:
        yield dtype, demanding_form(config, needs)
    yield dtypes[0], plain_form(config)
    if config.BLOCK_N == config.BLOCK_K:
        yield dtypes[0], demanding_form(config, needs, one_tile=True)


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

    needs = _find_needs(all_needs(config), serves_parts)
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
        all_needs(config) - needs,
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


def _write(source: str, found: dict[_Key, list[Candidate]]) -> None:
    """One candidate a line."""
    lines = []
    for (kernel, target, name), candidates in found.items():
        for candidate in candidates:
            row = {"kernel": kernel, "target": target, "list": name, **candidate._asdict()}
            row |= {"config": asdict(candidate.config), "not_for": sorted(candidate.not_for)}
            lines.append(json.dumps(row))
    head = f'{{"triton": "{triton.__version__}", "source": "{source}", "candidates": [\n'
    FILE.write_text(head + ",\n".join(lines) + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    regenerate(parser.parse_args().jobs, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
