"""Explicit reuse: how often a weight is expanded and folded, and that it is never stale."""

import asyncio
import contextlib
import contextvars
import io
import threading

import oracle
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import triton_tied as tt
from triton_tied import cached_weights, dispatch, packing

pytestmark = pytest.mark.usefixtures("one_config")


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

    monkeypatch.setattr(packing, "expand", counted("expand", packing.expand))
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


def update_by_set(layer):
    with torch.no_grad():
        layer.packed_weight.set_(layer.packed_weight * 2)


def update_by_vector(layer):
    vector_to_parameters(3 * parameters_to_vector(layer.parameters()), layer.parameters())


def update_data_twice(layer):
    """So that the second may lie where the first did."""
    for _ in range(2):
        layer.packed_weight.data = layer.packed_weight.data * 2


@pytest.mark.parametrize(
    "update",
    [
        update_in_place,
        update_in_inference_mode,
        update_data,
        update_by_checkpoint,
        update_by_weight,
        update_by_optimizer,
        update_by_set,
        update_by_vector,
        update_data_twice,
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
        assert len(cached_weights._current.get().made) == 0
        tt.tied_conv2d(x, packed, kernel_size=3)
        assert len(cached_weights._current.get().made) == 1


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


# ---- several backwards, in all the ways in which they come


@pytest.fixture
def kernels_layer():
    """Where the kernels run, a layer that they serve."""
    dtype = torch.float32 if dispatch.INTERPRETED else torch.float64
    return tt.TiedConv2d(4, 3, padding=1, dtype=dtype)


@pytest.fixture(params=["gathered", "written"][: 1 if dispatch.INTERPRETED else 2])
def any_size(request, monkeypatch):
    """Small weights and large ones; the kernels make neither."""
    if request.param == "written":
        monkeypatch.setattr(packing, "_MAX_GATHERED", 0)


def images(layer, count=2):
    sides = (2, 3) if dispatch.INTERPRETED else (6, 6)  # the interpreter is slow
    return torch.randn(count, 4, *sides, dtype=layer.packed_weight.dtype)


def assert_same(actual, expected):
    """To rounding: gradients may be summed in another order."""
    for a, e in zip(actual, expected, strict=True):
        assert oracle.relative_error(a, e) < (1e-5 if a.dtype == torch.float32 else 1e-13)


def gradients(layer, function, *arguments):
    layer.zero_grad()
    function(*arguments)
    return [parameter.grad.clone() for parameter in layer.parameters()]


def test_gradients_accumulate_in_a_block(kernels_layer, any_size):
    layer, x = kernels_layer, images(kernels_layer, 6)

    def accumulate():
        for part in x.chunk(3):
            repeated(layer, part, 3).square().sum().backward()

    assert_same(gradients(layer, tt.cached()(accumulate)), gradients(layer, accumulate))


def test_one_weight_serves_two_backwards_of_one_forward(kernels_layer, any_size):
    layer, x = kernels_layer, images(kernels_layer)

    def twice():
        y = layer(layer(x))
        y[:1].square().sum().backward(retain_graph=True)
        y.square().sum().backward()

    assert_same(gradients(layer, tt.cached()(twice)), gradients(layer, twice))


def test_losses_of_separate_forwards_are_differentiated_after_the_block(kernels_layer, any_size):
    layer, x = kernels_layer, images(kernels_layer, 4)

    def train(block):
        with block:
            losses = [layer(part).pow(3).sum() for part in x.chunk(2)]
        for loss in losses:
            loss.backward()

    actual = gradients(layer, train, tt.cached())
    assert_same(actual, gradients(layer, train, contextlib.nullcontext()))


def test_a_search_for_the_worst_input_makes_one_weight(layer, any_size, monkeypatch):
    calls = []
    expand = packing.expand
    monkeypatch.setattr(packing, "expand", lambda *a: calls.append(1) or expand(*a))

    def worst(x):
        for _ in range(4):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(repeated(layer, x, 2).square().sum(), x)
            x = x + grad.sign() / 10
        repeated(layer, x, 2).sum().backward()

    x = images(layer)
    expected = gradients(layer, worst, x)
    calls.clear()
    assert_same(gradients(layer, tt.cached()(worst), x), expected)
    assert len(calls) == 1


def test_gradient_penalty_in_a_block(kernels_layer, any_size):
    layer, x = kernels_layer, images(kernels_layer).requires_grad_()

    def penalty():
        y = repeated(layer, x, 2).pow(2).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        (y + grad.square().sum()).backward()

    assert_same(gradients(layer, tt.cached()(penalty)), gradients(layer, penalty))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "by hand": None,
}


class ByHand:
    """Writes where PyTorch does not look."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        for parameter in self.parameters:
            parameter.data.sub_(parameter.grad, alpha=0.01)


# The first and the last where each takes long.
@pytest.mark.parametrize("name", list(OPTIMIZERS)[:: 4 if dispatch.INTERPRETED else 1])
def test_training_inside_one_block_is_training(name, kernels_layer):
    x, start = images(kernels_layer), {n: p.clone() for n, p in kernels_layer.state_dict().items()}

    def trained(block):
        layer = tt.TiedConv2d(4, 3, padding=1, dtype=x.dtype)
        layer.load_state_dict(start)
        optimizer = (OPTIMIZERS[name] or ByHand)(layer.parameters())
        with block:
            for _ in range(3):
                layer.zero_grad()
                (repeated(layer, x, 2) - x).square().sum().backward()
                optimizer.step()
                with torch.no_grad():
                    layer(x)  # a weight without a gradient, which the next step makes stale
        return [parameter.detach() for parameter in layer.parameters()]

    assert_same(trained(tt.cached()), trained(contextlib.nullcontext()))


# ---- checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True][: 1 if dispatch.INTERPRETED else 2])
@pytest.mark.parametrize("place", ["around", "forward", "inside", "inside and around"])
def test_checkpoints(place, use_reentrant, kernels_layer, any_size):
    layer = kernels_layer
    x = images(layer).requires_grad_()

    def segment(x):
        return repeated(layer, x, 1).tanh()

    def train(block, inner):
        y = x
        with block:
            y = layer(y)
            for _ in range(2):
                y = checkpoint(inner, y, use_reentrant=use_reentrant)
            if place != "forward":
                layer(y).square().sum().backward()
        if place == "forward":
            layer(y).square().sum().backward()

    inner = tt.cached()(segment) if "inside" in place else segment
    block = contextlib.nullcontext() if place == "inside" else tt.cached()
    expected = gradients(layer, train, contextlib.nullcontext(), segment)
    assert_same(gradients(layer, train, block, inner), expected)


# ---- the compiler, transforms and modes


@pytest.mark.parametrize("place", ["inside", "around", "decorated", "both"])
def test_blocks_and_the_compiler(place, layer):
    x = images(layer)

    def inside(x):
        with tt.cached():
            return repeated(layer, x, 3).tanh()

    plain = torch.compile(
        lambda x: repeated(layer, x, 3).tanh(), backend="aot_eager", fullgraph=True
    )
    compiled = {
        "inside": torch.compile(inside, backend="aot_eager", fullgraph=True),
        "around": tt.cached()(plain),
        "decorated": torch.compile(
            tt.cached()(lambda x: repeated(layer, x, 3).tanh()), backend="aot_eager", fullgraph=True
        ),
        "both": tt.cached()(torch.compile(inside, backend="aot_eager", fullgraph=True)),
    }[place]
    for _ in range(2):
        assert_same([compiled(x)], [inside(x)])
        expected = gradients(layer, lambda: inside(x).square().sum().backward())
        assert_same(gradients(layer, lambda: compiled(x).square().sum().backward()), expected)
        with torch.no_grad():
            layer.packed_weight.mul_(1.5)
    assert cached_weights._current.get() is None


@pytest.mark.filterwarnings("ignore")  # of the tracer, about sizes
def test_what_is_made_under_a_mode_does_not_outlive_it(layer, x, any_size):
    expected = layer(x)
    with tt.cached():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(torch.randn(1, 4, 6, 6, dtype=x.dtype))
        assert torch.equal(layer(x), expected)
        traced = make_fx(lambda p: tt.tied_conv2d(x, p, layer.bias, kernel_size=3, padding=1))
        graph = traced(layer.packed_weight)
        assert torch.equal(layer(x), expected)
        assert_same([graph(2 * layer.packed_weight)], [layer(x) * 2 - layer.bias.view(-1, 1, 1)])
        script = torch.jit.trace(layer, x)
        torch.jit.save(script, io.BytesIO())  # it holds PyTorch's operations only
        with torch.no_grad():
            layer.packed_weight.mul_(2)
        assert torch.equal(script(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_tangents_of_packed_are_not_kept(layer, x):
    packed, tangent = layer.packed_weight.detach(), torch.randn_like(layer.packed_weight)
    with tt.cached():
        for direction in (tangent, 2 * tangent):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(packed, direction)
                out = forward_ad.unpack_dual(tt.tied_conv2d(x, dual, kernel_size=3)).tangent
            expected = tt.tied_conv2d(x, direction, kernel_size=3)
            assert_same([out], [expected])


# ---- threads, tasks, generators


def test_blocks_open_in_threads_while_optimizers_step():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizers = [torch.optim.SGD([parameter], lr=1.0) for _ in range(4)]
    for optimizer in optimizers:
        for _ in range(20):  # so that a step is seldom between two hooks
            optimizer.register_step_post_hook(lambda *_: None)
    errors, done = [], threading.Event()

    def open_blocks():
        while not done.is_set():
            with tt.cached():
                pass

    threads = [threading.Thread(target=open_blocks) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(500):
            for optimizer in optimizers:
                optimizer.step()
    except RuntimeError as error:
        errors.append(error)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert torch.equal(parameter, torch.full((3,), -2000.0))


def test_a_block_leaves_no_hook_behind(layer, x):
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks), len(optimizer._global_optimizer_pre_hooks)
    with tt.cached():
        layer(x)
        inside = (
            len(optimizer._global_optimizer_post_hooks),
            len(optimizer._global_optimizer_pre_hooks),
        )
    assert inside == before


def hidden_update(layer):
    layer.packed_weight.data.mul_(2)


def test_a_task_that_outlives_the_block_is_outside_of_it(layer, x):
    async def later(ended):
        before = layer(x)
        await ended.wait()
        hidden_update(layer)
        return before, layer(x)

    async def main():
        ended = asyncio.Event()
        with tt.cached():
            task = asyncio.create_task(later(ended))
            await asyncio.sleep(0)
            layer(x)
        ended.set()
        return await task

    before, after = asyncio.run(main())
    assert not torch.equal(before, after) and torch.equal(after, layer(x))


def test_blocks_of_tasks_that_take_turns_are_their_own(x, counts):
    layers = [tt.TiedConv2d(4, 3, padding=1, dtype=x.dtype) for _ in range(3)]

    async def apply(layer):
        with tt.cached():
            y = x
            for _ in range(4):
                y = layer(y)
                await asyncio.sleep(0)
        hidden_update(layer)
        return y, layer(x)

    async def main():
        return await asyncio.gather(*map(apply, layers))

    found = asyncio.run(main())
    assert counts["expand"] == 2 * 3
    for layer, (y, after) in zip(layers, found, strict=True):
        assert torch.equal(after, layer(x))
        layer.packed_weight.data.div_(2)
        assert torch.equal(y, repeated(layer, x, 4))


def test_blocks_of_generators_that_end_in_any_order(layer, x, counts):
    def applications():
        with tt.cached():
            while True:
                yield layer(x)

    first, second = applications(), applications()
    assert torch.equal(next(first), next(second))
    first.close()
    hidden_update(layer)
    assert torch.equal(next(second), layer(x))
    second.close()
    hidden_update(layer)
    before = counts["expand"]
    for _ in range(2):
        layer(x)
    assert counts["expand"] == before + 2 and cached_weights._current.get() is None


@pytest.mark.parametrize("where", ["context", "thread"])
def test_a_block_may_be_closed_elsewhere(where, layer, x, counts):
    block = tt.cached()
    block.__enter__()
    layer(x)

    def close():
        block.__exit__(None, None, None)

    if where == "context":
        contextvars.copy_context().run(close)
    else:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
    hidden_update(layer)
    changed = layer(x)
    assert counts["expand"] == 2
    with tt.cached():
        assert torch.equal(layer(x), changed) and torch.equal(layer(x), changed)
    assert counts["expand"] == 3


def test_threads_of_a_copied_context_do_not_share_the_block(layer, x, counts):
    with tt.cached():
        layer(x)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(layer, x))
        thread.start()
        thread.join()
    assert counts["expand"] == 2


def test_an_inner_block_joins_and_an_error_closes_both(layer, x, counts):
    with pytest.raises(ZeroDivisionError), tt.cached():
        layer(x)
        with tt.cached():
            layer(x)
            1 / 0  # noqa: B018
    assert counts["expand"] == 1 and cached_weights._current.get() is None
    layer(x)
    assert counts["expand"] == 2


def test_one_block_is_not_opened_twice_at_once():
    block = tt.cached()
    with block, pytest.raises(RuntimeError, match="open already"):
        block.__enter__()
    with block:
        pass


def test_what_returns_before_it_has_run_is_not_decorated():
    def generator():
        yield

    async def coroutine():
        pass

    async def both():
        yield

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match="open the block inside"):
            tt.cached()(function)


# ---- memory that is not what it was


def test_averaged_weights_swapped_in_and_out(layer, x):
    """By ``.data``, as averaging does it; changed while they are out."""
    average = torch.randn_like(layer.packed_weight)
    own = layer.packed_weight.data
    with tt.cached():
        for _ in range(3):
            for weights in (own, average):
                layer.packed_weight.data = weights
                y = layer(x)
                expected = tt.reference.tied_conv2d(
                    x, weights, layer.bias, kernel_size=3, padding=1
                )
                assert torch.equal(y, expected)
            average.mul_(0.9).add_(own, alpha=0.1)


def test_views_that_begin_at_the_same_address_are_told_apart(layer, x):
    memory = torch.randn(2 * len(layer.packed_weight), dtype=x.dtype)
    with tt.cached():
        for weights in (memory[: len(layer.packed_weight)], memory[::2]):
            layer.packed_weight.data = weights
            expected = tt.reference.tied_conv2d(
                x, layer.packed_weight, layer.bias, kernel_size=3, padding=1
            )
            assert torch.equal(layer(x), expected)


def test_what_is_made_before_a_cuda_graph_is_captured_is_not_used_in_it(
    layer, x, counts, monkeypatch
):
    with tt.cached():
        layer(x)
        monkeypatch.setattr(cached_weights, "_is_capturing", lambda: True)
        layer(x)
        monkeypatch.setattr(cached_weights, "_is_capturing", lambda: False)
        layer(x)
    assert counts["expand"] == 2


def test_each_stream_has_its_own_weight(layer, x, counts, monkeypatch):
    with tt.cached():
        for stream in (0, 1, 0, 1):
            monkeypatch.setattr(cached_weights, "_stream", lambda device, stream=stream: stream)
            layer(x)
    assert counts["expand"] == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_conversions_and_checkpoints_that_swap_the_parameter(mode, kernels_layer):
    """``torch.utils.swap_tensors`` takes no tensor to which others refer."""
    layer, x = kernels_layer, images(kernels_layer)
    state = {name: 2 * value for name, value in layer.state_dict().items()}
    dense = {"weight": 3 * layer.weight.detach(), "bias": state["bias"]}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with tt.cached(), mode():
            expected = layer(x).detach()
            layer.to(torch.float16 if x.dtype == torch.float64 else torch.float64).to(x.dtype)
            torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-2, atol=1e-2)
            for given in (state, dense):
                layer.load_state_dict(given)
                expected = tt.reference.tied_conv2d(
                    x, layer.packed_weight, layer.bias, kernel_size=3, padding=1
                )
                torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.weight, dense["weight"])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# ---- the dense weight itself


def test_unpack_and_weight_are_served_by_the_block(layer, x, counts):
    with tt.cached():
        layer(x)
        weights = [tt.unpack(layer.packed_weight, 4, 3) for _ in range(3)]
        assert torch.equal(layer.weight, weights[0])
        sum((w * i).sum() for i, w in enumerate(weights)).backward()
    assert counts == {"expand": 1, "fold": 1}
    (expected,) = torch.autograd.grad(
        3 * tt.unpack(layer.packed_weight, 4, 3).sum(), layer.packed_weight
    )
    assert_same([layer.packed_weight.grad], [expected])


def test_hooks_on_an_unpacked_weight_are_its_own(layer, x):
    def loss(double):
        with tt.cached():
            weight = tt.unpack(layer.packed_weight, 4, 3)
            weight.register_hook(lambda grad: grad * (2 if double else 1))
            weight.retain_grad()
            (layer(x).sum() + weight.square().sum()).backward()
            return weight.grad

    grads = gradients(layer, loss, True)
    plain = gradients(layer, lambda: layer(x).sum().backward())
    extra = gradients(layer, lambda: (2 * layer.weight.square().sum() + layer(x).sum()).backward())
    assert_same(grads, extra) and not torch.equal(grads[0], plain[0])
    assert_same([loss(False)], [2 * tt.unpack(layer.packed_weight, 4, 3)])


def test_writing_to_a_shared_weight_raises(layer, x):
    with tt.cached(), torch.no_grad():
        tt.unpack(layer.packed_weight, 4, 3).clone().mul_(2)
        layer(x)
    with pytest.raises(RuntimeError, match="clone it"), tt.cached(), torch.no_grad():
        tt.unpack(layer.packed_weight, 4, 3).mul_(2)
        layer(x)
    with pytest.raises(RuntimeError, match="clone it"), tt.cached():
        tt.unpack(layer.packed_weight, 4, 3).mul_(2)


def test_an_unpacked_weight_may_be_written_to_outside_of_a_block(layer, any_size):
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            weight = tt.unpack(layer.packed_weight, 4, 3).mul_(2)
        assert torch.equal(weight, 2 * layer.weight)
    weight.sum().backward()
    (expected,) = torch.autograd.grad(
        2 * tt.unpack(layer.packed_weight, 4, 3).sum(), layer.packed_weight
    )
    assert_same([layer.packed_weight.grad], [expected])
