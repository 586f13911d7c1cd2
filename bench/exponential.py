"""What skew orthogonal convolutions cost on a CPU, in time and in what the backward needs.

    python bench/exponential.py [--batch 128] [--seconds 20] [--out FILE]

This package stands against the published formula and against the best that is written by hand.
A training step is a forward and a backward with 5 terms, from the parameters on; an evaluation is a
forward without gradients, with 12. Medians of calls in turns, on one thread, in float32; the CPU's
time, which other processes disturb less than the time on the wall. Before they are timed, all are
seen to compute the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_tied as tt
from triton_tied.benchmark.clocks import Clock, Turn, interleave
from triton_tied.benchmark.formulas import PEERS_OF, power_series
from triton_tied.benchmark.results import machine_of
from triton_tied.benchmark.workloads import Workload

SIZES = [(32, 32), (64, 16), (128, 8), (256, 4), (512, 2)]  # channels, side
TRAINING, EVALUATION = 5, 12
SKEW = "skew_adjoint"
LABELS = {
    "published": "published formula",
    "by_hand": "by hand",
    "tied": "tied_exp",
    "tied_recompute": "tied_exp, recompute",
}
Peer = Callable[[Tensor, int], Tensor]  # of an image and the number of terms


class PublishedLayer(nn.Module):
    """Normalised by the least norm of four matrices, with one step of the power method in each
    training step."""

    def __init__(self, filter: Tensor) -> None:
        super().__init__()
        self.filter = nn.Parameter(filter)
        c, _, h, w = filter.shape
        self.vectors = [
            (torch.randn(right), torch.ones(left))
            for right, left in (
                ((1, c, 1, w), (c, 1, h, 1)),
                ((1, c, h, 1), (c, 1, 1, w)),
                ((1, c, h, w), (c, 1, 1, 1)),
                ((c, 1, h, w), (1, c, 1, 1)),
            )
        ]
        self.normalized(300)

    def normalized(self, steps: int) -> Tensor:
        weight = (self.filter - self.filter.transpose(0, 1).flip(2, 3)) / 2
        sigmas = []
        for n, (right, left) in enumerate(self.vectors):
            with torch.no_grad():
                for _ in range(steps):
                    left = F.normalize((weight * right).sum_to_size(left.shape), dim=None)
                    right = F.normalize((weight * left).sum_to_size(right.shape), dim=None)
            self.vectors[n] = right, left
            sigmas.append((weight * right * left).sum())
        return 0.7 * weight / torch.stack(sigmas).amin()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.normalized(1 if self.training else 0)
        terms = TRAINING if self.training else EVALUATION
        return power_series(x, lambda z: F.conv2d(z, weight, padding=1), terms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20, help="for each size and pass")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what is printed here, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine = machine_of(torch.device("cpu"))
    shown = ("processor", "threads", "load", "torch", "date", "commit")
    lines = [f"{name}: {machine[name]}" for name in shown]
    lines += [f"float32, contiguous images, batch {given.batch}, kernel 3x3"]
    print("\n".join(lines))
    for channels, side in SIZES:
        measured = measure(given.batch, channels, side, given.seconds)
        print("\n".join(measured), flush=True)
        lines += measured
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


def measure(batch: int, channels: int, side: int, seconds: float) -> list[str]:
    x = torch.randn(batch, channels, side, side, requires_grad=True)
    published = PublishedLayer(torch.randn(channels, channels, 3, 3))
    tied = published.normalized(0).detach()
    layer = tt.SkewOrthogonalConv2d(channels, channels, 3, bias=False)
    layer.load_state_dict({"random_conv_filter": published.filter.detach()}, strict=False)
    layer.normalized(300)

    workload = Workload("soc-exponential", batch, channels, (side, side), 3, "fp32", SKEW)
    functions: dict[str, Peer] = {
        LABELS[name]: kind(workload, tied, "contiguous").repeat
        for name, kind in PEERS_OF[workload.family].items()
    }
    layers: dict[str, Peer] = {
        "published layer": lambda x, n: published.train(n == TRAINING)(x),
        "SkewOrthogonalConv2d": lambda x, n: layer.train(n == TRAINING)(x),
    }
    lines = [f"\n{channels}@{side}{'training step':>34}{'kept':>13}{'evaluation':>16}"]
    for peers in (functions, layers):
        check(peers, x)
        lines += rows(peers, x, seconds)
    return lines


def check(peers: dict[str, Peer], x: Tensor) -> None:
    expected, *others = [peer(x, TRAINING).detach() for peer in peers.values()]
    for found in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def rows(peers: dict[str, Peer], x: Tensor, seconds: float) -> list[str]:
    upstream = torch.randn_like(x)
    step = {
        name: Turn(lambda peer=peer: peer(x, TRAINING).backward(upstream))
        for name, peer in peers.items()
    }
    evaluate = {name: Turn(lambda peer=peer: evaluated(peer, x)) for name, peer in peers.items()}
    trained = interleave(step, cpu_time, seconds).medians
    tested = interleave(evaluate, cpu_time, seconds / 2).medians
    return [
        f"{name:<22}{trained[name]:12.0f} ms {ratio(trained, name)}"
        f"{kept(peer, x) / 2**20:9.1f} MiB{tested[name]:10.0f} ms {ratio(tested, name)}"
        for name, peer in peers.items()
    ]


def ratio(medians: dict[str, float], name: str) -> str:
    return f"{medians[name] / next(iter(medians.values())):5.2f} x"


def cpu_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


@torch.no_grad()
def evaluated(peer: Peer, x: Tensor) -> None:
    peer(x, EVALUATION)


def kept(peer: Peer, x: Tensor) -> int:
    return Clock(x.device).kept_bytes(lambda: peer(x, TRAINING))


if __name__ == "__main__":
    main()
