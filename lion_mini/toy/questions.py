"""What can be said about a scene, and training examples of it in the paper's instructions."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import permutations

from ..box import Box
from ..text.prompts import EVAL_TEMPLATES, TASK_OF, TEMPLATES, render
from .world import COLOURS, LARGE, SHAPES, TAGS, Scene, Thing

MARGIN = 3  # the least difference, in grid units, at which a thing is called left of another
PLACES = (
    "in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
MISSED, INVENTED = 0.1, 0.03  # a tagger's error rates: per true tag, and per false tag
KINDS = ("caption", "vqa", "vqg", "dialogue", "rec", "reg")
# Training draws from these. The last is the one that evaluation asks.
INSTRUCTIONS = {
    kind: (*texts, *([EVAL_TEMPLATES[kind]] if kind in EVAL_TEMPLATES else [])) for kind, texts in TEMPLATES.items()
}

Record = dict[str, str]
Instructions = Mapping[str, Sequence[str]]


def matching(things: Sequence[Thing], phrase: str) -> list[Thing]:
    """The things to which every word of "small red shape" applies; "shape" applies to each."""
    return [thing for thing in things if thing.words | {"shape"} >= set(phrase.split())]


def ahead(a: Thing, b: Thing, side: tuple[int, int]) -> float:
    """How far the centre of a lies on that side of b's, in grid units."""
    axis, sign = side
    return sign * ((a.left, a.top)[axis] + a.side / 2 - (b.left, b.top)[axis] - b.side / 2)


def by_attributes(things: Sequence[Thing], target: Thing) -> list[str]:
    """Every choice of size, colour and shape that fits the target alone, from vague to precise."""
    sizes, colours, nouns = ("", f"{target.size} "), ("", f"{target.colour} "), ("shape", target.shape)
    phrases = [f"{size}{colour}{noun}" for noun in nouns for colour in colours for size in sizes]
    return [f"the {phrase}" for phrase in phrases if matching(things, phrase) == [target]]


def by_order(things: Sequence[Thing], target: Thing) -> Iterator[str]:
    """ "the leftmost circle", if there are several circles and the target is the leftmost by a margin."""
    for word, side in EXTREMES.items():
        for noun in (target.shape, "shape", f"{target.colour} shape"):
            rest = [thing for thing in matching(things, noun) if thing is not target]
            if rest and all(ahead(target, thing, side) >= MARGIN for thing in rest):
                yield f"the {word} {noun}"


def by_relation(things: Sequence[Thing], target: Thing) -> Iterator[str]:
    """ "the circle above the red cross", if there are several circles and by a margin only the target is above it."""
    for word, side in RELATIONS.items():
        for anchor in things:
            for noun in (target.shape, "shape"):
                rest = [thing for thing in matching(things, noun) if thing not in (target, anchor)]
                alone = rest and all(ahead(thing, anchor, side) <= 0 for thing in rest)
                if alone and ahead(target, anchor, side) >= MARGIN:
                    yield f"the {noun} {word} the {anchor.name}"


def expression(things: Sequence[Thing], target: Thing, rng: random.Random) -> str:
    """A phrase that fits the target alone. Six in ten use its attributes, the rest its position if that is possible."""
    way: Callable[..., Iterable[str]] = rng.choices((by_attributes, by_order, by_relation), (6, 2, 2))[0]
    return rng.choice([*way(things, target)] or by_attributes(things, target))


