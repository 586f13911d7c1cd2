"""What the driver would refuse to encode."""

from dataclasses import replace

import pytest
import torch

from ptx_machine import Fault
from ptx_machine.memory import Allocation
from ptx_machine.tensor_map import TensorMap, swizzled

IMAGE = torch.zeros(8, 64)
START = IMAGE.data_ptr() + -IMAGE.data_ptr() % 16
GOOD = TensorMap(Allocation(START, START + 2048), START, (32, 8), (256,), (32, 4), 4, 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"base": START + 4},
        {"shape": (0, 8)},
        {"strides": (24,)},
        {"strides": (2**40,)},
        {"box": (32, 257)},
        {"box": (2, 4), "swizzle": 0},
        {"box": (64, 4)},
        {"shape": (32, 8, 1)},
    ],
    ids=str,
)
def test_limits_of_tensor_maps(changed):
    assert GOOD.box_bytes == 512
    with pytest.raises(Fault, match="cuTensorMapEncodeTiled would refuse"):
        replace(GOOD, **changed)


def test_a_map_that_reaches_beyond_its_tensor():
    with pytest.raises(Fault, match="reaches beyond its tensor"):
        replace(GOOD, shape=(32, 9)).load((0, 8))


def test_a_copy_needs_an_aligned_target():
    with pytest.raises(Fault, match="not aligned to 128 bytes"):
        GOOD.places(1024 + 64)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_swizzle_permutes_the_chunks_of_its_span(mode):
    addresses = torch.arange(0, 1024, 16).numpy()
    permuted = swizzled(addresses, mode)
    span = 16 << mode
    assert sorted(permuted) == list(addresses)
    assert (permuted // span == addresses // span).all()
    if mode:  # 8 rows of one chunk lie in as many columns of chunks as a span has
        column = permuted[:: max(1, span // 16)][:8] % span
        assert len(set(column)) == min(8, span // 16)
