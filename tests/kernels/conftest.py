"""Where the kernels run, and the poison around everything that they may read or write."""

from pathlib import Path

import pytest
import torch

from triton_tied.dispatch import HAS_TRITON, INTERPRETED

collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]
LOADERS = ["pointer", "channels_last_descriptor"]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not INTERPRETED:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))


@pytest.fixture(scope="session")
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module", params=LOADERS)
def loader(request, device):
    """How pixels are read: by masked pointers, or by a descriptor of channels-last memory."""
    return _usable(request.param, device)


@pytest.fixture(scope="module", params=[*LOADERS, "planar_descriptor"])
def any_loader(request, device):
    """And by a descriptor of contiguous memory, of which it reads few problems."""
    return _usable(request.param, device)


def _usable(loader, device):
    if loader != "pointer" and device == "cuda":
        capability = torch.cuda.get_device_capability()
        if torch.version.hip or capability < (9, 0):
            pytest.skip(f"descriptors need compute capability 9.0, this GPU has {capability}")
    return loader


@pytest.fixture(autouse=True)
def allocations(monkeypatch):
    """All memory that ``torch.empty`` and ``torch.empty_strided`` give is filled with NaN, and
    listed: what a kernel skips shows."""
    made = []

    def poisoned(function):
        def allocate(*args, **kwargs):
            memory = function(*args, **kwargs)
            if memory.is_floating_point() and not memory.is_meta:
                memory.fill_(torch.nan)
            if not memory.is_meta:
                made.append(memory)
            return memory

        return allocate

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return made


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    """float32 is multiplied as such, by the kernels and by what they are held against."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """One thread, since the arrays are small; masked lanes without ``other`` read NaN, which on a
    GPU may be anything and in the interpreter is zero."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def create_masked_load(self, ptrs, mask, other, *rest, **options):
        dtype = ptrs.get_element_ty()
        if other is None and dtype.is_floating():
            lanes = interpreter.np.full(ptrs.data.shape, torch.nan, f"f{dtype.itemsize}")
            other = interpreter.TensorHandle(lanes, dtype)
        return load(self, ptrs, mask, other, *rest, **options)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)
        yield
    torch.set_num_threads(threads)
