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


def test_the_rows_of_a_box_are_what_it_loads():
    image = torch.arange(1, 8 * 64 + 1).view(8, 64).float()
    start = image.data_ptr()
    boxes = TensorMap(Allocation(start, start + 2048), start, (60, 8), (256,), (16, 4), 4, 0)
    for _ in range(20):
        at = 4 * int(torch.randint(-5, 18, ())), int(torch.randint(-5, 10, ()))
        rows, size = boxes.rows(at)
        first = (torch.from_numpy(rows.astype("int64")) - start) // 4
        inside = (first[:, None] + torch.arange(size // 4)).flatten()
        loaded = torch.from_numpy(boxes.load(at).view("float32"))
        assert torch.equal(image.flatten()[inside], loaded[loaded > 0])


@pytest.mark.parametrize("element", [2, 4])
def test_a_box_starts_at_a_multiple_of_16_bytes_of_its_rows(element):
    """On a GPU another start is an illegal instruction."""
    boxes = replace(GOOD, box=(64 // element, 4), element=element, swizzle=2)
    for start in range(-8, 9):
        if start * element % 16 == 0:
            boxes.load((start, -1))
            continue
        for use in (boxes.load, boxes.rows, lambda at: boxes.store(at, boxes.load((0, 0)))):
            with pytest.raises(Fault, match=f"starts at element {start} of a row"):
                use((start, -1))


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_row_narrower_than_its_swizzle_takes_up_all_of_it(mode):
    """As if the box were wide and only its first columns were written."""
    span = 16 << mode
    wide = replace(GOOD, box=(span // 4, 8), swizzle=mode).places(1024).reshape(8, -1)
    for chunks in range(1, span // 16 + 1):
        narrow = replace(GOOD, box=(4 * chunks, 8), swizzle=mode)
        assert narrow.box_bytes == 8 * 16 * chunks
        assert (narrow.places(1024).reshape(8, -1) == wide[:, : 4 * chunks]).all()
