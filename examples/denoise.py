r"""Train a gradient-field denoiser on photographs, and see that its Jacobian is symmetric.

    python examples/denoise.py [--output denoise.png] [--steps 400] [--seed 0]

The denoiser is one gradient step on a learned potential:

.. math:: D(x) = x - \nabla\phi(x), \qquad
          \phi(x) = \sum_{c,m} \psi_c((E x)_{c,m}) + \tfrac12 \langle E x, A E x \rangle

with a lifting convolution E (1 to C channels) and a tied convolution A. Because A is self-adjoint
the gradient needs no double backward, it is :math:`\nabla\phi(x) = E^T(\psi'(E x) + A E x)`, and
the Jacobian :math:`I - E^T(\mathrm{diag}\,\psi'' + A) E` of D is symmetric to rounding. With free
weights in place of A the same formula is no gradient of anything: its Jacobian is not symmetric.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from skimage import color, data
from torch import Tensor, nn
from tqdm import tqdm

import triton_tied as tt

TRAINING = ("astronaut", "coffee", "rocket", "coins")
HELD_OUT = ("camera", "chelsea")
NOISE = 25 / 255  # standard deviation; pixels lie in [0, 1]
CHANNELS, LIFT_SIZE, TIED_SIZE = 48, 7, 3
BATCH, PATCH = 16, 40


class GradientFieldDenoiser(nn.Module):
    """D(x) = x - E^T(psi'(E x) + A E x) with psi_c'(z) = strength_c * tanh(z / width_c)."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.lift = nn.Parameter(torch.randn(CHANNELS, 1, LIFT_SIZE, LIFT_SIZE) / LIFT_SIZE**2)
        self.log_strength = nn.Parameter(torch.full((CHANNELS, 1, 1), math.log(0.1)))
        self.log_width = nn.Parameter(torch.full((CHANNELS, 1, 1), math.log(0.1)))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        lifted = F.conv2d(x, self.lift, padding="same")
        force = self.log_strength.exp() * torch.tanh(lifted / self.log_width.exp())
        force = force + self.middle(lifted)
        return x - F.conv_transpose2d(force, self.lift, padding=LIFT_SIZE // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("denoise.png"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    tied = GradientFieldDenoiser(
        tt.TiedConv2d(CHANNELS, TIED_SIZE, padding=TIED_SIZE // 2, bias=False)
    )
    nn.init.normal_(tied.middle.packed_weight, std=1e-3)  # starts near the potential without A
    free = copy.deepcopy(tied)  # the same net with free weights, and the same ones to begin with
    free.middle = tied.middle.to_conv()
    models = {"tied": tied, "free": free}
    photographs = [load(name).to(device) for name in TRAINING]
    for name, model in models.items():
        train(model.to(device), photographs, arguments.steps, arguments.seed, name)
    report(models, device, arguments)
    print(f"{time.perf_counter() - start:.0f} s in all")


def load(name: str) -> Tensor:
    """A photograph that ships with scikit-image, gray, (1, 1, H, W) in [0, 1]."""
    pixels = getattr(data, name)()
    gray = color.rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255
    return torch.from_numpy(gray).float()[None, None]


def train(model: nn.Module, photographs: list[Tensor], steps: int, seed: int, name: str) -> None:
    """Least squares on random noisy patches; the same patches and noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    progress = tqdm(range(steps), desc=f"training {name}", unit="step")
    for step in progress:
        clean = patches(photographs, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        loss = F.mse_loss(model(clean + NOISE * noise), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix_str(f"PSNR {-10 * math.log10(loss.item()):.2f} dB")


def patches(photographs: list[Tensor], generator: torch.Generator) -> Tensor:
    """(BATCH, 1, PATCH, PATCH), each from a random place of a random photograph."""

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    chosen = []
    for _ in range(BATCH):
        photograph = photographs[below(len(photographs))]
        top, left = (below(side - PATCH + 1) for side in photograph.shape[2:])
        chosen.append(photograph[..., top : top + PATCH, left : left + PATCH])
    return torch.cat(chosen)


def report(
    models: dict[str, nn.Module], device: torch.device, arguments: argparse.Namespace
) -> None:
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    print(f"\n{'held-out photograph':<22}{'noisy':>10}{'tied':>10}{'free':>10}   PSNR, dB")
    rows = []
    for name in HELD_OUT:
        clean = load(name)
        noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            denoised = {key: model(noisy.to(device)).cpu() for key, model in models.items()}
        values = [psnr(image, clean) for image in (noisy, *denoised.values())]
        print(f"{name:<22}" + "".join(f"{value:>10.2f}" for value in values))
        rows.append([(noisy, "noisy"), (denoised["tied"], "denoised, tied"), (clean, "clean")])

    print(f"\n{'parameters':<22}{'':>10}{'tied':>10}{'free':>10}")
    for part, pick in (("of A", lambda model: model.middle), ("in all", lambda model: model)):
        counts = [sum(p.numel() for p in pick(model).parameters()) for model in models.values()]
        print(f"{part:<22}{'':>10}" + "".join(f"{count:>10,}" for count in counts))

    crop = rows[0][0][0][..., :48, :48].double().to(device)
    errors = [asymmetry(copy.deepcopy(model).double(), crop) for model in models.values()]
    print(f"\n{'|Jv - J^T v| / |Jv|':<22}{'':>10}" + "".join(f"{error:>10.1e}" for error in errors))
    picture(rows).save(arguments.output)
    print(f"\nwrote {arguments.output}")


def psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * math.log10(F.mse_loss(image, clean).item())


def asymmetry(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How far the Jacobian at x is from symmetric, seen by a random vector, in float64."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x)
    _, jacobian_v = torch.func.jvp(model, (x,), (v,))
    _, pull_back = torch.func.vjp(model, x)
    return ((jacobian_v - pull_back(v)[0]).norm() / jacobian_v.norm()).item()


def picture(
    rows: list[list[tuple[Tensor, str]]], side: int = 300, caption: int = 26
) -> Image.Image:
    """One row a photograph: the middle of each image, with its PSNR against the last one."""
    canvas = Image.new("L", (side * len(rows[0]), (side + caption) * len(rows)), color=255)
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        clean = row[-1][0]
        for c, (image, name) in enumerate(row):
            top, left = ((length - side) // 2 for length in image.shape[2:])
            crop = image[0, 0, top : top + side, left : left + side].clamp(0, 1)
            pixels = Image.fromarray((crop * 255).round().byte().numpy())
            corner = (c * side, r * (side + caption))
            canvas.paste(pixels, (corner[0], corner[1] + caption))
            quality = "" if image is clean else f"  {psnr(image, clean):.1f} dB"
            draw.text((corner[0] + 6, corner[1] + 4), name + quality, fill=0, font_size=16)
    return canvas


if __name__ == "__main__":
    main()
