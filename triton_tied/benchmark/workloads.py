"""The convolutions that are timed, each with where its sizes come from.

All have stride 1, padding that keeps the image's size, and as many output as input channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..autotune.problem import Problem
from ..geometry import resolve
from ..packing import Layout, Symmetry

Dtype = Literal["fp32", "tf32", "fp16", "bf16"]  # "tf32": float32 whose products may be TF32
Format = Literal["channels_last", "contiguous"]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TORCH_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_SKEW: Symmetry = "skew_adjoint"
_SELF: Symmetry = "self_adjoint"
_MAX_FLOPS_ON_CPU = 2e10
_16_BIT: tuple[Dtype, ...] = ("bf16", "fp16")

SOURCES = {
    "soc": "Singla and Feizi 2021, skew orthogonal convolutions: LipConvnet-5 to 40 "
    "(github.com/singlasahil14/SOC)",
    "soc-1x1": "the same nets' last block and head",
    "lip": "1-Lipschitz layers compared, CVPR 2024 "
    "(github.com/berndprach/1LipschitzLayersCompared)",
    "mondeq": "Winston and Kolter 2020, monotone operator equilibrium networks "
    "(github.com/locuslab/monotone_op_net)",
    "lca": "sparse coding of CIFAR by lateral inhibition (github.com/lanl/lca-pytorch)",
    "antisym": "antisymmetric residual nets after Haber and Ruthotto "
    "(github.com/pierluigiferrari/differential_equations_resnet)",
    "denoise": "DnCNN-shaped gradient-field denoisers",
    "resnet": "the square 3x3 layers of ResNet-18 and 34",
    "wide": "bound by arithmetic: the distance to the matrix units' limit",
    "thin": "bound by memory: the distance to the copy bandwidth",
    "ragged": "sizes that fit no tile",
    "depthwise": "depthwise and grouped use, as in github.com/thib-s/orthogonium",
    "oned": "SimpleSelfAttention's symmetric 1x1; sparse coding in one dimension",
    "launch": "time per call, with nothing to compute",
    "soc-exponential": "the exponential of soc's convolutions, as those nets apply it",
    "mondeq-splitting": "the equilibrium of mondeq's nets, by forward-backward splitting",
    "scaling channels": "one layer, its channels swept",
    "scaling side": "one layer, the image's side swept",
    "scaling batch": "one layer, the batch swept",
    "scaling kernel": "one layer, the kernel's side swept",
}
# Families whose forward is a formula of several convolutions.
FORMULAS = ("soc-exponential", "mondeq-splitting")


@dataclass(frozen=True)
class Workload:
    """One layer of one net.

    Args:
        family: a key of :data:`SOURCES`.
        image: the sizes of one image's sides.
        kernel: the side of the kernel.
        applications: convolutions with one weight in a training step, all of them tracked; of
            "soc-exponential" the terms, of "mondeq-splitting" the steps.
        evaluations: convolutions with one weight in a forward without gradients.
        headline: counts in the geometric means.
    """

    family: str
    batch: int
    channels: int
    image: tuple[int, ...]
    kernel: int
    dtype: Dtype
    symmetry: Symmetry = _SELF
    padding_mode: str = "zeros"
    groups: int = 1
    applications: int = 1
    evaluations: int = 1
    headline: bool = False

    @property
    def name(self) -> str:
        parts = [self.family, "x".join(map(str, self.shape)), f"k{self.kernel}", self.dtype]
        parts += ["skew"] * (self.symmetry == _SKEW)
        parts += [self.padding_mode] * (self.padding_mode != "zeros")
        parts += [f"g{self.groups}"] * (self.groups > 1)
        return " ".join(parts)

    @property
    def source(self) -> str:
        return SOURCES[self.family]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.image)

    @property
    def layout(self) -> Layout:
        return Layout(self.channels, (self.kernel,) * len(self.image), self.groups, self.symmetry)

    @property
    def flops(self) -> int:
        """Of a forward."""
        formula = self.family in FORMULAS
        return self.problem.flops * (self.convolutions(self.applications) if formula else 1)

    def convolutions(self, applications: int) -> int:
        """Of a formula. Each step of the splitting, and one more for the gradient, is a tied
        convolution and two with free weights."""
        return 3 * (applications + 1) if self.family == "mondeq-splitting" else applications

    @property
    def problem(self) -> Problem:
        """The forward as one launch sees it; a row of one dimension is an image of one row."""
        layout = self.layout
        image = self.image
        if len(image) == 1:
            layout, image = replace(layout, kernel_size=(1, self.kernel)), (1, *image)
        geometry = resolve(layout.kernel_size, 1, "same", 1)
        dtype = {"fp32": "float32_ieee", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return Problem(
            "conv",
            dtype[self.dtype],  # type: ignore[arg-type]
            layout,
            (self.batch, image[0], image[1]),
            geometry,
        )

    @property
    def formats(self) -> tuple[Format, ...]:
        return ("channels_last", "contiguous") if len(self.image) == 2 else ("contiguous",)


def every() -> list[Workload]:
    """All workloads but the sweeps; those of the headline first."""
    found = [
        *_soc(),
        *_lip(),
        *_lca(),
        *_resnet(),
        *_wide_and_thin(),
        *_antisym(),
        *_mondeq(),
        *_denoise(),
        *_grouped(),
        *_oned(),
        *_launch(),
        *_ragged(),
    ]
    return sorted(found, key=lambda workload: not workload.headline)


def on_cpu() -> list[Workload]:
    """Those in float32, since a CPU has no TF32 and most compute 16-bit products one by one, of
    which it does several steps a second."""
    mine = [
        workload
        for workload in every()
        if workload.dtype == "fp32" and workload.problem.flops < _MAX_FLOPS_ON_CPU
    ]
    telling = ("soc", "lip", "resnet", "antisym")
    found = [replace(w, headline=w.family in telling and w.batch >= 32) for w in mine]
    return sorted(found, key=lambda workload: not workload.headline)


def quick(on_gpu: bool) -> list[Workload]:
    """A few of the families, on a CPU those that it does in milliseconds."""
    if on_gpu:
        found = [
            *_soc()[:9:4],
            *_resnet(batches=(32,), dtypes=("bf16",)),
            *_wide_and_thin()[:4],
            *_launch(),
        ]
    else:
        found = [
            *_resnet(batches=(1,), dtypes=("fp32",)),
            *_lip(dtypes=("fp32",), widths=(16,))[:1],
            *_antisym(),
            Workload("ragged", 3, 50, (29, 29), 5, "fp32"),
            Workload("ragged", 3, 13, (13, 13), 3, "fp32", _SKEW),
        ]
    return [replace(workload, headline=True) for workload in found]


def sweeps(batch: int, dtype: Dtype, small: bool = False) -> list[Workload]:
    """One layer with one of its four sizes swept; ``small`` stops where a CPU begins to wait."""
    channels = (16, 32, 64, 128, 256, 512, 1024)[: 5 if small else None]
    sides = (7, 14, 28, 56, 112, 224, 512)[: 5 if small else None]
    batches = (1, 4, 16, 64, 256)[: 3 if small else None]
    kernels = (1, 3, 5, 7, 9, 11)

    def layer(axis: str, n: int = batch, c: int = 64, side: int = 28, k: int = 3) -> Workload:
        return Workload(f"scaling {axis}", n, c, (side, side), k, dtype)

    return [
        *(layer("channels", c=c) for c in channels),
        *(layer("side", side=side) for side in sides),
        *(layer("batch", n=n) for n in batches),
        *(layer("kernel", k=k) for k in kernels),
    ]


def formulas(on_gpu: bool, is_quick: bool = False) -> list[Workload]:
    """What is built on a tied convolution, at the shapes of its users: the exponential on a GPU in
    bfloat16. A CPU gets what it does in about a second, so of the splitting one image."""
    dtype: Dtype = "bf16" if on_gpu else "fp32"
    exponentials = [
        replace(w, family="soc-exponential", headline=False)
        for w in _soc()
        if w.kernel == 3 and w.dtype == dtype
    ]
    splittings = [
        replace(w, family="mondeq-splitting", batch=n, applications=20, evaluations=1)
        for w in _mondeq()
        for n in (128, 1)
    ]
    if is_quick:
        return [replace(exponentials[0], batch=128 if on_gpu else 8), splittings[-1]]
    found = [*exponentials, *splittings]
    return found if on_gpu else [w for w in found if w.flops < _MAX_FLOPS_ON_CPU]


def _soc() -> list[Workload]:
    sizes = [(32, 32), (64, 16), (128, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2)]
    repeats = {"symmetry": _SKEW, "applications": 5, "evaluations": 12}
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    return [
        Workload("soc", 128, c, (side, side), 3, dtype, headline=dtype == "bf16", **repeats)  # type: ignore[arg-type]
        for dtype in dtypes
        for c, side in [*sizes, (1024, 2)]
    ] + [
        Workload("soc-1x1", 128, c, (1, 1), 1, dtype, **repeats)  # type: ignore[arg-type]
        for dtype in _16_BIT
        for c in (2048, 1024)
    ]


def _lip(
    dtypes: tuple[Dtype, ...] = ("tf32", "fp32"), widths: tuple[int, ...] = (16, 32, 64, 128)
) -> list[Workload]:
    return [
        Workload(
            "lip",
            256,
            width * 2**i,
            (32 // 2**i, 32 // 2**i),
            3,
            dtype,
            _SKEW,
            applications=5,
            evaluations=12,
            headline=dtype == "tf32",
        )
        for dtype in dtypes
        for width in widths
        for i in range(4)
    ]


def _lca() -> list[Workload]:
    return [
        Workload("lca", 128, 64, (16, 16), 9, dtype, evaluations=800, headline=dtype == "bf16")
        for dtype in _16_BIT
    ]


def _resnet(
    batches: tuple[int, ...] = (32, 1, 8, 256), dtypes: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
) -> list[Workload]:
    return [
        Workload("resnet", n, c, (side, side), 3, dtype, headline=(n, dtype) == (32, "bf16"))
        for dtype in dtypes
        for n in batches
        for c, side in [(64, 56), (128, 28), (256, 14), (512, 7)]
    ]


def _wide_and_thin() -> list[Workload]:
    wide = [Workload("wide", 8, c, (64, 64), 3, "bf16", headline=True) for c in (256, 512, 1024)]
    thin = [
        Workload("thin", 64, c, (128, 128), k, "bf16", headline=True)
        for c in (8, 16, 24, 32, 48)
        for k in (3, 5, 7)
    ]
    return wide + thin


def _antisym() -> list[Workload]:
    return [Workload("antisym", n, 16, (32, 32), 3, "fp32", _SKEW) for n in (32, 1)]


def _mondeq() -> list[Workload]:
    return [
        Workload("mondeq", 128, c, (side, side), 3, "fp32", _SKEW, "circular", evaluations=300)
        for c, side in [(81, 34), (200, 34), (54, 30)]
    ]


def _denoise() -> list[Workload]:
    dtypes: tuple[Dtype, ...] = ("bf16", "fp32")
    return [
        Workload("denoise", n, c, (side, side), k, dtype, padding_mode=mode)
        for n, c, side in [(1, 64, 512), (16, 64, 128), (1, 96, 1024)]
        for dtype in dtypes
        for mode in ("zeros", "reflect")
        for k in (3, 5)
    ]


def _grouped() -> list[Workload]:
    return [
        Workload("depthwise", n, c, (28, 28), 3, "bf16", symmetry, mode, groups)
        for n, c, groups in [(64, 256, 256), (32, 128, 4)]
        for mode in ("circular", "zeros")
        for symmetry in (_SELF, _SKEW)
    ]


def _oned() -> list[Workload]:
    return [Workload("oned", 64, c, (1024,), k, "fp16") for c in (64, 256) for k in (1, 9)]


def _launch() -> list[Workload]:
    return [Workload("launch", 1, c, (8, 8), 3, "bf16") for c in (16, 64)]


def _ragged() -> list[Workload]:
    dtypes: tuple[Dtype, ...] = ("bf16", "fp32")
    return [
        Workload("ragged", 3, c, (side, side), k, dtype, symmetry)
        for dtype in dtypes
        for symmetry in (_SELF, _SKEW)
        for k in (3, 5)
        for c in (3, 13, 50, 100)
        for side in (7, 13, 29, 57)
    ]
