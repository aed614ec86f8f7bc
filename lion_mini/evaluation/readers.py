"""The benchmarks' official annotation files, each as a list of `Example`s (Table 8).

    flickr30k, coco    Karpathy's dataset_*.json, LAVIS' *_test.json, or COCO's own {"images", "annotations"}
    textcaps           TextCaps_0.1_val.json
    okvqa, vqav2       the questions' and the annotations' file, in any order, or LAVIS' one list
    aokvqa, gqa        aokvqa_v1p0_val.json, testdev_balanced_questions.json, or LAVIS' lists
    iconqa             the folder of choose_txt questions, or problems.json and pid_splits.json
    vsr, visdial       test.jsonl, visdial_1.0_val.json
    refcoco...         refs(unc).p with instances.json, Shikra's REC_*.jsonl, or MiniGPT-4's refcoco_*.json
    pope_..., mmbench  coco_pope_*.json (it is JSON lines), mmbench_*.tsv

The files of a data set are told apart by what they hold, and by their ending.
next: benchmarks.py
"""

import base64
import binascii
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..annotations import get, load_json, load_lines, load_pickle, numbers, one, rows, texts, whole
from ..box import Box

SHIPPED = {  # how many examples the paper's benchmarks have
    "flickr30k": 1000, "coco": 5000, "textcaps": 3166, "okvqa": 5046, "aokvqa": 1145, "gqa": 12578, "iconqa": 6316,
    "vsr": 1222, "visdial": 20640, "refcoco_val": 10834, "refcoco_testA": 5657, "refcoco_testB": 5095,
    "refcoco+_val": 10758, "refcoco+_testA": 5726, "refcoco+_testB": 4889, "refcocog_val": 4896,
    "refcocog_test": 9602, "pope_random": 2910, "pope_popular": 3000, "pope_adversarial": 3000, "mmbench": 6666,
}  # fmt: skip
TASKS = tuple(SHIPPED)
VSR_CANDIDATES = ("yes", "true", "no", "false")  # the first two say that the statement holds
LETTERS = "ABCD"


@dataclass(frozen=True)
class Example:
    """One thing to ask, and all that its score needs to know."""

    id: str
    image: str | bytes  # a path below --images, or the encoded picture itself
    fields: dict[str, str] = field(default_factory=dict)  # what the template has room for
    references: tuple[str, ...] = ()  # captions or annotators' answers
    candidates: tuple[str, ...] = ()  # to be ranked
    target: int | None = None  # the right candidate; None where the file hides it
    box: Box | None = None
    group: str = ""  # MMBench's ability; "difficult" where A-OKVQA leaves the direct answer out


def read(task: str, paths: Sequence[Path], rounds: str = "all") -> list[Example]:
    """The benchmark's examples in the file's order, ids unique; ValueError where there are none."""
    family, _, split = task.partition("_")
    if task not in TASKS:
        raise ValueError(f"the task {task!r} is unknown; there are {', '.join(TASKS)}")
    if family.startswith("refcoco"):
        found = refcoco(paths, split)
    elif family == "visdial":
        found = visdial(paths, rounds)
    else:
        reader = {
            "flickr30k": captions, "coco": captions, "textcaps": textcaps, "okvqa": vqa, "aokvqa": aokvqa, "gqa": gqa,
            "iconqa": iconqa, "vsr": vsr, "pope": pope, "mmbench": mmbench,
        }[family]  # fmt: skip
        found = reader(paths)
    where = " and ".join(map(str, paths))
    if not found:
        raise ValueError(f"{where}: there is no example in it")
    seen: set[str] = set()
    for example in found:
        if example.id in seen:
            raise ValueError(f"{where}: the id {example.id} stands there twice")
        seen.add(example.id)
    return found


# --- captions


def captions(paths: Sequence[Path], split: str = "test") -> list[Example]:
    path = one(paths)
    data = load_json(path)
    if isinstance(data, dict) and "annotations" in data:
        return coco_captions(data, path)
    found = []
    if isinstance(data, dict):
        splits = set()
        for where, image in rows(data, path, "images"):
            splits.add(get(image, "split", where))
            if image["split"] == split:
                name = f"{image.get('filepath', '')}/{get(image, 'filename', where)}".lstrip("/")
                said = [get(s, "raw", where) for s in get(image, "sentences", where, list)]
                found.append(Example(image_id(name), name, references=tuple(said)))
        if not found:
            raise ValueError(f"{path} has no split {split!r}, only {', '.join(sorted(splits)) or 'none'}")
        return found
    for where, row in rows(data, path):
        name = get(row, "image", where)
        found.append(Example(image_id(name), name, references=texts(row, "caption", where)))
    return found


