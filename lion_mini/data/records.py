"""Training data: files of records, or the toy world, become batches in an order that is a pure function of the seed.

A record is what the release trains from, in a JSON list or one per line; a line may be used without the ones before it:

    {"image": "coco/1.jpg", "question": "Find the dog and give ...", "answer": "Answer: [0.440,0.060,0.650,0.367]",
     "category": "region_level", "tags": ["dog", "man"]}

`image_path` or `image_id` may stand for `image`, a list of answers means its first one, `tags` may be joined already,
and without `tags` RAM is asked during training. `question` is the whole instruction, its template filled in.

Nothing here remembers where it was. Sample p of a run is found from the seed and p alone, so any process can make any
batch, a run resumes without having saved its data's state, and however many processes share a batch, it is the same:

    position   0 1 2 3 4 5 6 7 8 | 9 ...        epoch 0, a shuffle of (seed, 0): every record once | epoch 1 ...
    batch      |__ 0 __||__ 1 __||__ 2          micro-batches of 2: 0 1 | 2 3 | ...  process r of w takes r, r + w, ...

Compatible with the release's datasets/jsonl_vqa.py, but for its accidents: a region-level picture is never cropped or
mirrored, and a category that is neither level is an error. `python -m lion_mini.data convert` makes such files from the
official ones, `inspect` looks at one.                                                  next: stages.py
"""

import codecs
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..box import Box
from ..images import ImageFolder, open_image
from ..text.prompts import PLACEHOLDER, TASK_OF

CATEGORIES = TASK_OF | {
    **dict.fromkeys(("image", "image_level"), "image"),
    **dict.fromkeys(("ref", "region", "region_level", "grounding"), "region"),
}
NUMBERS = re.compile(r"\[[-+0-9.eE\s]*,[-+0-9.eE,\s]*\]")  # what can only be meant as a box


@dataclass(frozen=True)
class Example:
    """One question about one picture, with the answer to learn; `tags=None` means that RAM has to look."""

    image: Image.Image
    question: str
    answer: str
    tags: list[str] | None
    task: str
    name: str  # where it comes from, for messages


class Source(Protocol):
    augments: bool  # whether image-level pictures may be cropped and mirrored

    def __len__(self) -> int: ...

    def read(self, index: int, rng: random.Random) -> Example:
        """The example; a ValueError, in one sentence with its place, if there is something wrong with it."""


class Records:
    """A file of records. Lines are only indexed at first and read when their turn comes; a JSON list is kept whole."""

    augments = True

    def __init__(self, path: Path, root: Path, tasks: Sequence[str]):
        self.path, self.images, self.tasks = path, ImageFolder(root), tasks
        self.whole: list[Any] | None = None
        self.starts = np.empty(0, np.int64)
        try:
            with open(path, "rb") as file:
                first = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
                file.seek(0)
                if first == b"[":
                    self.whole = json.load(file)
                else:
                    starts = np.cumsum([0, *map(len, file)])[:-1]
                    file.seek(0)
                    self.starts = starts[[bool(line.strip()) for line in file]]
        except OSError as error:
            raise ValueError(f"the data file {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"the data file {path} is not JSON: {error}") from None
        if not len(self):
            raise ValueError(f"the data file {path} holds no record")

    def __len__(self) -> int:
        return len(self.starts) if self.whole is None else len(self.whole)

    def read(self, index: int, rng: random.Random) -> Example:
        name = f"{self.path}, record {index + 1}"
        try:
            fields = check(self.raw(index))
            if fields["task"] not in self.tasks:
                raise ValueError(f"is {fields['task']}-level, which this stage does not train")
            return Example(open_image(self.picture(fields.pop("image"))), name=name, **fields)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def picture(self, name: str) -> Path:
        """Where it is, or should be: who opens it there says that it is missing."""
        return self.images.find(name) or self.images.root / name

    def raw(self, index: int) -> Any:
        if self.whole is not None:
            return self.whole[index]
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None


def check(record: Any) -> dict[str, Any]:
    """A record's fields in our names, by the release's rules; ValueError for what nobody could train from."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {record!r:.40}")
    key = next((key for key in ("image", "image_path", "image_id") if record.get(key)), None)
    question, answer, tags = record.get("question"), record.get("answer", ""), record.get("tags")
    category = record.get("category", "image_level")
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if isinstance(tags, str):
        tags = split_tags(tags)
    if key is None:
        raise ValueError("it has no image")
    if not isinstance(image := record[key], str):
        kind = "a number" if isinstance(image, (int, float)) else "not text"
        raise ValueError(f"its {key} is {image!r:.40}, {kind}, and must be a path")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("it has no question")
    if PLACEHOLDER in question:
        raise ValueError(f"its question holds {PLACEHOLDER}, the soft prompt's place")
    if not isinstance(answer, str):
        raise ValueError(f"its answer is {answer!r:.40}, not text")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise ValueError(f"its tags are {tags!r:.40}, not a list of texts")
    if any(PLACEHOLDER in tag for tag in tags or ()):
        raise ValueError(f"its tags hold {PLACEHOLDER}, the soft prompt's place")
    if not isinstance(category, str) or category.lower().strip() not in CATEGORIES:
        raise ValueError(f"its category {category!r:.40} is neither image_level nor region_level")
    task = CATEGORIES[category.lower().strip()]
    for text in NUMBERS.findall(f"{question} {answer}") if task == "region" else ():
        box = Box.parse(text)
        if box is None or not box.area:
            raise ValueError(f"{text} is no box of fractions from 0 to 1")
    return {"image": image, "question": question, "answer": answer, "tags": tags, "task": task}


def split_tags(tags: str) -> list[str]:
    return [tag for tag in tags.split(", ") if tag]
