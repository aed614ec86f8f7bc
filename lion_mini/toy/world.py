"""The shapes world: pictures of which everything is known, so that LION can be trained and tested without any download.

A scene holds 2 to 5 shapes on a light, noisy ground. No two of them share both colour and shape, so that "the red
circle" is always one thing; large ones may overlap a little. Positions lie on a grid of 24 units, so a box in text is
exact although there are only 25 coordinates, each one piece of the vocabulary: "[0.042,0.125,0.375,0.458]".

    scene(7, "train")         the same scene for ever; no arrangement of shapes occurs in both splits
    records(scene, rng)       its captions, questions, dialogue, expressions and boxes, in the paper's instructions
    write_vocabularies(dir)   the official tokenizers' files with this world's words in them

`python -m lion_mini.toy --show 6` draws scenes with their texts and boxes.
next: data.py
"""

import argparse
import json
import random
import re
import string
import textwrap
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..box import Box
from ..images import draw_boxes
from ..text.prompts import EVAL_TEMPLATES, PLACEHOLDER, TASK_OF, TEMPLATES, render, tag_sentence

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 215),
    "yellow": (225, 195, 30), "purple": (150, 50, 170), "black": (35, 35, 35),
}  # fmt: skip
SIDES = {"small": (4, 5), "large": (7, 8)}  # in grid units
TAGS = (*SHAPES, *COLOURS, *SIDES)
GRID, CELL, UNIT = 24, 8, 4  # the picture in units, a cell in units, a unit in pixels
MOST = 5  # things in a scene
MARGIN = 3  # by how many units things must differ before anybody calls one left of the other
PLACES = (
    "in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
KINDS = ("caption", "vqa", "vqg", "dialogue", "rec", "reg")
MISSED, INVENTED = 0.1, 0.03  # how often a tagger overlooks a tag that is true, or sees one that is not

Split = Literal["train", "test"]
Record = dict[str, str]


@dataclass(frozen=True)
class Thing:
    """One shape; `left`, `top` and `side` in grid units, `cell` 0 to 8 in reading order."""

    shape: str
    colour: str
    size: str
    cell: int
    left: int
    top: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def words(self) -> set[str]:
        return {self.shape, self.colour, self.size}

    @property
    def box(self) -> Box:
        ends = (self.left, self.top, self.left + self.side, self.top + self.side)
        return Box(*(round(end / GRID, 3) for end in ends))

    def centre(self, axis: int) -> float:
        return (self.left, self.top)[axis] + self.side / 2


@dataclass(frozen=True)
class Scene:
    """What there is, in reading order; later things are drawn over earlier ones."""

    seed: int
    split: Split
    things: tuple[Thing, ...]

    @cached_property
    def image(self) -> Image.Image:
        rng = np.random.default_rng(zlib.crc32(f"{self.split} {self.seed}".encode()))
        side = GRID * UNIT
        ground = Image.new("RGB", (side, side), tuple(rng.integers(225, 256, 3).tolist()))
        draw = ImageDraw.Draw(ground)
        for thing in self.things:
            shade = rng.integers(-15, 16, 3)
            _draw(draw, thing, tuple((np.array(COLOURS[thing.colour]) + shade).clip(0, 255).tolist()))
        noise = rng.standard_normal((side, side, 3), dtype=np.float32) * rng.uniform(2, 8)
        return Image.fromarray((np.asarray(ground) + noise).clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...]) -> None:
    x, y, side = thing.left * UNIT, thing.top * UNIT, thing.side * UNIT
    right, bottom = x + side - 1, y + side - 1
    if thing.shape == "circle":
        draw.ellipse((x, y, right, bottom), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x, y, right, bottom), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon(((x, bottom), (right, bottom), (x + side / 2, y)), fill=fill)
    else:
        arm = round(side * 0.34)
        draw.rectangle((x + arm, y, right - arm, bottom), fill=fill)
        draw.rectangle((x, y + arm, right, bottom - arm), fill=fill)