def image_id(name: str) -> str:
    """COCO's number, as the evaluators name a picture, or the name without folder and ending."""
    stem = Path(name).stem
    return str(int(stem[-12:])) if stem.startswith("COCO_") and stem[-12:].isdigit() else stem


def coco_captions(data: Any, path: Path) -> list[Example]:
    said: dict[int, list[str]] = {}
    for where, row in rows(data, path, "annotations"):
        said.setdefault(whole(row, "image_id", where), []).append(get(row, "caption", where))
    found = []
    for where, image in rows(data, path, "images"):
        number = whole(image, "id", where)
        name = (
            get(image, "file_name", where) if "file_name" in image else f"val2014/COCO_val2014_{number:012}.jpg"
        )  # LAVIS' ground truth has no names
        if number not in said:
            raise ValueError(f"{where}: the image {number} has no caption")
        found.append(Example(str(number), name, references=tuple(said[number])))
    return found


def textcaps(paths: Sequence[Path]) -> list[Example]:
    path = one(paths)
    said: dict[str, list[str]] = {}
    for where, row in rows(load_json(path), path, "data"):
        said.setdefault(get(row, "image_id", where), []).append(get(row, "caption_str", where))
    return [Example(id, f"train_images/{id}.jpg", references=tuple(those)) for id, those in said.items()]


# --- questions


def vqa(paths: Sequence[Path]) -> list[Example]:
    """OKVQA and VQAv2. The annotators' `answer` counts, which OKVQA has stemmed, and not `raw_answer`."""
    data = [(path, load_json(path)) for path in paths]
    if len(data) == 1 and isinstance(data[0][1], list):
        found = []
        for where, row in rows(data[0][1], data[0][0]):
            fields = {"question": get(row, "question", where)}
            id = str(get(row, "question_id", where, (int, str)))
            found.append(Example(id, get(row, "image", where), fields, texts(row, "answer", where)))
        return found
    parts = {
        name: pair
        for pair in data
        for name in ("questions", "annotations")
        if isinstance(pair[1], dict) and name in pair[1]
    }
    if len(data) != 2 or len(parts) != 2:
        raise ValueError(f"{' and '.join(map(str, paths))}: expected the questions' file and the annotations' file")
    answers = {}
    for where, row in rows(parts["annotations"][1], parts["annotations"][0], "annotations"):
        given = get(row, "answers", where, list)
        answers[get(row, "question_id", where, int)] = tuple(get(answer, "answer", where) for answer in given)
    path, questions = parts["questions"]
    subtype = questions.get("data_subtype", "val2014")
    found = []
    for where, row in rows(questions, path, "questions"):
        id = get(row, "question_id", where, int)
        if id not in answers:
            raise ValueError(f"{where}: question {id} has no annotation in {parts['annotations'][0]}")
        name = f"{subtype}/COCO_{subtype}_{get(row, 'image_id', where, int):012}.jpg"
        found.append(Example(str(id), name, {"question": get(row, "question", where)}, answers[id]))
    return found


def aokvqa(paths: Sequence[Path]) -> list[Example]:
    path = one(paths)
    found = []
    for where, row in rows(load_json(path), path):
        fields, answers = {"question": get(row, "question", where)}, texts(row, "direct_answers", where)
        year = "train2017" if row.get("split") == "train" else "val2017"
        name = get(row, "image", where) if "image" in row else f"{year}/{get(row, 'image_id', where, int):012}.jpg"
        group = "difficult" if row.get("difficult_direct_answer") else ""
        found.append(Example(get(row, "question_id", where), name, fields, answers, group=group))
    return found


def gqa(paths: Sequence[Path]) -> list[Example]:
    path = one(paths)
    data = load_json(path)
    found = []
    if isinstance(data, dict):
        pairs: Iterable[tuple[str, str, Any]] = ((f"{path}, {id}", id, row) for id, row in data.items())
    else:
        pairs = ((w, str(get(row, "question_id", w, (int, str))), row) for w, row in rows(data, path))
    for where, id, row in pairs:
        name = get(row, "imageId", where) + ".jpg" if isinstance(data, dict) else get(row, "image", where)
        answer = texts(row, "answer", where)[:1]
        found.append(Example(id, name, {"question": get(row, "question", where)}, answer))
    return found


