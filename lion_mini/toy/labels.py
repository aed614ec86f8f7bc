"""Labels and losses of stage 0: what every patch shows, which tags apply, what every word of a question refers to.

    patch      shape, colour, size and box of the thing that covers most of it        `owners`, `patch_labels`
    noun       the same of the thing it refers to, if it is one; how many it fits     `Meanings`
    box        the same of the thing in it, at its last coordinate
    relation   the vector from the noun after it to the noun before it, and its component in the relation's direction

"Is the red cross right of the red triangle?" The triangle lies right of the cross and a little higher:

    cross      cross, red, small, its box; it fits 1 thing
    right of   across -2/3, down 1/12; to the right -2/3, so the answer is no
"""

from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import IGNORE
from ..text.tokenizers import UnigramTokenizer
from .questions import RELATIONS, Record, matching, plural
from .world import COLOURS, GRID, MOST, SHAPES, SIDES, TAGS, Scene, Thing

FIELDS = (len(SHAPES) + 1, len(COLOURS), len(SIDES), *[GRID + 1] * 4)  # classes; the last shape is background
BACKGROUND = [len(SHAPES), *[IGNORE] * 6]
REFERENT = (*FIELDS, MOST + 1)  # classes of a noun: the thing, and how many things fit
MEASURES = (2, 3)  # regressed, in halves of the image: a noun's centre; a relation's vector and component
HEADS = (sum(REFERENT) + MEASURES[0], MEASURES[1])  # outputs for a noun, for a relation
UNKNOWN: list[float] = [IGNORE] * (len(REFERENT) + sum(MEASURES))


def facts(thing: Thing) -> list[int]:
    """Shape, colour, size and box, as classes of FIELDS."""
    names = SHAPES.index(thing.shape), tuple(COLOURS).index(thing.colour), tuple(SIDES).index(thing.size)
    return [*names, thing.left, thing.top, thing.left + thing.side, thing.top + thing.side]


def owners(scenes: Sequence[Scene], side: int) -> Tensor:  # -> (b, side * side)
    """For every patch the index of the thing that covers most of it; -1 for background."""
    start = torch.arange(side, dtype=torch.float64) * GRID / side
    rows = []
    for scene in scenes:
        first = torch.tensor([(t.left, t.top) for t in scene.things])[..., None]
        last = first + torch.tensor([t.side for t in scene.things])[:, None, None]
        x, y = (last.minimum(start + GRID / side) - first.maximum(start)).clamp_min(0).unbind(1)  # 2 x (things, side)
        area, owner = (y[:, :, None] * x[:, None]).flatten(1).max(0)
        rows.append(owner.where(area > 0, -1))
    return torch.stack(rows)


def patch_labels(scenes: Sequence[Scene], owner: Tensor) -> Tensor:  # (b, n) -> (b, n, fields)
    """All fields of a thing; of background only the shape, and IGNORE for the rest."""
    tables = [torch.tensor([*map(facts, scene.things), BACKGROUND]) for scene in scenes]
    return torch.stack([table[row] for table, row in zip(tables, owner, strict=True)])


def field_loss(logits: Tensor, wanted: Tensor, fields: Sequence[int]) -> Tensor:  # (..., classes), (..., fields) -> ()
    """The sum over the fields of their mean cross-entropies."""
    losses = []
    for part, labels in zip(logits.float().split(tuple(fields), dim=-1), wanted.unbind(-1), strict=True):
        total = F.cross_entropy(part.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        losses.append(total / (labels != IGNORE).sum().clamp_min(1))
    return torch.stack(losses).sum()


def tag_labels(tags: Sequence[Collection[str]]) -> Tensor:  # -> (b, c)
    return torch.tensor([[float(tag in each) for tag in TAGS] for each in tags])


def asymmetric_loss(logits: Tensor, wanted: Tensor, focus: float = 2.0, margin: float = 0.05) -> Tensor:
    """Cross-entropy that plays down negatives (arXiv 2009.14119): one below the margin costs nothing. Both (b, c)."""
    p = logits.sigmoid()
    q = (p - margin).clamp_min(0)
    yes = -wanted * p.clamp_min(1e-6).log()
    no = -(1 - wanted) * q**focus * (1 - q).clamp_min(1e-6).log()
    return (yes + no).sum(-1).mean()


class Meanings:
    """Labels for the pieces of a question: REFERENT's fields, then the measures."""

    def __init__(self, pieces: UnigramTokenizer):
        self.encode = lru_cache(1 << 14)(pieces.encode)
        self.words = {self.encode(word)[0]: word for word in (*TAGS, "shape")}
        self.words |= {self.encode(plural(noun))[0]: noun for noun in (*SHAPES, "shape")}
        self.directions = {self.encode(word)[0]: direction for word, direction in RELATIONS.items()}
        self.numbers = {pieces.pieces[f"{i / GRID:.3f}"][0]: i for i in range(GRID + 1)}

    def question(self, record: Record, things: Sequence[Thing]) -> list[list[float]]:
        """One row per piece. In a REC question the first noun refers to the thing that is sought."""
        target = next((thing for thing in things if thing.box.to_text() == record["answer"]), None)
        rows: list[list[float]] = []
        adjectives: list[str] = []
        box: list[int] = []
        previous, relation = None, None  # the last noun's thing; the relation since then: its row, axis and sign
        for id in self.encode(record["question"]):
            row, word, thing = [*UNKNOWN], self.words.get(id), None
            if id in self.numbers:
                box = [*box, self.numbers[id]][-4:]
                thing = next((t for t in things if facts(t)[3:] == box), None)
            elif id in self.directions:
                relation = row, *self.directions[id]
            elif word in (*SHAPES, "shape"):
                fitting = matching(things, (*adjectives, word))
                thing = target or (fitting[0] if len(fitting) == 1 else None)
                row[len(FIELDS)] = len(fitting)
                if relation and previous and thing:
                    between, axis, sign = relation
                    vector = [(previous.centre(i) - thing.centre(i)) * 2 / GRID for i in (0, 1)]
                    between[-3:] = *vector, vector[axis] * sign
                previous, relation, target = thing, None, None
            adjectives = [*adjectives, word] if word in (*COLOURS, *SIDES) else []
            if thing:
                row[: len(FIELDS)] = facts(thing)
                row[len(REFERENT) : -3] = (thing.centre(axis) * 2 / GRID - 1 for axis in (0, 1))
            rows.append(row)
        return rows

    def prompts(
        self, prompts: Sequence[str], records: Sequence[Record], scenes: Sequence[Scene]
    ) -> Tensor:  # -> (b, prompt, fields and measures)
        """The question ends its prompt. The tags before it have no labels."""
        rows = []
        for prompt, record, scene in zip(prompts, records, scenes, strict=True):
            known = self.question(record, scene.things)
            before = len(self.encode(prompt)) - len(known)
            rows.append(torch.tensor([UNKNOWN] * before + known, dtype=torch.float32))
        return pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def meaning_loss(meant: Tensor, wanted: Tensor) -> Tensor:  # (k, classes and measures), (k, fields and measures) -> ()
    """Cross-entropy for the classes, squared error for the measures."""
    classes, *measures = meant.split((sum(REFERENT), *MEASURES), dim=-1)
    labels, *distances = wanted.split((len(REFERENT), *MEASURES), dim=-1)
    loss = 0.2 * field_loss(classes, labels.long(), REFERENT)
    for weight, predicted, measured in zip((1, 2), measures, distances, strict=True):
        known = measured != IGNORE
        if known.any():
            loss = loss + weight * F.mse_loss(predicted.float()[known], measured[known])
    return loss
