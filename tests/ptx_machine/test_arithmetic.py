"""Instructions of one thread, against Python's own numbers."""

import numpy as np
import pytest
import torch

from ptx_machine import Fault, run
from ptx_machine.faults import Unsupported
from ptx_machine.snippets import program, stored

A, B = -1000003, 77
U = A % 2**32
PARAMETERS = ".param .u64 out, .param .u32 x, .param .u32 y"
ONE_HALF_STEP = "mov.b32 %r5, 0f3F808000; "  # between two numbers of bfloat16
CASES = {
    "add.s32 %r9, %r2, %r3;": A + B,
    "sub.s32 %r9, %r2, %r3;": A - B,
    "div.s32 %r9, %r2, %r3;": -(-A // B),
    "rem.s32 %r9, %r2, %r3;": -(-A % B),
    "div.u32 %r9, %r2, %r3;": U // B,
    "mul.hi.u32 %r9, %r2, %r3;": (U * B) >> 32,
    "mul.lo.s32 %r9, %r2, %r3;": A * B,
    "mul.wide.s32 %rd3, %r2, %r3; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r9, %rd3;": -1,
    "mad.lo.s32 %r9, %r2, %r3, 5;": A * B + 5,
    "shr.s32 %r9, %r2, 40;": -1,
    "shr.u32 %r9, %r2, 4;": U >> 4,
    "shr.u32 %r9, %r2, 32;": 0,
    "shl.b32 %r9, %r2, %r3;": 0,
    "shf.l.wrap.b32 %r9, %r2, %r3, 36;": (B << 4 | U >> 28) % 2**32,
    "shf.r.wrap.b32 %r9, %r2, %r3, 5;": (B << 27 | U >> 5) % 2**32,
    "bfe.u32 %r9, %r2, 4, 14;": U >> 4 & 0x3FFF,
    "bfe.s32 %r9, %r2, 0, 8;": (U & 0xFF) - (256 if U & 0x80 else 0),
    "prmt.b32 %r9, %r2, %r3, 0x5410U;": U & 0xFFFF | B << 16,
    "prmt.b32 %r9, %r2, %r3, 0x7632U;": U >> 16,
    "lop3.b32 %r9, %r2, %r3, %r0, 0x96;": [U ^ B ^ thread for thread in range(32)],
    "min.u32 %r9, %r2, %r3;": B,
    "max.s32 %r9, %r2, %r3;": B,
    "setp.lt.s32 %p1, %r2, %r3; selp.b32 %r9, 3, 4, %p1;": 3,
    "setp.lt.u32 %p1, %r2, %r3; selp.b32 %r9, 3, 4, %p1;": 4,
    "cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r9, %rs1;": (U + 2**15) % 2**16 - 2**15,
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r9, {%rs2, %rs1};": U >> 16 | (U & 0xFFFF) << 16,
    "mov.b32 %r5, 0f3F800001; cvt.rn.bf16x2.f32 %r9, %r5, %r5;": 0x3F803F80,
    ONE_HALF_STEP + "cvt.rn.bf16.f32 %rs1, %r5; cvt.u32.u16 %r9, %rs1;": 0x3F80,
    "mov.b32 %r5, 0f3F818000; cvt.rn.bf16.f32 %rs1, %r5; cvt.u32.u16 %r9, %rs1;": 0x3F82,
    "mov.b32 %r5, 0f3F801000; cvt.rn.f16.f32 %rs1, %r5; cvt.u32.u16 %r9, %rs1;": 0x3C00,
    "mov.b32 %r5, 0f3F800001; fma.rn.f32 %r9, %r5, %r5, 0fBF800002;": 0x28800000,
    "shfl.sync.idx.b32 %r9, %r0, 7, 31, -1;": 7,
    "shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;": [thread ^ 1 for thread in range(32)],
    "elect.sync %r9|%p1, -1;": 0,
    "mov.b32 %r9, 1; setp.lt.u32 %p1, %r0, 16; @%p1 bra $L1; mov.b32 %r9, 2; $L1: "
    "mov.b32 %r5, 1;": [1] * 16 + [2] * 16,
}


@pytest.mark.parametrize("body", CASES)
def test_instructions(body):
    out = torch.zeros(32, dtype=torch.int32)
    inputs = "ld.param.b32 %r2, [x]; ld.param.b32 %r3, [y];"
    text = program(f"{inputs} {body} {stored('%r9')}", parameters=PARAMETERS)
    run(text, (1,), (out, A, B), 0)
    expected = CASES[body]
    expected = expected if isinstance(expected, list) else [expected] * 32
    assert [value % 2**32 for value in out.tolist()] == [value % 2**32 for value in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_are_pytorchs_own(dtype):
    numbers = torch.randn(32) * 2.0 ** torch.randint(-20, 10, (32,))
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    out = numbers.clone()
    load = "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; ld.global.b32 %r2, [%rd2];"
    text = program(f"{load} cvt.rn.{kind}.f32 %rs1, %r2; cvt.u32.u16 %r9, %rs1; {stored('%r9')}")
    run(text, (1,), (out,), 0)
    bits = out.view(torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(bits, numbers.to(dtype))


def test_a_loop_whose_threads_leave_one_by_one():
    out = torch.zeros(32, dtype=torch.int32)
    loop = "mov.b32 %r9, 0; $L1: add.u32 %r9, %r9, 3; setp.le.u32 %p1, %r9, %r0; @%p1 bra $L1;"
    run(program(f"{loop} {stored('%r9')}"), (1,), (out,), 0)
    assert out.tolist() == [3 * (thread // 3 + 1) for thread in range(32)]


def test_every_program_has_its_own_number():
    out = torch.zeros(3, dtype=torch.int32)
    body = (
        "mov.u32 %r9, %ctaid.x; ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r9, 4, %rd1; "
        "add.u32 %r9, %r9, 5; st.global.b32 [%rd2], %r9;"
    )
    run(program(body), (3,), (out,), 0)
    assert out.tolist() == [5, 6, 7]


def test_what_is_not_known_names_its_line():
    with pytest.raises(Unsupported, match=r"line 11: .*cos\.approx"):
        run(program("cos.approx.f32 %r9, %r0;"), (1,), (np.zeros(1),), 0)


def test_global_memory_ends_where_the_tensor_ends():
    buffer = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match="outside of all tensors"):
        run(program(stored("%r0")), (1,), (buffer[:31],), 0)
    run(program(stored("%r0")), (1,), (buffer[:32],), 0)


def test_misaligned_accesses_are_faults():
    out = torch.zeros(64, dtype=torch.int32)
    body = "ld.param.b64 %rd1, [out]; add.u64 %rd1, %rd1, 4; ld.global.b64 %rd2, [%rd1];"
    with pytest.raises(Fault, match="misaligned global"):
        run(program(body), (1,), (out,), 0)


def test_shared_memory_ends_where_the_programs_ends():
    body = "mov.b32 %r9, 1; st.shared.b32 [%r1+128], %r9;"
    with pytest.raises(Fault, match="outside of the program's memory"):
        run(program(body), (1,), (torch.zeros(1),), 128)
