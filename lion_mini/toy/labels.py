"""Labels and losses of stage 0: what every patch shows, and what every word of a question refers to.

patch      shape, colour, size, row, column and box of the thing that covers most of it
noun       the same of the thing it refers to, if it is one, and its centre; how many things it fits
box        the same of the thing in it, at its last coordinate
relation   the vector from the noun after it to the noun before it, and its component in the relation's direction
"""

import random
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import IGNORE
from ..text.tokenizers import UnigramTokenizer
from .questions import RELATIONS, Record, matching, plural
from .world import COLOURS, COORDINATES, GRID, MOST, SHAPES, SIDES, Scene, Thing

WORDS = (len(SHAPES) + 1, len(COLOURS), len(SIDES), 3, 3)  # classes of what words say; the last shape is background
FIELDS = (*WORDS, *[GRID + 1] * 4)  # and the box
REFERENT = (*FIELDS, MOST + 1)  # classes of a noun: the thing, and how many things fit
UNKNOWN: list[float] = [IGNORE] * (len(REFERENT) + 5)  # 5 measures in halves of the image: a centre, a relation
NOUNS = {form: noun for noun in (*SHAPES, "shape") for form in (noun, plural(noun))}
DIRECTIONS = {relation.split()[0]: side for relation, side in RELATIONS.items()}


def facts(thing: Thing) -> list[int]:
    """What is true of the thing, as classes of FIELDS."""
    said = SHAPES.index(thing.shape), [*COLOURS].index(thing.colour), [*SIDES].index(thing.size)
    return [*said, thing.cell // 3, thing.cell % 3, *thing.edges]


def one_hot(labels: Tensor, fields: Sequence[int]) -> Tensor:  # (..., fields) -> (..., classes)
    """Side by side for each field; zeros where it is unknown."""
    pairs = zip(labels.unbind(-1), fields, strict=True)
    return torch.cat([F.one_hot(field.clamp_min(0), n) * (field >= 0)[..., None] for field, n in pairs], dim=-1).float()


def patch_labels(scenes: Sequence[Scene], side: int) -> tuple[Tensor, Tensor]:  # -> (b, side * side), (b, ·, fields)
    """Per patch the index of the thing that covers most of it, -1 for background; and the thing's FIELDS."""
    owners, labels, background = list[Tensor](), list[Tensor](), [len(SHAPES), *[IGNORE] * 8]
    for scene in scenes:
        covered = torch.zeros(len(scene.things), GRID, GRID)
        for area, thing in zip(covered, scene.things, strict=True):
            area[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] = 1
        share, owner = F.adaptive_avg_pool2d(covered, side).flatten(1).max(0)
        owners.append(owner.where(share > 0, -1))
        labels.append(torch.tensor([*map(facts, scene.things), background])[owners[-1]])
    return torch.stack(owners), torch.stack(labels)


def mentioned(things: Sequence[Thing], text: str) -> list[int]:
    """The indices of the things that nouns of a text fit, "red circles" for instance."""
    found, adjectives = list[Thing](), list[str]()
    for word in re.findall("[a-z]+", text):
        if word in NOUNS:
            found += matching(things, " ".join((*adjectives, NOUNS[word])))
        adjectives = [*adjectives, word] if word in (*COLOURS, *SIDES) else []
    return [i for i, thing in enumerate(things) if thing in found]


def glimpse(
    owner: Sequence[int], things: Sequence[Thing], record: Record, queries: int, draw: random.Random
) -> list[int]:
    """The few of the ViT's tokens that T5 sees of an image-level question, as the Q-Former might choose: one for each
    thing that question or answer mentions, then of other things or the background, in any order."""
    wanted = mentioned(things, f"{record['question']} {record['answer']}")
    patches = {i: [1 + at for at, thing in enumerate(owner) if thing == i] for i in range(-1, len(things))}
    others = [i for i in range(len(things)) if i not in wanted]
    chosen = [*draw.sample(wanted, len(wanted)), *draw.sample(others, len(others)), *[-1] * queries][:queries]
    return draw.sample([draw.choice(patches[i] or patches[-1]) for i in chosen], queries)


def word_labels(
    pieces: UnigramTokenizer, prompt: str, record: Record, things: Sequence[Thing]
) -> list[list[float]]:  # -> (p, fields and measures)
    """A row per piece of the prompt, which the record's question ends. The tags before it have no labels.

    In a REC question the first noun refers to the thing sought.
    """
    target = next((thing for thing in things if thing.box.to_text() == record["answer"]), None)
    rows, adjectives, box = list[list[float]](), list[str](), list[int]()
    previous, relation = None, None  # the last noun's thing; the relation since then: its row, axis and sign
    for id in pieces.encode(record["question"]):
        row, word, thing = [*UNKNOWN], pieces.tokens[id].strip("▁"), None
        if word in COORDINATES:
            box = [*box, COORDINATES.index(word)][-4:]
            thing = next((t for t in things if [*t.edges] == box), None)
        elif word in DIRECTIONS:
            relation = row, *DIRECTIONS[word]
        elif word in NOUNS:
            fitting = matching(things, " ".join((*adjectives, NOUNS[word])))
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
    return [UNKNOWN] * (len(pieces.encode(prompt)) - len(rows)) + rows


def field_loss(logits: Tensor, labels: Tensor, fields: Sequence[int]) -> Tensor:  # (..., classes), (..., fields) -> ()
    """The sum over the fields of their mean cross-entropies."""
    total = torch.zeros(())
    for part, field in zip(logits.float().split(tuple(fields), dim=-1), labels.unbind(-1), strict=True):
        losses = F.cross_entropy(part.flatten(0, -2), field.flatten(), ignore_index=IGNORE, reduction="sum")
        total = total + losses / (field != IGNORE).sum().clamp_min(1)
    return total


def word_loss(predicted: Tensor, labels: Tensor) -> Tensor:  # (..., classes and measures), (..., labels) -> ()
    """Cross-entropy for the classes, squared error for the measures: a noun's 2, then a relation's 3."""
    total = 0.2 * field_loss(predicted[..., :-5], labels[..., :-5].long(), REFERENT)
    for weight, measures in ((1, slice(-5, -3)), (2, slice(-3, None))):
        known = labels[..., measures] != IGNORE
        errors = (predicted[..., measures].float() - labels[..., measures])[known]
        total = total + weight * errors.square().sum() / known.sum().clamp_min(1)
    return total
