"""What a user calls, forward and backward, on GPUs that are not there: checks, operators, the
choice of configs, Triton's own launches; only the last step, the GPU's, is the machine's."""

import collections
import re
from dataclasses import dataclass, field

import oracle
import pytest
import torch
from ptx_machine import EARLY, LATE
from ptx_machine.triton_gpu import EmulatedGpu, emulated

import triton_tied as tt
from triton_tied import dispatch
from triton_tied.autotune import first_use, gpus, image_copy, tuned_configs
from triton_tied.autotune.select import using
from triton_tied.dispatch import INTERPRETED
from triton_tied.kernels.configs import (
    ConvConfig,
    HaloConfig,
    OnePassConfig,
    RowByRowConfig,
    WeightGradConfig,
)
from triton_tied.kernels.toolchain import why_no_clusters

from .execution import KERNELS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
TIED = {1: tt.tied_conv1d, 2: tt.tied_conv2d}


@pytest.fixture(params=["A100", "H100"])
def gpu(request, compiler, monkeypatch, tmp_path):
    """Every tensor of the CPU is on this GPU. Its launches are counted, by kernel and by the
    instructions that copy and multiply."""
    launches = collections.Counter()

    def observe(kernel):
        roots = {i.opcode[:2] for i in kernel.instructions}
        bulk = any(i.opcode[:3] == ("cp", "async", "bulk") for i in kernel.instructions)
        launches.update([kernel.name, f"{kernel.name} bulk"] if bulk else [kernel.name])
        launches["wgmma"] += ("wgmma", "mma_async") in roots
        launches["mma"] += ("mma", "sync") in roots

    known = gpus.KNOWN[request.param]
    monkeypatch.setattr(gpus, "of_device", lambda device: known)
    monkeypatch.setattr(dispatch, "_why_not_here", lambda device, dtype: None)
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "tuned"))
    dispatch._why_reference.cache_clear()
    tuned_configs.forget()
    there = EmulatedGpu({"A100": 80, "H100": 90}[request.param], observe=observe)
    with emulated(there, *KERNELS):
        there.launches = launches
        yield there
    dispatch._why_reference.cache_clear()
    tuned_configs.forget()


@dataclass
class Call:
    """A convolution of ``shape``, as the function or the layer computes it."""

    shape: tuple
    dtype: torch.dtype = torch.bfloat16
    symmetry: str = "self_adjoint"
    options: dict = field(default_factory=lambda: {"padding": 1})
    padding_mode: str = "zeros"
    channels_last: bool = True
    alpha: float = 1.0
    residual: bool = False
    precision: str = "ieee"

    def tensors(self):
        channels, dims = self.shape[1], len(self.shape) - 2
        sizes = [self.shape, (tt.packed_size(*self.layout),), (channels,)]
        tensors = [torch.randn(size) for size in sizes + [self.shape] * self.residual]
        if self.precision == "tf32":  # numbers of no more digits than it reads
            tensors = [(t.view(torch.int32) & -(2**13)).view(torch.float32) for t in tensors]
        tensors = [t.to(self.dtype) for t in tensors]
        if self.channels_last and dims == 2:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        return tensors

    @property
    def layout(self):
        dims, groups = len(self.shape) - 2, self.options.get("groups", 1)
        return self.shape[1], (3,) * dims, groups, self.symmetry

    def __call__(self, x, packed, bias, residual=None):
        return TIED[x.dim() - 2](
            x, packed, bias, kernel_size=3, symmetry=self.symmetry, alpha=self.alpha,
            padding_mode=self.padding_mode, residual=residual, **self.options,
        )  # fmt: skip

    def expected(self, tensors, grad):
        convolution = oracle.Convolution(self.layout, self.options, self.padding_mode, self.alpha)
        return oracle.expect(convolution, tensors, grad, reference=False)


CALLS = {
    "channels-last": Call((2, 64, 8, 8)),
    "skew, TF32": Call((1, 64, 4, 16), torch.float32, "skew_adjoint", precision="tf32"),
    "exact float32": Call((1, 24, 7, 5), torch.float32),
    "contiguous": Call((1, 64, 4, 16), torch.float16, "skew_adjoint", channels_last=False),
    "ragged, dilated": Call((3, 40, 7, 9), torch.float16, options={"padding": 2, "dilation": 2}),
    "circular": Call((2, 32, 8, 8), torch.float16, "skew_adjoint", padding_mode="circular"),
    "reflect, alpha": Call((1, 32, 6, 8), torch.float16, padding_mode="reflect", alpha=0.5),
    "alpha, residual": Call((2, 64, 4, 4), alpha=-0.5, residual=True, symmetry="skew_adjoint"),
    "groups": Call((2, 32, 6, 8), torch.float16, options={"padding": 1, "groups": 2}),
    "one dimension": Call((2, 32, 40), torch.float16, "skew_adjoint"),
}


