"""The README and the pages: their code runs, their links lead somewhere, their numbers are so."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import triton_tied as tt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block of Python that must not run says why, in a comment right above it.
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)(?P<title>.*)\n"
    r"(?P<body>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    line: int
    language: str
    title: str
    body: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            text.count("\n", 0, match.start("body")) + 1,
            match["language"],
            match["title"].strip(),
            textwrap.dedent(match["body"]),
            match["reason"],
        )
        for match in FENCE.finditer(text)
    ]


@pytest.fixture
def settings():
    """PyTorch's settings, which pages may change. One thread is enough for their small images."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(
    page, settings, tmp_path, monkeypatch
):
    """A page's blocks share their names. Where a block titled "prints" follows one, its output."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": page.stem}
    printed = ""
    for block in blocks_of(page):
        assert block.language not in ("py", "python3", "pycon"), "python, so that it is run"
        if block.language == "python" and block.reason is None:
            # Empty lines in front, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif block.title == 'title="prints"':
            assert printed == block.body, f"{page.name}:{block.line}"


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_to_files_and_headings(page):
    wrong = []
    for target in map("".join, LINK.findall(re.sub(FENCE, "", page.read_text()))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (path.stem != "api" and anchor and anchor not in anchors_of(path)):
            wrong.append(target)
    assert not wrong


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES if page.parent != ROOT]


def test_the_api_page_has_every_public_name():
    directives = re.findall(r"^::: triton_tied\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert set(directives) >= set(tt.__all__)  # the tuner's are public only with Triton


def test_the_picture_is_what_its_script_draws():
    path = ROOT / "docs" / "draw_tie.py"
    spec = importlib.util.spec_from_file_location("draw_tie", path)
    draw_tie = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_tie)
    drawn = (ROOT / "docs/images/tie.svg").read_text()
    assert drawn == draw_tie.drawing()
    held = tt.packed_size(3, 3)
    assert f"{held} numbers instead of {3 * 3 * 9}" in drawn


def test_the_readme_states_the_ratios_of_the_result_it_names():
    readme = " ".join((ROOT / "README.md").read_text().split())
    (name,) = set(re.findall(r"bench/results/(cpu-[\d-]+\.json)", readme))
    means = json.loads((ROOT / "bench/results" / name).read_text())["geometric_means"]
    step = means["channels_last"]["forward_backward"]
    contiguous = {name: each["tied"] for name, each in means["contiguous"].items()}
    for said in (
        f"{step['tied']['ratio_to_dense']:.2f} times as long as with a dense weight "
        f"({step['tied']['workloads']} layers",
        f"{step['averaged']['tied_over_it']:.2f} times as long as averaging",
        f"{step['assembled']['tied_over_it']:.2f} times as long as a Python loop",
        f"{contiguous['forward_backward']['ratio_to_dense']:.2f} times as long as the faster",
        f"forward alone {contiguous['forward']['ratio_to_dense']:.2f} times",
    ):
        assert said in readme


def test_the_pages_of_the_exponential_state_the_ratios_of_their_result():
    result = (ROOT / "bench/results/exponential-2026-11-26.txt").read_text()
    rows = re.findall(r"^(\S.*?) +(\d+) ms +[\d.]+ x +([\d.]+) MiB +(\d+) ms", result, re.M)
    trained, kept, evaluated = (
        {name: [float(row[column]) for row in rows if row[0] == name] for name, *_ in rows}
        for column in (1, 2, 3)
    )

    def times(figures, ours, theirs):
        ratios = [a / b for a, b in zip(figures[ours], figures[theirs], strict=True)]
        return f"{min(ratios):.2f} to {max(ratios):.2f} times as long"

    page = " ".join((ROOT / "docs/exponential.md").read_text().split())
    assert f"{times(trained, 'tied_exp', 'by hand')} as the best" in page
    assert f"{times(trained, 'tied_exp, recompute', 'tied_exp')} as without" in page
    first = [kept[name][0] for name in ("tied_exp, recompute", "tied_exp")]
    assert "{} MiB instead of {} MiB".format(*first) in page
    page = " ".join((ROOT / "docs/orthogonal.md").read_text().split())
    ours, theirs = "SkewOrthogonalConv2d", "published layer"
    assert f"{times(trained, ours, theirs)} in training" in page
    assert f"{times(evaluated, ours, theirs)} in evaluation" in page


def test_the_page_of_operations_states_the_times_of_its_result():
    page = (ROOT / "docs/operations.md").read_text()
    name = "linear_time.json"
    assert f"bench/results/{name}" in page
    ratios: dict[str, list[float]] = {}
    for row in json.loads((ROOT / "bench/results" / name).read_text())["linear_time"]:
        size = f"{row['rows']} x {row['channels']}"
        by_hand = min(row["product_us"], row["linear_us"])
        ratios.setdefault(size, []).append(row["tied_us"] / by_hand)
    for size, row in ratios.items():
        assert f"| {size} | " + " | ".join(f"{ratio:.2f}" for ratio in row) + " |" in page
