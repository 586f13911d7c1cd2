"""``python -m triton_tied tune``."""

import json
import re

import pytest
import torch
from stand_ins import DEVICE, GPU, PROBLEM, others, store

from triton_tied.autotune import trial, tuned_configs
from triton_tied.autotune.cost_model import floor_us
from triton_tied.autotune.race import Outcome
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.tuned_configs import config_for
from triton_tied.cli import main

pytestmark = pytest.mark.usefixtures("absent_h200")


def run(capsys, *arguments):
    status = main.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_budget_is_for_all_problems_together(shares_of_time, capsys):
    assert run(capsys, "--shape", "8,96,32,32", "--budget", "9", "--json")[0] == 0
    assert shares_of_time == [9 / 2, 8]  # forward and backward are one problem


def test_report_as_json_is_what_the_ranking_of_the_cost_model_reads(capsys, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1", "--json")
    first = json.loads(out)[0]
    assert first["origin"]["gpu"] == "NVIDIA H200" and first["problem"]["kernel"] == "conv"
    left = make_shortlist(timed[0], GPU).candidates
    assert [c["predicted_us"] for c in first["candidates"]] == [c.predicted_us for c in left]
    assert [c["median_us"] for c in first["candidates"][:4]] == [12.0, None, None, 10.0]


def test_summary_tells_before_after_and_the_share_of_the_roofline(capsys, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("conv 8x64x32x32"))
    share = floor_us(timed[0], GPU) / 10.0
    assert line.split()[-5:] == ["12.0", "10.0", "1.20", f"{share:.0%}", "2/20"]
    monkeypatch.setattr(trial, "race_on", lambda *_: Outcome({}))
    status, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1", "--again", "--json")
    assert status == 1 and json.loads(out)[0]["after_us"] is None


def test_dry_run_shows_what_would_be_tried_and_why_the_rest_fell(capsys):
    arguments = (
        "--shape",
        "32,128,28,28",
        "--dry-run",
        "--gpu",
        "A100",
        "--symmetry",
        "skew_adjoint",
    )
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "conv 32x128x28x28 k3x3 p1 skew bfloat16 on A100: floor" in out
    assert "weight_grad" in out and "fell:" in out
    status, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert [set(row) for row in found] == [{"problem", "floor_us", "candidates", "fallen"}] * 2
    assert [row["problem"]["kernel"] for row in found] == ["conv", "weight_grad"]
    for row in found:
        assert row["problem"]["layout"]["symmetry"] == "skew_adjoint"
        assert set(row["candidates"][0]) == {"config", "predicted_us"}
        assert all(set(fallen) == {"config", "reason"} for fallen in row["fallen"])
    assert found[0]["fallen"]


def test_images_of_rows_are_tried_as_they_are_and_copied(capsys):
    arguments = ("--shape", "32,128,28,28", "--dry-run", "--gpu", "H100", "--json", "--memory")
    found = json.loads(run(capsys, *arguments, "contiguous")[1])
    problems = [row["problem"] for row in found]
    assert [(each["kernel"], each["memory"], each["output_memory"]) for each in problems] == [
        ("conv", "contiguous", "contiguous"),
        ("conv", "channels_last", "contiguous"),
        ("conv", "channels_last", "channels_last"),
        ("weight_grad", "contiguous", "channels_last"),
        ("weight_grad", "channels_last", "channels_last"),
    ]


def test_dry_run_of_a_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "some_model.py").write_text(
        "import triton_tied as tt\ndef make():\n    return tt.TiedConv2d(24, 3, padding='same')\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = (
        "--model",
        "some_model:make",
        "--input",
        "2,24,20,20",
        "--dry-run",
        "--gpu",
        "H100",
    )
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "conv 2x24x20x20" in out and "weight_grad 2x24x20x20" in out


def test_dry_run_tells_what_is_taken_untimed_where_that_is_not_the_first(capsys):
    arguments = ("--shape", "8,64,32,32", "--dry-run", "--gpu", "H100", "--kernel-size", "1")
    arguments += ("--memory",)
    assert "taken if nothing is timed" not in run(capsys, *arguments, "channels_last")[1]
    lines = run(capsys, *arguments, "contiguous")[1].splitlines()
    untimed = next(line for line in lines if "taken if nothing is timed" in line)
    assert "descriptor" in lines[1] and "pointer" in untimed


def test_dry_run_for_amd_multiplies_float32_exactly(capsys):
    arguments = ("--shape", "1,64,8,8", "--dtype", "fp32", "--dry-run", "--gpu", "MI300X")
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "float32_ieee on MI300X" in out


