"""A stand-in H100 for which everything is compiled and whose launches do nothing."""

from __future__ import annotations

from collections.abc import Callable

from triton.runtime import driver

from triton_tied import dispatch
from triton_tied.autotune import gpus
from triton_tied.autotune.compile_ahead import AbsentGpu


class IdleGpu(AbsentGpu):
    """Its launches do nothing."""

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None


def pretend_h100() -> None:
    """From now on tensors of the CPU go the kernels' path, as if they were on an H100."""
    driver.set_active(IdleGpu(90))
    gpus.of_device = lambda device: gpus.KNOWN["H100"]
    dispatch._why_not_here = lambda device, dtype: None
    dispatch._why_reference.cache_clear()
