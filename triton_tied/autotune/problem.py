"""One launch as the choice of a config sees it: no tensors, only what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels.base_config import Kernel, Need, Reading
from ..kernels.configs import Config
from ..kernels.merging import merge
from ..kernels.precision import InputPrecision, input_precision
from ..memory_format import Memory, extent, memory_of
from ..packing import Layout

if TYPE_CHECKING:  # slow to import
    from .candidates import Dtype

_NAMES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Problem:
    """A convolution or a packed weight gradient.

    Args:
        kernel: "conv" or "weight_grad".
        layout: channels, kernel size, groups and symmetry.
        image: images, rows and columns of the input.
        geometry: stride 1, padding and dilation.
        dtype: of the tensors; "float32" multiplies in TF32, "float32_ieee" does not.
        memory: of the images that are read.
        output_memory: of what a convolution writes, and of its residual.
        aligned: the images, and the weight, start at a multiple of 16 bytes.
        wide: an offset may pass 2^31.
        parameters, written: a convolution's packed vector and bias, and what is written, are of
            this dtype, where it is another. The code is, the best config is not.
    """

    kernel: Kernel
    dtype: Dtype
    layout: Layout
    image: tuple[int, int, int]
    geometry: Geometry
    memory: Memory = "channels_last"
    output_memory: Memory = "channels_last"
    aligned: bool = True
    wide: bool = False
    parameters: str | None = None
    written: str | None = None

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype.startswith("float32") else 2

    @property
    def precision(self) -> InputPrecision:
        return "tf32" if self.dtype == "float32" else "ieee"

    @cached_property
    def output(self) -> tuple[int, int, int]:
        """Images, rows and columns of the output."""
        rows, columns = self.geometry.output_size(self.image[1:], self.layout.kernel_size)
        return self.image[0], rows, columns

    @property
    def flops(self) -> int:
        return self.layout.flops(math.prod(self.output))

    @property
    def least_bytes(self) -> int:
        """Each image and the packed vector once, read or written."""
        images = self.layout.channels * (math.prod(self.image) + math.prod(self.output))
        return self.itemsize * (images + self.layout.size)

    def why_unreadable(self, config: Config) -> str | None:
        """Why the launcher would refuse the config, or None."""
        inner = self.layout.channels
        if self.memory == "contiguous":
            inner = math.gcd(self.image[2], self.output[2] if self.is_weight_grad else 0)
        return config.why_unreadable(
            Reading(
                self.layout,
                self.geometry,
                self.memory,
                inner,
                self.itemsize,
                self.aligned,
                self.precision,
                self.output_memory,
                math.gcd(self.image[2], self.output[2]),
            )
        )

    def as_read(self, config: Config) -> tuple[Problem, Any]:
        """What the kernel of a config is given: where it merges columns, that of those."""
        if config.merged == 1:
            return self, config
        return _merge(self, config.merged), replace(cast(Any, config), merged=1)

    @property
    def is_weight_grad(self) -> bool:
        return self.kernel == "weight_grad"

    def needs(self, config: Config) -> frozenset[Need]:
        """What the problem asks of the compiled code of a config; see :data:`.base_config.Need`."""
        if config.merged > 1:
            problem, as_read = self.as_read(config)
            return problem.needs(as_read)
        found: set[Need] = set()
        writes_at_once = not self.is_weight_grad and config.splits == 1
        if writes_at_once and self.output_memory != "channels_last":
            found.add("scattered_output")
        boxes = zip(self.output, config.box, strict=True)
        if self.is_weight_grad and any(size % side for size, side in boxes):
            found.add("ragged_boxes")
        if not self._reads_16_bytes(config.neighbours(self.layout)):
            found.add("scattered")
        if self.wide:
            found.add("wide")
        return config.needs & found

    def _reads_16_bytes(self, channels: int) -> bool:
        """Whether pointers find so many channels side by side, wherever they start."""
        whole = channels * self.itemsize % 16 == 0
        return self.memory == "channels_last" and whole and self.aligned

    @property
    def key(self) -> str:
        """Names the problem in a table: batch and image sides in steps of half an octave, so that
        neighbours share an entry."""
        steps = "x".join(str(round(2 * math.log2(max(size, 1)))) for size in self.image)
        return f"{self.code} image{steps}"

    @property
    def code(self) -> str:
        """All but the sizes of the images, which compile nothing anew, and other dtypes."""
        layout, geometry = self.layout, self.geometry
        times = "x"
        parts = (
            self.kernel,
            self.dtype,
            self.memory + ("" if self.aligned else "_unaligned") + ("_wide" if self.wide else ""),
            f"c{layout.group_channels}",
            f"g{layout.groups}",
            f"k{times.join(map(str, layout.kernel_size))}",
            f"d{times.join(map(str, geometry.dilation))}",
            layout.symmetry,
            *([] if self.output_memory == "channels_last" else [f"to_{self.output_memory}"]),
        )
        return " ".join(parts)

    def code_of(self, config: Config) -> str:
        """:attr:`code`, and that of merged columns, whose kernel is wider by some paddings."""
        if config.merged == 1:
            return self.code
        return f"{self.code} as {self.as_read(config)[0].code}"


@lru_cache(maxsize=64)  # one is asked for with hundreds of configs
def _merge(problem: Problem, merged: int) -> Problem:
    layout, geometry = merge(problem.layout, problem.geometry, merged)
    image = (*problem.image[:2], problem.image[2] // merged)
    return replace(problem, layout=layout, geometry=geometry, image=image)


def problem_of(
    kernel: Kernel, layout: Layout, geometry: Geometry, read: list[Tensor], output_memory: Memory,
    weights: Tensor | None = None, parameters: torch.dtype | None = None,
    written: torch.dtype | None = None,
) -> Problem:  # fmt: skip
    """The problem of reading these images, and a convolution's weight, which comes of parameters of
    a dtype (None: that of the images, as for what is written)."""
    x = read[0]
    tensors = read if weights is None else [*read, weights]
    return Problem(
        kernel,
        dtype_of(x.dtype),
        layout,
        (max(x.shape[0], 1), x.shape[2], x.shape[3]),  # of no image nothing is launched
        geometry,
        memory_of(*read),
        output_memory,
        not any(tensor.data_ptr() % 16 for tensor in tensors),
        max(extent(tensor) for tensor in tensors) >= 2**31,
        *(_name_of_other(dtype, x.dtype) for dtype in (parameters, written)),
    )


def _name_of_other(dtype: torch.dtype | None, usual: torch.dtype) -> str | None:
    return None if dtype in (None, usual) else str(dtype).removeprefix("torch.")


def key_of(*images: Tensor) -> tuple:
    """What a problem, and code compiled for it, depends on: equal keys, equal problems."""
    x = images[0]
    layouts = [(image.shape, image.stride(), image.data_ptr() % 16) for image in images]
    return x.dtype, x.device, input_precision(x.dtype), *layouts


def problems_of_layer(problem: Problem) -> list[Problem]:
    """A convolution's forward, its input gradient and its packed weight gradient, each once."""
    transposed = problem.geometry.transposed(problem.layout.kernel_size)
    backward = replace(problem, image=problem.output, geometry=transposed)
    weight = replace(
        problem, kernel="weight_grad", output_memory="channels_last",
        parameters=None, written=problem.parameters,
    )  # fmt: skip
    return list(dict.fromkeys([problem, backward, weight]))


def dtype_of(dtype: torch.dtype) -> Dtype:
    """The list of candidates that serves a dtype, under PyTorch's setting for TF32."""
    if dtype == torch.float32 and input_precision(dtype) == "ieee":
        return "float32_ieee"
    return _NAMES[dtype]
