"""Readers of the official annotation files (Table 8): paths in, `Example`s out.

    captions, textcaps   Karpathy's dataset_*.json, LAVIS' *_test.json, or COCO's own; TextCaps_0.1_val.json
    vqa                  OKVQA and VQAv2: the files of questions and annotations in any order, or LAVIS' one list
    aokvqa, gqa          aokvqa_v1p0_val.json, testdev_balanced_questions.json, or LAVIS' lists
    iconqa               the folder of choose_txt questions, or problems.json and pid_splits.json
    vsr, visdial         test.jsonl, visdial_1.0_val.json
    refcoco              refs(unc).p with instances.json, Shikra's REC_*.jsonl, or MiniGPT-4's refcoco_*.json
    pope, mmbench        coco_pope_*.json, mmbench_*.tsv

Content tells the forms of a data set apart; a list may be JSON lines. A fault is a ValueError with file and record.
"""

import base64
import codecs
import csv
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..box import Box
from ..files import json_lines, need, read_json, reading
from .metrics import MMBENCH_ABILITIES

VSR_CANDIDATES = ("yes", "true", "no", "false")  # the first two say that the statement holds
Line = dict[str, Any]  # of a file of predictions


@dataclass(frozen=True)
class Example:
    """One question about a picture, and all that its score needs."""

    id: str
    image: str | bytes  # a path below --images, or the encoded picture itself
    fields: Mapping[str, str] = field(default_factory=dict)  # what fills the template
    references: tuple[str, ...] = ()  # captions or annotators' answers
    candidates: tuple[str, ...] = ()  # to be ranked; without any, the model writes
    target: int | None = None  # the right candidate; None where the file hides it
    box: Box | None = None
    group: str = ""  # MMBench: ability; A-OKVQA: "difficult"; VisDial: "last" in a dialog's last round

    def __post_init__(self) -> None:
        need(self.image, (str, bytes), "image")
        answers = (("answer", text) for text in self.references + self.candidates)
        for name, text in [("id", self.id), ("group", self.group), *self.fields.items(), *answers]:
            need(text, str, name)
        if self.box and not self.box.area:
            raise ValueError("the box covers nothing of the image, in pixels")


def only(paths: Sequence[Path], count: int = 1) -> Path:
    if len(paths) > count:
        raise ValueError(f"expected {count} annotation file(s), found {len(paths)}: {', '.join(map(str, paths))}")
    return paths[0]


def read_files(paths: Sequence[Path], count: int = 1) -> tuple[str, Any]:
    """Name and content of a JSON file (JSON lines are a list), or of `count` files whose objects belong together."""
    where, first = " and ".join(map(str, paths)), only(paths, count)
    if len(paths) > 1:
        return where, {name: value for path in paths for name, value in read_json(path).items()}
    values = [value for _, value in json_lines(first)]
    return where, values[0] if len(values) == 1 else values


def rows(path: object, data: Any, name: str = "", split: str = "") -> Iterator[tuple[str, Any]]:
    """The objects of a list, of the list under this name, or of a dict by `question_id`, each with its place."""
    with reading(path):
        listed = need(data, dict)[name] if name else data
        if isinstance(listed, dict):
            by_id = any(isinstance(row, dict) for row in listed.values())  # else it is the only row
            listed = [need(row, dict, id) | {"question_id": id} for id, row in listed.items()] if by_id else [listed]
        need(listed, list, name or "it")
    for number, row in enumerate(listed, 1):
        with reading(place := f"{path}, {name or 'record'} {number}"):
            if not split or need(row, dict)["split"] == split:
                yield place, need(row, dict)


def texts(value: Any, name: str) -> tuple[str, ...]:
    """A text or a list of them. A number will do."""
    listed = value if isinstance(value, list) else [value]
    return tuple(str(need(text, (str, float), name)) for text in listed)


def choose(value: Any, choices: Sequence[Any], name: str) -> Any:
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value not in choices:
        raise ValueError(f"{name} must be in {choices}, found {value!r:.40}")
    return choices[choices.index(value)]  # 1, where the file has 1.0, "1" or true


def captions(paths: Sequence[Path], split: str = "test") -> Iterator[Example]:
    path, data = read_files(paths)
    if isinstance(data, dict) and "annotations" in data:  # COCO
        given = by_image(path, data, "annotations", "caption")
        for where, row in rows(path, data, "images"):
            with reading(where):
                id = str(row["id"])  # LAVIS' ground truth has no names
                name = row["file_name"] if "file_name" in row else f"val2014/COCO_val2014_{int(id):012}.jpg"
                yield Example(id, name, references=tuple(given.pop(id, ())))
        if given:
            raise ValueError(f"{path}: image {next(iter(given))} has captions and is not in images")
        return
    karpathy = isinstance(data, dict) and "images" in data  # else LAVIS' list
    for where, row in rows(path, data, "images", split) if karpathy else rows(path, data):
        with reading(where):
            name = f"{row.get('filepath', '')}/{row['filename']}".lstrip("/") if karpathy else row["image"]
            said = [sentence["raw"] for sentence in row["sentences"]] if karpathy else row["caption"]
            yield Example(image_id(name), name, references=texts(said, "caption"))


