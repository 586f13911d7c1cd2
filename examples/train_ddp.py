r"""Train a denoiser on several processes, save it, and go on with another number of them.

    torchrun --nproc_per_node=2 examples/train_ddp.py --steps 100 --checkpoint run
    torchrun --nproc_per_node=3 examples/train_ddp.py --steps 200 --checkpoint run    # goes on

Each process has a GPU, and they talk by NCCL; where there are fewer GPUs, all run on CPUs, by Gloo.
Each step has one batch, drawn from the number of the step, of which each process takes its share.
So the losses are those of one process, but for rounding.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import triton_tied as tt

BATCH, SIDE, CHANNELS, BLOCKS = 24, 32, 16, 3
NOISE = 0.5  # standard deviation; that of the images is about 1


class Denoiser(nn.Module):
    """Residual blocks with tied convolutions estimate the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(
            tt.TiedConv2d(CHANNELS, kernel_size=3, padding=1) for _ in range(BLOCKS)
        )
        self.head = nn.Conv2d(CHANNELS, 1, 3, padding=1)

    def forward(self, noisy: Tensor) -> Tensor:
        features = self.lift(noisy)
        for block in self.blocks:
            features = features + block(F.relu(features))
        return noisy - self.head(features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of the whole training")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a folder; a checkpoint in it is taken up"
    )
    parser.add_argument("--report", type=int, default=20, help="print every so many steps")
    arguments = parser.parse_args()
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if has_gpus else "gloo")
    if BATCH % dist.get_world_size():
        raise SystemExit(f"the number of processes must divide the batch of {BATCH}")
    train(arguments, int(os.environ["LOCAL_RANK"]) if has_gpus else None)
    # After the model is gone: it holds the group, and as the last to do so could wait for ever.
    dist.destroy_process_group()


def train(arguments: argparse.Namespace, gpu: int | None) -> None:
    device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
    torch.manual_seed(0)
    model = DistributedDataParallel(Denoiser().to(device), None if gpu is None else [gpu])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = load(arguments.checkpoint, model, optimizer)
    is_first = dist.get_rank() == 0
    progress = tqdm(
        range(start, arguments.steps),
        initial=start,
        total=arguments.steps,
        disable=not is_first,
        unit="step",
    )
    for step in progress:
        clean, noisy = (images.to(device) for images in share_of_batch(step))
        loss = F.mse_loss(model(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % arguments.report == 0:
            value = mean_over_processes(loss)
            if is_first:
                progress.write(f"step {step + 1} of {arguments.steps}: loss {value:.6f}")
    save(arguments.checkpoint, model, optimizer, arguments.steps)
    if is_first:
        print(f"saved {arguments.checkpoint}")


def share_of_batch(step: int) -> tuple[Tensor, Tensor]:
    """This process's part of the batch of a step: smooth images, and the same with noise."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randn(BATCH, 1, SIDE // 4, SIDE // 4, generator=generator)
    clean = F.interpolate(coarse, scale_factor=4, mode="bicubic")
    noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
    rank, processes = dist.get_rank(), dist.get_world_size()
    return clean[rank::processes], noisy[rank::processes]


def mean_over_processes(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    warnings.filterwarnings(
        "ignore", "Detected an existing checkpoint"
    )  # it is meant to be replaced
    dcp.save(state_of(model, optimizer, step), checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Takes up the checkpoint, if there is one, and returns its step."""
    if not (folder / ".metadata").exists():
        return 0
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return int(state["step"])


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}


if __name__ == "__main__":
    main()
