"""Training records: one question about one picture each. A file is a JSON list of them, or has one per line:

    {"image": "coco/1.jpg", "question": "Find the dog and give ...", "answer": "Answer: [0.440,0.060,0.650,0.367]",
     "category": "region_level", "tags": ["dog", "man"]}

`question` is the whole instruction. Of a list of answers the first counts. `tags` may be one text, "dog, man".
Without `tags` RAM tags the picture during training. `python -m lion_mini.data` makes such files and checks them.

Compatible with the release's datasets/jsonl_vqa.py, except that region-level pictures are never cropped or mirrored.
"""

import codecs
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..box import Box
from ..config import LionConfig
from ..files import disguise, need, reading
from ..images import ImageFolder, open_image
from ..text.prompts import PLACEHOLDER, TASK_OF

TASKS = LionConfig().tasks
CATEGORIES = {name: task for task in TASKS for name in (task, f"{task}_level")} | TASK_OF
CATEGORIES |= {"ref": "region", "grounding": "region", "norm": "image"}  # the release's
LONGEST = 4_000, 8_000  # characters of a prompt and of an answer; T5 reads and writes 128 tokens in training
BRACKETED = re.compile(r"(?i)\[(?:[-+0-9.e\s]|nan|inf)*,(?:[-+0-9.e,\s]|nan|inf)*\]")  # only a box looks like this


@dataclass(frozen=True)
class TrainingExample:
    """One question about one picture, and the answer to learn."""

    image: Image.Image
    question: str
    answer: str
    tags: list[str] | None  # None: RAM tags the picture
    task: str
    name: str  # file and record, for messages


class Source(Protocol):
    augments: bool  # whether image-level pictures may be cropped and mirrored

    def __len__(self) -> int: ...
    def read(self, index: int, rng: random.Random) -> TrainingExample: ...  # or a ValueError that names the record


class Records:
    """A file of records for these tasks, pictures below `roots`. Lines are read one by one, a JSON list as a whole."""

    augments = True

    def __init__(self, path: Path, roots: Path | Sequence[Path], tasks: Sequence[str] = TASKS):
        self.path, self.tasks = path, tasks
        self.images = ImageFolder(*([roots] if isinstance(roots, Path) else roots))
        self.whole, self.starts = list[Any](), np.empty(0, np.int64)  # a list's records, or where each line starts
        with reading(path), open(path, "rb") as file:
            if file.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                self.whole = json.load(file)
            else:
                ends = np.cumsum([0, *map(len, file)])
                file.seek(0)
                self.starts = ends[:-1][[bool(line.strip()) for line in file]]
            if fault := disguise(path) or "it holds no record" * (not len(self)):
                raise ValueError(fault)

    def __len__(self) -> int:
        return len(self.whole or self.starts)

    def line(self, index: int) -> bytes:
        if self.whole:
            return json.dumps(self.whole[index]).encode()
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return file.readline()

    def fields(self, index: int) -> dict[str, Any]:
        """Image, question, answer, tags, task and name of a record."""
        with reading(name := f"{self.path}, record {index + 1}"):
            return check_record(json.loads(self.line(index))) | {"name": name}

    def picture(self, fields: Mapping[str, str]) -> Path:
        """The path of a record's picture; one that is missing should lie below the first root."""
        with reading(fields["name"]):
            return self.images.path(fields["image"]) or self.images.roots[0] / fields["image"]

    def read(self, index: int, rng: random.Random) -> TrainingExample:
        fields = self.fields(index)
        with reading(fields["name"]):
            if fields["task"] not in self.tasks:
                raise ValueError(f"it is {fields['task']}-level, which this stage does not train")
            return TrainingExample(**fields | {"image": open_image(self.picture(fields))})


def check_record(record: Any) -> dict[str, Any]:
    """The fields image, question, answer, tags and task of a record; a ValueError if it cannot be trained from."""
    need(record, dict, "a record")
    image = record.get("image") or record.get("image_path") or record.get("image_id")
    question, answer, tags = record.get("question") or "", record.get("answer", ""), record.get("tags")
    answer = next(iter(answer), "") if isinstance(answer, list) else answer
    if tags is not None:
        tags = split_tags(tags) if isinstance(tags, str) else need(tags, list, "its field tags")
    texts = [("image path", image), ("question", question), ("answer", answer), *(("tag", tag) for tag in tags or ())]
    for name, text in texts:
        need(text, str, f"its {name}")
    if not question.strip():
        raise ValueError("it has no question")
    if len(prompt := ", ".join((question, *(tags or ())))) > LONGEST[0] or len(answer) > LONGEST[1]:
        fault = "its question with the tags has over {:,} characters, or its answer over {:,}"
        raise ValueError(fault.format(*LONGEST))
    if PLACEHOLDER in prompt:
        raise ValueError(f"its question and tags must not hold {PLACEHOLDER}, the soft prompt's place")
    task = CATEGORIES.get(str(category := record.get("category") or "image_level").lower().strip())
    if task is None:
        raise ValueError(f"its category {category!r:.40} is none of {', '.join(f'{name}_level' for name in TASKS)}")
    for text in BRACKETED.findall(f"{question} {answer}") if task == "region" else ():
        if not (box := Box.parse(text)) or not box.area:
            raise ValueError(f"{text} is no box of fractions from 0 to 1")
    return {"image": image, "question": question, "answer": answer, "tags": tags, "task": task}


def split_tags(tags: str) -> list[str]:
    """Tags that are joined by commas, or as RAM joins them: "dog | man"."""
    return [tag.strip() for tag in re.split("[,|]", tags) if tag.strip()]