MODELS = """
import torch, triton_tied as tt
def raises(): raise RuntimeError("two\\nlines")
def narrow(): return tt.TiedConv2d(8, 3)
def dense(): return torch.nn.Conv2d(16, 16, 3)
class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tt.TiedConv2d(16, 3, padding=1)
    def forward(self, x):
        return {"y": self.conv(x), "x": x, "n": 3}
def frozen(): return Several().requires_grad_(False)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "odd_models.py").write_text(MODELS)
    (tmp_path / "no_python.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:f", "ModuleNotFoundError"),
        ("no_python:f", "SyntaxError"),
        ("odd_models:f", "no attribute 'f'"),
        ("odd_models:torch", "not callable"),
        ("os:getcwd", "expected a function that makes a torch.nn.Module, it made a str"),
        ("odd_models:raises", "RuntimeError: two lines"),
        ("odd_models:narrow", "to have 8 channels, but got 16"),
        ("odd_models:dense", "ran no tied convolution"),
        (":f", "MODULE:FACTORY"),
    ],
)
def test_models_that_do_not_work_are_told_in_a_line(capsys, models, name, message):
    arguments = ("--model", name, "--input", "1,16,8,8", "--dry-run", "--gpu", "H100")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out
    assert message in err and err.startswith("tune: ") and err.count("\n") == 1


@pytest.mark.parametrize(("name", "problems"), [("Several", 2), ("frozen", 1)])
def test_models_may_return_anything(capsys, models, name, problems):
    arguments = ("--input", "1,16,8,8", "--dry-run", "--gpu", "H100", "--json")
    status, out, err = run(capsys, "--model", f"odd_models:{name}", *arguments)
    assert status == 0, err
    assert len(json.loads(out)) == problems


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--shape", "²,8,8,8"), "expected four positive numbers N,C,H,W, got '²,8,8,8'"),
        (("--shape", "1,8,8,8", "--padding", "²"), "Invalid padding string: '²'"),
    ],
)
def test_what_looks_like_a_number_is_told(capsys, option, message):
    try:
        status, _, err = run(capsys, *option, "--dry-run", "--gpu", "H100")
    except SystemExit as end:  # of argparse
        status, err = end.code, capsys.readouterr().err
    assert status == 2 and message in err


def test_a_dry_run_imports_and_exports_nothing(capsys, tmp_path):
    table = tmp_path / "table.json"
    table.write_text("no table")
    for option in ("--import", "--export"):
        arguments = ("--shape", "1,8,8,8", "--dry-run", "--gpu", "H100", option, str(table))
        status, out, err = run(capsys, *arguments)
        assert status == 2 and not out and "--dry-run changes nothing" in err
    assert table.read_text() == "no table"


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "much"])
def test_a_budget_is_more_than_nothing(capsys, budget):
    with pytest.raises(SystemExit, match="2"):
        main.main(["tune", "--shape", "1,8,8,8", "--budget", budget])
    assert "expected seconds, more than none" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["1,8,8", "a,8,8,8", "0,8,8,8", "1,-8,8,8", ""])
def test_a_shape_is_four_positive_numbers(capsys, shape):
    with pytest.raises(SystemExit, match="2"):
        main.main(["tune", f"--shape={shape}"])
    assert "expected four positive numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --shape, --model"),
        (("--dry-run", "--gpu", "H100"), "expected --shape, --model"),
        (("--input", "1,8,8,8"), "which is not given"),
        (("--shape", "1,8,8,8"), "no GPU here to time on; --dry-run"),
        (("--model", "no:where", "--input", "1,8,8,8"), "no GPU here to time on"),
        (("--shape", "1,8,8,8", "--padding", "-1", "--dry-run", "--gpu", "H100"), "negative"),
        (("--shape", "1,8,8,8", "--dilation", "0", "--dry-run", "--gpu", "H100"), "dilation"),
        (("--shape", "1,8,8,8", "--kernel-size", "0", "--dry-run", "--gpu", "H100"), "kernel_size"),
        (("--export", "x.json"), "no entry for NVIDIA H200"),
        (("--shape", "1,8,8,8", "--dry-run", "--gpu", "V100"), "unknown GPU 'V100'"),
        (("--shape", "1,9,8,8", "--groups", "2", "--dry-run", "--gpu", "H100"), "divisible"),
        (("--shape", "1,8,2,2", "--padding", "0", "--dry-run", "--gpu", "H100"), "larger than"),
        (("--shape", "1,8,8,8", "--padding", "full", "--dry-run", "--gpu", "H100"), "full"),
        (("--shape", "1,8,8,8", "--gpu", "H100"), "--gpu names a GPU for --dry-run"),
        (("--model", "nothing", "--input", "1,2,3,4", "--dry-run", "--gpu", "H100"), "MODULE:"),
        (("--import", __file__), "not a table"),
    ],
)
def test_bad_requests_are_refused(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_table_is_exported_and_imported(capsys, tmp_path, monkeypatch):
    theirs, _ = others()
    store(theirs)
    file = tmp_path / "mine.json"
    assert run(capsys, "--export", str(file))[0] == 0
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "elsewhere"))
    tuned_configs.forget()
    assert config_for(PROBLEM, DEVICE) != theirs
    assert run(capsys, "--import", str(file))[0] == 0
    assert config_for(PROBLEM, DEVICE) == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--import", "missing.json"), "there is no file 'missing.json'"),
        (("--shape", "1,8,8,8", "--export", "{file}/table.json"), "cannot be written"),
        (("--shape", "1,8,8,8", "--export", "."), "cannot be written"),
        # Not even by root, whom the permissions would let.
        (("--shape", "1,8,8,8", "--export", "/proc/nowhere/table.json"), "cannot be written"),
    ],
)
def test_files_that_cannot_serve_are_refused_at_once(capsys, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        main.main(["tune", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "info", "inspect", "tune", "bench"])
def test_every_option_has_its_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main.main([command, "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    for option in options:
        name, _, text = re.sub(r"\s+", " ", option).partition(" ")
        words = re.sub(r"--[a-z_-]+|[A-Z_,:]{4,}|\{.*?\}|-h,", "", text).split()
        assert len(words) >= 2, f"{command} {name}"
