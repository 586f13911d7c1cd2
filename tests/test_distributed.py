"""Several processes, on CPUs: sharded parameters and distributed tensors."""

import copy
import datetime
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import triton_tied as tt
from triton_tied import packing

PROCESSES = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without distributed")


def in_processes(check, folder):
    """Runs ``check()`` in two processes, which are the ranks of one group."""
    store = f"file://{folder / 'store'}"
    torch.multiprocessing.spawn(_as_rank, (check, store), nprocs=PROCESSES)


def _as_rank(rank, check, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store, datetime.timedelta(seconds=120), world_size=PROCESSES, rank=rank
    )
    check()
    dist.destroy_process_group()
    os._exit(0)  # a thread of Gloo's that wants the interpreter while it ends would abort


def layer_and_input():
    """The same in every process."""
    torch.manual_seed(0)
    layer = tt.TiedConv2d(6, kernel_size=3, padding=1, symmetry="skew_adjoint", dtype=torch.float64)
    return layer, torch.randn(4, 6, 5, 5, dtype=torch.float64)


def outcome(layer, x):
    y = layer(x)
    y.square().sum().backward()
    return y, layer.packed_weight.grad, layer.bias.grad


def check_sharded_parameters():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for packing._MAX_GATHERED in (2**18, 0):  # both ways in which a weight is made
        layer, x = layer_and_input()
        weight, expected = layer.weight.detach() + 0, outcome(layer, x)
        sharded, _ = layer_and_input()
        fully_shard(sharded)
        assert isinstance(sharded.packed_weight, DTensor) and isinstance(sharded.weight, DTensor)
        assert torch.equal(sharded.weight.full_tensor(), weight)  # before the first forward
        (actual,) = torch.autograd.grad(
            sharded.weight.full_tensor().pow(3).sum(), sharded.packed_weight
        )
        (truth,) = torch.autograd.grad(layer.weight.pow(3).sum(), layer.packed_weight)
        torch.testing.assert_close(actual.full_tensor(), truth)
        y, *gradients = outcome(sharded, x)
        torch.testing.assert_close(y, expected[0])
        for actual, truth in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(actual.full_tensor(), truth)
        sharded.unshard()
        assert torch.equal(sharded.weight, weight)
    check_sharded_orthogonal_layer()


def check_sharded_orthogonal_layer():
    """As :func:`check_sharded_parameters`; and made without memory, which is given it at last."""
    from torch.distributed.fsdp import fully_shard

    def make(device):
        torch.manual_seed(0)
        return tt.SkewOrthogonalConv2d(4, 6, 3, groups=2, device=device, dtype=torch.float64)

    layer, sharded = make("cpu"), fully_shard(make("cpu"))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert sharded.lipschitz_bound() == layer.lipschitz_bound()
    found, expected = (outcome(module, x) for module in (sharded, layer))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].full_tensor(), expected[1])
    late = fully_shard(make("meta")).to_empty(device="cpu")
    late.reset_parameters()
    assert late.eval().lipschitz_bound() < 1.01  # the power method has begun anew


def check_distributed_tensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for placement in (Shard(0), Replicate()):
        layer, x = layer_and_input()
        expected = outcome(layer, x)
        distributed = distribute_module(layer_and_input()[0], mesh)
        actual = outcome(distributed, distribute_tensor(x, mesh, [placement]))
        assert actual[0].placements == (placement,)
        for ours, truth in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.full_tensor(), truth)
        # As for a dense layer, either all are distributed or none.
        for model in (layer, nn.Conv2d(6, 6, 3, dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
                model(distribute_tensor(x, mesh, [placement]))


def check_checkpoint_of_the_first_process():
    """A dense one is refused, where it is and whatever is loaded; a tied one reaches all."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    is_first = dist.get_rank() == 0
    for shard, strict, bias in itertools.product((False, True), (True, False), (True, False)):
        torch.manual_seed(0)
        trained = nn.Sequential(tt.TiedConv1d(6, 4, groups=2, bias=bias), nn.ReLU())
        torch.manual_seed(1)
        model = nn.Sequential(tt.TiedConv1d(6, 4, groups=2, bias=bias), nn.ReLU())
        if shard:
            fully_shard(model)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)

        def load(source, model=model, options=options):
            state = source.state_dict() if is_first else {}
            set_model_state_dict(model, state, options=options)

        dense = tt.untie(copy.deepcopy(trained))
        if is_first and (shard or not strict):
            with pytest.raises(RuntimeError, match="dense weight '0.weight' would not reach all"):
                load(dense)
        elif is_first:  # the others say what is missing
            load(dense)
        elif strict:
            with pytest.raises(RuntimeError, match="Missing key.*packed_weight"):
                load(dense)
        elif bias and not shard:
            with pytest.warns(UserWarning, match="weight stays as it was"):
                load(dense)
        else:
            load(dense)
        load(trained)
        for actual, expected in zip(model.parameters(), trained.parameters(), strict=True):
            assert torch.equal(actual.full_tensor() if shard else actual, expected)


@pytest.mark.parametrize(
    "check",
    [check_sharded_parameters, check_distributed_tensors, check_checkpoint_of_the_first_process],
)
def test_two_processes(check, tmp_path):
    in_processes(check, tmp_path)
