"""Launches as Triton compiles them, under a driver of a GPU that is not there: the compiler's word
is real, and the compile checks compile what is launched."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import driver

from triton_tied.autotune.compile_ahead import Compilers, Job
from triton_tied.autotune.problem import Problem
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.inspection import compiled
from triton_tied.kernels import launch
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.launch import Convolution, WeightGradient
from triton_tied.kernels.weight_grad import weight_grad_kernel
from triton_tied.packing import Layout

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU is here"),
]
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
POINTER = ConvConfig((1, 8, 8), 32, 32, 4, 3)
GRAD_POINTER = WeightGradConfig((1, 4, 8), 32, 32, 2, 4, 3)
CONV_BULK = ConvConfig((1, 8, 16), 64, 64, 4, 3, "channels_last_descriptor", "weights_first")
GRAD_BULK = WeightGradConfig((1, 1, 64), 64, 64, 2, 4, 4, "channels_last_descriptor")


class Driver:
    """A GPU of a target that loads programs and says what they spill, but runs none."""

    def __init__(self, target):
        self.target, self.loaded, self.launched = target, [], []
        self.utils = SimpleNamespace(
            load_binary=self.load,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def load(self, name, binary, shared, device):
        program = SimpleNamespace(asm={"cubin": binary}, metadata=SimpleNamespace(shared=shared))
        code = compiled.Compiled(program, self.target)
        self.loaded.append(code)
        return 1, 1, code.resources.registers, code.resources.spill_bytes // 4, 1024

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(arguments)

    def get_current_target(self):
        return compiled.TARGETS[self.target]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def gpu(request, tmp_path, monkeypatch):
    """The driver of the target that the test names, and programs compiled anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = (conv_kernel, weight_grad_kernel)
    there = Driver(getattr(request, "param", "sm_90"))
    monkeypatch.setattr(driver, "_active", there)
    for kernel in kernels:
        kernel.device_caches.clear()
    yield there
    for kernel in kernels:
        kernel.device_caches.clear()


def image(channels, memory, sides=(8, 64), n=2):
    values = torch.randn(n, channels, *sides).to(torch.bfloat16)
    if memory == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if memory == "contiguous":
        return values
    return values.repeat_interleave(3, 3)[..., ::3]  # no stride is 1 or a multiple of 16


def convolution_of(form, memory="channels_last", sides=(8, 64), geometry=SAME):
    symmetry = "self_adjoint" if form.sign > 0 else "skew_adjoint"
    layout = Layout(form.channels, form.kernel_size, symmetry=symmetry)
    packed = torch.randn(layout.size).to(torch.bfloat16)
    centre = None
    if not form.gathered_centre:
        centre = torch.randn(1, form.channels, form.channels).to(torch.bfloat16)
    x = image(form.channels, memory, sides)
    residual = image(form.channels, memory, sides) if form.residual else None
    bias = torch.randn(form.channels).to(torch.bfloat16)
    last = memory == "channels_last"
    return Convolution(x, packed, centre, bias, residual, layout, geometry, 1.0, last)


def launch_one(config, form, sides=(8, 64), geometry=SAME):
    """Launches the kernel on images, and with arguments, that a form describes."""
    memory = {"planar_descriptor": "contiguous"}.get(config.loader, "channels_last")
    if form.scattered:
        memory, sides = "scattered", (7, 5)
    convolution = convolution_of(form, memory, sides, geometry)
    if isinstance(config, ConvConfig):
        return launch.conv(convolution, config)
    x, layout = convolution.x, convolution.layout
    grad = image(form.channels, memory, sides)
    return launch.weight_grad(WeightGradient(x, grad, layout, geometry, 1.0), config)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"], indirect=True)
