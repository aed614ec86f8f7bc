"""How well a model does in the toy world: each kind of question beside what a blind guess gets."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..box import Box
from ..data.records import split_tags
from ..evaluation import metrics
from ..model.generate import GENERATION
from ..pipeline import Lion
from ..text.prompts import TASK_OF
from .questions import INSTRUCTIONS, Record, records
from .world import Scene

MEASURED = {kind: texts[-1:] for kind, texts in INSTRUCTIONS.items()}  # the instructions of the benchmarks
SETTINGS = {"caption": "caption", "vqa": "answer", "rec": "locate", "reg": "describe"}


@dataclass(frozen=True)
class Reply:
    """A question about a scene, and what the model wrote. `right`: the same words, or a box that overlaps by half."""

    scene: Scene
    record: Record
    text: str

    @property
    def kind(self) -> str:
        return self.record["subkind"] or self.record["kind"]

    @property
    def right(self) -> bool:
        truth, said = (Box.parse(text) for text in (self.record["answer"], self.text))
        return said.iou(truth) >= 0.5 if said and truth else self.text == self.record["answer"]


@dataclass(frozen=True)
class ToyScore:
    """One row: fractions (for captions a tenth of CIDEr), and what the blind guess gets."""

    name: str
    score: float
    held_out: float  # the same, of the scenes with a pair of colour and shape that no training scene has
    baseline: float
    blind: str  # the blind guess, in words
    count: int  # questions


def ask(lion: Lion, scenes: Sequence[Scene], batch_size: int = 32) -> list[Reply]:
    """Captions, questions of every sub-kind, REC and REG about every scene, as the benchmarks ask them. A stage-1 or
    stage-2 model is asked only about the level it was trained for."""
    kinds = [kind for kind in SETTINGS if lion.config.visual_input in ("all", TASK_OF[kind])]
    groups: dict[tuple[str, str], list[tuple[Scene, Record]]] = {}
    for each in scenes:
        for record in records(each, random.Random(f"eval {each.split} {each.seed}"), kinds, MEASURED):
            groups.setdefault((record["kind"], record["subkind"]), []).append((each, record))
    replies: list[Reply] = []
    for (kind, _), pairs in tqdm(sorted(groups.items()), unit="kind", disable=None):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            tags = [split_tags(record["tags"]) for _, record in batch] if lion.model.ram is None else None
            prompts, tasks = [record["question"] for _, record in batch], [TASK_OF[kind]] * len(batch)
            answers = lion.respond([each.image for each, _ in batch], prompts, tasks, GENERATION[SETTINGS[kind]], tags)
            together = zip(batch, answers, strict=True)
            replies += [Reply(each, record, said.text.strip()) for (each, record), said in together]
    return replies


def levels(replies: Sequence[Reply]) -> dict[str, float]:
    """The share of right answers: at image level, to questions that only tags can answer, and at region level."""
    found: dict[str, list[bool]] = {}
    for reply in replies:
        name = {"rec": "REC", "reg": "REG", "ground": "ground"}.get(reply.kind, "image level")
        found.setdefault(name, []).append(reply.right)
    return {
        name: sum(found[name]) / len(found[name]) for name in ("image level", "ground", "REC", "REG") if name in found
    }


def toy_scores(replies: Sequence[Reply]) -> Iterator[ToyScore]:
    """One row per kind of question, for captions and existence several."""
    for kind in dict.fromkeys(reply.kind for reply in replies):
        asked = [reply for reply in replies if reply.kind == kind]
        held_out = {name: score for name, score, *_ in measure(kind, [r for r in asked if r.scene.held_out])}
        for name, score, baseline, blind in measure(kind, asked):
            yield ToyScore(name, score, held_out.get(name, float("nan")), baseline, blind, len(asked))


def measure(kind: str, replies: Sequence[Reply]) -> Iterator[tuple[str, float, float, str]]:
    """Name, score, the score of a blind guess and the guess in words, for replies of one kind."""
    if not replies:
        return
    texts, truth = [reply.text for reply in replies], [reply.record["answer"] for reply in replies]
    exact = sum(reply.right for reply in replies) / len(replies)
    things = [[(t, r.record["answer"]) for t in r.scene.things] for r in replies]
    by_chance = lambda right: sum(sum(right(*pair) for pair in pairs) / len(pairs) for pairs in things) / len(things)
    if kind == "caption":
        ours, blind = (metrics.cider([[t] for t in truth], said)[0] / 10 for said in (texts, [*truth[1:], truth[0]]))
        yield "captions, CIDEr / 10", ours, blind, "another scene's caption"
    elif kind == "rec":
        blind = by_chance(lambda thing, answer: thing.box.iou(Box.parse(answer)) >= 0.5)
        yield "REC, Acc@0.5", exact, blind, "a random object's box"
    elif kind == "reg":
        blind = by_chance(lambda thing, answer: f"the {thing.size} {thing.name}" == answer)
        yield "REG, exact", exact, blind, "a random object's name"
    else:
        frequent, times = Counter(truth).most_common(1)[0]
        yield f"VQA, {kind}", exact, times / len(truth), f"always {frequent!r}"
    if kind == "existence":
        pope, yes = metrics.pope(texts, truth), metrics.pope(["yes"] * len(truth), truth)
        yield "POPE, F1", pope.f1, yes.f1, "always 'yes'"


def score_table(replies: Sequence[Reply]) -> str:
    lines = [f"{'':22}{'LION':>7}{'held out':>10}{'blind':>8}   the blind guess"]
    for row in toy_scores(replies):
        numbers = f"{row.score:7.1%}{row.held_out:10.1%}{row.baseline:8.1%}"
        lines.append(f"{row.name:22}{numbers}   {row.blind} ({row.count} questions)")
    return "\n".join(lines)
