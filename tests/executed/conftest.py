import pytest
from ptx_machine.triton_gpu import skip_assembler


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Triton makes PTX only, into a cache of the test's own."""
    for name, value in skip_assembler(tmp_path).items():
        monkeypatch.setenv(name, value)
