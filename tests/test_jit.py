"""Launches as Triton compiles them, under a driver of a GPU that is not there: the compiler's word
is real, and the compile checks compile what is launched."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402

from triton_tied import compiled, launch  # noqa: E402
from triton_tied.configs import ConvConfig, WeightGradConfig  # noqa: E402
from triton_tied.geometry import Geometry  # noqa: E402
from triton_tied.kernels.conv import conv_kernel  # noqa: E402
from triton_tied.kernels.weight_grad import weight_grad_kernel  # noqa: E402
from triton_tied.packing import Layout  # noqa: E402
from triton_tied.paths import INTERPRETED  # noqa: E402

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU is here"),
]
SAME = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
POINTER = ConvConfig((1, 8, 8), 32, 32, 4, 3)
GRAD_POINTER = WeightGradConfig((1, 4, 8), 32, 32, 2, 4, 3)
CONV_TMA = ConvConfig((1, 8, 16), 64, 64, 4, 3, "descriptor", "weights_first")
GRAD_TMA = WeightGradConfig((1, 1, 64), 64, 64, 2, 4, 4, "descriptor")


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
    if memory == "planar":
        return values
    return values.repeat_interleave(3, 3)[..., ::3]  # no stride is 1 or a multiple of 16


def launch_one(config, form, sides=(8, 64), geometry=SAME):
    """Launches the kernel on images, and with arguments, that a form describes."""
    symmetry = "self_adjoint" if form.sign > 0 else "skew_adjoint"
    layout = Layout(form.channels, form.kernel_size, symmetry=symmetry)
    sides = (7, 5) if form.memory == "scattered" else sides
    x = image(form.channels, form.memory, sides)
    if isinstance(config, WeightGradConfig):
        grad = image(form.channels, form.memory, sides)
        return launch.weight_grad(x, grad, layout, geometry, 1.0, config)
    packed = torch.randn(layout.size).to(torch.bfloat16)
    centre = None
    if not form.gathered_centre:
        centre = torch.randn(1, form.channels, form.channels).to(torch.bfloat16)
    residual = image(form.channels, form.memory, sides) if form.residual else None
    bias = torch.randn(form.channels).to(torch.bfloat16)
    last = form.memory == "channels_last"
    return launch.conv(x, packed, centre, bias, residual, layout, geometry, 1.0, last, config)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"], indirect=True)
@pytest.mark.parametrize(
    "config, form",
    [
        (POINTER, compiled.Form(64)),
        (POINTER, compiled.Form(72, -1, residual=True, gathered_centre=True)),
        (POINTER, compiled.Form(35, 1, "scattered")),
        (GRAD_POINTER, compiled.Form(64)),
        (GRAD_POINTER, compiled.Form(40, -1)),
        (CONV_TMA, compiled.Form(128, residual=True)),
        (CONV_TMA, compiled.Form(128, -1, "planar")),
        (GRAD_TMA, compiled.Form(128)),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_launched_is_what_the_checks_compile(gpu, config, form):
    if config.loader == "descriptor" and gpu.target == "sm_80":
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
    layout = Layout(128, (3, 3), symmetry="skew_adjoint")
    x = image(128, "channels_last")
    packed = torch.randn(layout.size).to(torch.bfloat16)
    arguments = (x, packed, None, None, None, layout, SAME, 1.0, True)
    # two sums of 128 numbers a thread
    spilling, _ = launch.conv_call(*arguments, ConvConfig((1, 8, 16), 128, 16, 4, 2))
    assert "spills" in spilling.fault()
    assert launch.conv_call(*arguments, POINTER)[0].fault() is None
    assert not gpu.launched


def test_a_config_that_does_not_compile_is_known_too(gpu):
    layout = Layout(64, (3, 3))
    x = image(64, "channels_last")
    packed = torch.randn(layout.size).to(torch.bfloat16)
    config = ConvConfig((1, 3, 8), 32, 32)  # not a power of two
    call, _ = launch.conv_call(x, packed, None, None, None, layout, SAME, 1.0, True, config)
    fault = call.fault()
    assert "power of 2" in fault or "Error" in fault
