"""The algebra: against a brute-force count, the formula written out, and autograd."""

import itertools
import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import triton_tied as tt
from triton_tied import packing

SYMMETRIES = ["self_adjoint", "skew_adjoint"]
SUPPORTED_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [  # channels, kernel_size, groups
    (5, (3, 3), 1),
    (6, (3, 3), 3),
    (4, (2, 2), 1),
    (4, (2, 3), 2),
    (3, (1, 7), 1),
    (7, (1, 1), 1),
    (4, (3, 3), 4),
    (4, (1, 1), 4),
    (1, (3, 3), 1),
    (1, (1,), 1),
    (4, (5,), 1),
    (6, (4,), 2),
    (3, (3, 3, 3), 1),
    (4, (2, 1, 3), 2),
]


@st.composite
def layouts(draw):
    groups = draw(st.integers(1, 4))
    channels = groups * draw(st.integers(1, 6))
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return channels, kernel, groups, draw(st.sampled_from(SYMMETRIES))


def random_packed(channels, kernel, groups, symmetry, dtype=torch.float64):
    return torch.randn(tt.packed_size(channels, kernel, groups, symmetry)).to(dtype)


def mirror(weight, groups, symmetry):
    """``s * flip(W)^T`` inside each group, by slices."""
    sign = {"self_adjoint": 1, "skew_adjoint": -1}[symmetry]
    flipped = weight.flip(tuple(range(2, weight.dim())))
    return torch.cat([sign * part.transpose(0, 1) for part in flipped.chunk(groups)])


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_packed_size_is_the_number_of_free_entries(channels, kernel, groups, symmetry):
    c = channels // groups
    entries = itertools.product(range(c), range(c), *map(range, kernel))
    free = set()
    for i, j, *tap in entries:
        opposite = (j, i, *(k - 1 - t for k, t in zip(kernel, tap, strict=True)))
        own = (i, j, *tap)
        if opposite == own and symmetry == "skew_adjoint":
            continue  # W = -W: always zero
        free.add(min(own, opposite))
    assert tt.packed_size(channels, kernel, groups, symmetry) == groups * len(free)


def test_packed_size_of_the_documented_examples():
    sizes = [(64, 3, 18464, 18400), (3, 3, 42, 39), (16, 2, 512, 512)]
    for channels, kernel, self_adjoint, skew_adjoint in sizes:
        assert tt.packed_size(channels, kernel) == self_adjoint
        assert tt.packed_size(channels, kernel, symmetry="skew_adjoint") == skew_adjoint


@given(layouts(), st.booleans(), st.booleans())
def test_unpack_equals_the_formula_written_out(layout, channels_last, small):
    channels, kernel, groups, symmetry = layout
    memory_format = torch.contiguous_format
    if channels_last and len(kernel) > 1:
        memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[len(kernel)]
    packed = random_packed(*layout)
    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr(packing, "_MAX_GATHERED", 0)
        weight = tt.unpack(packed, *layout, memory_format=memory_format)
    assert torch.equal(weight, oracle.expand(packed, channels, kernel, groups, symmetry))
    assert weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_tie_is_exact_and_pack_undoes_unpack(channels, kernel, groups, symmetry, dtype, expansion):
    packed = random_packed(channels, kernel, groups, symmetry, dtype)
    weight = tt.unpack(packed, channels, kernel, groups, symmetry)
    assert weight.dtype == dtype and weight.shape == (channels, channels // groups, *kernel)
    assert torch.equal(weight, mirror(weight, groups, symmetry))
    assert torch.equal(tt.pack(weight, groups, symmetry), packed)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_pack_is_the_orthogonal_projection(channels, kernel, groups, symmetry):
    weight = torch.randn(channels, channels // groups, *kernel, dtype=torch.float64)
    nearest = tt.unpack(tt.pack(weight, groups, symmetry), channels, kernel, groups, symmetry)
    torch.testing.assert_close(nearest, (weight + mirror(weight, groups, symmetry)) / 2)
    other = tt.unpack(
        random_packed(channels, kernel, groups, symmetry), channels, kernel, groups, symmetry
    )
    # what the projection removes is at right angles to every tied weight
    assert abs(((weight - nearest) * other).sum()) < 1e-12 * weight.norm() * (1 + other.norm())


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 1, 1)])
def test_joined_dense_weights_are_packed_as_groups_and_joined_vectors_are_not(kernel, symmetry):
    parts = [random_packed(3, kernel, 1, symmetry) for _ in range(4)]
    weight = torch.cat([oracle.expand(part, 3, kernel, 1, symmetry) for part in parts])
    grouped = tt.pack(weight, 4, symmetry)
    assert torch.equal(tt.unpack(grouped, 12, kernel, 4, symmetry), weight)
    one_kind_of_number = len(kernel) != 1  # pairs only, or centres only
    assert torch.equal(torch.cat(parts), grouped) is one_kind_of_number


