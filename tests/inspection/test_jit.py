"""Launches as Triton compiles them, under a driver of a GPU that is not there: the compiler's word
is real, and the compile checks compile what is launched."""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_tied.autotune.compile_ahead import Compilers, Job
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.select import problem_of_call
from triton_tied.dispatch import INTERPRETED
from triton_tied.geometry import Geometry
from triton_tied.inspection import compiled
from triton_tied.inspection.requirements import form_of
from triton_tied.kernels import launch, plans
from triton_tied.kernels.calls import Convolution, WeightGradient
from triton_tied.kernels.configs import ClusteredConfig, ConvConfig, WeightGradConfig
from triton_tied.kernels.conv import conv_kernel
from triton_tied.kernels.matrices import matrices_kernel
from triton_tied.kernels.merge_columns import merge_columns_kernel
from triton_tied.kernels.plans import make_plan
from triton_tied.kernels.stored_taps import are_matrices, expand_matrices, stored_taps
from triton_tied.kernels.sum_merged import sum_merged_kernel
from triton_tied.kernels.sum_splits import sum_splits_kernel
from triton_tied.kernels.toolchain import why_no_clusters
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
CLUSTERED = ClusteredConfig((1, 8, 8), 128, 3)
KERNELS = [
    conv_kernel, weight_grad_kernel, sum_splits_kernel, matrices_kernel, merge_columns_kernel,
    sum_merged_kernel,
]  # fmt: skip
in_clusters = pytest.mark.skipif(why_no_clusters() is not None, reason=str(why_no_clusters()))
if why_no_clusters() is None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from triton_tied.kernels.clustered import clustered_kernel

    KERNELS.append(clustered_kernel)
else:
    GluonDescriptor = TensorDescriptor


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
    there = Driver(getattr(request, "param", "sm_90"))
    monkeypatch.setattr(driver, "_active", there)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield there
    for kernel in KERNELS:
        kernel.device_caches.clear()


def image(channels, memory, sides=(8, 64), n=2):
    values = torch.randn(n, channels, *sides).to(torch.bfloat16)
    if memory == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if memory == "contiguous":
        return values
    return values.repeat_interleave(3, 3)[..., ::3]  # no stride is 1 or a multiple of 16


def convolution_of(form, memory="channels_last", sides=(8, 64), geometry=SAME, **options):
    symmetry = "self_adjoint" if form.sign > 0 else "skew_adjoint"
    layout = Layout(form.channels, form.kernel_size, symmetry=symmetry)
    packed = torch.randn(layout.size).to(torch.bfloat16)
    weights = packed
    if are_matrices(layout, "ieee"):
        stored = stored_taps(layout, "ieee")
        weights = expand_matrices(packed, layout, stored, torch.bfloat16, "ieee")
    x, bias = image(form.channels, memory, sides), torch.randn(form.channels).to(torch.bfloat16)
    last = not form.scattered_output
    convolution = Convolution(
        x, packed, weights, bias, None, layout, geometry, 1.0, 1.0, last, "ieee"
    )
    return convolution._replace(**options)


def gradient_of(convolution, **options):
    x, layout, geometry = convolution.x, convolution.layout, convolution.geometry
    rows, columns = geometry.output_size(x.shape[2:], layout.kernel_size)
    grad = x.new_empty(*x.shape[:2], rows, columns).contiguous(memory_format=torch.channels_last)
    if geometry == SAME:  # in the memory of x, whatever that is
        grad = torch.empty_like(x).copy_(x) if x.is_contiguous() else x
    gradient = WeightGradient(x, grad, layout, geometry, 1.0, x.dtype, False, "ieee")
    return gradient._replace(**options)


def launch_one(config, form, sides=(8, 64), geometry=SAME, **options):
    """Launches the kernel on images, and with arguments, that a form describes."""
    memory = {"planar_descriptor": "contiguous"}.get(config.loader, "channels_last")
    if form.scattered or form.scattered_output:  # no stride is a multiple of 16
        memory, sides = "scattered" if form.scattered else memory, (7, 5)
    convolution = convolution_of(form, memory, sides, geometry)
    if config.kernel == "conv":
        return launch.conv(convolution._replace(**options), config)
    return launch.weight_grad(gradient_of(convolution, **options), config)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"], indirect=True)
