"""What the cost model knows of a GPU: its limits, and its peaks from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..kernels.configs import HOPPER_SHARED_BYTES
from .candidates import Target, target_of


@dataclass(frozen=True)
class GPU:
    """Limits of one multiprocessor, and peaks of the whole.

    Args:
        shared_bytes: shared memory of a multiprocessor; ``block_shared_bytes``: of one program.
        half_tflops, tf32_tflops, float32_tflops: dense products, 10^12 operations a second.
        memory_gbs, cache_gbs: GB/s of the memory and of the last-level cache.
        clock_ghz: of the multiprocessors, at which the peaks are reached.
        registers, max_programs: of a multiprocessor, and how many programs it holds at once.
    """

    name: str
    target: Target
    multiprocessors: int
    shared_bytes: int
    block_shared_bytes: int
    half_tflops: float
    tf32_tflops: float
    float32_tflops: float
    memory_gbs: float
    cache_gbs: float
    clock_ghz: float
    registers: int = 65536
    max_programs: int = 32
    warp_size: int = 32
    has_descriptors: bool = False

    def tflops(self, list_dtype: str) -> float:
        """Of the products of a list of candidates, by its dtype."""
        peaks = {"float32": self.tf32_tflops, "float32_ieee": self.float32_tflops}
        return peaks.get(list_dtype, self.half_tflops)


# The caches' rates are no data of theirs: guesses, from microbenchmarks that others published. The
# memories of H100 and H200 are not at their peak but as fast as others measured them.
KNOWN = {
    gpu.name: gpu
    for gpu in (
        GPU(
            "H200", "sm_90", 132, 233472, HOPPER_SHARED_BYTES, 989, 494, 67, 4300, 7000, 1.755,
            has_descriptors=True,
        ),
        GPU(
            "H100", "sm_90", 132, 233472, HOPPER_SHARED_BYTES, 989, 494, 67, 3000, 7000, 1.755,
            has_descriptors=True,
        ),
        GPU("A100", "sm_80", 108, 167936, 166912, 312, 156, 19.5, 1800, 4500, 1.41),
        GPU(
            "B200", "sm_100", 148, 233472, 232448, 2250, 1125, 75, 7200, 10000, 1.85,
            has_descriptors=True,
        ),
        GPU(
            "MI300X", "gfx942", 304, 65536, 65536, 1307, 163, 163, 4800, 11000, 2.1, 131072,
            warp_size=64,
        ),
        GPU("RTX4090", "sm_80", 128, 102400, 101376, 165, 83, 83, 920, 5000, 2.52),
    )
}  # fmt: skip
# The one whose limits the configs of a target are held to; unknown GPUs count as like it.
MODEL_OF = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}


def find(name: str) -> GPU:
    """A known GPU by name, in any case.

    Raises:
        ValueError: an unknown name.
    """
    for known, gpu in KNOWN.items():
        if known.lower() == name.lower():
            return gpu
    raise ValueError(f"unknown GPU {name!r}: expected one of {', '.join(KNOWN)}")


def of_device(device: torch.device) -> GPU:
    """The GPU of a device; an unknown one is a known one of its kind, scaled by its number of
    multiprocessors. The CPU of an interpreted run has the limits of an A100, which others have too,
    and runs one program after another."""
    if device.type != "cuda":
        return replace(KNOWN["A100"], multiprocessors=1, max_programs=1)
    properties = torch.cuda.get_device_properties(device)
    plain = properties.name.replace(" ", "").lower()
    for known, gpu in KNOWN.items():
        if known.lower() in plain:
            return replace(gpu, multiprocessors=properties.multi_processor_count)
    target = "gfx942" if torch.version.hip else target_of((properties.major, properties.minor))
    model = KNOWN[MODEL_OF[target or "sm_80"]]
    share = properties.multi_processor_count / model.multiprocessors
    return replace(
        model,
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_multiprocessor", model.shared_bytes),
        block_shared_bytes=getattr(
            properties, "shared_memory_per_block_optin", model.block_shared_bytes
        ),
        half_tflops=model.half_tflops * share,
        tf32_tflops=model.tf32_tflops * share,
        float32_tflops=model.float32_tflops * share,
        memory_gbs=model.memory_gbs * share,
        cache_gbs=model.cache_gbs * share,
    )
