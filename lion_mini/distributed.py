"""One process, or the several that torchrun started."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .quantize import usable


def distributed(device: str, timeout: timedelta | None = None) -> tuple[int, int, torch.device]:
    """Initialise the process group. Returns (rank, world size, device); without torchrun it is (0, 1, device).

    On CUDA the backend is nccl and "cuda" means the card LOCAL_RANK; elsewhere it is gloo. `timeout` limits how long a
    collective waits for the other ranks. A device that cannot be used raises a ValueError.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, usable(device)
    mine = usable(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), mine