def scene(seed: int, split: Split) -> Scene:
    """The scene of this number. Arrangements are dealt to the splits by their checksum: one in ten is held out."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = random.Random(f"{split} {seed}")
    while True:
        things = _things(rng)
        arrangement = sorted((t.shape, t.colour, t.size, t.cell) for t in things)
        if (zlib.crc32(repr(arrangement).encode()) % 10 == 0) == (split == "test"):
            return Scene(seed, split, things)


def _things(rng: random.Random) -> tuple[Thing, ...]:
    count = rng.randint(2, MOST)
    names = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    things = []
    for (shape, colour), cell in zip(names, sorted(rng.sample(range(9), count)), strict=True):
        size = rng.choice(tuple(SIDES))
        side = rng.choice(SIDES[size])
        slack = max(1, CELL - side)  # a large thing may stand out of its cell, over its neighbour
        row, column = divmod(cell, 3)
        left, top = (
            min(max(0, at * CELL + rng.randint(-(size == "large"), slack)), GRID - side) for at in (column, row)
        )
        things.append(Thing(shape, colour, size, cell, left, top, side))
    return tuple(things)


# --- what can be said


def matching(things: Sequence[Thing], words: Collection[str]) -> list[Thing]:
    """The things to which all these words apply; "shape" applies to each."""
    return [thing for thing in things if thing.words | {"shape"} >= set(words)]


def holds(a: Thing, b: Thing, axis: int, sign: int) -> bool | None:
    """Whether a lies on that side of b; None where it is too close to call."""
    ahead = (a.centre(axis) - b.centre(axis)) * sign
    return True if ahead >= MARGIN else False if ahead <= 0 else None


def _phrases(thing: Thing) -> Iterator[tuple[str, ...]]:
    """Ways to name it by what it is, from vague to precise."""
    for noun in ("shape", thing.shape):
        for colour in ((), (thing.colour,)):
            for size in ((), (thing.size,)):
                yield (*size, *colour, noun)


def by_attributes(things: Sequence[Thing], target: Thing) -> list[str]:
    """Every choice of size, colour and shape that fits the target alone."""
    return ["the " + " ".join(words) for words in _phrases(target) if len(matching(things, words)) == 1]


def by_order(things: Sequence[Thing], target: Thing) -> list[str]:
    """ "the leftmost circle", where there are several circles and the first one leads clearly."""
    found = []
    for word, (axis, sign) in EXTREMES.items():
        for noun in ((target.shape,), ("shape",), (target.colour, "shape")):
            others = [other for other in matching(things, noun) if other is not target]
            if others and all((target.centre(axis) - o.centre(axis)) * sign >= MARGIN for o in others):
                found.append(f"the {' '.join((word, *noun))}")
    return found


def by_relation(things: Sequence[Thing], target: Thing) -> list[str]:
    """ "the circle above the red cross", where there are several circles, clearly one above it and clearly no other."""
    found = []
    for word, (axis, sign) in RELATIONS.items():
        for anchor in things:
            for noun in (target.shape, "shape"):
                group = [other for other in matching(things, (noun,)) if other is not anchor]
                if anchor is target or len(group) < 2:
                    continue
                if all(holds(other, anchor, axis, sign) is (other is target) for other in group):
                    found.append(f"the {noun} {word} the {anchor.name}")
    return found


def expression(things: Sequence[Thing], target: Thing, rng: random.Random) -> str:
    """One that fits the target alone: in six of ten by what it is, else by where it is, if that can be said."""
    ways = [by_attributes, by_order, by_relation]
    first = rng.choices(ways, (6, 2, 2))[0]
    return rng.choice(first(things, target) or by_attributes(things, target))


def caption(things: Sequence[Thing]) -> str:
    *most, last = [f"a {thing.name}" for thing in things]
    return f"{', '.join(most)} and {last}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def questions(things: Sequence[Thing], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(sub-kind, question, answer); one each, but existence twice, with yes and with no. Half of the noes are near:
    both words occur, only not together. A sub-kind to which a scene gives no clear occasion is left out."""
    names = {thing.name for thing in things}
    yield "existence", f"Is there a {rng.choice(sorted(names))} in the image?", "yes"
    colours, shapes = sorted({t.colour for t in things}), sorted({t.shape for t in things})
    near = [f"{colour} {shape}" for colour in colours for shape in shapes if f"{colour} {shape}" not in names]
    far = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in names]
    absent = rng.choice(near if near and rng.random() < 0.5 else far)
    yield "existence", f"Is there a {absent} in the image?", "no"

    noun = rng.choice([("shape",), (rng.choice(SHAPES),), (rng.choice(tuple(COLOURS)), "shape"), (rng.choice(shapes),)])
    yield "counting", f"How many {plural(' '.join(noun))} are there?", str(len(matching(things, noun)))

    for kind, known in (("colour", "shape"), ("shape", "colour")):
        choices = []
        for thing in things:
            noun = (thing.shape,) if known == "shape" else (thing.colour, "shape")
            for words in (noun, (thing.size, *noun)):
                if len(matching(things, words)) == 1:
                    choices.append((" ".join(words), getattr(thing, kind)))
        if choices:
            named, answer = rng.choice(choices)
            yield kind, f"What {kind} is the {named}?", answer

    for kind, pick in (("comparison", _comparisons), ("relation", _relations)):
        answers = pick(things)
        if answers:
            wanted = rng.random() < 0.5
            question, yes = rng.choice([pair for pair in answers if pair[1] == wanted] or answers)
            yield kind, question, "yes" if yes else "no"


