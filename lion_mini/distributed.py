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
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank + world).isdecimal() or int(rank) >= int(world):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {world!r}: unset them, or start with torchrun")
    if world == "1":
        return 0, 1, usable(device)
    mine = usable(f"cuda:{os.environ.get('LOCAL_RANK', rank)}" if device == "cuda" else device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=timeout)
    return dist.get_rank(), dist.get_world_size(), mine
