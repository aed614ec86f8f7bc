"""What can be said about a scene: expressions, captions, questions, dialogue and tags, and records of them.

expression(things, thing, rng)   "the circle above the red cross": it fits this thing alone
questions(things, rng)           (sub-kind, question, answer)
records(scene, rng)              training records: the above in the paper's instructions
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import permutations

from ..box import Box
from ..text.prompts import EVAL_TEMPLATES, TASK_OF, TEMPLATES, render
from .world import COLOURS, SHAPES, TAGS, Scene, Thing

MARGIN = 3  # the least difference, in grid units, at which a thing is called left of another
PLACES = (
    "in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
MISSED, INVENTED = 0.1, 0.03  # a tagger's error rates: per true tag, and per false tag
KINDS = ("caption", "vqa", "vqg", "dialogue", "rec", "reg")
INSTRUCTIONS = {kind: (*TEMPLATES[kind], *([EVAL_TEMPLATES[kind]] if kind in EVAL_TEMPLATES else [])) for kind in KINDS}

Record = dict[str, str]

# --- expressions


def matching(things: Sequence[Thing], words: Collection[str]) -> list[Thing]:
    """The things to which all these words apply; "shape" applies to each."""
    return [thing for thing in things if thing.words | {"shape"} >= set(words)]


def holds(a: Thing, b: Thing, axis: int, sign: int) -> bool | None:
    """Whether a lies on that side of b; None if it is too close to call."""
    ahead = (a.centre(axis) - b.centre(axis)) * sign
    return True if ahead >= MARGIN else False if ahead <= 0 else None


def by_attributes(things: Sequence[Thing], target: Thing) -> list[str]:
    """Every choice of size, colour and shape that fits the target alone, from vague to precise."""
    phrases = [
        (*size, *colour, noun)
        for noun in ("shape", target.shape) for colour in ((), (target.colour,)) for size in ((), (target.size,))
    ]  # fmt: skip
    return ["the " + " ".join(words) for words in phrases if len(matching(things, words)) == 1]


def by_order(things: Sequence[Thing], target: Thing) -> list[str]:
    """ "the leftmost circle", if there are several circles and the target is the leftmost by a margin."""
    phrases = []
    for word, (axis, sign) in EXTREMES.items():
        for noun in ((target.shape,), ("shape",), (target.colour, "shape")):
            others = [thing for thing in matching(things, noun) if thing is not target]
            if others and all(holds(target, other, axis, sign) for other in others):
                phrases.append(f"the {' '.join((word, *noun))}")
    return phrases


def by_relation(things: Sequence[Thing], target: Thing) -> list[str]:
    """ "the circle above the red cross", if there are several circles and by a margin only the target is above it."""
    phrases = []
    for word, (axis, sign) in RELATIONS.items():
        for anchor in things:
            for noun in (target.shape, "shape"):
                group = [thing for thing in matching(things, (noun,)) if thing is not anchor]
                only = all(holds(thing, anchor, axis, sign) is (thing is target) for thing in group)
                if only and anchor is not target and len(group) > 1:
                    phrases.append(f"the {noun} {word} the {anchor.name}")
    return phrases


def expression(things: Sequence[Thing], target: Thing, rng: random.Random) -> str:
    """A phrase that fits the target alone. Six in ten use its attributes, the rest its position if that is possible."""
    way = rng.choices([by_attributes, by_order, by_relation], (6, 2, 2))[0]
    return rng.choice(way(things, target) or by_attributes(things, target))


# --- captions, questions, dialogue, tags


def caption(things: Sequence[Thing]) -> str:
    *most, last = [f"a {thing.name}" for thing in things]
    return f"{', '.join(most)} and {last}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def questions(things: Sequence[Thing], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(sub-kind, question, answer): one question per sub-kind, but existence once with yes and once with no.

    Half of the noes are near misses: both words occur, but not together. A sub-kind without an unambiguous question in
    this scene is left out.
    """
    names = {thing.name for thing in things}
    yield "existence", f"Is there a {rng.choice(sorted(names))} in the image?", "yes"
    colours, shapes = sorted({t.colour for t in things}), sorted({t.shape for t in things})
    near = [f"{colour} {shape}" for colour in colours for shape in shapes if f"{colour} {shape}" not in names]
    far = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in names]
    absent = rng.choice(near if near and rng.random() < 0.5 else far)
    yield "existence", f"Is there a {absent} in the image?", "no"

    noun = rng.choice([("shape",), (rng.choice(SHAPES),), (rng.choice(tuple(COLOURS)), "shape"), (rng.choice(shapes),)])
    yield "counting", f"How many {plural(' '.join(noun))} are there?", str(len(matching(things, noun)))

    for kind in ("colour", "shape"):
        choices = []
        for thing in things:
            noun = (thing.shape,) if kind == "colour" else (thing.colour, "shape")
            for words in (noun, (thing.size, *noun)):
                if len(matching(things, words)) == 1:
                    choices.append((f"What {kind} is the {' '.join(words)}?", getattr(thing, kind)))
        if choices:
            yield kind, *rng.choice(choices)

    comparisons = [
        (f"Is the {a.name} larger than the {b.name}?", a.size == "large" != b.size) for a, b in permutations(things, 2)
    ]
    relations = [
        (f"Is the {a.name} {word} the {b.name}?", holds(a, b, axis, sign) is True)
        for word, (axis, sign) in RELATIONS.items()
        for a, b in permutations(things, 2)
        if abs(a.centre(axis) - b.centre(axis)) >= MARGIN
    ]
    for kind, pairs in (("comparison", comparisons), ("relation", relations)):
        if pairs:
            wanted = rng.random() < 0.5
            question, yes = rng.choice([pair for pair in pairs if pair[1] == wanted] or pairs)
            yield kind, question, "yes" if yes else "no"


def dialogue(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """One turn of a conversation: a question and a whole sentence in reply."""
    thing = rng.choice(things)
    if rng.random() < 0.5:
        return f"Tell me about the {thing.name}.", f"It is {thing.size} and {PLACES[thing.cell]}."
    cell = thing.cell if rng.random() < 0.7 else rng.randrange(9)
    replies = [f"There is a {t.size} {t.name}." for t in things if t.cell == cell]
    return f"What do you see {PLACES[cell]}?", replies[0] if replies else "There is nothing."


def tags(things: Sequence[Thing], rng: random.Random) -> list[str]:
    """A tagger's output: the true tags, of which it misses some, and a few false ones."""
    true = set().union(*(thing.words for thing in things))
    return [tag for tag in TAGS if rng.random() >= (MISSED if tag in true else 1 - INVENTED)]


# --- records


def records(
    scene: Scene,
    rng: random.Random,
    kinds: Collection[str] = KINDS,
    instructions: Mapping[str, Sequence[str]] = INSTRUCTIONS,
) -> list[Record]:
    """One record per kind, for vqa one per question: `question`, `answer`, `category`, `tags`, `kind`, `subkind`.

    `rng` chooses each instruction among the paper's for training and for evaluation. `subkind` is empty except for vqa.
    """
    things, result = scene.things, list[Record]()
    joined = ", ".join(tags(things, rng))

    def add(kind: str, answer: str, subkind: str = "", /, **fields: str | Box) -> None:
        question = render(rng.choice(instructions[kind]), **fields)
        result.append({"question": question, "answer": answer, "category": f"{TASK_OF[kind]}_level"})
        result[-1] |= {"kind": kind, "subkind": subkind, "tags": joined}

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
    return result