def _comparisons(things: Sequence[Thing]) -> list[tuple[str, bool]]:
    return [
        (f"Is the {a.name} larger than the {b.name}?", a.size == "large" != b.size)
        for a in things for b in things if a is not b
    ]  # fmt: skip


def _relations(things: Sequence[Thing]) -> list[tuple[str, bool]]:
    found = []
    for word, (axis, sign) in RELATIONS.items():
        for a in things:
            for b in things:
                answer = holds(a, b, axis, sign)
                if a is not b and answer is not None and abs(a.centre(axis) - b.centre(axis)) >= MARGIN:
                    found.append((f"Is the {a.name} {word} the {b.name}?", answer))
    return found


def dialogue(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """One turn of a conversation, answered by a sentence."""
    thing = rng.choice(things)
    if rng.random() < 0.5:
        return f"Tell me about the {thing.name}.", f"It is {thing.size} and {PLACES[thing.cell]}."
    cell = thing.cell if rng.random() < 0.7 else rng.randrange(9)
    there = [f"There is a {t.size} {t.name}." for t in things if t.cell == cell]
    return f"What do you see {PLACES[cell]}?", there[0] if there else "There is nothing."


def tags(things: Sequence[Thing], rng: random.Random) -> list[str]:
    """What a tagger might say: the true tags, one in ten overlooked, and now and then an invented one."""
    true = set().union(*(thing.words for thing in things))
    return [tag for tag in TAGS if rng.random() >= (MISSED if tag in true else 1 - INVENTED)]


INSTRUCTIONS = {kind: (*TEMPLATES[kind], *([EVAL_TEMPLATES[kind]] if kind in EVAL_TEMPLATES else [])) for kind in KINDS}


def records(
    scene: Scene,
    rng: random.Random,
    kinds: Collection[str] = KINDS,
    instructions: Mapping[str, Sequence[str]] = INSTRUCTIONS,
) -> list[Record]:
    """One record per kind (for vqa per sub-kind), as data.py's sources give them, and what it is about: `kind`,
    and for vqa, `subkind`. The instruction is one of the paper's, or the one of its benchmarks, chosen by `rng`."""
    things = scene.things
    said = ", ".join(tags(things, rng))
    found: list[Record] = []

    def add(kind: str, answer: str, subkind: str = "", /, **fields: str | Box) -> None:
        question = render(rng.choice(instructions[kind]), **fields)
        category = f"{TASK_OF[kind]}_level"
        about = {"kind": kind, "subkind": subkind, "tags": said}
        found.append({"question": question, "answer": answer, "category": category, **about})

    asked = list(questions(things, rng)) if {"vqa", "vqg"} & set(kinds) else []
    if "caption" in kinds:
        add("caption", caption(things))
    if "vqa" in kinds:
        for subkind, question, answer in asked:
            add("vqa", answer, subkind, question=question)
    if "vqg" in kinds:
        _, question, answer = rng.choice(asked)
        add("vqg", question, answer=answer)
    if "dialogue" in kinds:
        question, answer = dialogue(things, rng)
        add("dialogue", answer, question=question)
    if "rec" in kinds:
        target = rng.choice(things)
        add("rec", target.box.to_text(), expression=expression(things, target, rng))
    if "reg" in kinds:
        target = rng.choice(things)
        add("reg", f"the {target.size} {target.name}", box=target.box)
    return found


# --- the vocabularies

PIECES, WORDS = 512, 512  # T5's and the Q-Former's tables


def _texts() -> list[str]:
    """Every instruction, and scenes enough to have heard every word of the world."""
    templates = [text for kind in TEMPLATES.values() for text in kind] + list(EVAL_TEMPLATES.values())
    rng = random.Random(0)
    said = [f"{r['question']} {r['answer']}" for i in range(400) for r in records(scene(i, "train"), rng)]
    return [re.sub(r"\{\w+\}", " ", text) for text in templates] + [tag_sentence(TAGS), *PLACES, *said]


def write_vocabularies(folder: str | Path) -> None:
    """`tokenizer.json`, `vocab.txt`, `ram_tag_list.txt` and `ram_tag_list_threshold.txt`, as the official files are.

    A word of this world is one piece, and so is a coordinate; anything else is spelled, letter by letter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [f"{i / GRID:.3f}" for i in range(GRID + 1)]
    found = sorted({word for text in _texts() for word in re.findall(r"[A-Za-z]+[0-9]?", text)})
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *numbers, *(f"▁{word}" for word in found if len(word) > 1 or word in "Aa")]
    pieces += ["x1", "x2", "y1", "y2", "▁[", '▁"', "▁,", *TAGS, "▁0", "▁1", "▁2", "▁3", "▁4", "▁5"]
    pieces += [f'"{word}' for word in ("Is", "How", "What")]
    scored = [[name, 0.0] for name in ("<pad>", "</s>", "<unk>")]
    scored += [[piece, -10.0 if len(piece) == 1 else -5.0] for piece in dict.fromkeys(pieces)]
    assert len(scored) < PIECES, f"{len(scored)} pieces do not fit into a table of {PIECES}"
    added = [(name, i) for i, name in enumerate(("<pad>", "</s>", "<unk>"))] + [(PLACEHOLDER, len(scored))]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False} for name, id in added
        ],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        "pre_tokenizer": space,
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": scored, "byte_fallback": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")

    plain = dict.fromkeys(word.lower() for word in found)
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *signs, *(f"##{c}" for c in signs[:36])]
    words = list(dict.fromkeys([*words, *plain, *(number[2:] for number in numbers)]))
    words += [f"[unused{i}]" for i in range(WORDS - len(words))]
    assert len(words) == WORDS, f"{len(words)} words do not fit into a table of {WORDS}"
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "ram_tag_list.txt").write_text("\n".join(TAGS) + "\n", encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("0.5\n" * len(TAGS), encoding="utf-8")


# --- to look at


def show(seeds: Sequence[int], split: Split) -> Image.Image:
    """A sheet of scenes, boxes and names drawn on, with the records of each beside it."""
    sheet = Image.new("RGB", (1180, 400 * len(seeds)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, seed in enumerate(seeds):
        one = scene(seed, split)
        big = one.image.resize((384, 384), Image.Resampling.NEAREST)
        sheet.paste(draw_boxes(big, [(thing.box, thing.name) for thing in one.things]), (8, 8 + 400 * row))
        said = records(one, random.Random(seed))
        lines = [f"{r['subkind'] or r['kind']}: {r['question']}  ->  {r['answer']}" for r in said]
        lines = [f"scene({seed}, {split!r})   tags: {said[0]['tags']}", *lines]
        text = "\n".join(textwrap.fill(line, 120, subsequent_indent="    ") for line in lines)
        draw.text((402, 10 + 400 * row), text, fill="black", font_size=12)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes of the shapes world with their texts and boxes.")
    parser.add_argument("--show", type=int, metavar="N", default=4, help="how many scenes")
    parser.add_argument("--seed", type=int, default=0, help="the first one's number")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    options = parser.parse_args()
    if options.show < 1:
        parser.error(f"--show must be at least 1, not {options.show}")
    show(range(options.seed, options.seed + options.show), options.split).save(options.out)
    print(f"{options.show} scenes are in {options.out}")
