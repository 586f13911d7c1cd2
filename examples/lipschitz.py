r"""Train a 1-Lipschitz classifier of digits, and certify within what radius classes stay.

    python examples/lipschitz.py [--output lipschitz.png] [--steps 300] [--seed 0]

All layers are skew orthogonal convolutions, with the activation MaxMin between them, so that the
net f is 1-Lipschitz but for the error of a series, which is bounded. A difference of two logits is
then :math:`\sqrt 2`-Lipschitz: an image whose largest logit is ahead by a margin m keeps its class
under every change of a norm below :math:`m / (\sqrt 2 L)`. No attack can find one.

The same net with free weights is certified in the same way, where L is the product of the largest
singular values of its layers. No training step keeps that product small.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import triton_tied as tt

CHANNELS, CLASSES, SIDE = 8, 10, 8
BATCH, LEARNING_RATE, TEMPERATURE = 64, 1e-2, 1 / 4
HELD_OUT, ATTACKED = 500, 200
RADII = (0.1, 0.3, 0.5)


class FreeConv2d(nn.Module):
    """Shapes as in SkewOrthogonalConv2d, but one convolution with free weights."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        channels = max(in_channels * stride**2, out_channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.stride)
        x = F.pad(x, (0, 0, 0, 0, 0, self.conv.in_channels - x.shape[1]))
        return self.conv(x)[:, : self.out_channels]


class MaxMin(nn.Module):
    """Sorts pairs of channels: keeps the norm."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("lipschitz.png"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    training, held_out = digits(arguments.seed)
    models = {}
    for name, kind in {"tied": tt.SkewOrthogonalConv2d, "free": FreeConv2d}.items():
        torch.manual_seed(arguments.seed)
        models[name] = classifier(kind)
        train(models[name], *training, arguments.steps, arguments.seed, name)
    bounds = {"tied": certified_bound(models["tied"]), "free": product_of_norms(models["free"])}
    broken = report(models, bounds, *held_out, arguments.output)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if broken or bounds["tied"] > 1.001:
        raise SystemExit("the certificate of the tied net does not hold")


def classifier(layer: Callable[..., nn.Module]) -> nn.Sequential:
    """Logits from (N, 1, 8, 8). The last layer has one pixel, of all channels and pixels."""
    wide = 4 * CHANNELS
    return nn.Sequential(
        *(layer(1, CHANNELS, kernel_size=3), MaxMin()),
        *(layer(CHANNELS, wide, kernel_size=3, stride=2), MaxMin()),
        *(layer(wide, wide, kernel_size=3), MaxMin()),
        *(layer(wide, CLASSES, kernel_size=1, stride=4), nn.Flatten()),
    )


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 1, 8, 8) in [0, 1] and their classes, for training and held out: the handwritten
    digits that ship with scikit-learn."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    classes = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    training, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return (images[training], classes[training]), (images[held_out], classes[held_out])


def train(
    model: nn.Module, images: Tensor, classes: Tensor, steps: int, seed: int, name: str
) -> None:
    """Cross entropy, with a temperature that asks for wide margins."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    progress = tqdm(range(steps), desc=f"training {name}", unit="step")
    for step in progress:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]) / TEMPERATURE, classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix_str(f"loss {loss.item():.2f}")
    model.eval()
    model.requires_grad_(False)


def certified_bound(model: nn.Sequential) -> float:
    """Of the Lipschitz constant: MaxMin has 1, and each layer knows its own."""
    layers = [layer for layer in model if isinstance(layer, tt.SkewOrthogonalConv2d)]
    return math.prod(layer.lipschitz_bound() for layer in layers)


def product_of_norms(model: nn.Sequential) -> float:
    """The same for free weights: of each convolution the largest singular value, exactly."""
    product, side = 1.0, SIDE
    for layer in model:
        if isinstance(layer, FreeConv2d):
            side //= layer.stride
            conv, size = layer.conv, layer.conv.in_channels * side**2
            basis = torch.eye(size).view(size, -1, side, side)
            matrix = F.conv2d(basis, conv.weight, padding=conv.padding).flatten(1)
            product *= torch.linalg.matrix_norm(matrix, 2).item()
    return product


