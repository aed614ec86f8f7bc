"""One process, or the several that torchrun started."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .quantize import usable


def distributed(device: str) -> tuple[int, int, torch.device]:
    """Initialise the process group, once. Returns (rank, world size, device); without torchrun it is (0, 1, device).

    On CUDA the backend is nccl and "cuda" means the card LOCAL_RANK; elsewhere it is gloo. A collective waits for days:
    rank 0 may train stage 0, or write XXL. A device that cannot be used raises a ValueError.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank + world).isdecimal() or int(rank) >= int(world):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {world!r}: unset them, or start with torchrun")
    if world == "1":
        return 0, 1, usable(device)
    mine = usable(f"cuda:{os.environ.get('LOCAL_RANK', rank)}" if device == "cuda" else device)
    card = mine if mine.type == "cuda" else None
    if card:
        torch.cuda.set_device(card)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if card else "gloo", timeout=timedelta(days=7), device_id=card)
    return dist.get_rank(), dist.get_world_size(), mine
