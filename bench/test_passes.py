"""Each peer at each pass, as pytest-benchmark shows it: ``pytest bench``.

Peers here run one after another. Where a ratio matters, take ``python -m triton_tied bench``, in
which they take turns.
"""

from __future__ import annotations

import pytest
import torch

from triton_tied.benchmark.agreement import Truth
from triton_tied.benchmark.passes import PASSES, random_images
from triton_tied.benchmark.peers import PEERS, random_tied_weight
from triton_tied.benchmark.workloads import TORCH_DTYPES, quick

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOADS = {workload.name: workload for workload in quick(DEVICE.type == "cuda")}


@pytest.mark.parametrize("peer_name", PEERS)
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("workload_name", WORKLOADS)
def test_pass(benchmark, workload_name, pass_name, peer_name):
    workload, each, kind = WORKLOADS[workload_name], PASSES[pass_name], PEERS[peer_name]
    memory, dtype = workload.formats[0], TORCH_DTYPES[workload.dtype]
    if not each.applies_to(workload):
        pytest.skip("a single application is the forward")
    reason = kind.why_not(workload, DEVICE) or each.why_not(kind)
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()
    benchmark.group = f"{workload.name}, {each.name}"
    tied = random_tied_weight(workload, dtype, DEVICE)
    images = random_images(workload, memory, dtype, DEVICE)
    peer = kind(workload, tied, memory)
    assert Truth(workload, tied, images, memory).why_wrong(peer, images) is None
    with each.around():
        call = each.prepare(peer, images, each.times(workload))

        def finished() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=5, warmup_rounds=2)