@pytest.mark.parametrize(
    "config, form",
    [
        (POINTER, compiled.Form(64)),
        (replace(POINTER, splits=2), compiled.Form(64, split=True)),
        (POINTER, compiled.Form(72, -1, scattered_output=True)),
        (POINTER, compiled.Form(35, scattered=True)),
        (GRAD_POINTER, compiled.Form(64)),
        (GRAD_POINTER, compiled.Form(40, -1)),
        (GRAD_POINTER, compiled.Form(35, scattered=True, ragged_boxes=True)),
        (CONV_BULK, compiled.Form(128)),
        (replace(CONV_BULK, splits=3), compiled.Form(64, split=True)),
        (replace(CONV_BULK, BLOCK_K=32), compiled.Form(128)),
        (
            replace(CONV_BULK, loader="planar_descriptor"),
            compiled.Form(128, -1, dilation=(1, 8)),  # whose taps start at multiples of 16 bytes
        ),
        pytest.param(CLUSTERED, compiled.Form(256, -1), marks=in_clusters),
        pytest.param(
            replace(CLUSTERED, splits=2), compiled.Form(128, split=True), marks=in_clusters
        ),
        (GRAD_BULK, compiled.Form(128)),
        (replace(GRAD_BULK, BLOCK_K=32), compiled.Form(128)),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_launched_is_what_the_checks_compile(gpu, config, form):
    if config.loader != "pointer" and gpu.target == "sm_80":
        pytest.skip("sm_80 has no bulk copies")
    padding = tuple((steps, steps) for steps in form.dilation)
    launch_one(config, form, geometry=Geometry((1, 1), padding, form.dilation))
    launched, *sums = gpu.loaded
    checked = compiled.compile_config(config, gpu.target, "bfloat16", form)
    assert launched.resources == checked.resources
    assert len(gpu.launched) == len(gpu.loaded) == 1 + (config.splits > 1)
    assert len(sums) == (config.splits > 1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("config", [POINTER, GRAD_POINTER, CONV_BULK], ids=lambda c: c.kind)
def test_of_merged_columns_too(gpu, config, sign):
    config = replace(config, merged=4, splits=1)
    convolution = convolution_of(compiled.Form(8, sign))
    call = convolution if config.kernel == "conv" else gradient_of(convolution)
    (launch.conv if config.kernel == "conv" else launch.weight_grad)(call, config)
    codes = [code.resources for code in gpu.loaded]
    form = form_of(problem_of_call(call), config)
    assert (form.channels, form.kernel_size) == (32, (3, 3))
    checked = compiled.compile_config(config, gpu.target, "bfloat16", form).resources
    assert len(codes) == 2 and codes[config.kernel == "conv"] == checked


def test_no_code_is_made_anew_for_other_sizes_and_paddings(gpu):
    sizes = [(8, 64), (16, 16), (1, 1), (7, 5)]
    for sides in sizes:
        for padding in (0, 1, 16):
            geometry = Geometry((1, 1), ((padding + 1, padding + 1),) * 2, (1, 1))
            launch_one(POINTER, compiled.Form(64), sides, geometry)
    assert len(gpu.launched) == 12 and len(gpu.loaded) == 1


def test_splits_make_no_code_anew(gpu):
    for splits in (2, 3, 16):
        launch_one(replace(GRAD_POINTER, splits=splits), compiled.Form(64))
    assert len(gpu.launched) == 6 and len(gpu.loaded) == 2  # each with its sum
    for splits in (2, 3, 4):
        launch_one(replace(POINTER, splits=splits), compiled.Form(64))
    assert len(gpu.launched) == 12 and len(gpu.loaded) == 4


@pytest.mark.parametrize("splits", [1, 2])
def test_neither_bias_nor_residual_nor_scales_make_code_anew(gpu, splits):
    residual = image(64, "channels_last")
    for options in (
        {},
        {"bias": None},
        {"residual": residual},
        {"bias": None, "residual": residual, "alpha": -0.3, "beta": 2.0},
        {"residual": residual, "beta": 0.0, "alpha": 0.0},
    ):
        launch_one(replace(POINTER, splits=splits), compiled.Form(64), **options)
    assert len(gpu.launched) == 5 * splits and len(gpu.loaded) == splits


@pytest.mark.parametrize("config", [GRAD_POINTER, replace(GRAD_POINTER, splits=1)])
def test_the_gradient_of_a_bias_makes_no_code_anew(gpu, config):
    for has_bias in (False, True):
        launch_one(config, compiled.Form(64), has_bias=has_bias)
    assert len(gpu.launched) == 2 * config.splits and len(gpu.loaded) == config.splits


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
def test_matrices_of_all_layers_are_unpacked_by_one_code(gpu, symmetry):
    for channels, kernel in ((64, (3, 3)), (128, (1, 1)), (72, (5, 4))):
        layout = Layout(channels, kernel, symmetry=symmetry)
        packed = torch.randn(layout.size).to(torch.bfloat16)
        launch.unpack_matrices(packed, layout, layout.taps, torch.bfloat16, "ieee")
    assert len(gpu.launched) == 3 and len(gpu.loaded) == 1
    checked = compiled.compile_matrices(launch.MATRICES_BLOCK, gpu.target, "bfloat16", layout.sign)
    assert gpu.loaded[0].resources == checked.resources


def shown(value):
    """What of an argument the GPU is told."""
    if isinstance(value, TensorDescriptor | GluonDescriptor):
        return [shown(value.base), {**vars(value), "base": None}]
    if isinstance(value, LazyDict):  # for hooks
        return value.get()
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "config",
    [POINTER, CONV_BULK, pytest.param(CLUSTERED, marks=in_clusters), GRAD_POINTER, GRAD_BULK],
)
def test_what_is_launched_again_is_what_triton_would_launch(gpu, config, splits, monkeypatch):
    """The first call of a plan goes through Triton's JIT, the next ones to the compiled kernel."""
    if config.kernel == "conv":
        form = compiled.Form(128 if config is CLUSTERED else 64)
        calls = [convolution_of(form, alpha=a, beta=0.5) for a in (1.0, -0.3, 2.0)]
    else:
        pairs = [[image(64, "channels_last") for _ in range(2)] for _ in range(3)]
        calls = [
            WeightGradient(*pair, Layout(64, (3, 3)), SAME, 0.5, torch.bfloat16, True, "ieee")
            for pair in pairs
        ]
    plan = plans.make_plan(calls[0], replace(config, splits=splits))
    memory = {}  # the same for all runs, so that they can be compared
    monkeypatch.setattr(
        plans.Written,
        "make",
        lambda written, device: memory.setdefault(
            written, torch.empty(written.shape, dtype=written.dtype)
        ),
    )
    launch.run(plan, calls[0])
    for call in calls[1:]:
        gpu.launched.clear()
        with monkeypatch.context() as patch:
            for kernel in KERNELS:
                patch.setattr(kernel, "run", None)
            launch.run(plan, call)
        again = gpu.launched[:]
        gpu.launched.clear()
        launch.run(plans.make_plan(call, replace(config, splits=splits)), call)
        assert len(again) == splits
        for one, other in zip(again, gpu.launched, strict=True):
            assert list(map(shown, one)) == list(map(shown, other))


def test_who_watches_launches_sees_all_of_them(gpu, monkeypatch):
    call = convolution_of(compiled.Form(64))
    plan, seen = plans.make_plan(call, POINTER), []
    monkeypatch.setattr(conv_kernel, "pre_run_hooks", [lambda *_, **__: seen.append("before")])
    launch.run(plan, call)
    launch.run(plan, call)
    assert seen == ["before"] * 2
    monkeypatch.setattr(conv_kernel, "pre_run_hooks", [])
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
    launch.run(plan, call)
    assert gpu.launched[-1][7] == seen.append and gpu.launched[-1][6].get()["name"] == "conv_kernel"
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    compiled_before = len(gpu.loaded)
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "gsan")
    monkeypatch.setattr(conv_kernel, "run", lambda *_, **__: seen.append("JIT"))
    launch.run(plan, call)
    assert seen[-1] == "JIT" and len(gpu.loaded) == compiled_before


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_runs_on_the_device_of_its_tensors(gpu, current, monkeypatch):
    call = convolution_of(compiled.Form(64))
    plan, made = plans.make_plan(call, POINTER), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext()
    )
    monkeypatch.setattr(launch, "_call", on_gpu(launch._call))
    for _ in range(2):
        launch.run(plan, call)
    assert made == [torch.device("cuda", 0)] * 2 * (current != 0) and len(gpu.launched) == 2


