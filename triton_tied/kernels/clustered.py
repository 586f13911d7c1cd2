"""The tied convolution on sm_90 in clusters of two programs: what both need is read once."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    cluster,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tiles import box_start, dense_strides, inside, pixel_offsets, widen

# Shapes are those of a cluster. A layout says which half of an axis each program has, or, with no
# axis, that both have all of it.


@gluon.constexpr_function
def halves(rank, axis):
    return [[int(place == axis) for place in range(rank)]]


@gluon.constexpr_function
def tile_layout(dtype, axis):
    """Of operands, as bulk copies write them: rows of 128 bytes."""
    return gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2, cga_layout=halves(2, axis))


@gluon.constexpr_function
def sums_layout(dtype, warps, columns, axis):
    shape = [16, columns, 256 // dtype.primitive_bitwidth]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], shape, cga_layout=halves(2, axis))


@gluon.constexpr_function
def staged_layout(axis):
    """Of sums on their way out: neighbouring rows of a column lie in other banks."""
    return gl.SwizzledSharedLayout(4, 1, 8, [1, 0], cga_layout=halves(2, axis))


@gluon.constexpr_function
def output_layout(dtype, channels, warps, axis):
    """Of a program's channels, 16 bytes a thread."""
    vector = 128 // dtype.primitive_bitwidth
    across = min(32, channels // vector)
    threads = [32 // across, across]
    return gl.BlockedLayout([1, vector], threads, [warps, 1], [1, 0], cga_layout=halves(2, axis))


@gluon.constexpr_function
def threads_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0], cga_layout=halves(1, None))


@gluon.jit
def share(steps, split, splits):
    """The first step of a split, and the one after its last. Splits are not empty."""
    return steps * split // splits, steps * (split + 1) // splits


@gluon.jit
def barriers(pool, STAGES: gl.constexpr):
    """STAGES that say "full", then as many that say "empty"."""
    layout: gl.constexpr = mbarrier.MBarrierLayout.multicta(2)
    return pool.index(0)._reinterpret(gl.int64, [2 * STAGES, 2], layout)


