"""How well a model does in the toy world: each kind of question beside what a blind guess gets."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..box import Box
from ..data.records import split_tags
from ..evaluation import metrics
from ..model.generate import GENERATION
from ..pipeline import Lion
from ..text.prompts import TASK_OF
from .questions import INSTRUCTIONS, Record, records
from .world import Scene, Thing

MEASURED = {kind: texts[-1:] for kind, texts in INSTRUCTIONS.items()}  # the instructions of the benchmarks
SETTINGS = {"caption": "caption", "vqa": "answer", "rec": "locate", "reg": "describe"}


@dataclass(frozen=True)
class ToyScore:
    """One row: a fraction (for captions a tenth of CIDEr) and what the blind guess gets."""

    name: str
    score: float
    baseline: float
    blind: str  # the blind guess, in words
    count: int  # questions


def toy_scores(model: Lion, scenes: Sequence[Scene], batch_size: int = 32) -> list[ToyScore]:
    """Ask about every scene: captions, questions of every sub-kind, REC and REG. A stage-1 or stage-2 model is asked
    only about the level it was trained for."""
    kinds = [kind for kind in SETTINGS if model.config.visual_input in ("all", TASK_OF[kind])]
    groups: dict[tuple[str, str], list[tuple[Scene, Record]]] = {}
    for each in scenes:
        for record in records(each, random.Random(f"eval {each.split} {each.seed}"), kinds, MEASURED):
            groups.setdefault((record["kind"], record["subkind"]), []).append((each, record))
    rows: list[ToyScore] = []
    for (kind, subkind), pairs in sorted(groups.items(), key=lambda item: item[0][0]):
        texts: list[str] = []
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            tags = [split_tags(record["tags"]) for _, record in batch] if model.model.ram is None else None
            prompts, tasks = [record["question"] for _, record in batch], [TASK_OF[kind]] * len(batch)
            answers = model.respond([each.image for each, _ in batch], prompts, tasks, GENERATION[SETTINGS[kind]], tags)
            texts += [answer.text.strip() for answer in answers]
        rows += toy_rows(subkind or kind, texts, [record["answer"] for _, record in pairs], [each for each, _ in pairs])
    return rows


def toy_rows(kind: str, texts: Sequence[str], truth: Sequence[str], scenes: Sequence[Scene]) -> Iterator[ToyScore]:
    """The rows of one kind or sub-kind of question."""
    count, exact = len(truth), sum(map(str.__eq__, texts, truth)) / len(truth)
    if kind == "caption":
        ours, blind = (metrics.cider([[t] for t in truth], said)[0] / 10 for said in (texts, [*truth[1:], truth[0]]))
        yield ToyScore("captions, CIDEr / 10", ours, blind, "another scene's caption", count)
    elif kind == "rec":
        boxes = [box for box in map(Box.parse, truth) if box]
        blind = random_thing(scenes, boxes, lambda thing, box: thing.box.iou(box) >= 0.5)
        yield ToyScore("REC, Acc@0.5", metrics.grounding(texts, boxes).accuracy, blind, "a random object's box", count)
    elif kind == "reg":
        blind = random_thing(scenes, truth, lambda thing, answer: f"the {thing.size} {thing.name}" == answer)
        yield ToyScore("REG, exact", exact, blind, "a random object's name", count)
    else:
        frequent, times = Counter(truth).most_common(1)[0]
        yield ToyScore(f"VQA, {kind}", exact, times / count, f"always {frequent!r}", count)
    if kind == "existence":
        pope, yes = metrics.pope(texts, truth), metrics.pope(["yes"] * count, truth)
        yield ToyScore("POPE, F1", pope.f1, yes.f1, "always 'yes'", count)
        yield ToyScore("POPE, accuracy", pope.accuracy, yes.accuracy, "always 'yes'", count)


def random_thing(scenes: Sequence[Scene], truth: Sequence[Any], right: Callable[[Thing, Any], bool]) -> float:
    """How often a thing drawn at random from its scene is right."""
    pairs = zip(scenes, truth, strict=True)
    return sum(sum(right(t, answer) for t in s.things) / len(s.things) for s, answer in pairs) / len(scenes)