@pytest.mark.parametrize(
    "config, form",
    [
        (POINTER, compiled.Form(64)),
        (POINTER, compiled.Form(72, -1, residual=True, gathered_centre=True)),
        (POINTER, compiled.Form(35, scattered=True)),
        (GRAD_POINTER, compiled.Form(64)),
        (GRAD_POINTER, compiled.Form(40, -1)),
        (CONV_BULK, compiled.Form(128, residual=True)),
        (replace(CONV_BULK, loader="planar_descriptor"), compiled.Form(128, -1)),
        (GRAD_BULK, compiled.Form(128)),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_launched_is_what_the_checks_compile(gpu, config, form):
    if config.loader != "pointer" and gpu.target == "sm_80":
        pytest.skip("sm_80 has no bulk copies")
    launch_one(config, form)
    (launched,) = gpu.loaded
    checked = compiled.compile_config(config, gpu.target, "bfloat16", form)
    assert launched.resources == checked.resources
    assert len(gpu.launched) == 1


def test_no_code_is_made_anew_for_other_sizes_and_paddings(gpu):
    sizes = [(8, 64), (16, 16), (1, 1), (7, 5)]
    for sides in sizes:
        for padding in (0, 1, 16):
            geometry = Geometry((1, 1), ((padding + 1, padding + 1),) * 2, (1, 1))
            launch_one(POINTER, compiled.Form(64), sides, geometry)
    assert len(gpu.launched) == 12 and len(gpu.loaded) == 1


def test_splits_make_no_code_anew(gpu):
    for splits in (2, 3, 16):
        config = WeightGradConfig((1, 4, 8), 32, 32, splits, 4, 3)
        launch_one(config, compiled.Form(64))
    assert len(gpu.launched) == 3 and len(gpu.loaded) == 1


@pytest.mark.parametrize("gpu", ["sm_80"], indirect=True)
def test_a_config_that_spills_is_known_before_it_is_launched(gpu):
    convolution = convolution_of(compiled.Form(128, -1, gathered_centre=True))
    # two sums of 128 numbers a thread
    assert "spills" in launch.fault(convolution, ConvConfig((1, 8, 16), 128, 16, 4, 2))
    assert launch.fault(convolution, POINTER) is None
    assert not gpu.launched


@pytest.mark.parametrize("config", [POINTER, GRAD_POINTER, CONV_BULK, GRAD_BULK])
def test_asking_for_a_fault_compiles_what_is_then_launched(gpu, config):
    form = compiled.Form(128, residual=True)
    convolution = convolution_of(form)
    x, layout = convolution.x, convolution.layout
    if isinstance(config, ConvConfig):
        assert launch.fault(convolution, config) is None
        launch.conv(convolution, config)
    else:
        gradient = WeightGradient(x, x.clone(), layout, SAME, 1.0)
        assert launch.fault(gradient, config) is None
        launch.weight_grad(gradient, config)
    assert len(gpu.loaded) == len(gpu.launched) == 1


def test_a_config_that_does_not_compile_is_known_too(gpu):
    config = ConvConfig((1, 3, 8), 32, 32)  # not a power of two
    fault = launch.fault(convolution_of(compiled.Form(64)), config)
    assert "power of 2" in fault or "Error" in fault


def test_what_is_compiled_ahead_is_what_is_launched(gpu, tmp_path):
    jobs, calls = [], []
    for config in (POINTER, CONV_BULK, GRAD_POINTER, GRAD_BULK):
        kernel = "conv" if isinstance(config, ConvConfig) else "weight_grad"
        centre = "gathered" if kernel == "conv" else "none"
        problem = Problem(kernel, "bfloat16", Layout(64, (3, 3)), (2, 8, 64), SAME, centre=centre)
        extras = frozenset({"bias", "residual"} if kernel == "conv" else ())
        jobs.append(Job(90, problem, config, extras))
        form = compiled.Form(64, residual=True, gathered_centre=True)
        calls.append((config, form))
    with Compilers(2) as compilers:
        assert list(compilers.compile(jobs)) == [None] * 4
    ahead = set(tmp_path.rglob("*.cubin"))
    for config, form in calls:
        launch_one(config, form, sides=(16, 128))
    assert len(gpu.launched) == len(ahead) == 4
    assert set(tmp_path.rglob("*.cubin")) == ahead
