"""The judgement on the cost model, by hand-computed numbers."""

import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_tied.autotune import gpus, shortlist
from triton_tied.autotune.candidates import list_of, read_file
from triton_tied.autotune.cost_model import TERMS, predict
from triton_tied.autotune.problem import Problem
from triton_tied.geometry import resolve
from triton_tied.kernels.configs import as_json, as_listed
from triton_tied.packing import Layout

SCRIPT = Path(__file__).parents[2] / "bench" / "cost_model.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cost_model = load(SCRIPT)
judge, ranks, spearman = cost_model.judge, cost_model.ranks, cost_model.spearman


def test_ranks_share_their_mean_where_values_are_equal():
    assert ranks([10, 20, 20, 5]) == [2, 3.5, 3.5, 1]
    assert ranks([7, 7, 7]) == [2, 2, 2]


def test_rho_without_ties():
    # 1 - 6 sum(d^2) / (n (n^2 - 1)) with d = 1, 1, 1, 1, 0
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(1 - 24 / 120)
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)


def test_rho_with_ties():
    # ranks 1 2.5 2.5 4 and 1 3 2 4, less 2.5: their product is 4.5, their squares 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rho_says_nothing_where_nothing_varies():
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [2]) is None


@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 2), min_size=2))
def test_rho_depends_on_the_order_alone_and_is_symmetric(pairs):
    xs, ys = zip(*pairs, strict=True)
    rho = spearman(xs, ys)
    assert spearman([x**3 for x in xs], [math.exp(y) for y in ys]) == rho
    assert spearman(ys, xs) == rho
    assert rho is None or -1 - 1e-9 <= rho <= 1 + 1e-9


def test_regret_is_the_first_choice_over_the_best():
    assert judge([(3.0, 10.0), (1.0, 12.0), (2.0, 8.0)]).regret == 12 / 8
    assert judge([(1.0, 8.0), (1.0, 4.0)]).regret == 2  # of equal predictions the first
    assert judge([(5.0, 7.0)]) == (None, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        judge([])


@pytest.fixture
def script():
    return cost_model


def row(kernel, name, *times):
    candidates = [{"config": {}, "predicted_us": p, "median_us": m} for p, m in times]
    problem = {"kernel": kernel, "name": name}
    return {"origin": {"gpu": "some GPU"}, "problem": problem, "candidates": candidates}


def test_script_reports_each_problem_each_kernel_and_all(script, tmp_path, capsys):
    rows = [
        row("conv", "conv a", (1, 10), (2, 20), (3, 30), (4, None)),
        row("conv", "conv b", (1, 30), (2, 20), (3, 10)),
        row("weight_grad", "weight_grad c", (1, 10), (2, 8)),
        row("weight_grad", "one is nothing to rank", (1, 10)),
    ]
    file = tmp_path / "tune.json"
    file.write_text(json.dumps(rows))
    assert script.main([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[:60].strip(): " ".join(line[60:].split()) for line in lines}
    assert found == {
        "some GPU: conv a": "rho 1.00 regret 1.00 x",
        "some GPU: conv b": "rho -1.00 regret 3.00 x",
        "some GPU: weight_grad c": "rho -1.00 regret 1.25 x",
        "all of conv": "rho 0.00 regret 2.00 x worst 3.00 x",
        "all of weight_grad": "rho -1.00 regret 1.25 x",
        "all 3 problems": "rho -1.00 regret 1.25 x worst 3.00 x",
    }


def test_script_says_that_nothing_was_measured(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "COMMITTED", tmp_path)
    assert script.main([]) == 0
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '[{"candidates": 3}]', "[{}]"])
def test_script_refuses_other_files(script, tmp_path, capsys, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert script.main([str(file)]) == 2
    assert "expected what `tune --json` prints" in capsys.readouterr().err


def test_the_fit_finds_terms_that_explain_what_was_timed(tmp_path):
    gpu = gpus.KNOWN["H100"]
    truth = replace(
        TERMS, bulk_latency=2.5 * TERMS.bulk_latency, cache_bytes=0.6 * TERMS.cache_bytes
    )
    rows = []
    for channels, side in ((32, 64), (64, 28), (128, 14), (256, 7)):
        layout = Layout(channels, (3, 3))
        problem = Problem("conv", "bfloat16", layout, (32, side, side), resolve((3, 3), 1, 1, 1))
        shown = shortlist.make_shortlist(problem, gpu)
        listed = {c.config: c for c in list_of("conv", "sm_90", "bfloat16")}
        timed = [
            {"config": as_json(config), "predicted_us": 1.0, "median_us": predict(
                problem, gpu, listed[as_listed(config)]._replace(config=config), truth
            ).total}
            for config, _ in shown.candidates
        ]  # fmt: skip
        named = {"key": problem.key, "name": "", **asdict(problem)}
        rows.append({"problem": named, "origin": {"gpu": "NVIDIA H100 80GB"}, "candidates": timed})
    file = tmp_path / "tune-x.json"
    file.write_text(json.dumps(rows))
    timed = cost_model.timed_in(file)
    assert len(timed) == sum(len(row["candidates"]) for row in rows)
    before = cost_model.error_of(timed, TERMS)
    assert cost_model.error_of(timed, cost_model.fit(timed)) < before / 100
    assert cost_model.error_of(timed, truth) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name, gpu", [("sm_80", "A100"), ("sm_90", "H100")])
def test_committed_predictions_are_of_these_kernels_and_the_page_shows_them(name, gpu):
    static = load(SCRIPT.with_name("static.py"))
    results = SCRIPT.parent / "results"
    committed = json.loads((results / f"static-{name}.json").read_text())
    assert committed["sources"] == read_file()["sources"]
    rows = list(static.predicted(gpus.KNOWN[gpu]))
    assert json.loads(json.dumps(rows)) == committed["rows"]
    if name == "sm_90":
        before = json.loads((results / "static-sm_90-first-kernels.json").read_text())["rows"]
        page = (SCRIPT.parents[1] / "docs" / "predicted.md").read_text()
        assert "\n".join(static.table(rows, static._times(before))) in page
