import os

import hypothesis
import pytest
import torch

import triton_tied.packing

hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fresh_random_data():
    """Another seed each time; a failure names it, and TRITON_TIED_SEED repeats it."""
    seed = int(os.environ.get("TRITON_TIED_SEED", torch.seed() % 2**32))
    torch.manual_seed(seed)
    print(f"TRITON_TIED_SEED={seed}")


@pytest.fixture
def absent_h200(monkeypatch, tmp_path):
    """Every device is an H200 that is not there, with an empty table of its own: its origin."""
    from triton_tied import autotune, gpus
    from triton_tied.table import Origin

    origin = Origin("NVIDIA H200", "9.0", 132, torch.__version__, "3.7.1", "12.8")
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpus, "of_device", lambda device: gpus.KNOWN["H200"])
    monkeypatch.setattr(autotune, "origin_of", lambda device: origin)
    autotune.forget()
    yield origin
    autotune.forget()


@pytest.fixture(params=["gathered", "written"])
def expansion(request, monkeypatch):
    """Both ways in which a weight is expanded, whatever its size."""
    if request.param == "written":
        monkeypatch.setattr(triton_tied.packing, "_GATHERED", 0)
    return request.param