def convolutions(gpu):
    """That were launched."""
    return sum(gpu.launches[f"{name}_kernel"] for name in ("conv", "halo", "clustered"))


def gradients(gpu):
    """Packed ones that were launched."""
    names = ("weight_grad", "one_pass", "one_pass_tf32", "row_by_row")
    return sum(gpu.launches[f"{name}_kernel"] for name in names)


@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients(name, gpu, convolution_precision):
    call = CALLS[name]
    convolution_precision.fp32_precision = call.precision
    tensors = call.tensors()
    for gpu.timing in (EARLY, LATE):
        gpu.launches.clear()
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = call(*leaves)
        grad = torch.randn(output.shape).to(output.dtype)
        if call.precision == "tf32":
            grad = (grad.view(torch.int32) & -(2**13)).view(torch.float32)
        results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        for actual, wanted in zip(results, call.expected(tensors, grad), strict=True):
            oracle.assert_within_bound(actual, wanted)
        assert convolutions(gpu) == 2 and gradients(gpu) == 1


def test_a_layer_of_bfloat16_copies_and_multiplies_as_its_gpu_does_best(gpu):
    layer = tt.TiedConv2d(64, 3, padding=1, dtype=torch.bfloat16)
    x = torch.randn(2, 64, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert layer.packed_weight.grad.isfinite().all() and layer.bias.grad.isfinite().all()
    on_hopper = 3 * (gpu.capability == 90)
    assert gpu.launches["wgmma"] == on_hopper and gpu.launches["mma"] == 3 - on_hopper
    names = ("conv_kernel", "halo_kernel", "weight_grad_kernel", "one_pass_kernel")
    assert sum(gpu.launches[f"{name} bulk"] for name in names) == on_hopper


@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize(
    "dtype, precision, kernel",
    [(torch.bfloat16, "ieee", "one_pass"), (torch.float32, "tf32", "one_pass_tf32")],
)
def test_few_channels_on_hopper_take_kernels_of_their_own(
    gpu, symmetry, dtype, precision, kernel, convolution_precision
):
    convolution_precision.fp32_precision = precision
    call = Call((2, 16, 32, 32), dtype, symmetry=symmetry, precision=precision)
    leaves = [t.requires_grad_() for t in call.tensors()]
    output = call(*leaves)
    grad = torch.randint(-3, 4, output.shape).to(output.dtype)
    results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    for actual, wanted in zip(results, call.expected(leaves, grad), strict=True):
        oracle.assert_within_bound(actual, wanted)
    assert gpu.launches["halo_kernel"] == convolutions(gpu) == 2
    assert gpu.launches[f"{kernel}_kernel"] == gradients(gpu) == 1


@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_gradients_row_by_row_on_hopper(gpu, convolution_precision):
    """Only large problems take them of their own accord."""
    convolution_precision.fp32_precision = "tf32"
    call = Call((4, 64, 8, 8), torch.float32, "skew_adjoint", precision="tf32")
    tensors = call.tensors()
    leaves = [t.requires_grad_() for t in tensors]
    with using(weight_grad=RowByRowConfig((4, 8, 8), 64, (3, 3), 8, 4, 2)):
        output = call(*leaves)
        grad = torch.randint(-3, 4, output.shape).float()
        results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    for actual, wanted in zip(results, call.expected(leaves, grad), strict=True):
        oracle.assert_within_bound(actual, wanted)
    assert gpu.launches["row_by_row_kernel"] == gradients(gpu) == 1


@pytest.mark.skipif(why_no_clusters() is not None, reason=str(why_no_clusters()))
@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_many_channels_on_hopper_are_shared_by_two_programs(gpu):
    call = Call((2, 128, 16, 16), symmetry="skew_adjoint")
    x, packed, bias = call.tensors()
    output = call(x.requires_grad_(), packed, bias)
    grad = torch.randn(output.shape).to(output.dtype)
    results = [output.detach(), *torch.autograd.grad(output, x, grad)]
    for actual, wanted in zip(results, call.expected([x, packed, bias], grad), strict=False):
        oracle.assert_within_bound(actual, wanted)
    assert gpu.launches["clustered_kernel"] == convolutions(gpu) == 2


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
def test_merged_columns(gpu, symmetry):
    call = Call((2, 8, 6, 32), torch.float16, symmetry, alpha=-0.5)
    conv = ConvConfig((1, 4, 8), 32, 32, splits=2, merged=4)
    weight_grad = WeightGradConfig((1, 4, 8), 32, 32, 2, merged=4)
    if gpu.capability == 90:
        conv = HaloConfig((1, 8, 8), 32, roles="pixels_first", merged=4)
        weight_grad = OnePassConfig((1, 4, 8), 16, (3, 3), 4, merged=2)
    leaves = [t.requires_grad_() for t in call.tensors()]
    with using(conv=conv, weight_grad=weight_grad):
        output = call(*leaves)
        grad = torch.randn(output.shape).to(output.dtype)
        results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        x, packed, *others = leaves
        prepared = tt.prepare(packed, 8, 3, symmetry=symmetry, dtype=torch.float16)
        assert torch.equal(call(x, prepared, *others), output)
    for actual, wanted in zip(results, call.expected(leaves, grad), strict=True):
        oracle.assert_within_bound(actual, wanted)
    assert gpu.launches["merge_columns_kernel"] == convolutions(gpu) == 3
    assert gpu.launches["sum_merged_kernel"] == gradients(gpu) == 1


@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_contiguous_images_take_the_kernels_of_channels_last_ones(gpu, monkeypatch):
    monkeypatch.setattr(image_copy, "copy_us", lambda problem, gpu: 0.0)
    call = Call((2, 32, 16, 16), torch.float16, "skew_adjoint", channels_last=False)
    leaves = [t.requires_grad_() for t in call.tensors()]
    output = call(*leaves)
    grad = torch.randn(output.shape).to(output.dtype)
    results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    for actual, wanted in zip(results, call.expected(leaves, grad), strict=True):
        oracle.assert_within_bound(actual, wanted)
        assert actual.is_contiguous()
    assert gpu.launches["halo_kernel"] == convolutions(gpu) == 2
    assert gradients(gpu) == 1


def test_autocast_and_cached_weights(gpu):
    layer = tt.TiedConv2d(32, 3, padding=1, symmetry="skew_adjoint")
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), tt.cached():
        y = layer(layer(x))
        y.float().sum().backward()
    packed = layer.packed_weight.detach().bfloat16().requires_grad_()
    z = x.bfloat16()
    for _ in range(2):
        z = tt.reference.tied_conv2d(
            z, packed, layer.bias.detach().bfloat16(), kernel_size=3, padding=1,
            symmetry="skew_adjoint",
        )  # fmt: skip
    (expected,) = torch.autograd.grad(z.float().sum(), packed)
    # two roundings to bfloat16 of 2^-9 each way, and as many of the reference
    assert y.dtype == torch.bfloat16
    assert oracle.relative_error(y, z) < 1e-2
    assert oracle.relative_error(layer.packed_weight.grad, expected) < 1e-2
    assert not gpu.launches["matrices_kernel"]  # the centre is gathered


def test_a_kernel_that_computes_wrongly_is_found_out_and_another_serves(gpu, monkeypatch):
    """Its machine code adds where it should multiply by alpha."""
    wrong = []

    def rewrite(text):
        if not wrong and re.search(r"\.entry (conv|halo)_kernel", text):
            wrong.append(text)
        return text.replace("mul.f32", "add.f32") if text in wrong else text

    monkeypatch.setattr(first_use, "checks", lambda device: True)
    gpu.rewrite = rewrite
    call = Call((2, 32, 8, 8), alpha=-0.5)
    tensors = call.tensors()
    with pytest.warns(UserWarning, match="a kernel computes wrongly .* conv bfloat16"):
        output = call(*tensors)
    oracle.assert_within_bound(output, call.expected(tensors, torch.zeros_like(output))[0])
    assert convolutions(gpu) == 3 and "mul.f32" in wrong[0]
    assert torch.equal(call(*tensors), output)
    assert convolutions(gpu) == 4