@pytest.mark.parametrize("dtype, large", [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_pack_and_unpack_do_not_overflow_at_the_largest_numbers(dtype, large, expansion):
    weight = torch.full((3, 3, 3, 3), large, dtype=dtype)
    assert torch.equal(tt.unpack(tt.pack(weight), 3, 3), weight)


def test_gradient_of_the_centre_diagonal_does_not_overflow_in_half(expansion):
    packed = torch.zeros(tt.packed_size(2, 1), dtype=torch.float16, requires_grad=True)
    tt.unpack(packed, 2, 1).backward(torch.full((2, 2, 1, 1), 5e4, dtype=torch.float16))
    once = torch.tensor(5e4, dtype=torch.float16)
    assert torch.equal(packed.grad, torch.stack([once, once + once, once]))


def test_not_a_number_stays_in_its_two_places(expansion):
    for symmetry in SYMMETRIES:
        packed = random_packed(4, (3, 3), 1, symmetry)
        packed[-1] = math.nan  # in the last row of the centre
        weight = tt.unpack(packed, 4, 3, symmetry=symmetry)
        places = weight.isnan().nonzero().tolist()
        expected = [[3, 3, 1, 1]] if symmetry == "self_adjoint" else [[2, 3, 1, 1], [3, 2, 1, 1]]
        assert places == expected


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_gradient_is_that_of_the_formula(channels, kernel, groups, symmetry, expansion):
    layout = (channels, kernel, groups, symmetry)
    packed = random_packed(*layout).requires_grad_()
    upstream = torch.randn(channels, channels // groups, *kernel, dtype=torch.float64)
    (expected,) = torch.autograd.grad(oracle.expand(packed, *layout), packed, upstream)
    # an upstream gradient in other memory orders, and one whose entries share memory
    orders = [upstream, upstream.transpose(0, -1).contiguous().transpose(0, -1)]
    for order in orders:
        (actual,) = torch.autograd.grad(tt.unpack(packed, *layout), packed, order)
        torch.testing.assert_close(actual, expected)
    (expected,) = torch.autograd.grad(oracle.expand(packed, *layout).sum(), packed)
    (actual,) = torch.autograd.grad(tt.unpack(packed, *layout).sum(), packed)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("channels, kernel, groups", LAYOUTS)
def test_derivatives_of_every_kind_agree(channels, kernel, groups, symmetry, expansion):
    layout = (channels, kernel, groups, symmetry)
    packed = random_packed(*layout).requires_grad_()
    if not packed.numel():
        assert not tt.unpack(packed, *layout).any()
        return

    def squared(p):
        return tt.unpack(p, *layout).square()  # not linear, so that the second derivative is not 0

    assert torch.autograd.gradcheck(squared, packed, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(squared, packed, check_batched_grad=True)


def test_transforms_of_torch_func(expansion):
    layout = (4, (3, 3), 2, "skew_adjoint")
    packed, tangent = random_packed(*layout), random_packed(*layout)

    def ours(p):
        return tt.unpack(p, *layout).square().sum((1, 2, 3))

    def truth(p):
        return oracle.expand(p, *layout).square().sum((1, 2, 3))

    close = torch.testing.assert_close
    close(torch.func.jacrev(ours)(packed), torch.func.jacrev(truth)(packed))
    close(torch.func.jacfwd(ours)(packed), torch.func.jacfwd(truth)(packed))
    close(torch.func.jvp(ours, (packed,), (tangent,)), torch.func.jvp(truth, (packed,), (tangent,)))
    batch = torch.stack([packed, tangent], 1)
    close(torch.vmap(ours, 1)(batch), torch.vmap(truth, 1)(batch))
    close(
        torch.func.hessian(lambda p: ours(p).sum())(packed),
        torch.func.hessian(lambda p: truth(p).sum())(packed),
    )
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(packed, tangent)))
    close(dual.tangent, torch.func.jvp(truth, (packed,), (tangent,))[1])


@pytest.mark.parametrize(
    "first", ["func.grad", "vmap", "inference", "fake", "real in fake", "compile"]
)
def test_tables_made_inside_a_transform_do_not_outlive_it(first, expansion):
    packing._tables.clear()
    layout = (3, (3, 3), 1, "skew_adjoint")
    packed = random_packed(*layout)

    def loss(p):
        return tt.unpack(p, *layout).square().sum()

    if first == "func.grad":
        torch.func.grad(loss)(packed)
    elif first == "vmap":
        torch.vmap(loss)(packed.expand(2, -1))
    elif first == "inference":
        with torch.inference_mode():
            loss(packed)
    elif first == "fake":
        with FakeTensorMode() as mode:
            loss(mode.from_tensor(packed))
    elif first == "real in fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            loss(packed)
    else:
        torch.compile(loss, backend="eager", fullgraph=True)(packed)
    weight = tt.unpack(packed.requires_grad_(), *layout)
    assert torch.equal(weight, oracle.expand(packed, *layout))
    weight.square().sum().backward()
    torch.testing.assert_close(packed.grad, torch.func.grad(loss)(packed.detach()))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_tables_together_take_bounded_memory(monkeypatch, symmetry, expansion):
    packing._tables.clear()
    monkeypatch.setattr(packing, "_MAX_TABLE_BYTES", 4 * 9 * 36)  # just one of six channels
    for channels in (2, 3, 4, 5, 6, 7, 6):
        layout = (channels, (3, 3), 1, symmetry)
        packed = random_packed(*layout).requires_grad_()
        upstream = torch.randn(channels, channels, 3, 3, dtype=torch.float64)
        for _ in range(2):
            weight = tt.unpack(packed, *layout)
            (grad,) = torch.autograd.grad(weight, packed, upstream)
            expected = oracle.expand(packed, *layout)
            assert torch.equal(weight, expected)
            torch.testing.assert_close(grad, torch.autograd.grad(expected, packed, upstream)[0])
        kept = sum(table.nbytes for table in packing._tables.values())
        assert kept <= packing._MAX_TABLE_BYTES
    assert bool(kept) is (expansion != "in blocks")


def test_the_table_used_longest_ago_goes_first(monkeypatch):
    packing._tables.clear()
    built, build = [], packing._build_gather_index
    monkeypatch.setattr(packing, "_MAX_TABLE_BYTES", 4 * 9 * (4 + 9 + 16))  # of 2, 3 and 4 channels

    def spy(device, layout, channels_last):
        built.append(layout.channels)
        return build(device, layout, channels_last)

    monkeypatch.setattr(packing, "_build_gather_index", spy)
    for channels in (2, 3, 4, 2, 5, 2, 3):  # the fifth takes the place of the second and third
        tt.unpack(random_packed(channels, (3, 3), 1, "self_adjoint"), channels, 3)
    assert built == [2, 3, 4, 5, 3]


@pytest.mark.parametrize("channels, kernel", [(512, 3), (600, 1), (2048, 1)])
def test_tables_take_less_memory_than_the_packed_vector(channels, kernel):
    packing._tables.clear()
    packed = torch.randn(tt.packed_size(channels, kernel), requires_grad=True)
    tt.unpack(packed, channels, kernel).sum().backward()
    kept = sum(table.nbytes for table in packing._tables.values())
    assert kept < packed.nbytes / 2


def test_one_weight_serves_several_backwards(expansion):
    for layout in [(5, (3, 3), 1, "self_adjoint"), (4, (1, 2), 2, "skew_adjoint")]:
        packed = random_packed(*layout).requires_grad_()
        weight, expected = tt.unpack(packed, *layout), oracle.expand(packed, *layout)
        for _ in range(3):
            upstream = torch.randn(weight.shape, dtype=torch.float64)
            (grad,) = torch.autograd.grad(weight, packed, upstream)
            (want,) = torch.autograd.grad(expected, packed, upstream, retain_graph=True)
            torch.testing.assert_close(grad, want)


def test_large_centres_are_those_of_the_formula():
    """Of sizes at which the centre is copied in blocks, without any limit moved."""
    for groups, symmetry in [(1, "self_adjoint"), (2, "skew_adjoint")]:
        channels = 520 * groups
        packed = random_packed(channels, (1, 1), groups, symmetry, torch.float32).requires_grad_()
        weight = tt.unpack(packed, channels, 1, groups, symmetry)
        assert torch.equal(weight, mirror(weight, groups, symmetry))
        assert torch.equal(tt.pack(weight, groups, symmetry), packed)
        upstream = torch.randn(weight.shape)
        (grad,) = torch.autograd.grad(weight, packed, upstream)
        places = tt.unpack(torch.arange(1.0, len(packed) + 1), channels, 1, groups, symmetry).long()
        signed = (upstream * places.sign()).double().flatten()
        expected = torch.zeros(len(packed) + 1, dtype=torch.float64)
        expected.index_add_(0, places.abs().flatten(), signed)
        torch.testing.assert_close(grad.double(), expected[1:], rtol=1e-6, atol=1e-6)


def test_unpack_works_on_fake_and_meta_tensors_after_real_ones(expansion):
    layout = (3, (3, 3), 1, "skew_adjoint")
    packed = random_packed(*layout)
    tt.unpack(packed, *layout)
    with FakeTensorMode() as mode:
        assert tt.unpack(mode.from_tensor(packed), *layout).shape == (3, 3, 3, 3)
    assert tt.unpack(packed.to("meta"), *layout).shape == (3, 3, 3, 3)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_compiled_unpack_and_its_gradient_are_those_of_the_formula(symmetry, expansion):
    layout = (4, (3, 3), 1, symmetry)
    packed = random_packed(*layout).requires_grad_()
    compiled = torch.compile(
        lambda p: tt.unpack(p, *layout).square(), backend="aot_eager", fullgraph=True
    )
    expected = oracle.expand(packed, *layout).square()
    actual = compiled(packed)
    torch.testing.assert_close(actual, expected)
    (want,) = torch.autograd.grad(expected.sum(), packed)
    (got,) = torch.autograd.grad(actual.sum(), packed)
    torch.testing.assert_close(got, want)


def test_pack_is_differentiable():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for symmetry in SYMMETRIES:
        assert torch.autograd.gradcheck(lambda w, s=symmetry: tt.pack(w, 2, s), weight)
