"""``python -m triton_tied``: that the check passes here, and that it can fail."""

import math

import pytest
import torch

import triton_tied as tt
from triton_tied import check, dispatch, packing, reference
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
    assert printed.count(" ok ") == 3 * len(check.CASES)
    assert f"{3 * len(check.CASES)} checks, 0 faults" in printed


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


def test_info_names_versions_and_the_path(capsys):
    assert main.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and tt.__version__ in printed
    assert "float64  reference: there are no kernels for torch.float64" in printed
    path = "kernels" if dispatch.INTERPRETED else "reference: kernels run on GPUs"
    assert f"float32  {path}" in printed
