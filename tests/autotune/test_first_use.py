"""Kernels that compute wrongly are found out when they first serve, and never serve again."""

import warnings
from dataclasses import replace

import pytest
import torch
from stand_ins import GEOMETRY, GPU, config_of, convolution_of, gradient_of

from triton_tied import reference, rounding
from triton_tied.autotune import disk_cache, first_use, select, tuned_configs
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.verdict import excess_of
from triton_tied.geometry import Geometry
from triton_tied.kernels import launch
from triton_tied.kernels.calls import Convolution, WeightGradient
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig
from triton_tied.kernels.merging import merge
from triton_tied.kernels.stored_taps import expand_matrices
from triton_tied.kernels.toolchain import ToolchainError
from triton_tied.operators import definitions
from triton_tied.packing import Layout, expand

LAYOUT = Layout(16, (3, 3))


def plain(call):
    """The launch's result as plain PyTorch computes it in float32."""
    dtype = call.dtype if isinstance(call, WeightGradient) else call.x.dtype
    return _plain(
        call._replace(
            **{
                name: value.float()
                for name, value in call._asdict().items()
                if torch.is_tensor(value)
            }
        )
    ).to(dtype)


def _plain(call):
    if isinstance(call, WeightGradient):
        gradient = reference.weight_grad(call.x, call.grad, call.layout, call.geometry, call.alpha)
        bias = [call.alpha * call.grad.sum((0, 2, 3))] if call.has_bias else []
        return torch.cat([gradient, *bias])
    return reference.convolve(
        call.x, dense_weight(call), call.bias, call.geometry, call.layout.groups,
        alpha=call.alpha, residual=call.residual, beta=call.beta,
    )  # fmt: skip


def dense_weight(call):
    """Of what the kernel reads: packed or, of each pair of taps and the centre, a matrix."""
    layout = call.layout
    if call.weights.dim() == 1:
        return expand(call.weights, layout)
    matrices = call.weights.float()
    opposite = layout.sign * matrices[:, : layout.pairs].flip(1).transpose(2, 3)
    taps = torch.cat([matrices, opposite], 1)[:, : layout.taps]
    return taps.movedim(1, -1).reshape(layout.weight_shape)


def ragged(result):
    """Wrong in the last column of the last image, or the last number, alone."""
    wrong = result.clone()
    wrong[-1, ..., -1:] += 100
    return wrong


WRONG = {
    "off": lambda result: result * 1.01,
    "NaN": lambda result: torch.full_like(result, float("nan")),
    "off on the edge": lambda result: (
        ragged(result[None])[0] if result.dim() == 1 else ragged(result)
    ),
}


@pytest.fixture
def gpu(absent_h200, monkeypatch):
    """Launches are computed in plain PyTorch; those of the configs in ``wrong`` by what it names.
    Lists the configs launched."""
    wrong, launched = {}, []

    def run(plan, call):
        launched.append(plan.config)
        return wrong.get(plan.config, lambda result: result)(plain(call))

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(first_use, "checks", lambda device: True)
    return wrong, launched