def on_gpu(make):
    return lambda each, tensors, scales, device: make(
        each, tensors, scales, torch.device("cuda", 0)
    )


@pytest.mark.parametrize("gpu", ["sm_80"], indirect=True)
def test_a_config_that_spills_is_known_before_it_is_launched(gpu):
    convolution = convolution_of(compiled.Form(128, -1))
    # a sum of 256 numbers a thread
    assert "spills" in launch.fault(convolution, ConvConfig((1, 16, 16), 128, 16, 4, 2))
    assert launch.fault(convolution, POINTER) is None
    assert not gpu.launched


@pytest.mark.parametrize(
    "config", [POINTER, replace(POINTER, splits=2), GRAD_POINTER, CONV_BULK, GRAD_BULK]
)
def test_asking_for_a_fault_compiles_what_is_then_launched(gpu, config):
    call = convolution_of(compiled.Form(128))
    if isinstance(config, WeightGradConfig):
        call = gradient_of(call)
    assert launch.fault(call, config) is None
    asked = len(gpu.loaded)
    launch.run(make_plan(call, config), call)
    assert asked == len(gpu.loaded) == len(gpu.launched) == 1 + (config.splits > 1)


def test_a_config_that_does_not_compile_is_known_too(gpu):
    config = ConvConfig((1, 3, 8), 32, 32)  # not a power of two
    fault = launch.fault(convolution_of(compiled.Form(64)), config)
    assert "power of 2" in fault or "Error" in fault


