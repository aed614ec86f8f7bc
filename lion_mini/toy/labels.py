"""What every patch of a scene shows and every word of a question means: the toy's labels for stage 0.

    a patch     the thing that fills most of it: shape, colour, size, box                  `owners`, `patch_labels`
    a noun      the one thing that it means, with its adjectives, and how many they fit    `Meanings`
    a box       the thing in it, at its last number
    a relation  from the noun after it to the noun before it: how far, and by how much it holds

    "Is the red cross right of the red triangle?" where the triangle lies right of the cross, a little higher:
            cross -> cross, red, small, its box; one fits      right of -> -2/3 across, 1/12 down: holds by -2/3

A real LION's parts learn such things from billions of pictures and sentences.                   next: stage0.py
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import toy
from ..config import IGNORE
from ..text.tokenizers import UnigramTokenizer

FIELDS = (len(toy.SHAPES) + 1, len(toy.COLOURS), len(toy.SIDES), *[toy.GRID + 1] * 4)  # the last shape is: none
NOTHING = [len(toy.SHAPES), *[IGNORE] * 6]
REFERENT = (*FIELDS, toy.MOST + 1)  # of a noun: what the one thing is that it means, and how many it may mean
MEASURES = (2, 3)  # of a noun: the thing's centre; of a relation: how far it is, across and down, and by how much it
# holds; in halves of the picture
UNKNOWN: list[float] = [IGNORE] * (len(REFERENT) + sum(MEASURES))


def facts(thing: toy.Thing) -> list[int]:
    """Shape, colour, size and box: the classes of FIELDS."""
    names = toy.SHAPES.index(thing.shape), tuple(toy.COLOURS).index(thing.colour), tuple(toy.SIDES).index(thing.size)
    return [*names, thing.left, thing.top, thing.left + thing.side, thing.top + thing.side]


def owners(scene: toy.Scene, side: int) -> np.ndarray:  # -> (side * side)
    """For every patch the number of the thing that fills most of it, -1 where there is none."""
    edges = np.arange(side) * toy.GRID / side
    step = toy.GRID / side
    best, owner = np.zeros((side, side)), np.full((side, side), -1)
    for i, t in enumerate(scene.things):
        wide = (np.minimum(edges + step, t.left + t.side) - np.maximum(edges, t.left)).clip(0)
        high = (np.minimum(edges + step, t.top + t.side) - np.maximum(edges, t.top)).clip(0)
        area = high[:, None] * wide
        owner[area > best] = i
        best = np.maximum(best, area)
    return owner.reshape(-1)


def patch_labels(scenes: Sequence[toy.Scene], owner: Tensor) -> Tensor:  # (b, n) -> (b, n, fields)
    """IGNORE for what background has not."""
    tables = [torch.tensor([*(facts(t) for t in scene.things), NOTHING]) for scene in scenes]
    return torch.stack([table[one] for table, one in zip(tables, owner, strict=True)])


def field_loss(logits: Tensor, wanted: Tensor, fields: Sequence[int]) -> Tensor:  # (..., classes), (..., fields) -> ()
    """The sum over the fields of their mean cross-entropies."""
    losses = []
    for i, one in enumerate(logits.float().split(tuple(fields), dim=-1)):
        labels = wanted[..., i].flatten()
        total = F.cross_entropy(one.flatten(0, -2), labels, ignore_index=IGNORE, reduction="sum")
        losses.append(total / (labels != IGNORE).sum().clamp_min(1))
    return torch.stack(losses).sum()


class Meanings:
    """What the pieces of a question mean, in the order of REFERENT, then the measures."""

    def __init__(self, pieces: UnigramTokenizer):
        self.encode = lru_cache(1 << 14)(pieces.encode)  # with tags hardly a prompt comes twice
        self.words = {self.encode(word)[0]: word for word in (*toy.TAGS, "shape")}
        self.words |= {self.encode(toy.plural(noun))[0]: noun for noun in (*toy.SHAPES, "shape")}
        self.sides = {self.encode(words)[0]: side for words, side in toy.RELATIONS.items()}
        self.numbers = {pieces.pieces[f"{i / toy.GRID:.3f}"][0]: i for i in range(toy.GRID + 1)}

    def question(self, record: toy.Record, things: Sequence[toy.Thing]) -> list[list[float]]:
        """One row per piece. The first noun of a REC's expression means the thing that is sought."""
        target = next((thing for thing in things if thing.box.to_text() == record["answer"]), None)
        rows: list[list[float]] = []
        adjectives: list[str] = []
        box: list[int] = []
        last, between = None, None
        for id in self.encode(record["question"]):
            row, word, thing = [*UNKNOWN], self.words.get(id), None
            if id in self.numbers:
                box = [*box, self.numbers[id]][-4:]
                thing = next((t for t in things if facts(t)[3:] == box), None)
            elif id in self.sides:
                between = row, *self.sides[id]
            elif word in (*toy.SHAPES, "shape"):
                fitting = toy.matching(things, (*adjectives, word))
                thing = target or (fitting[0] if len(fitting) == 1 else None)
                row[len(FIELDS)] = len(fitting)
                if between and last and thing:
                    relation, axis, sign = between
                    far = [(last.centre(i) - thing.centre(i)) * 2 / toy.GRID for i in (0, 1)]
                    relation[-3:] = *far, far[axis] * sign
                last, between, target = thing, None, None
            adjectives = [*adjectives, word] if word and word in (*toy.COLOURS, *toy.SIDES) else []
            if thing:
                row[: len(FIELDS)] = facts(thing)
                row[len(REFERENT) : -3] = (thing.centre(axis) * 2 / toy.GRID - 1 for axis in (0, 1))
            rows.append(row)
        return rows

    def prompts(
        self, prompts: Sequence[str], records: Sequence[toy.Record], scenes: Sequence[toy.Scene]
    ) -> Tensor:  # -> (b, prompt, fields and measures)
        """The question stands at its prompt's end, behind the tags, which mean nothing here."""
        ends = [len(self.encode(text)) for text in prompts]
        labels = torch.full((len(prompts), max(ends), len(UNKNOWN)), float(IGNORE))
        for row, end, record, scene in zip(labels, ends, records, scenes, strict=True):
            known = torch.tensor(self.question(record, scene.things))
            row[end - len(known) : end] = known
        return labels


def meaning_loss(meant: Tensor, wanted: Tensor) -> Tensor:  # (..., classes and measures), (..., fields and measures)
    loss = 0.2 * field_loss(meant[..., : sum(REFERENT)], wanted[..., : len(REFERENT)].long(), REFERENT)
    measures = meant[..., sum(REFERENT) :].split(MEASURES, dim=-1), wanted[..., len(REFERENT) :].split(MEASURES, dim=-1)
    for weight, found, measured in zip((1, 2), *measures, strict=True):
        known = measured != IGNORE
        if known.any():
            loss = loss + weight * F.mse_loss(found.float()[known], measured[known])
    return loss
