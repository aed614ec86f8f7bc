"""Readers of the official annotation files (Table 8): paths in, `Example`s out.

    captions, textcaps   Karpathy's dataset_*.json, LAVIS' *_test.json, or COCO's own; TextCaps_0.1_val.json
    vqa                  OKVQA and VQAv2: the files of questions and annotations in any order, or LAVIS' one list
    aokvqa, gqa          aokvqa_v1p0_val.json, testdev_balanced_questions.json, or LAVIS' lists
    iconqa               the folder of choose_txt questions, or problems.json and pid_splits.json
    vsr, visdial         test.jsonl, visdial_1.0_val.json
    refcoco              refs(unc).p with instances.json, Shikra's REC_*.jsonl, or MiniGPT-4's refcoco_*.json
    pope, mmbench        coco_pope_*.json (it holds JSON lines), mmbench_*.tsv

Content and suffix tell the forms of a data set apart. A fault is a ValueError that names file and record.
"""

import base64
import csv
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..box import Box
from ..files import json_lines, need, read_json, reading

VSR_CANDIDATES = ("yes", "true", "no", "false")  # the first two say that the statement holds


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
        for name, text in {"id": self.id, "group": self.group, **self.fields}.items():
            need(text, str, name)
        for text in self.references + self.candidates:
            need(text, str, "answer")
        if self.box and not self.box.area:
            raise ValueError("the box covers nothing of the image")


def only(paths: Sequence[Path], count: int = 1) -> Path:
    if len(paths) > count:
        raise ValueError(f"expected {count} annotation file(s), found {len(paths)}: {', '.join(map(str, paths))}")
    return paths[0]


def read_files(paths: Sequence[Path], count: int = 1) -> tuple[str, Any]:
    """Name and content of a JSON file, or of `count` files whose objects belong together."""
    data = read_json(only(paths, count), object)
    with reading(where := " and ".join(map(str, paths))):
        for path in paths[1:]:
            data = data | read_json(path)
    return where, data


def rows(path: object, data: Any, name: str = "", split: str = "") -> Iterator[tuple[str, Any]]:
    """The objects of a list, of the list under this name, or of a dict by `question_id`, each with its place."""
    with reading(path):
        listed = need(data, dict)[name] if name else data
        if isinstance(listed, dict):
            listed = [need(row, dict, id) | {"question_id": id} for id, row in listed.items()]
        need(listed, list, name or "it")
    for number, row in enumerate(listed, 1):
        with reading(place := f"{path}, {name or 'record'} {number}"):
            if not split or need(row, dict).get("split") == split:
                yield place, need(row, dict)


def texts(row: Any, name: str) -> tuple[str, ...]:
    """The field as texts, at least one."""
    if not (value := need(row[name], (str, list), name)):
        raise ValueError(f"{name} is empty")
    return (value,) if isinstance(value, str) else tuple(value)


def choose(value: Any, choices: Sequence[Any], name: str) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be in {choices}, found {value!r:.40}")
    return choices[choices.index(value)]  # 1, where the file has 1.0 or true


def captions(paths: Sequence[Path], split: str = "test") -> Iterator[Example]:
    path, data = read_files(paths)
    if isinstance(data, dict) and "annotations" in data:  # COCO
        said = by_image(path, data, "annotations", "caption")
        for where, row in rows(path, data, "images"):
            with reading(where):
                id = int(row["id"])
                name = row.get("file_name", f"val2014/COCO_val2014_{id:012}.jpg")  # LAVIS' ground truth has no names
                yield Example(str(id), name, references=texts({"caption": said[str(id)]}, "caption"))
    elif isinstance(data, dict):  # Karpathy
        for where, row in rows(path, data, "images", split):
            with reading(where):
                name = (row.get("filepath", "") + "/" + row["filename"]).lstrip("/")
                yield Example(image_id(name), name, references=tuple(s["raw"] for s in row["sentences"]))
    else:
        for where, row in rows(path, data):
            with reading(where):
                yield Example(image_id(row["image"]), row["image"], references=texts(row, "caption"))


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
    pair, answers = isinstance(data, dict) and ("questions" in data or "annotations" in data), {}
    for where, row in rows(path, data, "annotations") if pair else ():
        with reading(where):
            answers[row["question_id"]] = tuple(answer["answer"] for answer in row["answers"])
    for where, row in rows(path, data, "questions" if pair else ""):
        with reading(where):
            id = row["question_id"]
            if not pair:  # LAVIS' list, or GQA's questions by id
                name = row["imageId"] + ".jpg" if "imageId" in row else row["image"]
                said = texts(row, "answer")
            elif id in answers:
                subtype = data.get("data_subtype", "val2014")
                name, said = f"{subtype}/COCO_{subtype}_{row['image_id']:012d}.jpg", answers[id]
            else:
                raise ValueError(f"question {id} has no annotation")
            yield Example(str(id), name, {"question": row["question"]}, said)