def test_what_is_compiled_ahead_is_what_is_launched(gpu, tmp_path):
    configs = (POINTER, replace(POINTER, splits=2), CONV_BULK, GRAD_POINTER, GRAD_BULK)
    jobs = []
    for channels, config in itertools.product((64, 128), configs):
        kernel = "conv" if isinstance(config, ConvConfig) else "weight_grad"
        problem = Problem(kernel, "bfloat16", Layout(channels, (3, 3)), (2, 8, 64), SAME)
        jobs.append(Job(90, problem, config))
    with Compilers(2) as compilers:
        assert list(compilers.compile(jobs)) == [None] * len(jobs)
    ahead = set(tmp_path.rglob("*.cubin"))
    for job in jobs:
        form = compiled.Form(job.problem.layout.channels)
        residual = image(form.channels, "channels_last", (16, 128))
        more = {"residual": residual} if job.problem.kernel == "conv" else {"has_bias": True}
        launch_one(job.config, form, sides=(16, 128), **more)
    layout = Layout(128, (3, 3))
    packed, stored = torch.randn(layout.size).to(torch.bfloat16), stored_taps(layout, "ieee")
    launch.unpack_matrices(packed, layout, stored, torch.bfloat16, "ieee")
    assert {path.stem for path in ahead} == {
        "conv_kernel", "weight_grad_kernel", "sum_splits_kernel", "matrices_kernel"
    }  # fmt: skip
    assert set(tmp_path.rglob("*.cubin")) == ahead
