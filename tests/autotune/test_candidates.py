"""What the committed list says of its making, and which part of it a change invalidates."""

import json

import pytest

from triton_tied.autotune import candidates
from triton_tied.kernels import configs
from triton_tied.kernels.configs import KINDS, as_json, from_json


def hashes():
    return {kind: candidates.kind_hash(kind) for kind in KINDS}


@pytest.fixture
def change(monkeypatch):
    """Edits a file of kernels, for this test."""
    files = candidates._jit_files()

    def edit(name, old, new):
        assert old in files[name]
        changed = {**files, name: files[name].replace(old, new)}
        monkeypatch.setattr(candidates, "_jit_files", lambda: changed)

    return edit


def changed_since(before):
    return {kind for kind, found in hashes().items() if found != before[kind]}


def test_a_kernel_is_part_of_its_own_kind_and_of_the_whole(change):
    before, whole = hashes(), candidates.source_hash()
    change("conv", "acc = -acc", "acc = acc * -1")
    assert changed_since(before) == {"conv"}
    assert candidates.source_hash() != whole


def test_what_kernels_share_is_part_of_all_that_import_it(change):
    before = hashes()
    change("tiles", "BLOCK_I * BLOCK_H", "BLOCK_H * BLOCK_I")
    assert changed_since(before) >= {"conv", "weight_grad"}


def test_comments_docstrings_and_other_kernels_are_part_of_none(change):
    before = hashes()
    change("conv", '"""The tied convolution', '# a comment\n"""Another docstring')
    assert not changed_since(before)
    change("matrices", "import triton\n", "import triton\n\nX = 1\n")
    assert not changed_since(before)


def test_how_a_kind_is_compiled_is_part_of_it(monkeypatch):
    class Other(configs.ConvConfig):
        def compile_options(self, on_nvidia):
            return {"num_warps": 4}

    before = hashes()
    monkeypatch.setitem(KINDS, "conv", Other)
    assert changed_since(before) == {"conv"}


def test_every_committed_config_is_what_its_row_says():
    for key, found in candidates.committed().items():
        for candidate in found:
            row = json.loads(json.dumps(as_json(candidate.config)))
            assert from_json(row) == candidate.config and row["kind"] == candidate.config.kind
            assert candidate.config.kernel == key[0] and candidate.config.splits == 1