def aokvqa(paths: Sequence[Path]) -> Iterator[Example]:
    for where, row in rows(*read_files(paths)):
        with reading(where):
            year = "train2017" if row.get("split") == "train" else "val2017"
            name = row["image"] if "image" in row else f"{year}/{row['image_id']:012d}.jpg"
            group = "difficult" if row.get("difficult_direct_answer") else ""
            answers = texts(row, "direct_answers")
            yield Example(row["question_id"], name, {"question": row["question"]}, answers, group=group)


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
            choices = texts(row, "choices")
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
        questions, answers = (need(data["data"][name], list, name) for name in ("questions", "answers"))
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
    shikra = only(paths).suffix == ".jsonl"
    for number, (where, row) in enumerate(json_lines(refs) if shikra else rows(*read_files(paths))):
        with reading(where):
            # MiniGPT-4 appends the object's number to COCO_train2014_ and 12 digits.
            name = row["img_path"] if shikra else row["img_id"][:27] + ".jpg"
            fields = {"expression": (row["expression"] if shikra else texts(row, "sents")[0]).strip()}
            yield Example(f"{Path(name).stem}-{number}", name, fields, box=any_box_of(row, where, corners=shikra))


def refer(path: Path, instances: Path, split: str) -> Iterator[Example]:
    data = read_json(instances)
    with reading(instances):
        images, objects = ({row["id"]: row for _, row in rows(instances, data, n)} for n in ("images", "annotations"))
    with reading(path), open(path, "rb") as file:
        try:
            refs = PlainUnpickler(file, encoding="latin1").load()  # written by Python 2
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"it is not a whole pickle: {error}") from error
    for where, ref in rows(path, refs, split=split):
        with reading(where):
            image, annotation = images.get(ref["image_id"]), objects.get(ref["ann_id"])
            if image is None or annotation is None:
                raise ValueError(f"image {ref['image_id']} or annotation {ref['ann_id']} is not in {instances}")
            box = any_box_of(annotation, where, corners=False, size=image)
            name = "train2014/" + image["file_name"]  # the ref's own file_name ends in the object's number
            for sentence in ref["sentences"]:
                yield Example(str(sentence["sent_id"]), name, {"expression": sentence["sent"].strip()}, box=box)


class PlainUnpickler(pickle.Unpickler):
    """refer's files hold dicts, lists, texts and numbers. Nothing is imported, so no code runs."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}, and only plain data is read")


def any_box_of(row: Any, where: str, corners: bool, size: Any = None) -> Box:
    """`bbox` in pixels, as two corners or as a corner with width and height."""
    with reading(where):
        x, y, a, b = (need(number, float, "bbox") for number in row["bbox"])
        width, height = (need((size or row)[name], float, name) for name in ("width", "height"))
        return Box.from_pixels(x, y, a if corners else x + a, b if corners else y + b, width, height)


def pope(paths: Sequence[Path]) -> Iterator[Example]:
    for where, row in json_lines(only(paths)):
        with reading(where):
            label = choose(row["label"], ("yes", "no"), "label")
            yield Example(str(row["question_id"]), row["image"], {"question": row["text"]}, (label,))


def mmbench(paths: Sequence[Path]) -> Iterator[Example]:
    """A row's picture is base64 text, or the index of the row that has it. Options and answer may be missing."""
    path = only(paths)
    csv.field_size_limit(2**31 - 1)  # a picture is one field
    with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    pictures = {row.get("index"): row.get("image") or "" for row in table}
    for where, row in rows(path, table):
        with reading(where):
            home = row["image"] if need(row["image"], str, "image") in pictures else row["index"]
            picture = base64.b64decode(pictures[home], validate=True)
            given = {name: text for name, text in row.items() if text not in (None, "", "nan")}
            options = {letter: given[letter] for letter in "ABCD" if letter in given}
            letters, candidates = tuple(options), tuple(options.values())
            target = letters.index(choose(given["answer"], letters, "answer")) if "answer" in given else None
            lines = "\n".join(map(". ".join, options.items()))
            fields = {"question": row["question"], "hint": given.get("hint", ""), "options": lines}
            yield Example(row["index"], picture, fields, letters, candidates, target, group=row["l2-category"])
