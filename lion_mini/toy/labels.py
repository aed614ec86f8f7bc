"""Labels and losses of stage 0: what every patch shows, and what every word of a question refers to.

patch      shape, colour, size, row, column and box of the thing that covers most of it
noun       the same of the thing it refers to, if it is one; how many things it fits
box        the same of the thing in it, at its last coordinate
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import IGNORE
from ..text.tokenizers import UnigramTokenizer
from .questions import Record, matching, plural
from .world import COLOURS, COORDINATES, GRID, MOST, SHAPES, SIDES, Scene, Thing

WORDS = (len(SHAPES) + 1, len(COLOURS), len(SIDES), 3, 3)  # classes of what words say; the last shape is background
FIELDS = (*WORDS, *[GRID + 1] * 4)  # and the box
REFERENT = (*FIELDS, MOST + 1)  # classes of a noun: the thing, and how many things fit
NOUNS = {form: noun for noun in (*SHAPES, "shape") for form in (noun, plural(noun))}


def facts(thing: Thing) -> list[int]:
    """What is true of the thing, as classes of FIELDS."""
    said = SHAPES.index(thing.shape), [*COLOURS].index(thing.colour), [*SIDES].index(thing.size)
    return [*said, thing.cell // 3, thing.cell % 3, *thing.edges]


def one_hot(labels: Tensor, fields: Sequence[int]) -> Tensor:  # (..., fields) -> (..., classes)
    """Side by side for each field; zeros where it is unknown."""
    pairs = zip(labels.unbind(-1), fields, strict=True)
    return torch.cat([F.one_hot(field.clamp_min(0), n) * (field >= 0)[..., None] for field, n in pairs], dim=-1).float()


def patch_labels(scenes: Sequence[Scene], side: int) -> Tensor:  # -> (b, side * side, fields)
    """Per patch the FIELDS of the thing that covers most of it, or of background."""
    labels, background = list[Tensor](), [len(SHAPES), *[IGNORE] * (len(FIELDS) - 1)]
    for scene in scenes:
        covered = torch.zeros(len(scene.things), GRID, GRID)
        for area, thing in zip(covered, scene.things, strict=True):
            area[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] = 1
        share, owner = F.adaptive_avg_pool2d(covered, side).flatten(1).max(0)
        labels.append(torch.tensor([*map(facts, scene.things), background])[owner.where(share > 0, -1)])
    return torch.stack(labels)


def mentioned(things: Sequence[Thing], text: str) -> list[int]:
    """The indices of the things that nouns of a text fit, "red circles" for instance. "What shape" fits none."""
    found, adjectives = list[Thing](), list[str]()
    for word in re.findall("[a-z]+", text):
        if word in NOUNS and (adjectives or NOUNS[word] in SHAPES):
            found += matching(things, " ".join((*adjectives, NOUNS[word])))
        adjectives = [*adjectives, word] if word in (*COLOURS, *SIDES) else []
    return [i for i, thing in enumerate(things) if thing in found]


def asked_labels(things: Sequence[Thing], record: Record, queries: int) -> list[list[int]]:  # -> (q, WORDS)
    """What words say of the things that the question mentions, or else its answer. The rest is background."""
    wanted = mentioned(things, record["question"]) or mentioned(things, record["answer"])
    background = [len(SHAPES), *[IGNORE] * (len(WORDS) - 1)]
    return [*(facts(things[i])[: len(WORDS)] for i in wanted), *[background] * queries][:queries]


def noun_labels(pieces: UnigramTokenizer, prompt: str, record: Record, things: Sequence[Thing]) -> list[list[int]]:
    """(p, fields): a row per piece of the prompt, which the record's question ends. The tags before it have no labels.

    In a REC question the first noun refers to the thing sought.
    """
    target = next((thing for thing in things if thing.box.to_text() == record["answer"]), None)
    rows, adjectives, box = list[list[int]](), list[str](), list[int]()
    for id in pieces.encode(record["question"]):
        word, count, thing = pieces.tokens[id].strip("▁"), IGNORE, None
        if word in COORDINATES:
            box = [*box, COORDINATES.index(word)][-4:]
            thing = next((t for t in things if [*t.edges] == box), None)
        elif word in NOUNS:
            fitting = matching(things, " ".join((*adjectives, NOUNS[word])))
            thing, count, target = target or (fitting[0] if len(fitting) == 1 else None), len(fitting), None
        adjectives = [*adjectives, word] if word in (*COLOURS, *SIDES) else []
        rows.append([*(facts(thing) if thing else [IGNORE] * len(FIELDS)), count])
    return [[IGNORE] * len(REFERENT)] * (len(pieces.encode(prompt)) - len(rows)) + rows


def field_loss(logits: Tensor, labels: Tensor, fields: Sequence[int]) -> Tensor:  # (..., classes), (..., fields) -> ()
    """The sum over the fields of their mean cross-entropies."""
    total = torch.zeros(())
    for part, field in zip(logits.float().split(tuple(fields), dim=-1), labels.unbind(-1), strict=True):
        losses = F.cross_entropy(part.flatten(0, -2), field.flatten(), ignore_index=IGNORE, reduction="sum")
        total = total + losses / (field != IGNORE).sum().clamp_min(1)
    return total
