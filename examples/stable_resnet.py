r"""Send photographs through 500 residual layers, and see that nothing explodes or dies out.

    python examples/stable_resnet.py [--output stable_resnet.png] [--layers 500] [--seed 0]

Each layer is a step of size h,

.. math:: x + h \tanh(A x - \gamma x)

with a skew-adjoint convolution A, and one weight for all. With a step that is small enough, the
energy :math:`\sum \log \cosh(A x - \gamma x)` never grows, from one layer to the next, whatever A
and the image are. With free weights in place of A it grows, and so do features and gradients.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage import color, data
from torch import Tensor, nn
from tqdm import tqdm

import triton_tied as tt

PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "coins", "camera", "chelsea")
CHANNELS, SIDE = 8, 32
STANDARD_DEVIATION, GAMMA = 0.0125, 0.005  # of the weights; the damping
ROUNDING = 1e-12  # of the energy, relative, in float64


class FreeResidual2d(nn.Module):
    """The same step with free weights."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        nn.init.normal_(self.conv.weight, std=STANDARD_DEVIATION)
        self.step, self.gamma = step, GAMMA

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step * torch.tanh(self.conv(x) - self.gamma * x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("stable_resnet.png"))
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(arguments.seed)
    tied = tt.AntisymmetricResidual2d(CHANNELS, gamma=GAMMA, bias=False)
    nn.init.normal_(tied.conv.packed_weight, std=STANDARD_DEVIATION)
    tied.step = tied.stable_step()
    lift = nn.Conv2d(1, CHANNELS, 3, padding=1)
    images = torch.cat([load(name) for name in PHOTOGRAPHS])
    features = lift((images - images.mean()) / images.std()).detach()
    results = {
        name: through(layer, features, arguments.layers, name)
        for name, layer in {"tied": tied, "free": FreeResidual2d(tied.step)}.items()
    }
    grown = report(results, tied.step, arguments.layers, arguments.output)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if grown:
        raise SystemExit("the energy of the tied net has grown")


def load(name: str) -> Tensor:
    """The middle of a photograph that ships with scikit-image, gray, (1, 1, SIDE, SIDE)."""
    pixels = getattr(data, name)()
    gray = torch.from_numpy(color.rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255)
    side = min(gray.shape)
    top, left = ((length - side) // 2 for length in gray.shape)
    square = gray[None, None, top : top + side, left : left + side]
    return F.interpolate(square, size=(SIDE, SIDE), mode="area")


def through(layer: nn.Module, features: Tensor, layers: int, name: str) -> dict[str, Tensor]:
    """One number before the first layer and after each: the norms of the features and of a random
    gradient that comes back from the end, relative to where they start, and the energy."""
    states = [features.requires_grad_()]
    with tt.cached():  # one weight for all layers
        for _ in tqdm(range(layers), desc=f"through {name}", unit="layer"):
            states.append(layer(states[-1]))
        gradients = torch.autograd.grad(states[-1], states, torch.randn_like(features))
        with torch.no_grad():
            energies = [energy(layer, x) for x in states]
    norms = torch.stack([x.detach().norm() for x in states])
    gradient_norms = torch.stack([gradient.norm() for gradient in gradients])
    return {
        "features": norms / norms[0],
        "gradients": gradient_norms / gradient_norms[-1],
        "energy": torch.stack(energies),
    }


def energy(layer: nn.Module, x: Tensor) -> Tensor:
    return (layer.conv(x) - layer.gamma * x).cosh().log().sum()


def report(results: dict[str, dict[str, Tensor]], step: float, layers: int, output: Path) -> int:
    """Prints all, and returns in how many layers the tied net's energy grew."""
    print(f"\n{f'{layers} layers, step {step:.3f}':<32}" + "".join(f"{n:>10}" for n in results))
    for what, place in (("features", -1), ("gradients", 0)):
        ends = [result[what][place].item() for result in results.values()]
        label = f"norm of {what}, at the {'end' if place else 'start'}"
        print(f"{label:<32}" + "".join(f"{end:>10.2f}" for end in ends))
    grown = {name: count_of_growth(result["energy"]) for name, result in results.items()}
    print(f"{'layers that add energy':<32}" + "".join(f"{count:>10}" for count in grown.values()))
    picture(results).savefig(output, dpi=120, metadata={"Software": None})
    print(f"\nwrote {output}")
    return grown["tied"]


def count_of_growth(energies: Tensor) -> int:
    return int((energies[1:] > energies[:-1] * (1 + ROUNDING)).sum())


def picture(results: dict[str, dict[str, Tensor]]) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("features", "gradients"), strict=True):
        for name, result in results.items():
            axes.semilogy(result[what], label=f"{name} weights")
        axes.set(xlabel="layer", title=f"norm of the {what}")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    main()
