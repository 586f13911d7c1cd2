"""The formulas that are timed, against the matrices of their convolutions. No test asks how long
anything takes."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from triton_tied.benchmark import clocks, formulas, passes, results, roofline, suite, workloads
from triton_tied.benchmark.agreement import Truth
from triton_tied.benchmark.workloads import Workload

CPU = torch.device("cpu")
EXPONENTIAL = Workload(
    "soc-exponential", 2, 3, (4, 5), 3, "fp32", "skew_adjoint", applications=5, evaluations=7
)
SPLITTING = Workload(
    "mondeq-splitting", 2, 3, (4, 5), 3, "fp32", "skew_adjoint", "circular", applications=300
)
PEERS = [
    pytest.param(workload, name, id=f"{workload.family} {name}")
    for workload in (EXPONENTIAL, SPLITTING)
    for name in formulas.peers_of(workload)
]
each_peer = pytest.mark.parametrize(("workload", "name"), PEERS)


def made(workload, name, weight, memory="channels_last"):
    return formulas.peers_of(workload)[name](workload, weight, memory)


def matrix_of(weight, workload):
    """Of a convolution, a column for each pixel that is one where all others are zero."""
    pixels = math.prod(workload.shape[1:])
    basis = torch.eye(pixels, dtype=weight.dtype).view(-1, *workload.shape[1:])
    mode = "circular" if workload.padding_mode == "circular" else "constant"
    return F.conv2d(F.pad(basis, [1] * 4, mode), weight).flatten(1).T


def drawn(workload):
    """The tied weight by the formula; a direction in which it may move; another weight; images."""
    layout = workload.layout
    sizes = layout.channels, layout.kernel_size, layout.groups, layout.symmetry
    packed = torch.randn(2, layout.size, dtype=torch.float64) / 10
    weight, direction = (oracle.expand(each, *sizes) for each in packed)
    free = torch.randn_like(weight) / 10
    x, upstream = torch.randn(2, *workload.shape, dtype=torch.float64)
    return weight, direction, free, x, upstream


def slope(peer, gradients, direction):
    """How the loss moves where the tied weight moves in the direction; the others stay."""
    held = type(peer)._hold(peer, direction)
    parameters = [part.to(gradient) for part, gradient in zip(held, gradients, strict=True)]
    return sum((gradients[i] * parameters[i]).sum() for i in range(len(held)))


@pytest.mark.parametrize("memory", EXPONENTIAL.formats)
@pytest.mark.parametrize("name", formulas.peers_of(EXPONENTIAL))
def test_the_exponential_is_the_series_of_the_matrix(name, memory):
    weight, direction, _, x, upstream = drawn(EXPONENTIAL)
    peer = made(EXPONENTIAL, name, weight, memory)
    moving = weight.clone().requires_grad_()
    x.requires_grad_()
    a = matrix_of(moving, EXPONENTIAL)
    series = sum(torch.linalg.matrix_power(a, n) / math.factorial(n) for n in range(6))
    expected = (x.flatten(1) @ series.T).view_as(x)
    dx, dw = torch.autograd.grad(expected, (x, moving), upstream)
    output = peer.forward(x)
    found, *gradients = torch.autograd.grad(output, [x, *peer.parameters], upstream)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found, dx, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(slope(peer, gradients, direction), (dw * direction).sum())


@pytest.mark.parametrize("memory", SPLITTING.formats)
@pytest.mark.parametrize("name", formulas.peers_of(SPLITTING))
def test_the_splitting_ends_in_the_equilibrium_and_its_implicit_gradient(name, memory):
    weight, direction, free, x, upstream = drawn(SPLITTING)
    peer = made(SPLITTING, name, torch.cat([weight, free]), memory)
    x.requires_grad_()
    z = peer.forward(x)
    found, *gradients = torch.autograd.grad(z, [x, *peer.parameters], upstream)
    a, s = matrix_of(free, SPLITTING), matrix_of(weight, SPLITTING)
    eye = torch.eye(len(a), dtype=a.dtype)
    w = (1 - formulas._M) * eye - a.T @ a + s
    flat, grad, inner = z.detach().flatten(1), upstream.flatten(1), x.detach().flatten(1)
    torch.testing.assert_close(flat, (flat @ w.T + inner).relu(), rtol=1e-10, atol=1e-10)
    moved, turned = matrix_of(direction, SPLITTING), torch.randn_like(free) / 10
    other = matrix_of(turned, SPLITTING)
    slopes = [0.0, 0.0]
    for n in range(len(flat)):
        active = torch.diag((flat[n] > 0).to(a))
        # z = J (W z + x), so that dz = (I - J W)^-1 J (dW z + dx).
        dx = active @ torch.linalg.solve(eye - w.T @ active, grad[n])
        torch.testing.assert_close(found[n].flatten(), dx, rtol=1e-9, atol=1e-10)
        slopes[0] += dx @ moved @ flat[n]
        slopes[1] -= dx @ (other.T @ a + a.T @ other) @ flat[n]
    still = torch.zeros_like(free)
    torch.testing.assert_close(
        slope(peer, gradients, torch.cat([direction, still])), slopes[0], rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close((gradients[1] * turned).sum(), slopes[1], rtol=1e-8, atol=1e-9)


@each_peer
def test_a_peer_that_computes_another_formula_is_found(workload, name, monkeypatch):
    weight = formulas.random_weight(workload, torch.float32, CPU)
    images = passes.random_images(workload, "channels_last", torch.float32, CPU)
    truth, peer = Truth(workload, weight, images, "channels_last"), made(workload, name, weight)
    assert truth.why_wrong(peer, images) is None
    repeat = peer.repeat
    monkeypatch.setattr(peer, "repeat", lambda x, times: repeat(x, 1))
    assert "output is off" in truth.why_wrong(peer, images)
    monkeypatch.setattr(peer, "repeat", lambda x, n: 1.05 * repeat(x, n) - 0.05 * repeat(x, n).data)
    assert "gradient is off" in truth.why_wrong(peer, images)


@pytest.mark.parametrize(
    ("workload", "name"),
    [(w, name) for w in (EXPONENTIAL, SPLITTING) for name in ("forward", "forward_backward")]
    + [(EXPONENTIAL, "evaluation")],
)
def test_flops_are_those_that_pytorch_counts(workload, name):
    each = passes.PASSES[name]
    weight = formulas.random_weight(workload, torch.float32, CPU)
    images = passes.random_images(workload, "channels_last", torch.float32, CPU)
    times = each.times(workload)
    with each.around():
        call = each.prepare(made(workload, "by_hand", weight), images, times)
        with FlopCounterMode(display=False) as counter:
            call()
    assert counter.get_total_flops() == roofline.work_of(workload, name, times).flops


def test_what_is_kept_are_the_inputs_of_the_convolutions_and_their_weights():
    weight = formulas.random_weight(EXPONENTIAL, torch.float32, CPU)
    x = torch.randn(EXPONENTIAL.shape, requires_grad=True)
    for name, images in (("published", 5), ("by_hand", 5), ("tied", 5), ("tied_recompute", 1)):
        peer = made(EXPONENTIAL, name, weight, "contiguous")
        kept = clocks.Clock(CPU).kept_bytes(lambda peer=peer: peer.forward(x))
        assert images * x.nbytes < kept < images * x.nbytes + 3 * weight.nbytes


def test_formulas_are_timed_and_shown_even_where_this_package_loses(monkeypatch):
    ceilings = roofline.Ceilings({"fp32": 0.1}, 10.0)
    monkeypatch.setattr(clocks, "_MAX_ROUNDS", 3)
    monkeypatch.setattr(suite.roofline, "measure", lambda clock, dtypes: ceilings)
    planned = suite.plan(CPU, is_quick=True)
    kinds = {cell.workload.family: (cell.passes, cell.peers) for cell in planned}
    small = [EXPONENTIAL, replace(SPLITTING, applications=3)]
    cells = [suite.Cell(w, "channels_last", *kinds[w.family]) for w in small]
    result = suite.run(cells, CPU, 20.0)
    assert not result.faults
    found = {(row.family, row.pass_, row.peer): row for row in result.rows}
    assert {(family, peer) for family, pass_, peer in found if pass_ == "forward_backward"} == {
        (w.family, peer) for w in small for peer in formulas.peers_of(w)
    }
    assert all((row.kept_bytes or 0) > 0 for row in result.rows if row.pass_ == "forward")
    head, *lines = results.formula_table(result.rows)
    for line in lines:
        shown = dict(zip(head, line, strict=True))
        family, pass_ = shown["layer"].split()[0], shown["pass"].replace(" ", "_")
        tied, hand = (found[family, pass_, peer].median_ms for peer in ("tied", "by_hand"))
        assert shown["over best by hand"] == f"{tied / hand:.2f}"
    assert "soc-exponential" not in results.table(result.rows)


def test_the_shapes_are_those_of_their_users():
    for on_gpu, counts in ((True, (9, 6)), (False, (5, 2))):
        families = [workload.family for workload in workloads.formulas(on_gpu)]
        assert tuple(families.count(family) for family in workloads.FORMULAS) == counts
    known = {workload.shape[1:] for workload in workloads.every()}
    assert {workload.shape[1:] for workload in workloads.formulas(True)} <= known
