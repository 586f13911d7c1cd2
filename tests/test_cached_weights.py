"""Explicit reuse: how often a weight is expanded and folded, and that it is never stale."""

import contextlib
import threading

import pytest
import torch

import triton_tied as tt
from triton_tied import cached_weights, dispatch, packing, reference


@pytest.fixture(autouse=True)
def one_config():
    """Where the kernels run, the same config serves a centre that is gathered and one that is
    unpacked: only then are results the same to the bit."""
    with contextlib.ExitStack() as stack:
        if dispatch.INTERPRETED:
            from triton_tied.autotune import select
            from triton_tied.kernels import configs

            stack.enter_context(
                select.using(
                    conv=configs.ConvConfig((1, 8, 8), 16, 16),
                    weight_grad=configs.WeightGradConfig((1, 4, 8), 16, 16),
                )
            )
        yield


@pytest.fixture
def counts(monkeypatch):
    """Calls of expand and of fold; the weights are expanded by the function that counts both."""
    monkeypatch.setattr(packing, "_MAX_GATHERED", 0)
    seen = {"expand": 0, "fold": 0}

    def counted(name, function):
        def call(*arguments):
            seen[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(reference, "expand", counted("expand", packing.expand))
    monkeypatch.setattr(packing, "fold", counted("fold", packing.fold))
    return seen


@pytest.fixture
def layer():
    return tt.TiedConv2d(4, 3, padding=1, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(1, 4, 6, 6, dtype=torch.float64)


def repeated(layer, x, times=12):
    for _ in range(times):
        x = layer(x)
    return x


def test_twelve_applications_under_autograd_expand_once_and_fold_once(layer, x, counts):
    repeated(layer, x).square().sum().backward()
    assert counts == {"expand": 12, "fold": 12}
    expected, layer.packed_weight.grad = layer.packed_weight.grad, None
    with tt.cached():
        repeated(layer, x).square().sum().backward()
    assert counts == {"expand": 13, "fold": 13}
    torch.testing.assert_close(layer.packed_weight.grad, expected)


def test_frozen_weights_are_expanded_once_in_inference(layer, x, counts):
    expected = repeated(layer, x)
    counts["expand"] = 0
    for mode in (torch.no_grad, torch.inference_mode):
        with tt.cached(), mode():
            for _ in range(3):
                assert torch.equal(repeated(layer, x), expected)
        assert counts["expand"] == 1
        counts["expand"] = 0


def test_cached_works_as_a_decorator_and_nests(layer, x, counts):
    @tt.cached()
    def apply():
        with tt.cached():
            repeated(layer, x)
        return repeated(layer, x)

    apply()
    apply()
    assert counts["expand"] == 2


def test_nothing_is_kept_after_the_block(layer, x, counts):
    with tt.cached():
        layer(x)
    layer(x)
    assert counts["expand"] == 2


def update_in_place(layer):
    with torch.no_grad():
        layer.packed_weight.mul_(2)


def update_in_inference_mode(layer):
    with torch.inference_mode():
        layer.packed_weight.mul_(2)


def update_data(layer):
    layer.packed_weight.data = layer.packed_weight.data * 2


def update_by_checkpoint(layer):
    layer.load_state_dict(
        {**layer.state_dict(), "packed_weight": torch.ones_like(layer.packed_weight)}
    )


def update_by_weight(layer):
    layer.weight = torch.ones(4, 4, 3, 3)


def update_by_optimizer(layer, **options):
    layer.packed_weight.grad = torch.ones_like(layer.packed_weight)
    torch.optim.Adam(layer.parameters(), lr=0.1, **options).step()


def update_by_fused_optimizer(layer):
    update_by_optimizer(layer, fused=True)


@pytest.mark.parametrize(
    "update",
    [
        update_in_place,
        update_in_inference_mode,
        update_data,
        update_by_checkpoint,
        update_by_weight,
        update_by_optimizer,
        update_by_fused_optimizer,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_update_inside_the_block_is_noticed(layer, x, update, mode):
    with tt.cached():
        with mode():
            before = layer(x)
        update(layer)
        with mode():
            after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x))


def test_weights_made_without_gradient_are_not_reused_with_it(layer, x):
    for first in (torch.no_grad, torch.inference_mode):
        layer.zero_grad()
        with tt.cached():
            with first():
                layer(x)
            layer(x).sum().backward()
        assert layer.packed_weight.grad.any()


def test_frozen_weights_made_in_inference_mode_are_not_saved_for_a_backward(layer, x):
    layer.requires_grad_(False)
    with tt.cached():
        with torch.inference_mode():
            layer(x)
        x.requires_grad_()
        layer(x).sum().backward()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_layers_layouts_and_dtypes_do_not_mix(x, counts):
    layers = [tt.TiedConv2d(4, 3, padding=1, symmetry=s) for s in ("self_adjoint", "skew_adjoint")]
    x = x.float()
    inputs = [x, x.contiguous(memory_format=torch.channels_last)]
    expected = [layer(v) for layer in layers for v in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        half = [layer(x) for layer in layers]
    with tt.cached():
        for _ in range(2):
            actual = [layer(v) for layer in layers for v in inputs]
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
            with torch.autocast("cpu", torch.bfloat16):
                assert all(torch.equal(lyr(x), h) for lyr, h in zip(layers, half, strict=True))


def test_functional_calls_share_the_block(x, counts):
    packed = torch.randn(tt.packed_size(4, 3), dtype=torch.float64)
    with tt.cached():
        for _ in range(5):
            x = tt.tied_conv2d(x, packed, kernel_size=3, padding=1)
    assert counts["expand"] == 1


def test_what_is_made_from_a_temporary_is_forgotten_with_it(x):
    packed = torch.randn(tt.packed_size(4, 3), dtype=torch.float64)
    with tt.cached():
        for _ in range(5):
            tt.tied_conv2d(x, packed * 2, kernel_size=3)
        assert len(cached_weights._entries.get()) == 0
        tt.tied_conv2d(x, packed, kernel_size=3)
        assert len(cached_weights._entries.get()) == 1


def test_inference_tensors_are_never_stale(x):
    with torch.inference_mode(), tt.cached():
        packed = torch.randn(tt.packed_size(4, 3), dtype=torch.float64)
        before = tt.tied_conv2d(x, packed, kernel_size=3)
        packed.mul_(2)
        after = tt.tied_conv2d(x, packed, kernel_size=3)
    torch.testing.assert_close(after, 2 * before)


def test_transforms_inside_the_block_are_right(layer, x):
    def loss(packed):
        with tt.cached():
            y = tt.tied_conv2d(x, packed, kernel_size=3, padding=1)
            return tt.tied_conv2d(y, packed, kernel_size=3, padding=1).square().sum()

    with tt.cached():
        layer(x)
        packed = layer.packed_weight.detach()
        actual = torch.func.grad(loss)(packed)
        batched = torch.vmap(loss)(torch.stack([packed, 2 * packed]))
    (expected,) = torch.autograd.grad(loss(packed.requires_grad_()), packed)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(batched[1], 16 * batched[0])


def test_a_block_belongs_to_its_thread(layer, x, counts):
    with tt.cached():
        layer(x)
        other = threading.Thread(target=layer, args=(x,))
        other.start()
        other.join()
    assert counts["expand"] == 2
