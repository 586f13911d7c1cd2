"""The examples of one process: short runs show what only the tie gives, and fail without."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import triton_tied as tt

for module in ("matplotlib", "skimage", "sklearn"):
    pytest.importorskip(module)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Examples as modules. They set the number of threads and the dtype of the process."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    monkeypatch.chdir(tmp_path)

    def load(name, *options):
        monkeypatch.setattr(sys, "argv", [name, f"--seed={torch.seed() % 1000}", *options])
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def table(text):
    """Of each printed row the numbers of the tied and of the free net."""
    rows = re.findall(r"^(\S.*?) {2,}(\S+) +(\S+)$", text, re.MULTILINE)
    return {label: (tied, free) for label, tied, free in rows}


def test_classifier_is_certified_after_training(load, capsys):
    load("lipschitz", "--steps=24").main()
    out, err = capsys.readouterr()
    rows = table(out)
    tied, free = map(float, rows["bound of the Lipschitz constant"])
    assert 1 < tied < 1.001 < 2 < free
    assert rows["of 200 attacks, inside the radius"] == ("0", "0")
    assert float(rows["accuracy, held out"][0].rstrip("%")) > 20  # chance is 10 %
    assert "training tied: 100%" in err
    assert Path("lipschitz.png").read_bytes().startswith(b"\x89PNG")


def test_attacks_break_a_certificate_that_is_wrong(load, capsys, monkeypatch):
    monkeypatch.setattr(tt.SkewOrthogonalConv2d, "lipschitz_bound", lambda layer: 0.5)
    with pytest.raises(SystemExit, match="does not hold"):
        load("lipschitz", "--steps=12").main()


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_bounds_of_the_classifiers_are_above_the_norm_of_a_jacobian(load, kind):
    example = load("lipschitz")
    layer = tt.SkewOrthogonalConv2d if kind == "tied" else example.FreeConv2d
    net = example.classifier(layer).eval().requires_grad_(False)
    bound = example.certified_bound(net) if kind == "tied" else example.product_of_norms(net)
    jacobian = torch.func.jacrev(net)(torch.rand(1, 1, 8, 8)).view(10, 64)
    assert torch.linalg.matrix_norm(jacobian, 2) < bound * (1 + 1e-5)  # rounding, in float32


def test_product_of_norms_is_that_of_the_convolutions(load):
    """Against the power method, on the images that the layers see."""
    example = load("lipschitz")
    net = example.classifier(example.FreeConv2d).requires_grad_(False)
    norms = []
    for layer, side in zip(net[::2], (8, 4, 4, 1), strict=True):
        conv = layer.conv
        x = torch.randn(1, conv.in_channels, side, side)
        for _ in range(300):
            x = x / x.norm()
            y = F.conv2d(x, conv.weight, padding=conv.padding)
            x = F.conv_transpose2d(y, conv.weight, padding=conv.padding)
        norms.append(y.norm().item())
    # The power method comes from below, slowly where singular values lie close.
    assert 0.95 < math.prod(norms) / example.product_of_norms(net) < 1 + 1e-4


def test_energy_falls_in_the_tied_net_alone(load, capsys):
    load("stable_resnet", "--layers=250").main()
    out, err = capsys.readouterr()
    tied, free = map(int, table(out)["layers that add energy"])
    assert tied == 0 < free
    assert "through tied: 100%" in err
    assert Path("stable_resnet.png").read_bytes().startswith(b"\x89PNG")


def test_energy_grows_where_the_step_is_too_large(load, capsys, monkeypatch):
    monkeypatch.setattr(tt.AntisymmetricResidual2d, "stable_step", lambda layer: 20.0)
    with pytest.raises(SystemExit, match="has grown"):
        load("stable_resnet", "--layers=60").main()


@pytest.mark.parametrize("name", ["lipschitz", "stable-resnet"])
def test_pages_of_the_examples_state_their_results(name):
    page = (ROOT / f"docs/{name}.md").read_text()
    (result,) = set(re.findall(r"bench/results/(\S+?\.txt)", page))
    rows = table((ROOT / "bench/results" / result).read_text())
    stated = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    stated = {label: numbers for label, *numbers in stated if re.match(r"[\d.]", numbers[0])}
    assert len(stated) >= 3
    assert {label: list(rows[label]) for label in stated} == stated