def iconqa(paths: Sequence[Path]) -> list[Example]:
    """Of the three kinds of question only those with choices in text; the number of choices varies."""
    problems: list[tuple[str, str, Any]] = []
    if len(paths) == 1 and paths[0].is_dir():
        wanted = ("**/test/choose_txt/*/data.json", "choose_txt/*/data.json", "*/data.json")  # from the root or inside
        found_there = next(filter(None, ([*paths[0].glob(pattern)] for pattern in wanted)), [])
        files = sorted(found_there, key=lambda file: (len(file.parent.name), file.parent.name))
        problems = [(str(file), file.parent.name, load_json(file)) for file in files]
    else:
        data = [(path, load_json(path)) for path in paths]
        lists = [(path, d) for path, d in data if isinstance(d, dict) and "choose_txt_test" in d]
        known = [(path, d) for path, d in data if isinstance(d, dict) and "choose_txt_test" not in d]
        if len(lists) != 1 or len(known) != 1:
            raise ValueError(
                f"{' and '.join(map(str, paths))}: expected the folder of questions, or problems.json and "
                "pid_splits.json with its choose_txt_test"
            )
        for id in map(str, lists[0][1]["choose_txt_test"]):
            problems.append((f"{known[0][0]}, {id}", id, get(known[0][1], id, str(known[0][0]), dict)))
    found = []
    for where, id, row in problems:
        choices, target = texts(row, "choices", where), get(row, "answer", where, int)
        if not 0 <= target < len(choices):
            raise ValueError(f"{where}: answer {target} is not one of {len(choices)} choices")
        fields = {"question": get(row, "question", where)}
        found.append(Example(id, f"test/choose_txt/{id}/image.png", fields, candidates=choices, target=target))
    return found


def vsr(paths: Sequence[Path]) -> list[Example]:
    found = []
    for i, (where, row) in enumerate(load_lines(one(paths))):
        label = get(row, "label", where, int)
        if label not in (0, 1):
            raise ValueError(f"{where}: label is {label}, not 0 or 1")
        name = "/".join(get(row, "image_link" if "image_link" in row else "image", where).split("/")[-2:])
        fields = {"question": get(row, "caption", where)}
        found.append(Example(str(i), name, fields, candidates=VSR_CANDIDATES, target=0 if label else 2))
    return found


def visdial(paths: Sequence[Path], rounds: str = "all") -> list[Example]:
    """Every round is a question of its own, whose history are the rounds before it; `rounds="last"` keeps the tenth,
    which is what LAVIS' data set comes to."""
    if rounds not in ("all", "last"):
        raise ValueError(f"rounds is 'all' or 'last', not {rounds!r}")
    path = one(paths)
    data = get(load_json(path), "data", str(path), dict)
    questions, answers = (get(data, name, f"{path}, data", list) for name in ("questions", "answers"))
    found = []
    for where, row in rows(data, path, "dialogs"):
        image, history = whole(row, "image_id", where), ""
        turns = get(row, "dialog", where, list)
        for i, turn in enumerate(turns):
            here = f"{where}, round {i + 1}"
            question = entry(questions, get(turn, "question", here, int), here)
            if rounds == "all" or i == len(turns) - 1:
                options = tuple(entry(answers, j, here) for j in get(turn, "answer_options", here, list))
                target, fields = get(turn, "gt_index", here, int), {"question": question, "history": history}
                entry(options, target, here)
                name = f"VisualDialog_val2018/VisualDialog_val2018_{image:012}.jpg"
                found.append(Example(f"{image}-{i + 1}", name, fields, candidates=options, target=target))
            if i + 1 < len(turns):
                history = f"{history} q: {question} a: {entry(answers, get(turn, 'answer', here, int), here)}".strip()
    return found


def entry(texts: Sequence[Any], number: Any, where: str) -> str:
    if not isinstance(number, int) or not 0 <= number < len(texts) or not isinstance(texts[number], str):
        raise ValueError(f"{where}: {number!r:.40} is not the number of one of {len(texts)} texts")
    return texts[number]


# --- boxes


def refcoco(paths: Sequence[Path], split: str) -> list[Example]:
    """One example per expression, its box unrounded. The split of Shikra's and MiniGPT-4's files is the file."""
    pickles = [path for path in paths if path.suffix in (".p", ".pkl", ".pickle")]
    if pickles:
        others = [path for path in paths if path not in pickles]
        if len(pickles) != 1 or len(others) != 1:
            raise ValueError(f"{' and '.join(map(str, paths))}: expected refs(...).p and its instances.json")
        return refer(pickles[0], others[0], split)
    path = one(paths)
    found = []
    if path.suffix == ".jsonl":
        for i, (where, row) in enumerate(load_lines(path)):
            name, said = get(row, "img_path", where), get(row, "expression", where)
            box = box_of(row, where, corners=True)
            found.append(Example(f"{Path(name).stem}-{i}", name, {"expression": said.strip()}, box=box))
        return found
    for i, (where, row) in enumerate(rows(load_json(path), path)):
        name = get(row, "img_id", where)[:27]  # what follows COCO_train2014_ and 12 digits numbers the object
        fields = {"expression": texts(row, "sents", where)[0].strip()}
        found.append(Example(f"{name}-{i}", f"{name}.jpg", fields, box=box_of(row, where, corners=False)))
    return found


