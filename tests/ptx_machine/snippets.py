"""Hand-written PTX for the tests of the machine."""

from __future__ import annotations

import itertools

_NUMBERS = itertools.count()
_TEMPLATE = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry one({parameters})
.reqntid {threads} {directives}
{{
    .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<64>; .reg .b64 %rd<16>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, global_smem;
    {body}
    ret;
}}
"""
OUT = ".param .u64 out"
MAP = ".param .align 64 .b8 map[128]"


def program(body: str, threads: int = 32, parameters: str = OUT, directives: str = "") -> str:
    """%r0 is the thread's number, %r1 where shared memory starts."""
    return _TEMPLATE.format(
        body=body, threads=threads, parameters=parameters, directives=directives
    )


def roles(*bodies: str, threads: int = 32) -> str:
    """The first so many threads do the first, the next the second, ..."""
    text = f"div.u32 %r62, %r0, {threads};"
    for i, body in enumerate(bodies):
        end = f"$Role{next(_NUMBERS)}"
        text += f"setp.ne.u32 %p7, %r62, {i}; @%p7 bra {end}; {body} {end}: mov.b32 %r63, 0;"
    return text


def stored(register: str) -> str:
    """Each thread's ``register`` goes to ``out``."""
    return (
        "ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; "
        f"st.global.b32 [%rd2], {register};"
    )


# 64 x 16 of A and 16 x 8 of B in float16 lie in shared memory without a swizzle: A in 16 and B in
# 2 atoms of 8 rows of 16 bytes, 128 bytes each. D is 64 x 8.
A_BYTES, B_BYTES = 64 * 16 * 2, 16 * 8 * 2


def _descriptor(register: str, at: int) -> str:
    """Atoms lie 128 bytes apart along the inner dimension and 256 along the other."""
    bits = (1024 + at) >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32
    return f"mov.b64 {register}, {bits};"


PRODUCT = (
    _descriptor("%rd4", 0)
    + _descriptor("%rd5", A_BYTES)
    + "wgmma.fence.sync.aligned; setp.ne.b32 %p7, 0, 0; "
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
    "{%r40, %r41, %r42, %r43}, %rd4, %rd5, %p7, 1, 1, 0, 0; "
    "wgmma.commit_group.sync.aligned;"
)
FROM_REGISTERS = PRODUCT.replace("%rd4, %rd5,", "{%r50, %r51, %r52, %r53}, %rd5,").replace(
    "1, 1, 0, 0;", "1, 1, 0;"
)
WAIT = "wgmma.wait_group.sync.aligned 0;"
FENCE = "fence.proxy.async.shared::cta;"
BARRIER = "bar.sync 0;"
# Thread t writes 1.0 to the t-th 16 bytes of A and, of B's, those that there are.
FILLED = (
    "mov.b32 %r2, 0x3c003c00; shl.b32 %r3, %r0, 4; add.u32 %r3, %r1, %r3; "
    "st.shared.v4.b32 [%r3], {%r2, %r2, %r2, %r2}; setp.lt.u32 %p1, %r0, 16; "
    f"@%p1 st.shared.v4.b32 [%r3+{A_BYTES}], {{%r2, %r2, %r2, %r2}};"
)