def convolution(n=4, dtype=torch.float32, **options):
    x = torch.randn(n, 16, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    packed = options.pop("packed", torch.randn(LAYOUT.size).to(dtype))
    return convolution_of(x, LAYOUT, GEOMETRY)._replace(packed=packed, weights=packed, **options)


def gradient(n=4, **options):
    x, grad = (
        torch.randn(n, 16, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    return gradient_of(x, grad, LAYOUT, GEOMETRY, **options)


def gradient_with_bias(n=4):
    return gradient(n, has_bias=True)


def ranked(call):
    return make_shortlist(select.problem_of_call(call), GPU).ranked


def found_wrong(gpu):
    """A call whose first config was found to be wrong; that config, and the one that serves."""
    wrong, _ = gpu
    call = convolution()
    first, second = ranked(call)[:2]
    wrong[first] = WRONG["off"]
    with pytest.warns(UserWarning):
        config_of(call)
    return call, first, second


@pytest.mark.parametrize("make", [convolution, gradient, gradient_with_bias])
@pytest.mark.parametrize("error", WRONG)
def test_a_wrong_kernel_is_struck_off_and_the_next_is_taken(gpu, make, error):
    wrong, launched = gpu
    call = make()
    first, second = ranked(call)[:2]
    wrong[first] = WRONG[error]
    with pytest.warns(UserWarning, match="computes wrongly on NVIDIA H200") as warned:
        assert config_of(call) == second
    assert launched == [first, second] and repr(first) in str(warned[0].message)


def test_what_was_checked_is_remembered_by_the_table(gpu, absent_h200, recwarn):
    _, launched = gpu
    call, first, second = found_wrong(gpu)
    tuned_configs.forget()  # as another process would
    assert config_of(call) == second and launched == [first, second]
    checked = disk_cache.load(disk_cache.path_of(absent_h200), absent_h200).checked
    assert sorted(checked.values()) == [False, True]
    assert tuned_configs.verdicts_of(call.x.device) == checked
    config_of(convolution(n=12))  # the same machine code
    assert launched == [first, second]
    config_of(convolution(bias=torch.randn(16)))  # other code
    assert len(launched) > 2


def test_without_a_folder_verdicts_are_kept_in_memory(gpu, no_folder):
    _, launched = gpu
    call = convolution()
    with pytest.warns(UserWarning, match="cannot be locked"):
        config_of(call)
    tuned_configs.read_again()
    config_of(call)
    assert launched == [ranked(call)[0]]


@pytest.mark.parametrize("make", [convolution, gradient])
def test_where_all_are_wrong_the_reference_serves(gpu, make):
    wrong, launched = gpu
    call = make()
    wrong |= dict.fromkeys(ranked(call), WRONG["NaN"])
    with pytest.warns(UserWarning, match="plain PyTorch serves"):
        assert config_of(call) is None
    tried = len(launched)
    assert tried == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_of(call) is None  # said once
    assert len(launched) == tried


def test_short_memory_is_said_and_the_kernel_serves(gpu, monkeypatch):
    def run(plan, call):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(launch, "run", run)
    call = convolution()
    with pytest.warns(UserWarning, match="no memory to check"):
        assert config_of(call) == ranked(call)[0]


def test_what_is_known_to_be_wrong_never_serves(gpu, monkeypatch):
    _, launched = gpu
    call, first, second = found_wrong(gpu)
    monkeypatch.setattr(first_use, "checks", lambda device: False)  # in a capture, say
    assert config_of(call) == second and launched == [first, second]


@pytest.mark.parametrize("make", [convolution, gradient])
def test_of_no_image_nothing_is_known(gpu, make):
    _, launched = gpu
    call = make(0)
    assert config_of(call) is not None and not launched
    assert not tuned_configs.verdicts_of(call.x.device)


def test_of_offsets_of_64_bits_nothing_is_known(gpu):
    _, launched = gpu
    call = convolution()
    problem = select.problem_of_call(call)
    config = ranked(call)[0]
    assert first_use.why_wrong(replace(problem, wide=True), call, config) is None and not launched
    assert first_use.why_wrong(problem, call, config) is None and launched


def test_a_launch_that_is_refused_is_no_error_of_the_users(gpu, monkeypatch):
    call = convolution()
    first, second = ranked(call)[:2]

    def run(plan, call):
        if plan.config == first:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return plain(call)

    monkeypatch.setattr(launch, "run", run)
    with pytest.warns(UserWarning, match="cannot be launched .* invalid argument"):
        assert config_of(call) == second


def test_a_broken_toolchain_is_the_users_to_know(gpu, monkeypatch):
    def unpack_matrices(*_):
        raise ToolchainError("no C compiler")

    monkeypatch.setattr(launch, "unpack_matrices", unpack_matrices)
    with pytest.raises(ToolchainError, match="no C compiler"):
        first_use.unpacks_matrices(torch.randn(LAYOUT.size), LAYOUT, torch.float32)


def test_matrices_that_are_unpacked_wrongly_are_found_out(gpu, monkeypatch):
    layout, packed, made = Layout(128, (3, 3)), torch.randn(Layout(128, (3, 3)).size), []

    def unpack(packed, layout, stored, dtype, precision):
        made.append(dtype)
        matrices = expand_matrices(packed, layout, stored, dtype, precision)
        return matrices if dtype == torch.float16 else matrices.mT  # transposed, so wrong

    monkeypatch.setattr(launch, "unpack_matrices", unpack)
    assert first_use.unpacks_matrices(packed, layout, torch.float16)
    with pytest.warns(UserWarning, match="computes wrongly on NVIDIA H200.*matrices"):
        assert not first_use.unpacks_matrices(packed, layout, torch.bfloat16)
    assert first_use.unpacks_matrices(packed, layout, torch.float16)  # both are remembered
    assert not first_use.unpacks_matrices(packed, layout, torch.bfloat16)
    assert made == [torch.float16, torch.bfloat16]
    weights = definitions.read_weights(packed, layout, torch.bfloat16)  # PyTorch makes them
    assert torch.equal(weights, expand_matrices(packed, layout, 5, torch.bfloat16, "ieee"))


def test_code_for_other_alignment_and_formats_is_checked_apart(gpu):
    _, launched = gpu
    one_further = torch.randn(17)[1:]  # not a multiple of 16 bytes
    calls = [
        convolution(),
        convolution(bias=torch.randn(16)),
        convolution(bias=one_further),
        convolution(channels_last=False),
        convolution(packed=torch.randn(LAYOUT.size + 1)[1:]),
        convolution(dtype=torch.float16),
        convolution(dtype=torch.float16, bias=torch.randn(16).half()),
        convolution(dtype=torch.float16, bias=torch.randn(16)),  # as under autocast
        convolution(residual=torch.randn(4, 16, 8, 8)),
        gradient(),
        gradient_with_bias(),
        gradient(dtype=torch.float16),
    ]
    for call in calls:
        config_of(call)
    assert len(launched) == len(calls)


@pytest.mark.parametrize("make", [convolution, gradient])
def test_code_of_merged_columns_is_checked_for_each_kernel_that_they_have(gpu, make):
    _, launched = gpu
    config = {convolution: ConvConfig, gradient: WeightGradConfig}[make](
        (1, 4, 8), 16, 16, merged=2
    )
    for padding, kernel_w in ((1, 3), (2, 2), (1, 3), (2, 2)):
        geometry = Geometry((1, 1), ((1, 1), (padding,) * 2), (1, 1))
        assert merge(LAYOUT, geometry, 2)[0].kernel_size == (3, kernel_w)
        call = make()._replace(geometry=geometry)
        if make is gradient:
            grad = torch.randn(4, 16, 8, 6 + 2 * padding)
            call = call._replace(grad=grad.contiguous(memory_format=torch.channels_last))
        assert not first_use.why_wrong(select.problem_of_call(call), call, config)
    assert launched == [config] * 2


def test_nothing_is_checked_on_the_cpu_in_a_capture_or_where_the_user_says_so(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_use.checks(gpu) and not first_use.checks(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not first_use.checks(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_TIED_CHECK", "0")
    assert not first_use.checks(gpu)


@pytest.mark.parametrize("n", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_the_slice_runs_the_same_code_on_memory_as_the_callers(n, images):
    config = ConvConfig((images, 4, 4), 16, 16)
    x = torch.randn(n, 16, 9, 33).half()[..., 1:]  # 2 bytes beyond a multiple of 16
    packed = torch.randn(LAYOUT.size).half()
    call = convolution(packed=packed, residual=torch.randn(n, 16, 9, 32).half(), x=x)
    small = first_use._small(call, config)
    assert torch.equal(small.weights, small.packed)
    assert small.x.stride() == x.stride() and small.x.data_ptr() % 16 == x.data_ptr() % 16
    assert len(small.x) <= n and len(small.residual) == len(small.x)
    assert (len(small.x) % images == 0) == (n % images == 0)
    assert len(small.x) > images or len(small.x) == n
    assert small.x.std() > 0.5 and small.packed.std() > 0.5 and small.alpha != 1 != small.beta


def test_the_random_numbers_of_the_user_are_left_alone(gpu):
    call = convolution()
    before = torch.get_rng_state()
    config_of(call)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("symmetry", ["self_adjoint", "skew_adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_right_result_is_within_the_bound_and_one_lost_term_is_not(dtype, symmetry):
    layout = Layout(16, (3, 3), 2, symmetry)
    x, grad = (torch.randn(2, 16, 8, 8).to(dtype) for _ in range(2))
    packed, bias = torch.randn(layout.size).to(dtype), torch.randn(16).to(dtype)
    conv = Convolution(x, packed, packed, bias, grad, layout, GEOMETRY, -0.7, 1.9, False, "ieee")
    single = torch.randn(layout.size)  # as under autocast
    cast = conv._replace(packed=single, weights=single.to(dtype), bias=torch.randn(16))
    matrices = expand_matrices(single, layout, 5, dtype, "ieee")
    unpacked = cast._replace(weights=matrices)
    grads = gradient_of(x, grad, layout, GEOMETRY, alpha=-0.7, precision="ieee")
    lost, lost_grad = x.clone(), grad.clone()
    lost[0, 3, 2, 5] = lost_grad[0, 3, 2, 5] = 0
    with_bias = [grads._replace(has_bias=True, dtype=each) for each in (dtype, torch.float32)]
    for call in (conv, cast, unpacked, grads, *with_bias):
        assert excess_of(call, plain(call)) <= 1
        assert excess_of(call, plain(call._replace(x=lost))) > 1
    for call in (conv, cast):
        assert excess_of(call, plain(call._replace(residual=lost_grad))) > 1
        assert excess_of(call, plain(call._replace(bias=call.bias.roll(1)))) > 1
    for call in with_bias:
        wrong = plain(call)
        wrong[layout.size :] = plain(call._replace(grad=lost_grad))[layout.size :]
        assert excess_of(call, wrong) > 1
    assert not excess_of(conv, plain(conv) * float("nan")) <= 1


def test_a_sum_so_long_that_any_result_is_within_the_bound_is_still_told_from_zeros(monkeypatch):
    monkeypatch.setattr(rounding, "_accumulation", lambda *_: (2.0**-22, 1e-38))  # of a GPU
    layout = Layout(8, (3, 3))
    x, grad = (torch.randn(1, 8, 320, 320).half() for _ in range(2))
    call = gradient_of(x, grad, layout, GEOMETRY)
    truth = plain(call)
    assert excess_of(call, truth) <= 1
    for wrong in (torch.zeros_like(truth), -truth, truth * 1.05):
        assert excess_of(call, wrong) > 1
