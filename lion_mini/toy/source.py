"""The shapes world as a source of training examples."""

import random
from collections.abc import Sequence

from ..data.records import Example, split_tags
from ..text.prompts import TASK_OF
from .world import KINDS, Record, Split, records
from .world import scene as draw


class Toy:
    """The shapes world, drawn when asked: scene `index`, and one of its questions, every kind equally often."""

    augments = False  # its questions know left from right, and where the edges are

    def __init__(self, tasks: Sequence[str], split: Split = "train", scenes: int = 200_000):
        self.tasks, self.split, self.scenes = tasks, split, scenes

    def __len__(self) -> int:
        return self.scenes

    def read(self, index: int, rng: random.Random) -> Example:
        scene = draw(index, self.split)
        kinds = [kind for kind in KINDS if TASK_OF[kind] in self.tasks]
        found: dict[tuple[str, str], list[Record]] = {}
        for record in records(scene, rng, kinds):
            found.setdefault((record["kind"], record["subkind"]), []).append(record)
        record = rng.choice(found[rng.choice(sorted(found))])
        name = f"toy scene {index} of {self.split}"
        return Example(
            scene.image, record["question"], record["answer"], split_tags(record["tags"]), TASK_OF[record["kind"]], name
        )
