"""The toy world as a source of training examples."""

import random
from collections.abc import Sequence

from ..data.records import Example, split_tags
from ..text.prompts import TASK_OF
from .questions import KINDS, Record, records
from .world import Split, scene


class Toy:
    """Scene `index`, and a question about it. Every kind and sub-kind of the tasks is equally likely."""

    augments = False  # its questions are about left and right, and about positions

    def __init__(self, tasks: Sequence[str], split: Split = "train", scenes: int = 200_000):
        self.tasks, self.split, self.scenes = tasks, split, scenes

    def __len__(self) -> int:
        return self.scenes

    def read(self, index: int, rng: random.Random) -> Example:
        shown = scene(index, self.split)
        kinds: dict[tuple[str, str], list[Record]] = {}
        for record in records(shown, rng, [kind for kind in KINDS if TASK_OF[kind] in self.tasks]):
            kinds.setdefault((record["kind"], record["subkind"]), []).append(record)
        record = rng.choice(kinds[rng.choice(sorted(kinds))])
        question, answer, tags = record["question"], record["answer"], split_tags(record["tags"])
        name = f"toy scene {index} of {self.split}"
        return Example(shown.image, question, answer, tags, TASK_OF[record["kind"]], name)
