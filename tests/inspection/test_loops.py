"""What is read out of machine code about its loops."""

import pytest
import triton
import triton.language as tl
from triton.compiler import ASTSource

from triton_tied.dispatch import INTERPRETED
from triton_tied.inspection import compiled
from triton_tied.inspection.loops import Loops, layout_changes, loops_of

SASS = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   MOV R1, c[0x0][0x28] ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @!P0 BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   STS.U16 [R3], R4 ;
        /*0090*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*00a0*/                   MEMBAR.ALL.CTA ;
        /*00b0*/               @P1 BRA 0x30 ;
        /*00c0*/                   STG.E [R2], R4 ;
        /*00d0*/               @P2 BRA 0x20 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0100*/              @!P0 BRA 0xf0 ;
        /*0110*/                   BRA 0x10 ;
"""


def test_the_innermost_loop_with_products_counts():
    """Not what stands around it, nor the wait that was put out of the way and jumps back."""
    found = loops_of(SASS, warps=8)
    assert found == Loops(
        barriers=1, fences=1, waits=1, narrow_accesses=1, multiplications=2 * 2 * 64 * 128 * 16
    )


def test_products_of_single_warps_count_for_each():
    loop = "/*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ;\n/*0020*/ @P0 BRA 0x10 ;"
    assert loops_of(loop, warps=4).multiplications == 4 * 16 * 8 * 16


def test_code_without_products_has_no_such_loop():
    assert loops_of("/*0010*/ FFMA R1, R2, R3, R1 ;\n/*0020*/ @P0 BRA 0x10 ;", 4) == Loops(
        0, 0, 0, 0, 0
    )


@triton.jit
def two_products_into_one_sum(
    x, w, y, n, C: tl.constexpr, TAPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    acc = tl.zeros((N, M), tl.float32)
    for tap in tl.range(0, n):
        tile = tl.reshape(w.load([tap, 0, 0]), (N, C))
        one = tl.reshape(x.load([0, tap, 0, 0]), (M, C))
        other = tl.reshape(x.load([0, TAPS - tap, 0, 0]), (M, C))
        acc = tl.dot(tile, tl.trans(one), acc)
        acc = tl.dot(tl.trans(tile), tl.trans(other), acc)
    offsets = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(y + offsets, acc)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_a_sum_that_changes_its_layout_is_found():
    """Each of two products into one sum has its own layout: the sum crosses shared memory twice."""
    constants = {"C": 64, "TAPS": 8, "M": 256, "N": 64}
    signature = {
        "x": "tensordesc<bf16[1, 16, 16, 64]>", "w": "tensordesc<bf16[1, 64, 64]>", "y": "*fp32",
        "n": "i32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    source = ASTSource(two_products_into_one_sum, signature, constants)
    options = {"num_warps": 8, "num_stages": 2}
    code = triton.compile(source, target=compiled.TARGETS["sm_90"], options=options)
    found = compiled.Compiled(code, "sm_90", 2 * 256 * 64 * 64).instructions
    assert layout_changes(code.asm["ttgir"]) == found.layout_changes > 0
    assert found.loop_barriers > 10 and found.narrow_accesses == 0