def textcaps(paths: Sequence[Path]) -> Iterator[Example]:
    for id, said in by_image(*read_files(paths), "data", "caption_str").items():
        yield Example(id, f"train_images/{id}.jpg", references=tuple(said))


def by_image(path: object, data: Any, name: str, field: str) -> dict[str, list[str]]:
    """The captions of each picture, from the list `name` of single ones."""
    said = defaultdict[str, list[str]](list)
    for where, row in rows(path, data, name):
        with reading(where):
            said[str(row["image_id"])].append(need(row[field], str, field))
    return said


def image_id(name: str) -> str:
    """COCO's number, as the evaluators name a picture, or else the name without folder and suffix."""
    stem = Path(name).stem
    return str(int(stem[-12:])) if stem.startswith("COCO_") and stem[-12:].isdigit() else stem


def vqa(paths: Sequence[Path]) -> Iterator[Example]:
    """OKVQA, VQAv2 and GQA. The annotators' `answer` counts, which OKVQA has stemmed, and not `raw_answer`."""
    path, data = read_files(paths, count=2)
    answers, pair = defaultdict[str, list](list), isinstance(data, dict) and {"questions", "annotations"} & data.keys()
    for where, row in rows(path, data, "annotations") if pair else ():
        with reading(where):
            answers[str(row["question_id"])] += [answer["answer"] for answer in row["answers"]]
    for where, row in rows(path, data, "questions" if pair else ""):
        with reading(where):
            id = str(row["question_id"])
            if pair:
                subtype = data.get("data_subtype", "val2014")
                name, said = f"{subtype}/COCO_{subtype}_{int(row['image_id']):012}.jpg", answers.pop(id, [])
            else:  # LAVIS' list, or GQA's questions by id
                name, said = f"{row['imageId']}.jpg" if "imageId" in row else row["image"], row["answer"]
            yield Example(id, name, {"question": row["question"]}, texts(said, "answer"))
    if answers:
        raise ValueError(f"{path}: question {next(iter(answers))} has answers and is not in questions")


def aokvqa(paths: Sequence[Path]) -> Iterator[Example]:
    for where, row in rows(*read_files(paths)):
        with reading(where):
            year = "train2017" if row.get("split") == "train" else "val2017"
            name = row["image"] if "image" in row else f"{year}/{int(row['image_id']):012}.jpg"
            group = "difficult" * need(row.get("difficult_direct_answer", False), bool, "difficult_direct_answer")
            answers = texts(row["direct_answers"], "direct_answers")
            yield Example(str(row["question_id"]), name, {"question": row["question"]}, answers, group=group)


def iconqa(paths: Sequence[Path]) -> Iterator[Example]:
    """Only the questions with choices in text (choose_txt). The number of choices varies."""
    if paths[0].is_dir():  # the root of the data set, or a folder inside
        patterns = ("**/test/choose_txt/*/data.json", "choose_txt/*/data.json", "*/data.json")
        files = next(filter(None, ([*paths[0].glob(pattern)] for pattern in patterns)), [])
        path, data = str(only(paths)), {file.parent.name: read_json(file) for file in files}
        ids = sorted(data, key=lambda id: (len(id), id))
    else:
        path, data = read_files(paths, count=2)
        with reading(path):
            ids = need(data["choose_txt_test"], list, "choose_txt_test")
    for id in map(str, ids):
        with reading(f"{path}, {id}"):
            row, image = data[id], f"test/choose_txt/{id}/image.png"
            choices = texts(row["choices"], "choices")
            target = choose(row["answer"], range(len(choices)), "answer")
            yield Example(id, image, {"question": row["question"]}, (), choices, target)


def vsr(paths: Sequence[Path]) -> Iterator[Example]:
    for number, (where, row) in enumerate(json_lines(only(paths))):
        with reading(where):
            name = "/".join(row["image_link" if "image_link" in row else "image"].split("/")[-2:])
            target = 0 if choose(row["label"], (0, 1), "label") else 2
            yield Example(str(number), name, {"question": row["caption"]}, (), VSR_CANDIDATES, target)


def visdial(paths: Sequence[Path]) -> Iterator[Example]:
    """Each round is a question of its own, and the rounds before it are its history."""
    path, data = read_files(paths)
    with reading(path):
        questions, answers = (dict(enumerate(need(data["data"][n], list, n))) for n in ("questions", "answers"))
    for where, row in rows(path, data["data"], "dialogs"):
        with reading(where):
            id, history = int(row["image_id"]), ""
            image = f"VisualDialog_val2018/VisualDialog_val2018_{id:012}.jpg"
            for number, turn in enumerate(row["dialog"], 1):
                question = questions[turn["question"]]
                options = tuple(answers[option] for option in turn["answer_options"])
                target = choose(turn["gt_index"], range(len(options)), "gt_index")
                fields, group = {"question": question, "history": history}, "last" * (number == len(row["dialog"]))
                yield Example(f"{id}-{number}", image, fields, (), options, target, group=group)
                if not group:
                    history = f"{history} q: {question} a: {answers[turn['answer']]}".strip()


