"""``SkewOrthogonalConv2d`` against the formula of the papers, written out with a dense filter."""

import copy
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

import triton_tied as tt

DTYPE = torch.float64
SKEW = "skew_adjoint"
OPTIONS = {"kernel_size": 3, "dtype": DTYPE}


def matrices_of(weight, groups):
    """Of each group the four matrices of [out, in, KH, KW]: out; in; out KH | in KW; out KW | in
    KH as rows."""
    for part in weight.chunk(groups):
        o, i, h, w = part.shape
        yield (
            part.reshape(o, i * h * w),
            part.transpose(0, 1).reshape(i, o * h * w),
            part.permute(0, 2, 1, 3).reshape(o * h, i * w),
            part.permute(0, 3, 1, 2).reshape(o * w, i * h),
        )


def published(x, filter, bias, *, stride, out_channels, terms, correction, groups, padding_mode):
    """exp(c W / sigma) with W the half difference of a filter and its transpose."""
    transposed = torch.cat([part.transpose(0, 1) for part in filter.chunk(groups)]).flip(2, 3)
    weight = (filter - transposed) / 2
    sigmas = [
        torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in four]).amin()
        for four in matrices_of(weight, groups)
    ]
    parts = [part / sigma for part, sigma in zip(weight.chunk(groups), sigmas, strict=True)]
    weight = correction * torch.cat(parts)
    n, c, h, w = x.shape
    blocks = x.view(n, c, h // stride, stride, w // stride, stride).permute(0, 1, 3, 5, 2, 4)
    z = blocks.reshape(n, c * stride**2, h // stride, w // stride)
    if z.shape[1] < weight.shape[0]:
        zeros = z.new_zeros(n, weight.shape[0] - z.shape[1], *z.shape[2:])
        z = torch.cat([z, zeros], 1)
    result = power = z
    sides = [k // 2 for k in reversed(weight.shape[2:]) for _ in range(2)]
    for i in range(1, terms + 1):
        mode = "constant" if padding_mode == "zeros" else padding_mode
        power = F.conv2d(F.pad(power, sides, mode), weight, groups=groups)
        result = result + power / math.factorial(i)
    return result[:, :out_channels] + bias.view(-1, 1, 1)


def converge(layer):
    """What the power method comes to: the right singular vectors."""
    weight = tt.unpack(layer.packed_weight, *sizes_of(layer)).detach()
    for group, matrices in enumerate(matrices_of(weight, layer.groups)):
        for vectors, matrix in (
            (layer.flat_vectors, matrices[0]),
            (layer.square_vectors, matrices[2]),
        ):
            vectors[group] = torch.linalg.svd(matrix.to(vectors.dtype)).Vh[0]


def sizes_of(layer):
    channels = max(layer.in_channels * layer.stride**2, layer.out_channels)
    return channels, layer.kernel_size, layer.groups, SKEW


@st.composite
def layers(draw):
    stride, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    in_channels = draw(st.integers(1, 3)) * (groups if stride == 1 else 1)
    out_channels = draw(st.integers(1, 3)) * groups
    options = {
        "kernel_size": draw(st.sampled_from([1, 3, (3, 1), (1, 5)])),
        "stride": stride,
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "recompute": draw(st.booleans()),
    }
    layer = tt.SkewOrthogonalConv2d(in_channels, out_channels, **options, dtype=DTYPE)
    return layer, [stride * draw(st.integers(4, 6)) for _ in range(2)], draw(st.booleans())


@settings(max_examples=25)
@given(layers())
def test_outputs_and_gradients_are_the_published_ones(drawn):
    layer, sides, training = drawn
    channels, kernel_size, groups, _ = sizes_of(layer)
    if channels // groups == 1 and layer.kernel_size == (1, 1):
        return  # A is zero, and the published layer divides by zero
    x = torch.randn(2, layer.in_channels, *sides, dtype=DTYPE, requires_grad=True)
    filter = torch.randn(channels, channels // groups, *kernel_size, dtype=DTYPE)
    layer.load_state_dict({"random_conv_filter": filter, "bias": layer.bias}, strict=False)
    converge(layer.train(training))
    filter.requires_grad_()
    expected = published(
        x,
        filter,
        layer.bias,
        stride=layer.stride,
        out_channels=layer.out_channels,
        terms=5 if training else 12,
        correction=1.0 if kernel_size == (1, 1) else 0.7,
        groups=groups,
        padding_mode=layer.padding_mode,
    )
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(found)
    want = torch.autograd.grad(expected, (x, filter, layer.bias), upstream)
    got_x, got_packed, got_bias = torch.autograd.grad(
        found, (x, layer.packed_weight, layer.bias), upstream
    )
    # Their filter enters as W = pack(filter), so that its gradient is that of the packed vector,
    # half in each of both places.
    (got_filter,) = torch.autograd.grad(tt.pack(filter, groups, SKEW), filter, got_packed)
    torch.testing.assert_close((got_x, got_filter, got_bias), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("terms", [1, 5, 12])
def test_the_jacobian_is_orthogonal_up_to_the_bound(terms, stride, groups, padding_mode):
    options = {"stride": stride, "groups": groups, "padding_mode": padding_mode, **OPTIONS}
    layer = tt.SkewOrthogonalConv2d(2, 2 * stride**2, eval_terms=terms, bias=False, **options)
    layer.eval()
    J = oracle.matrix_of(layer, 2, 4 * stride, 3 * stride)
    error = layer.lipschitz_bound() - 1
    values = torch.linalg.svdvals(J)
    assert values.max() <= 1 + error + 1e-12 and values.min() >= 1 - error - 1e-12
    defect = torch.linalg.matrix_norm(J.T @ J - torch.eye(len(J), dtype=DTYPE), 2)
    assert defect <= 2 * error + error**2 + 1e-12
    if terms == 12:
        assert defect < 1e-4
    x = torch.randn(3, 2, 4 * stride, 3 * stride, dtype=DTYPE)
    ratio = layer(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert (ratio - 1).abs().max() <= error + 1e-12


@pytest.mark.parametrize(("channels", "out_channels"), [(2, 5), (5, 2)])
def test_with_channels_of_zeros_the_norm_is_kept_and_with_fewer_it_cannot_grow(
    channels, out_channels
):
    layer = tt.SkewOrthogonalConv2d(channels, out_channels, **OPTIONS).eval()
    J = oracle.matrix_of(lambda x: layer(x) - layer.bias[:, None, None], channels, 4, 4)
    J = J if channels < out_channels else J.T  # orthonormal columns, or rows
    assert (J.T @ J - torch.eye(J.shape[1], dtype=DTYPE)).abs().max() < 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_the_lipschitz_bound_does_not_rest_on_the_power_method(training):
    """Its vectors are those of another weight, so that the normalised weight is too large."""
    layer = tt.SkewOrthogonalConv2d(3, 3, padding_mode="circular", bias=False, **OPTIONS)
    with torch.no_grad():
        layer.packed_weight.normal_()
    layer.train(training)
    weight = tt.unpack(layer.normalized(), *sizes_of(layer)).detach()
    four = next(matrices_of(weight, 1))
    assert min(torch.linalg.matrix_norm(matrix, 2) for matrix in four) > 0.72
    bound = layer.lipschitz_bound()
    frozen = copy.deepcopy(layer)
    frozen.normalized = lambda iterations: tt.pack(weight, symmetry=SKEW)  # no step in between
    J = oracle.matrix_of(frozen, 3, 5, 5)
    assert torch.linalg.matrix_norm(J, 2) <= bound


def test_training_keeps_the_layer_orthogonal():
    layer = tt.SkewOrthogonalConv2d(4, 4, **OPTIONS, bias=False)
    target = torch.randn(2, 4, 5, 5, dtype=DTYPE)
    x = torch.randn(2, 4, 5, 5, dtype=DTYPE)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    layer.eval()
    J = oracle.matrix_of(layer, 4, 4, 4)
    assert (J.T @ J - torch.eye(64, dtype=DTYPE)).abs().max() < 1e-3
    for iterations, most in ((0, 2), (200, 1.02)):  # one step in each forward follows the weight
        weight = tt.unpack(layer.normalized(iterations), *sizes_of(layer)).detach()
        four = next(matrices_of(weight, 1))
        least = min(torch.linalg.matrix_norm(matrix, 2) for matrix in four)
        assert 0.7 * (1 - 1e-9) < least < 0.7 * most


def test_a_state_dict_brings_back_the_same_layer():
    layer = tt.SkewOrthogonalConv2d(3, 5, **OPTIONS)
    x = torch.randn(2, 3, 4, 4, dtype=DTYPE)
    layer(x)
    other = tt.SkewOrthogonalConv2d(3, 5, **OPTIONS)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x))


def published_state(channels, groups, vectors, **more):
    shape = (channels // groups, channels // groups, 3, 3)
    filter = torch.randn(*([groups] if groups > 1 else []), *shape, dtype=DTYPE)
    return filter, {**{name: torch.randn(1) for name in vectors}, **more}


@pytest.mark.parametrize("groups", [1, 2])
def test_published_checkpoints_are_loaded(groups):
    """2021: random_conv_filter, with a leading axis of groups where there are any, u1 ... v4 and
    correction. 2022: weight, and _u1 ... _v4."""
    options = {"groups": groups, **OPTIONS}
    for key, under in (("random_conv_filter", ""), ("weight", "_")):
        layer = tt.SkewOrthogonalConv2d(2, 4, **options)
        vectors = [f"{under}{kind}{n}" for kind in "uv" for n in "1234"]
        bias = torch.randn(4, dtype=DTYPE)
        filter, state = published_state(4, groups, vectors, bias=bias)
        state[key] = filter
        if not under:
            state["correction"] = torch.tensor([0.7])
        net = torch.nn.Sequential(layer)
        net.load_state_dict({f"0.{name}": value for name, value in state.items()})
        parts = [part.squeeze(0) for part in filter.chunk(groups)] if groups > 1 else [filter]
        half = [(part - part.transpose(0, 1).flip(2, 3)) / 2 for part in parts]
        weight = tt.unpack(layer.packed_weight, 4, 3, groups, SKEW)
        assert torch.equal(weight, torch.cat(half)) and torch.equal(layer.bias, bias)
        # The power method has begun anew, so that the layer can be evaluated at once.
        found = tt.unpack(layer.normalized(), 4, 3, groups, SKEW).detach()
        for four in matrices_of(found, groups):
            least = min(torch.linalg.matrix_norm(matrix, 2) for matrix in four)
            assert 0.7 * (1 - 1e-9) < least < 0.7 * 1.05


def test_wrong_checkpoints_are_refused():
    layer = tt.SkewOrthogonalConv2d(4, 4, **OPTIONS)
    before = copy.deepcopy(layer.state_dict())
    filter = torch.randn(4, 4, 3, 3, dtype=DTYPE)
    for state, message in (
        ({"random_conv_filter": filter, "correction": torch.ones(1)}, "correction=1.*0.7"),
        ({"random_conv_filter": filter, **layer.state_dict()}, "packed_weight.*too: which"),
        ({"random_conv_filter": filter[:3]}, r"got weight of size \[3, 4, 3, 3\]"),
        ({"random_conv_filter": filter[:3, :3]}, "size mismatch for packed_weight"),
        ({"random_conv_filter": filter.tolist()}, "must be Tensor, not list"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, strict=False)
        assert all(torch.equal(layer.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(training):
    layer = tt.SkewOrthogonalConv2d(2, 8, 3, stride=2).train(training)
    compiled_layer = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second with the vectors of the first
        x = torch.randn(2, 2, 6, 6)
        for each in (layer, compiled):
            each(x).square().mean().backward()
        torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled_layer.packed_weight.grad, layer.packed_weight.grad)


def test_under_autocast_the_normalisation_is_not_rounded():
    layer = tt.SkewOrthogonalConv2d(4, 4, 3).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            torch.equal(layer.normalized(), layer.normalized()) and layer(x).dtype == torch.bfloat16
        )
        inside = layer.normalized()
    assert torch.equal(inside, layer.normalized())


def test_an_evaluation_in_between_does_not_disturb_a_backward():
    layer = tt.SkewOrthogonalConv2d(2, 2, **OPTIONS)
    x = torch.randn(1, 2, 4, 4, dtype=DTYPE)
    first = layer.eval()(x)
    layer.train()(x)
    first.sum().backward()
    assert layer.packed_weight.grad.abs().max() > 0


def test_a_weight_of_zero_is_the_identity():
    layer = tt.SkewOrthogonalConv2d(2, 2, bias=False, **OPTIONS)
    torch.nn.init.zeros_(layer.packed_weight)
    x = torch.randn(1, 2, 4, 4, dtype=DTYPE)
    assert torch.equal(layer(x), x)
    single = tt.SkewOrthogonalConv2d(1, 1, 1, bias=False, dtype=DTYPE)  # has no number at all
    assert torch.equal(single(x[:, :1]), x[:, :1])


def test_unbatched_half_and_meta():
    layer = tt.SkewOrthogonalConv2d(2, 4, 3, stride=2)
    x = torch.randn(2, 6, 6)
    torch.testing.assert_close(layer.eval()(x), layer(x[None])[0])
    assert layer.half()(x.half()).dtype == torch.float16
    on_meta = tt.SkewOrthogonalConv2d(2, 4, 3, stride=2, device="meta")
    assert on_meta(x.to("meta")).shape == (4, 3, 3)


def test_it_shows_what_it_is():
    shown = repr(tt.SkewOrthogonalConv2d(16, 32, 3, stride=2, eval_terms=14, bias=False))
    assert shown == (
        "SkewOrthogonalConv2d(16, 32, kernel_size=(3, 3), stride=2, eval_terms=14, bias=False, "
        "packed_weight=18400 of 36864)"
    )


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels should be positive, got in_channels=0"),
        ({"out_channels": -1}, ValueError, "out_channels should be positive"),
        ({"out_channels": 2.5}, TypeError, "out_channels must be an int"),
        ({"kernel_size": 2}, ValueError, r"SkewOrthogonalConv2d needs an odd kernel_size"),
        ({"kernel_size": 0}, ValueError, "kernel_size should be positive"),
        ({"stride": 0}, ValueError, "stride should be positive, got stride=0"),
        ({"groups": 3}, ValueError, "channels=4, groups=3"),
        ({"padding_mode": "reflect"}, ValueError, "'zeros' or 'circular', got 'reflect'"),
        ({"train_terms": 0}, ValueError, "train_terms should be positive, got train_terms=0"),
        ({"eval_terms": None}, TypeError, "eval_terms must be an int"),
        ({"correction": 0}, ValueError, "correction should be positive, got correction=0"),
        ({"correction": -0.7}, ValueError, "correction must be finite and not negative"),
    ],
    ids=str,
)
def test_mistakes_are_told(wrong, error, message):
    with pytest.raises(error, match=message):
        tt.SkewOrthogonalConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **wrong})


def test_numbers_are_not_drawn_where_pruning_would_lose_them():
    layer = prune.identity(tt.SkewOrthogonalConv2d(4, 4, **OPTIONS), "packed_weight")
    before = layer.packed_weight_orig.clone()
    with pytest.raises(RuntimeError, match="SkewOrthogonalConv2d is computed .* by pruning"):
        layer.reset_parameters()
    assert torch.equal(layer.packed_weight_orig, before)


def test_images_that_do_not_fit_are_told():
    layer = tt.SkewOrthogonalConv2d(4, 4, 3, stride=2)
    for x, error, message in (
        (torch.zeros(1, 3, 4, 4), RuntimeError, r"\[N, 4, H, W\].*\[1, 3, 4, 4\]"),
        (torch.zeros(4, 4), RuntimeError, r"\[N, 4, H, W\].*\[4, 4\]"),
        (torch.zeros(1, 4, 4, 5), RuntimeError, r"divisible by stride=2.*\[1, 4, 4, 5\]"),
        (None, TypeError, "'input' must be Tensor, not NoneType"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