@gluon.jit
def arrive_at_both(number):
    """Each warp arrives, in both programs, at one of the barriers: Gluon's arrivals reach only the
    own program. All that the kernel allocates is the pool, so shared memory starts with them."""
    layout: gl.constexpr = threads_layout(gl.num_warps())
    threads = gl.arange(0, 32 * gl.num_warps(), layout)
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_one_of_two;
        .reg .b32 address;
        setp.lt.u32 is_one_of_two, $1, 2;
        mov.u32 address, global_smem;
        add.u32 address, address, $2;
        and.b32 $0, $1, 1;
        mapa.shared::cluster.u32 address, address, $0;
        @is_one_of_two mbarrier.arrive.shared::cluster.b64 _, [address];
        }""",
        "=&r,r,r", [threads % 32, threads * 0 + 8 * number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_taps(
    x, weights, pool, group, image, top, left, n_start, first, start, stop,
    OPPOSITE: gl.constexpr, STORED: gl.constexpr, CHANNELS: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    SHARED: gl.constexpr, PROGRAM_M: gl.constexpr, PROGRAM_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Has the operands of steps start to stop - 1 copied, as add_taps of conv.py goes through them.
    ``first``: the number of the first among all steps of the program."""
    K_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    UNITS: gl.constexpr = (PROGRAM_M + PROGRAM_N) // 8
    full_and_empty = barriers(pool, STAGES)
    for step in range(start, stop):
        stored = step // K_BLOCKS
        k_start = step % K_BLOCKS * BLOCK_K
        tap = KERNEL_H * KERNEL_W - 1 - stored if OPPOSITE else stored
        use = first + step - start
        stage = use % STAGES
        full = full_and_empty.index(stage)
        mbarrier.wait(full_and_empty.index(STAGES + stage), (use // STAGES & 1) ^ 1)
        mbarrier.expect(full, (PROGRAM_M + PROGRAM_N) * 128)
        row = top + tap // KERNEL_W * DILATION_H
        column = left + tap % KERNEL_W * DILATION_W
        tile = pool.index(1 + stage * UNITS)
        tile = tile._reinterpret(x.dtype, x.block_shape, x.layout)
        tma.async_copy_global_to_shared(
            x, [image, row, column, group * CHANNELS + k_start], full, tile,
            multicast=SHARED == "pixels",
        )  # fmt: skip
        matrix = group * STORED + stored
        place = [matrix, k_start, n_start] if OPPOSITE else [matrix, n_start, k_start]
        tile = pool.index(1 + stage * UNITS + PROGRAM_M // 8)
        tile = tile._reinterpret(x.dtype, weights.block_shape, weights.layout)
        tma.async_copy_global_to_shared(
            weights, place, full, tile, multicast=SHARED == "weights"
        )  # fmt: skip


@gluon.jit
def copy_ahead(
    x, weights, opposite_weights, pool, group, image, top, left, n_start, split, splits,
    HAS_OPPOSITE: gl.constexpr, STORED: gl.constexpr, CHANNELS: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    SHARED: gl.constexpr, PROGRAM_M: gl.constexpr, PROGRAM_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The work of four warps. One would do, but all of a program have to come to the cluster's
    barrier, and Triton gives the idle ones of a warpgroup nothing to do."""
    K_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    cluster.arrive(relaxed=True)
    cluster.wait()
    start, stop = share(STORED * K_BLOCKS, split, splits)
    copy_taps(
        x, weights, pool, group, image, top, left, n_start, 0, start, stop,
        False, STORED, CHANNELS, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W,
        SHARED, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_OPPOSITE:
        first = stop - start
        start, stop = share(KERNEL_H * KERNEL_W // 2 * K_BLOCKS, split, splits)
        copy_taps(
            x, opposite_weights, pool, group, image, top, left, n_start, first, start, stop,
            True, STORED, CHANNELS, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W,
            SHARED, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES,
        )  # fmt: skip


@gluon.jit
def add_taps(
    acc, pool, first, stop, uses,
    OPPOSITE: gl.constexpr, SHARED: gl.constexpr,
    PROGRAM_M: gl.constexpr, PROGRAM_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds the products [N, M] of what was copied in steps first to stop - 1, of ``uses`` in all.
    A stage is left to the copies once the next one is multiplied, if it is to be filled again."""
    dtype: gl.constexpr = pool.dtype
    SHARES_PIXELS: gl.constexpr = SHARED == "pixels"
    M: gl.constexpr = PROGRAM_M if SHARES_PIXELS else 2 * PROGRAM_M
    N: gl.constexpr = 2 * PROGRAM_N if SHARES_PIXELS else PROGRAM_N
    UNITS: gl.constexpr = (PROGRAM_M + PROGRAM_N) // 8
    layout_x: gl.constexpr = tile_layout(dtype, None if SHARES_PIXELS else 0)
    layout_w: gl.constexpr = tile_layout(dtype, 0 if SHARES_PIXELS else None)
    layout_opposite: gl.constexpr = tile_layout(dtype, 1 if SHARES_PIXELS else None)
    full = barriers(pool, STAGES)
    gl.assume(first < stop)  # else sums come from two places, and each product waits for the last
    for use in range(first, stop):
        stage = use % STAGES
        mbarrier.wait(full.index(stage), use // STAGES & 1)
        x = pool.index(1 + stage * UNITS)._reinterpret(dtype, [M, BLOCK_K], layout_x)
        w = pool.index(1 + stage * UNITS + PROGRAM_M // 8)
        if OPPOSITE:
            w = w._reinterpret(dtype, [BLOCK_K, N], layout_opposite).permute((1, 0))
        else:
            w = w._reinterpret(dtype, [N, BLOCK_K], layout_w)
        acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, (acc,))
        if (use > first) & (use - 1 + STAGES < uses):
            arrive_at_both(STAGES + (use - 1) % STAGES)
    acc = warpgroup_mma_wait(0, (acc,))
    if stop - 1 + STAGES < uses:
        arrive_at_both(STAGES + (stop - 1) % STAGES)
    return acc


@gluon.jit
def sum_taps(
    pool, split, splits, SIGN: gl.constexpr, HAS_OPPOSITE: gl.constexpr, STORED: gl.constexpr,
    CHANNELS: gl.constexpr, TAPS: gl.constexpr, SHARED: gl.constexpr,
    PROGRAM_M: gl.constexpr, PROGRAM_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum of a split over its taps: [N, M]."""
    SHARES_PIXELS: gl.constexpr = SHARED == "pixels"
    M: gl.constexpr = PROGRAM_M if SHARES_PIXELS else 2 * PROGRAM_M
    N: gl.constexpr = 2 * PROGRAM_N if SHARES_PIXELS else PROGRAM_N
    K_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    layout: gl.constexpr = sums_layout(
        pool.dtype, gl.num_warps(), PROGRAM_M, 0 if SHARES_PIXELS else 1
    )
    start, stop = share(STORED * K_BLOCKS, split, splits)
    steps = stop - start
    uses = steps
    if HAS_OPPOSITE:
        start, stop = share(TAPS // 2 * K_BLOCKS, split, splits)
        uses += stop - start
    acc = gl.zeros([N, M], gl.float32, layout)
    acc = add_taps(
        acc, pool, 0, steps, uses, False, SHARED, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES
    )  # fmt: skip
    if HAS_OPPOSITE:
        if SIGN < 0:
            acc = -acc
        acc = add_taps(
            acc, pool, steps, uses, uses, True, SHARED, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES
        )  # fmt: skip
        if SIGN < 0:
            acc = -acc
    return acc


@gluon.jit
def convolve_tile(
    bias, residual, y, pool, group, image, row, column, n_start, split, splits,
    n, out_h, out_w, bias_channels, alpha, beta,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr,
    HAS_OPPOSITE: gl.constexpr, STORED: gl.constexpr, TAPS: gl.constexpr,
    SHARED: gl.constexpr, WIDE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    PROGRAM_M: gl.constexpr, PROGRAM_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The work of the warpgroups that multiply, 64 out-channels each. The sums leave through shared
    memory, where no copy is to come any more, and in pieces, which takes fewer registers."""
    dtype: gl.constexpr = y.dtype.element_ty
    SHARES_PIXELS: gl.constexpr = SHARED == "pixels"
    M: gl.constexpr = PROGRAM_M if SHARES_PIXELS else 2 * PROGRAM_M
    N: gl.constexpr = 2 * PROGRAM_N if SHARES_PIXELS else PROGRAM_N
    AXIS: gl.constexpr = 1 if SHARES_PIXELS else 0  # of [M, N] that the programs share out
    PIECES: gl.constexpr = 4
    layout: gl.constexpr = output_layout(dtype, PROGRAM_N, gl.num_warps(), AXIS)
    gl.static_assert(4 * PROGRAM_M * PROGRAM_N <= STAGES * (PROGRAM_M + PROGRAM_N) * 128)

    cluster.arrive(relaxed=True)
    cluster.wait()
    acc = sum_taps(
        pool, split, splits, SIGN, HAS_OPPOSITE, STORED, CHANNELS, TAPS, SHARED,
        PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES,
    )  # fmt: skip
    staged = pool.index(1)._reinterpret(gl.float32, [M, N], staged_layout(AXIS))
    staged.store(acc.permute((1, 0)))
    staged = staged._reinterpret(gl.float32, [PIECES, M // PIECES, N], staged_layout(AXIS))

    stride_n, stride_h, stride_w = dense_strides(out_h, out_w, GROUPS * CHANNELS, WIDE)
    channels = n_start + gl.arange(0, N, gl.SliceLayout(0, layout))
    is_channel = (channels < CHANNELS)[None, :]
    has_bias = channels < gl.minimum(bias_channels, CHANNELS)
    channels += group * CHANNELS
    bias_tile = gl.load(bias + channels, mask=has_bias, other=0.0).to(gl.float32)[None, :]
    PIECE: gl.constexpr = PROGRAM_M // PIECES
    for piece in range(PIECES):
        offs_m = gl.arange(0, M // PIECES, gl.SliceLayout(1, layout))
        offs_m = offs_m // PIECE * PROGRAM_M + piece * PIECE + offs_m % PIECE
        images = image + offs_m // (BLOCK_H * BLOCK_W)
        rows = row + offs_m // BLOCK_W % BLOCK_H
        columns = column + offs_m % BLOCK_W
        mask = inside(images, rows, columns, n, out_h, out_w)[:, None] & is_channel
        offsets = pixel_offsets(images, rows, columns, stride_n, stride_h, stride_w, WIDE)
        offsets = offsets[:, None] + widen(channels, WIDE)[None, :]
        tile = alpha * (staged.index(piece).load(layout) + bias_tile)
        if beta != 0.0:
            tile += beta * gl.load(residual + offsets, mask=mask, other=0.0).to(gl.float32)
        gl.store(y + offsets, tile.to(dtype), mask=mask)


@gluon.jit(
    do_not_specialize=[
        "n", "out_h", "out_w", "stride_split", "padding_h", "padding_w", "splits", "bias_channels",
    ]
)  # fmt: skip
def clustered_kernel(
    x, weights, opposite_weights, bias, residual, y,
    n, out_h, out_w, stride_split, padding_h, padding_w, splits, bias_channels, alpha, beta,
    CHANNELS: gl.constexpr, GROUPS: gl.constexpr, SIGN: gl.constexpr, STORED: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    SHARED: gl.constexpr, WIDE: gl.constexpr,
    BLOCK_I: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What conv_kernel computes, where all taps are stored, or all but opposites.

    Two programs on neighbouring multiprocessors, a cluster, compute one tile of a box by BLOCK_N
    out-channels. SHARED: what both need, which is copied once, into the memory of both: "pixels",
    where each has half of the out-channels; or "weights", where each has half of the box, along
    its first side that is not 1.

    Four warps of a program have operands copied into a ring of stages, and the others multiply. The
    first program copies what is shared. So nobody fills a stage again before both have left it, and
    each warp that leaves it tells both. A program ends when it has what it waits for, which is all
    that the other one sends it.

    x, weights, opposite_weights: descriptors of (N, H, W, C), and of matrices; the last one is None
    where all taps are stored. y, residual: (N, H, W, C) without gaps. The others: see conv_kernel.
    """
    BLOCK_K: gl.constexpr = 1024 // x.dtype.primitive_bitwidth  # rows of 128 bytes
    TAPS: gl.constexpr = KERNEL_H * KERNEL_W
    HAS_OPPOSITE: gl.constexpr = STORED < TAPS
    BLOCK_M: gl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    PROGRAM_M: gl.constexpr = BLOCK_M if SHARED == "pixels" else BLOCK_M // 2
    PROGRAM_N: gl.constexpr = BLOCK_N // 2 if SHARED == "pixels" else BLOCK_N
    N_BLOCKS: gl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    UNITS: gl.constexpr = 1 + STAGES * (PROGRAM_M + PROGRAM_N) // 8  # of 8 rows of 128 bytes
    layout: gl.constexpr = tile_layout(x.dtype, 0)
    gl.static_assert(16 * gl.num_warps() == PROGRAM_N)

    pool = gl.allocate_shared_memory(x.dtype, [UNITS, 16, BLOCK_K], layout)
    full_and_empty = barriers(pool, STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_and_empty.index(i), count=1)
        mbarrier.init(full_and_empty.index(STAGES + i), count=2 * gl.num_warps())
    mbarrier.fence_init_release_cluster()

    pid = gl.program_id(0)  # of a cluster
    n_start = pid % N_BLOCKS * BLOCK_N
    group = pid // N_BLOCKS % GROUPS
    split = pid // (N_BLOCKS * GROUPS) % splits
    box = pid // (N_BLOCKS * GROUPS * splits)
    image, row, column = box_start(box, out_h, out_w, BLOCK_I, BLOCK_H, BLOCK_W)
    y += split.to(gl.int64) * stride_split
    gl.warp_specialize(
        [
            (convolve_tile, (
                bias, residual, y, pool, group, image, row, column, n_start, split, splits,
                n, out_h, out_w, bias_channels, alpha, beta,
                CHANNELS, GROUPS, SIGN, HAS_OPPOSITE, STORED, TAPS, SHARED, WIDE,
                BLOCK_H, BLOCK_W, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES,
            )),
            (copy_ahead, (
                x, weights, opposite_weights, pool, group, image,
                row - padding_h, column - padding_w, n_start, split, splits,
                HAS_OPPOSITE, STORED, CHANNELS, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W,
                SHARED, PROGRAM_M, PROGRAM_N, BLOCK_K, STAGES,
            )),
        ],
        [4],
        [24],  # registers of a thread that copies
    )  # fmt: skip
