"""The devices that a command runs on."""

import torch


def devices() -> list[torch.device]:
    """The CPU, and a GPU if there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