def box_of(row: Any, where: str, corners: bool, size: Any = None) -> Box:
    """`any_box_of` that has an area: without one no answer could be right."""
    box = any_box_of(row, where, corners, size)
    if not box.area:
        width, height = ((size or row)[name] for name in ("width", "height"))
        raise ValueError(f"{where}: the bbox {row['bbox']} covers nothing of an image of {width} x {height}")
    return box


def any_box_of(row: Any, where: str, corners: bool, size: Any = None) -> Box:
    """`bbox` in pixels, as two corners or as a corner with width and height."""
    x, y, a, b = numbers(row, "bbox", 4, where)
    width, height = (get(size or row, name, where, (int, float)) for name in ("width", "height"))
    try:
        return Box.from_pixels(x, y, a if corners else x + a, b if corners else y + b, width, height)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def refer(path: Path, instances: Path, split: str) -> list[Example]:
    data = load_json(instances)
    images = {get(row, "id", where, int): row for where, row in rows(data, instances, "images")}
    boxes = {get(row, "id", where, int): row for where, row in rows(data, instances, "annotations")}
    splits, found = set(), []
    for where, ref in rows(load_pickle(path), path):
        splits.add(get(ref, "split", where))
        if ref["split"] != split:
            continue
        image, annotation = (
            known.get(get(ref, name, where, int)) for name, known in (("image_id", images), ("ann_id", boxes))
        )
        if image is None or annotation is None:
            number = f"image_id {ref['image_id']}" if image is None else f"ann_id {ref['ann_id']}"
            raise ValueError(f"{where}: {number} is not in {instances}")
        box = box_of(annotation, where, corners=False, size=image)
        for sentence in get(ref, "sentences", where, (list, tuple)):
            id, said = get(sentence, "sent_id", where, int), get(sentence, "sent", where)
            name = f"train2014/{get(image, 'file_name', where)}"  # the ref's own file_name ends in the object's number
            found.append(Example(str(id), name, {"expression": said.strip()}, box=box))
    if not found:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(sorted(splits)) or 'none'}")
    return found


# --- yes and no, letters


def pope(paths: Sequence[Path]) -> list[Example]:
    found = []
    for where, row in load_lines(one(paths)):
        id, label = get(row, "question_id", where, (int, str)), get(row, "label", where)
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label is {label!r:.40}, not yes or no")
        found.append(Example(str(id), get(row, "image", where), {"question": get(row, "text", where)}, (label,)))
    return found


def mmbench(paths: Sequence[Path]) -> list[Example]:
    """A row's picture is base64 text, or the index of the row that has it; options and answer may be left out."""
    path = one(paths)
    csv.field_size_limit(2**31 - 1)  # a picture is one field
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of tab-separated values: {error}") from None
    raw = {row.get("index"): row.get("image") or "" for row in table}
    decoded: dict[str, bytes] = {}
    found = []
    for i, row in enumerate(table, 1):
        where = f"{path}, record {i}"
        index, question, ability = (get(row, name, where) for name in ("index", "question", "l2-category"))
        key = get(row, "image", where)
        home = key if key in raw else index
        if home not in decoded:
            try:
                decoded[home] = base64.b64decode(raw[home], validate=True)
            except binascii.Error as error:
                raise ValueError(f"{where}: image is not base64: {error}") from None
        given = {
            name: "" if (row.get(name) or "nan") == "nan" else str(row[name]) for name in (*LETTERS, "hint", "answer")
        }
        options = {letter: given[letter] for letter in LETTERS if given[letter]}
        if given["answer"] and given["answer"] not in options:
            raise ValueError(f"{where}: answer {given['answer']!r} is none of the options {', '.join(options)}")
        lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        fields = {"question": question, "hint": given["hint"], "options": lines}
        target = list(options).index(given["answer"]) if given["answer"] else None
        found.append(
            Example(index, decoded[home], fields, tuple(options), tuple(options.values()), target, group=ability)
        )
    return found
