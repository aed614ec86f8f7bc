"""How well a model does in the shapes world: every kind of question, each beside what a blind guess gets."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import toy
from ..box import Box
from ..data.records import split_tags
from ..evaluation import metrics
from ..model.generate import GENERATION
from ..pipeline import Lion
from ..text.prompts import TASK_OF

MEASURED = {kind: texts[-1:] for kind, texts in toy.INSTRUCTIONS.items()}  # the instruction of the benchmarks
PRESET_OF = {"caption": "caption", "rec": "locate", "reg": "describe"}  # for the others: answer


@dataclass(frozen=True)
class ToyScore:
    """A fraction (CIDEr: a tenth of it), what one gets without looking, and over how many questions."""

    name: str
    score: float
    baseline: float
    blind: str  # what the baseline does
    count: int


def toy_rows(said: Sequence[tuple[toy.Scene, toy.Record, str]]) -> Iterator[ToyScore]:
    groups: dict[str, list[tuple[toy.Scene, toy.Record, str]]] = {}
    for row in said:
        kind, subkind = row[1]["kind"], row[1]["subkind"]
        groups.setdefault(f"VQA, {subkind}" if subkind else kind, []).append(row)
    for name, group in groups.items():
        truth, texts = [record["answer"] for _, record, _ in group], [text.strip() for *_, text in group]
        many = len(group)
        if name == "caption":
            ours = metrics.cider([[answer] for answer in truth], texts)[0] / 10
            other = metrics.cider([[answer] for answer in truth], [*truth[1:], truth[0]])[0] / 10
            yield ToyScore("captions, CIDEr / 10", ours, other, "another scene's caption", many)
        elif name == "rec":
            boxes = [box for box in map(Box.parse, truth) if box]
            hits = [
                sum(t.box.iou(b) >= 0.5 for t in s.things) / len(s.things)
                for (s, *_), b in zip(group, boxes, strict=True)
            ]
            guess = sum(hits) / many
            yield ToyScore(
                "REC, Acc@0.5", metrics.grounding(texts, boxes).accuracy, guess, "a random object's box", many
            )
        else:
            right = sum(map(str.__eq__, texts, truth)) / many
            if name == "reg":
                alike = (
                    sum(f"the {t.size} {t.name}" == a for t in s.things) / len(s.things)
                    for s, r, _ in group
                    for a in [r["answer"]]
                )
                yield ToyScore("REG, exact", right, sum(alike) / many, "a random object's name", many)
                continue
            frequent = Counter(truth).most_common(1)[0]
            yield ToyScore(name, right, frequent[1] / many, f"always {frequent[0]!r}", many)
            if name == "VQA, existence":
                counts, yes = metrics.pope(texts, truth), metrics.pope(["yes"] * many, truth)
                yield ToyScore("POPE, F1", counts.f1, yes.f1, "always 'yes'", many)
                yield ToyScore("POPE, accuracy", counts.accuracy, yes.accuracy, "always 'yes'", many)


def toy_scores(model: Lion, scenes: Sequence[toy.Scene], batch_size: int = 32) -> list[ToyScore]:
    """Captions, questions of every kind, REC, REG and POPE's existence, each beside what a blind guess gets."""
    asked = []
    for one in scenes:
        rng = random.Random(f"eval {one.split} {one.seed}")
        kinds = [kind for kind in ("caption", "vqa", "rec", "reg") if can(model, TASK_OF[kind])]
        asked += [(one, record) for record in toy.records(one, rng, kinds, MEASURED)]
    said: list[tuple[toy.Scene, toy.Record, str]] = []
    asked.sort(key=lambda pair: pair[1]["kind"])
    for kind in dict.fromkeys(record["kind"] for _, record in asked):
        chosen = [pair for pair in asked if pair[1]["kind"] == kind]
        preset = GENERATION[PRESET_OF.get(kind, "answer")]
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            pictures = [one.image for one, _ in batch]
            tags = None if model.model.ram is not None else [split_tags(record["tags"]) for _, record in batch]
            prompts = [record["question"] for _, record in batch]
            told = model.respond(pictures, prompts, [TASK_OF[kind]] * len(batch), preset, tags)
            said += [(one, record, answer.text) for (one, record), answer in zip(batch, told, strict=True)]
    return list(toy_rows(said))


def can(model: Lion, task: str) -> bool:
    """A model of stage 1 knows image-level tasks, one of stage 2 region-level ones."""
    return model.config.visual_input in ("all", task)
