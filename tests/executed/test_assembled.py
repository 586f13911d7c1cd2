"""What the machine takes NVIDIA's assembler to do, read in its machine code."""

import re

import pytest

from triton_tied.dispatch import INTERPRETED
from triton_tied.inspection.compiled import Form, compile_config
from triton_tied.kernels.configs import ClusteredConfig, ConvConfig, HaloConfig, OnePassConfig
from triton_tied.kernels.toolchain import why_no_clusters

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
LAST = "channels_last_descriptor"


@pytest.mark.parametrize(
    "config, form",
    [
        (ConvConfig((1, 16, 16), 16, 16, 8, 3), Form(40, kernel_size=(1, 1))),
        (ConvConfig((1, 16, 16), 32, 32, 8, 3), Form(16, -1, kernel_size=(1, 1))),
        (ConvConfig((1, 1, 128), 64, 64, 4, 3, LAST), Form(64, kernel_size=(1, 1))),
    ],
)
def test_sums_are_moved_into_place_before_the_fence_or_not_read(config, form):
    """In PTX they are moved behind it, where a loop of one step is unrolled."""
    compiled = compile_config(config, "sm_90", "float16", form)
    ptx, sass = compiled._compiled.asm["ptx"], compiled._cuobjdump("-sass")
    within = r"(?:(?!wgmma\.).)*?"
    behind = rf"wgmma\.fence{within}mov\.b32\s+(%r\d+),{within}wgmma\.mma_async[^{{]*{{\1,"
    assert re.search(behind, ptx, re.S)
    code = [line.strip() for line in re.sub(r"/\*.*?\*/", "", sass).splitlines()]
    products, since = 0, None
    for line in code:
        product = re.search(r"HGMMA\.64x(\d+)x\d+\S* R(\d+), ", line)
        if line.startswith("WARPGROUP.ARRIVE"):
            since = set()
        elif product and since is not None:
            columns, first = map(int, product.groups())
            products += 1
            sums = set(range(first, first + columns // 2))
            assert "RZ, !UPT" in line or not sums & since, line
        elif "DEPBAR" in line:
            since = None
        elif since is not None:
            since |= {int(n) for n in re.findall(r"^(?:@!?U?P\d+ )?[\w.]+ R(\d+)", line)}
    assert products


@pytest.mark.parametrize(
    "config, form",
    [
        (HaloConfig((1, 8, 16), 64), Form(64)),
        (OnePassConfig((1, 8, 16), 32, (3, 3)), Form(32)),
        pytest.param(
            ClusteredConfig((1, 8, 16), 128), Form(128),
            marks=pytest.mark.skipif(why_no_clusters() is not None, reason="no clusters"),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)  # fmt: skip
def test_the_unit_that_counts_copies_makes_mbarriers(config, form):
    """Not a store, which copies would see only behind a proxy fence: PTX has none there. For
    clusters it has a fence for mbarriers, maybe by another thread than made them. That is no
    machine code, so neither matters."""
    compiled = compile_config(config, "sm_90", "float16", form)
    ptx, sass = compiled._compiled.asm["ptx"], compiled._cuobjdump("-sass")
    last = ptx.rindex("mbarrier.init")
    barrier = re.compile(r"bar(rier)?\.sync").search(ptx, last)
    made = ptx[ptx.index("mbarrier.init") : barrier.start()]
    assert ("fence.mbarrier_init" in made) == isinstance(config, ClusteredConfig)
    assert "fence.proxy" not in made
    assert made.count("mbarrier.init") == ptx.count("mbarrier.init")
    steps = re.findall(r"SYNCS\.EXCH|FENCE|MEMBAR|BAR\.SYNC", sass)
    first, *_, last = (i for i, step in enumerate(steps) if step == "SYNCS.EXCH")
    assert steps.count("SYNCS.EXCH") == made.count("mbarrier.init")
    assert set(steps[first : last + 2]) == {"SYNCS.EXCH", "BAR.SYNC"}
    assert steps[last + 1] == "BAR.SYNC"
