"""What each part contributes at answering time: one source of knowledge is exchanged or emptied, nothing is trained.

A model may have learned to ignore a part. Then exchanging what the part says changes no answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.adapters import MixtureOfAdapters
from ..model.lion import LionModel

CHANGES = (
    "none",
    "Q-Former tokens of another picture",
    "Q-Former asked another question",
    "aggregator tokens of another picture",
    "tags emptied",
    "tags of another picture",
    "router rows swapped",
)


class Previous:
    """Gives each row what belongs to the row before it; the first gets the last one of the batch before."""

    def __init__(self) -> None:
        self.last: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        first = self.last or [tensor[-1:] for tensor in tensors]
        self.last = [tensor[-1:] for tensor in tensors]
        return [torch.cat((one, tensor[:-1])) for one, tensor in zip(first, tensors, strict=True)]


def change(model: LionModel, name: str) -> bool:
    """Make the change by hooks on the modules, for good. False if the model has no such part."""
    previous = Previous()
    routers = [module for module in model.modules() if isinstance(module, MixtureOfAdapters) and module.gates]
    roll = lambda ids: None if ids is None else ids.roll(1, 0)
    match name:
        case "Q-Former tokens of another picture" if model.qformer is not None:
            model.vit.register_forward_hook(lambda _, args, out: (*previous(out[:1]), out[1]))
        case "aggregator tokens of another picture" if model.aggregator is not None:
            model.vit.register_forward_hook(lambda _, args, out: (out[0], previous(out[1])))
        case "Q-Former asked another question" if model.qformer is not None:
            model.qformer.register_forward_pre_hook(lambda _, args: (args[0], *map(roll, args[1:])))
        case "tags emptied" if model.ram is not None:
            model.ram.register_forward_hook(lambda _, args, out: torch.full_like(out, -torch.inf))
        case "tags of another picture" if model.ram is not None:
            model.ram.register_forward_hook(lambda _, args, out: previous([out])[0])
        case "router rows swapped" if routers:
            for mixture in routers:
                mixture.register_forward_pre_hook(lambda _, args: (args[0], 1 - args[1]))
        case _:
            return name == "none"
    return True
