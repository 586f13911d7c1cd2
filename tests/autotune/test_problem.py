"""Which problems share an entry of a table."""

from dataclasses import replace

from stand_ins import PROBLEM

from triton_tied.geometry import Geometry
from triton_tied.packing import Layout


def test_neighbours_share_an_entry_and_strangers_do_not():
    def key(**changes):
        return replace(PROBLEM, **changes).key

    assert key(image=(8, 31, 33)) == PROBLEM.key
    assert key(image=(9, 32, 32)) == PROBLEM.key
    different = [
        key(kernel="weight_grad"),
        key(dtype="float16"),
        key(dtype="float32_ieee"),
        key(layout=Layout(128, (3, 3))),
        key(layout=Layout(128, (3, 3), 2)),
        key(layout=Layout(64, (5, 3))),
        key(layout=Layout(64, (3, 3), 1, "skew_adjoint")),
        key(geometry=Geometry((1, 1), ((1, 1), (1, 1)), (2, 1))),
        key(memory="contiguous"),
        key(output_memory="contiguous"),
        key(output_memory="strided"),
        key(aligned=False),
        key(wide=True),
        key(image=(32, 32, 32)),
        key(image=(8, 64, 32)),
    ]
    assert len({PROBLEM.key, *different}) == 1 + len(different)
