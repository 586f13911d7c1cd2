"""``python -m triton_tied``: that the check passes here, and that it can fail."""

import math

import pytest
import torch

import triton_tied as tt
from triton_tied import check, dispatch, functional, packing, reference
from triton_tied.cli import check as cli_check
from triton_tied.cli import info as cli_info
from triton_tied.cli import main


@pytest.fixture(autouse=True)
def only_the_cpu(monkeypatch):
    for command in (cli_check, cli_info):
        monkeypatch.setattr(command, "devices", lambda: [torch.device("cpu")])


def test_check_passes_on_this_machine(capsys):
    assert main.main(["check"]) == 0
    printed = capsys.readouterr().out
    checks = 3 * len(check.CASES) + 3  # problems, and each dtype against dense
    assert printed.count(" ok ") == checks
    assert f"{checks} checks, 0 faults" in printed


@pytest.mark.parametrize("fault", ["output", "not a number", "gradient", "layout"])
def test_check_finds_a_fault(fault, monkeypatch, capsys):
    convolve, fold = reference.convolve, packing.fold
    if fault == "output":
        monkeypatch.setattr(reference, "convolve", lambda *a: convolve(*a) * 1.02)
    elif fault == "not a number":
        monkeypatch.setattr(reference, "convolve", lambda *a: convolve(*a) * math.nan)
    elif fault == "gradient":
        monkeypatch.setattr(packing, "_MAX_GATHERED", 0)
        monkeypatch.setattr(packing, "fold", lambda *a: fold(*a) * 1.02)
    else:
        monkeypatch.setattr(packing, "pack", lambda *a: tt.pack(*a).flip(0))
    assert main.main(["check"]) == 1
    assert "FAULT" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_cut_operands_pass_as_tf32_and_not_as_float32(monkeypatch):
    convolve = reference.convolve

    def cut(tensor):
        bits = tensor.detach().view(torch.int32)
        return tensor + ((bits >> 13 << 13).view(torch.float32) - tensor.detach())

    monkeypatch.setattr(functional, "takes_operators", lambda *_: False)
    monkeypatch.setattr(reference, "convolve", lambda x, w, *rest: convolve(cut(x), cut(w), *rest))
    case = check.CASES[0]
    tf32, exact = (
        check.check_case(case, torch.float32, torch.device("cpu"), tf32=tf32)
        for tf32 in (True, False)
    )
    assert tf32.worst.output <= 1 and exact.worst.output > 1


@pytest.mark.parametrize("errors, passed", [(1.9, True), (2.1, False), (math.nan, False)])
def test_errors_of_one_dtype_are_compared_over_all_problems(errors, passed):
    def row(arithmetic, tied, dense):
        numbers = [check.Errors(*[number] * 3) for number in (0.5, tied, dense)]
        return check.Row(check.CASES[0], arithmetic, torch.device("cpu"), *numbers, True)

    # dense is exact in one of the problems, which says nothing about all of them
    rows = [row("float32", 0.5 * errors**2, 0.0), row("float32", 0.5 * errors**2, 1.0)]
    (comparison,) = check.compare([*rows, row("tf32", 9.0, 1.0)])
    assert comparison.passed == passed


def test_info_names_versions_and_the_path(capsys):
    assert main.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and tt.__version__ in printed
    assert "float64  reference: there are no kernels for torch.float64" in printed
    path = "kernels" if dispatch.INTERPRETED else "reference: kernels run on GPUs"
    assert f"float32  {path}" in printed
