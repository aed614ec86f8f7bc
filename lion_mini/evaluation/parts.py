"""What each part contributes at answering time: one source of knowledge is exchanged or emptied, nothing is trained.

A model may have learned to ignore a part. Then the change costs nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import LionConfig
from ..model.adapters import MixtureOfAdapters
from ..model.lion import LionModel

CHANGES = (
    "Q-Former tokens of another picture",
    "Q-Former asked another question",
    "aggregator tokens of another picture",
    "tags emptied",
    "tags of another picture",
    "router rows swapped",
)


def changes(config: LionConfig) -> list[str]:
    """The changes that a model has the parts for, after "none"."""
    has = {
        "Q-Former": config.visual_input != "region",
        "aggregator": config.visual_input != "image",
        "tags": config.ram is not None and config.tags != "none",
        "router": config.adapters > 1,
    }
    return ["none", *(name for name in CHANGES if has[name.split()[0]])]


class Previous:
    """Gives each row what belongs to the picture before it: the last earlier row that differs, also of other batches.
    Only the very first picture has none, and gets the last one of its batch."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, ...] = ()
        self.this: tuple[Tensor, ...] = ()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        rows, taken = list(zip(*tensors, strict=True)), []
        for row in rows:
            if not self.this or not all(map(torch.allclose, row, self.this)):
                self.before, self.this = self.this, row
            taken.append(self.before or rows[-1])
        return [torch.stack(column) for column in zip(*taken, strict=True)]


def change(model: LionModel, name: str) -> None:
    """Make a change of CHANGES, for good, by hooks on the modules."""
    previous = Previous()
    match name:
        case "Q-Former tokens of another picture":  # the ViT returns its last block's output, then the taps
            model.vit.register_forward_hook(lambda _, args, out: (*previous(out[:1]), out[1]))
        case "Q-Former asked another question" if model.qformer is not None:
            roll = lambda text: text if text is None else text.roll(1, 0)  # ids, and their mask
            model.qformer.register_forward_pre_hook(lambda _, args: (args[0], *map(roll, args[1:])))
        case "aggregator tokens of another picture":
            model.vit.register_forward_hook(lambda _, args, out: (out[0], previous(out[1])))
        case "tags emptied" if model.ram is not None:
            model.ram.register_forward_hook(lambda _, args, out: torch.full_like(out, -torch.inf))
        case "tags of another picture" if model.ram is not None:
            model.ram.register_forward_hook(lambda _, args, out: previous([out])[0])
        case "router rows swapped":
            for module in model.modules():
                if isinstance(module, MixtureOfAdapters):
                    module.register_forward_pre_hook(lambda _, args: (args[0], 1 - args[1]))


def parts_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row per change, a column per score; below the first row, what the change adds."""
    none, *rest = rows.items()
    names = list(none[1])
    lines = [f"| change at answering time | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    lines.append(f"| none | {' | '.join(f'{none[1][name]:.1f}' for name in names)} |")
    for change, scores in rest:
        cells = [f"{scores[name]:.1f} ({scores[name] - none[1][name]:+.1f})" for name in names]
        lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines)