def caption(things: Sequence[Thing]) -> str:
    """The large things."""
    *most, last = [f"a {thing.name}" for thing in things if thing.size == "large"]
    return f"{', '.join(most)} and {last}" if most else last


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def questions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(sub-kind, question, answer): one question per sub-kind, but existence once with yes and once with no.

    Half of the noes are near misses: both words occur, but not together. A sub-kind without an unambiguous question in
    this scene is left out.
    """
    things = scene.things
    names, words = {thing.name for thing in things}, set().union(*(thing.words for thing in things))
    yield "ground", "What is the ground?", scene.ground
    yield "existence", f"Is there a {rng.choice(sorted(names))} in the image?", "yes"
    absent = [name for colour in COLOURS for shape in SHAPES if (name := f"{colour} {shape}") not in names]
    near = sorted(name for name in absent if set(name.split()) <= words)
    yield "existence", f"Is there a {rng.choice(near if near and rng.random() < 0.5 else absent)} in the image?", "no"

    one = rng.choice(things)
    nouns = [rng.choice(SHAPES), f"{rng.choice(tuple(COLOURS))} shape", one.shape, f"{one.colour} shape"]
    noun = rng.choice([noun for noun in nouns if len(matching(things, noun)) <= LARGE] or [one.name])
    yield "counting", f"How many {plural(noun)} are there?", str(len(matching(things, noun)))

    for kind in ("colour", "shape"):
        choices = []
        for thing in things:
            noun = thing.shape if kind == "colour" else f"{thing.colour} shape"
            phrases = [phrase for phrase in (noun, f"{thing.size} {noun}") if matching(things, phrase) == [thing]]
            choices += [(f"What {kind} is the {phrase}?", getattr(thing, kind)) for phrase in phrases]
        if choices:
            yield kind, *rng.choice(choices)

    pairs = list(permutations(things, 2))
    comparisons = [(f"Is the {a.name} larger than the {b.name}?", a.size == "large" != b.size) for a, b in pairs]
    relations = [
        (f"Is the {a.name} {word} the {b.name}?", ahead(a, b, side) > 0)
        for word, side in RELATIONS.items() for a, b in pairs if abs(ahead(a, b, side)) >= MARGIN
    ]  # fmt: skip
    for kind, choices in (("comparison", comparisons), ("relation", relations)):
        if choices:
            wanted = rng.random() < 0.5
            question, yes = rng.choice([choice for choice in choices if choice[1] == wanted] or choices)
            yield kind, question, "yes" if yes else "no"


def dialogue(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """One turn of a conversation: a question and a whole sentence in reply."""
    thing = rng.choice(things)
    if rng.random() < 0.5:
        return f"Tell me about the {thing.name}.", f"It is {thing.size} and {PLACES[thing.cell]}."
    cell = thing.cell if rng.random() < 0.7 else rng.randrange(9)
    replies = [f"There is a {t.size} {t.name}." for t in things if t.cell == cell]
    return f"What do you see {PLACES[cell]}?", replies[0] if replies else "There is nothing."


def true_tags(scene: Scene) -> list[str]:
    true = {scene.ground, *(thing.colour for thing in scene.things)}
    return [tag for tag in TAGS if tag in true]


def tags(scene: Scene, rng: random.Random) -> list[str]:
    """A tagger's output: the true tags, of which it misses some, and a few false ones."""
    true = true_tags(scene)
    return [tag for tag in TAGS if rng.random() >= (MISSED if tag in true else 1 - INVENTED)]


def records(
    scene: Scene, rng: random.Random, kinds: Collection[str] = KINDS, instructions: Instructions = INSTRUCTIONS
) -> list[Record]:
    """One record per kind, for vqa one per question: `question`, `answer`, `category`, `tags`, `kind`, `subkind`.

    `rng` chooses each instruction among the paper's for training and for evaluation. `subkind` is empty except for vqa.
    """
    things, result = scene.things, list[Record]()
    joined = ", ".join(tags(scene, rng))

    def add(kind: str, answer: str, subkind: str = "", /, **fields: str | Box) -> None:
        question = render(rng.choice(instructions[kind]), **fields)
        result.append({"question": question, "answer": answer, "category": f"{TASK_OF[kind]}_level"})
        result[-1] |= {"kind": kind, "subkind": subkind, "tags": joined}

    asked = list(questions(scene, rng)) if {"vqa", "vqg"} & set(kinds) else []
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