def report(
    models: dict[str, nn.Module],
    bounds: dict[str, float],
    images: Tensor,
    classes: Tensor,
    output: Path,
) -> int:
    """Prints all, and returns how many attacks broke the tied net's certificate."""
    right, radius, distance, inside = {}, {}, {}, {}
    attacked = slice(ATTACKED)
    for name, model in models.items():
        logits = model(images)
        first, second = logits.topk(2).values.unbind(1)
        right[name] = logits.argmax(1) == classes
        radius[name] = (first - second) / (math.sqrt(2) * bounds[name])
        distance[name] = attack(model, images[attacked], name)
        inside[name] = int((distance[name] < radius[name][attacked]).sum())

    def line(label: str, values: dict[str, float], form: str) -> None:
        print(f"{label:<42}" + "".join(f"{format(values[name], form):>10}" for name in models))

    print(f"\n{'':<42}" + "".join(f"{name:>10}" for name in models))
    line("bound of the Lipschitz constant", bounds, ".6g")
    line("accuracy, held out", {n: share(right[n]) for n in models}, ".1%")
    line("certified radius, median", {n: radius[n].median().item() for n in models}, ".4f")
    for r in RADII:
        certified = {n: share(right[n] & (radius[n] > r)) for n in models}
        line(f"certified accuracy, radius {r}", certified, ".1%")
    line("distance at which attacks succeed, median", medians(distance), ".4f")
    print(f"attacks that succeed inside the certified radius: {inside['tied']} of {ATTACKED}")
    picture(right, radius, distance).savefig(output, dpi=120, metadata={"Software": None})
    print(f"\nwrote {output}")
    return inside["tied"]


def share(flags: Tensor) -> float:
    return flags.float().mean().item()


def medians(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: each.median().item() for name, each in values.items()}


def attack(model: nn.Module, images: Tensor, name: str, steps: int = 15) -> Tensor:
    """Norms of changes that alter the class, infinite where none is found.

    Each step goes to where the linearised margin to the second class is zero, and a little further.
    """
    start, x = model(images).argmax(1, keepdim=True), images.clone()
    distance = torch.full((len(images),), math.inf)
    for _ in tqdm(range(steps), desc=f"attacking {name}", unit="step"):
        x.requires_grad_()
        with torch.enable_grad():
            logits = model(x)
            others = logits.scatter(1, start, -math.inf).max(1).values
            margin = logits.gather(1, start)[:, 0] - others
            (gradient,) = torch.autograd.grad(margin.sum(), x)
        steepness = gradient.square().sum((1, 2, 3)).clamp_min(1e-12)
        x = x.detach() - (1.02 * margin.detach() / steepness).view(-1, 1, 1, 1) * gradient
        moved = (x - images).flatten(1).norm(dim=1)
        is_other = model(x).argmax(1) != start[:, 0]
        distance = torch.where(is_other, torch.minimum(distance, moved), distance)
    return distance


def picture(
    right: dict[str, Tensor], radius: dict[str, Tensor], distance: dict[str, Tensor]
) -> Figure:
    """How much of the accuracy is left under changes up to a radius: certified, and attacked."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    radii = torch.linspace(0, 1.5, 151)
    for name, colour in {"tied": "C0", "free": "C1"}.items():
        correct = right[name][:ATTACKED]
        certified = [100 * share(right[name] & (radius[name] > r)) for r in radii]
        attacked = [100 * share(correct & (distance[name] > r)) for r in radii]
        axes.plot(radii, certified, colour, label=f"{name}, certified")
        axes.plot(radii, attacked, colour, linestyle="dashed", label=f"{name}, attacked")
    axes.set(xlabel="norm of the change", ylabel="accuracy, %", xlim=(0, 1.5), ylim=(0, 100))
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