def refcoco(paths: Sequence[Path], split: str) -> Iterator[Example]:
    """One example per expression, its box unrounded. A file of Shikra or MiniGPT-4 holds one split."""
    pickled = lambda path: path.suffix in (".p", ".pkl", ".pickle")
    refs, *instances = sorted(paths, key=pickled, reverse=True)
    if pickled(refs):
        if len(instances) != 1:
            raise ValueError(f"expected refs(...).p and its instances.json, found {', '.join(map(str, paths))}")
        yield from refer(refs, instances[0], split)
        return
    for number, (where, row) in enumerate(json_lines(only(paths))):
        with reading(where):
            shikra = "img_path" in row  # MiniGPT-4 appends the object's number to COCO_train2014_ and 12 digits
            name = row["img_path"] if shikra else row["img_id"][:27] + ".jpg"
            fields = {"expression": row["expression" if shikra else "sents"].strip()}
            yield Example(f"{Path(name).stem}-{number}", name, fields, box=any_box_of(row, where, corners=shikra))


def refer(path: Path, instances: Path, split: str) -> Iterator[Example]:
    data = read_json(instances)
    with reading(instances):
        by_id = lambda name: {str(row["id"]): row for _, row in rows(instances, data, name)}
        images, objects = by_id("images"), by_id("annotations")
    with reading(path), open(path, "rb") as file:
        refs = PlainUnpickler(file, encoding="utf-8", errors="latin1").load()
    for where, ref in rows(path, refs, split=split):
        with reading(where):
            image, annotation = images.get(str(ref["image_id"])), objects.get(str(ref["ann_id"]))
            if image is None or annotation is None:
                raise ValueError(f"image {ref['image_id']} or annotation {ref['ann_id']} is not in {instances}")
            box = any_box_of(annotation, where, corners=False, size=image)
            name = "train2014/" + image["file_name"]  # the ref's own file_name ends in the object's number
            for sentence in ref["sentences"]:
                yield Example(str(sentence["sent_id"]), name, {"expression": sentence["sent"].strip()}, box=box)


codecs.register_error("latin1", lambda e: (e.object[e.start : e.end].decode("latin-1"), e.end))  # type: ignore


class PlainUnpickler(pickle.Unpickler):
    """refer's files hold plain data, in texts UTF-8 or else Latin-1. Nothing is imported, so no code runs."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}, and only plain data is read")


def any_box_of(row: Any, where: str, corners: bool, size: Any = None) -> Box:
    """`bbox` in pixels, as two corners or as a corner with width and height."""
    with reading(where):
        x, y, a, b = (need(number, float, "bbox") for number in row["bbox"])
        width, height = (need((size or row)[name], float, name) for name in ("width", "height"))
        if max(x, y, a, b) <= 1:  # fractions by mistake, or the first pixel
            return Box(0, 0, 0, 0)
        return Box.from_pixels(x, y, a if corners else x + a, b if corners else y + b, width, height)


def pope(paths: Sequence[Path]) -> Iterator[Example]:
    for where, row in json_lines(only(paths)):
        with reading(where):
            label = choose(need(row["label"], str, "label").strip().lower(), ("yes", "no"), "label")
            yield Example(str(row["question_id"]), row["image"], {"question": row["text"]}, (label,))


def mmbench(paths: Sequence[Path]) -> Iterator[Example]:
    """A row's picture is base64 text, or the index of the row that has it. Options and answer may be missing."""
    path = only(paths)
    csv.field_size_limit(2**31 - 1)  # a picture is one field
    with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", strict=True))
    pictures = {row.get("index"): row.get("image") for row in table}
    for where, row in rows(path, table):
        with reading(where):
            picture = base64.b64decode(pictures.get(row["image"], row["image"]), validate=True)
            given = {name: text for name, text in row.items() if text not in (None, "", "nan")}
            # Options are shown in alphabetical order (B.2) and lettered anew. `references` are the file's letters.
            letters = tuple(sorted(given.keys() & set("ABCDEFGH"), key=lambda name: (given[name].casefold(), name)))
            candidates = tuple(given[letter] for letter in letters)
            target = letters.index(choose(given["answer"], letters, "answer")) if "answer" in given else None
            lines = "\n".join(map("{}. {}".format, "ABCDEFGH", candidates))
            fields = {"question": row["question"], "hint": given.get("hint", ""), "options": lines}
            group = choose(row["l2-category"], [*MMBENCH_ABILITIES], "l2-category")
            yield Example(str(int(row["index"])), picture, fields, letters, candidates, target, group=group)
