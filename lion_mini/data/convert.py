"""The official training sets (section 4, Table 7) as records, one a line, as data.py reads them.

    python -m lion_mini.data convert vqav2 --ann questions.json annotations.json --images coco --out vqa.jsonl
    python -m lion_mini.data convert vqav2 --as vqg ...     the same questions turned round: one question per answer
    python -m lion_mini.data convert vg --as reg --ann region_descriptions.json image_data.json --images vg --out reg
    python -m lion_mini.data inspect reg.jsonl --images vg

    llava                   llava_instruct_150k.json, every turn of every conversation
    vqav2, okvqa, aokvqa    official files or LAVIS' lists      --as vqa (default) or vqg
    ocrvqa                  dataset.json, the training split    --as vqa or vqg
    coco, textcaps          captions_train2014.json, TextCaps_0.1_train.json
    vg, refcoco             regions, or Shikra's lines; refs(...).p with instances.json     --as rec (default) or reg
    release                 the release's own image_level_data.json and region_level_data.json

Instructions are drawn from the paper's (`--templates FILE` for your own), by `--seed` and the record's number alone.
next: stages.py
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..annotations import get, load_json, load_lines, rows, whole
from ..box import Box
from ..evaluation.readers import any_box_of, aokvqa, captions, refcoco, vqa
from ..images import ImageFolder, draw_boxes, open_image
from ..text.prompts import TASK_OF, TEMPLATES, load_templates, render
from .records import BRACKETED, Records, check

Raw = tuple[str, dict[str, str | Box], str]  # picture, what fills the template, answer
TABLE_7 = {  # sizes that add up to Table 7's: VQG 470K without OCR-VQA, VQA 1.3M with it, captions 524K
    ("vqav2", "vqa"): 443_757, ("okvqa", "vqa"): 9_009, ("aokvqa", "vqa"): 17_056, ("ocrvqa", "vqa"): 801_579,
    ("vqav2", "vqg"): 443_757, ("okvqa", "vqg"): 9_009, ("aokvqa", "vqg"): 17_056,
    ("coco", "caption"): 414_113, ("textcaps", "caption"): 109_765, ("llava", "dialogue"): 361_000,
    ("vg", "rec"): 3_600_000, ("vg", "reg"): 3_600_000,
}  # fmt: skip
ROUNDED = ("llava", "vg")  # the table gives these to three digits only
KINDS = {
    "llava": ("dialogue",), "vqav2": ("vqa", "vqg"), "okvqa": ("vqa", "vqg"), "aokvqa": ("vqa", "vqg"),
    "ocrvqa": ("vqa", "vqg"), "coco": ("caption",), "textcaps": ("caption",), "vg": ("rec", "reg"),
    "refcoco": ("rec", "reg"), "release": ("as it is",),
}  # fmt: skip


def records(name: str, kind: str, paths: Sequence[Path], templates: dict[str, tuple[str, ...]], seed: int) -> Iterator:
    """The data set's records in its order, the instruction filled in; no question where what fills it is empty."""
    if name == "release":
        for path in paths:
            yield from released(path)
        return
    rng = random.Random()
    for i, (image, fields, answer) in enumerate(raw(name, kind, paths)):
        rng.seed(seed * 1_000_003 + i)
        hole = any(isinstance(text, str) and not text.strip() for text in fields.values())
        question = "" if hole else render(rng.choice(templates[kind]), **fields)
        yield {"image": image, "question": question, "answer": answer, "category": f"{TASK_OF[kind]}_level"}


def raw(name: str, kind: str, paths: Sequence[Path]) -> Iterator[Raw]:
    if kind in ("vqa", "vqg"):
        for image, question, answer in asked(name, paths):
            yield (image, {"question": question}, answer) if kind == "vqa" else (image, {"answer": answer}, question)
    elif kind in ("rec", "reg"):
        for image, expression, box in regions(paths) if name == "vg" else referred(paths):
            if kind == "rec":
                yield image, {"expression": expression}, f"Answer: {box.to_text()}"
            else:
                yield image, {"box": box}, expression
    elif name == "llava":
        yield from turns(paths)
    elif name == "coco":
        for example in captions(paths, "train"):
            folder = "" if "/" in str(example.image) else "train2014/"
            for said in example.references:
                yield folder + str(example.image), {}, said.strip()
    else:
        for path in paths:
            for where, row in rows(load_json(path), path, "data"):
                yield f"train_images/{get(row, 'image_id', where)}.jpg", {}, get(row, "caption_str", where).strip()


def asked(name: str, paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """(picture, question, the annotators' most frequent answer); of equally frequent ones the first."""
    if name == "ocrvqa":
        for path in paths:
            data = load_json(path)
            if not isinstance(data, dict):
                raise ValueError(f"{path}: expected an object of books, found {data!r:.40}")
            for id, row in data.items():
                where = f"{path}, {id}"
                if get(row, "split", where, int) == 1:  # 2 and 3 are for validation and test
                    image = f"images/{id}{Path(get(row, 'imageURL', where)).suffix}"
                    questions, answers = (get(row, field, where, list) for field in ("questions", "answers"))
                    if len(questions) != len(answers):
                        raise ValueError(f"{where}: {len(questions)} questions and {len(answers)} answers")
                    yield from ((image, str(q), str(a)) for q, a in zip(questions, answers, strict=True))
        return
    for example in aokvqa(paths) if name == "aokvqa" else vqa(paths):
        answer = max(example.references, key=example.references.count, default="")
        yield str(example.image), example.fields["question"], answer


def turns(paths: Sequence[Path]) -> Iterator[Raw]:
    """Each turn alone: what was said before it is dropped, and so is the picture's mark."""
    for path in paths:
        for where, row in rows(load_json(path), path):
            said = get(row, "conversations", where, list)
            unanswered = {"from": "gpt", "value": ""}
            for i, (person, model) in enumerate(zip_longest(said[::2], said[1::2], fillvalue=unanswered)):
                here = f"{where}, turn {i + 1}"
                if (get(person, "from", here), get(model, "from", here)) != ("human", "gpt"):
                    raise ValueError(f"{here}: expected human and gpt, found {person['from']} and {model['from']}")
                question = get(person, "value", here).replace("<image>", "").strip()
                yield get(row, "image", here), {"question": question}, get(model, "value", here).strip()


def regions(paths: Sequence[Path]) -> Iterator[tuple[str, str, Box]]:
    """Visual Genome's regions, clamped to the picture, or Shikra's lines of them; empty ones are dropped."""
    if len(paths) == 1 and paths[0].suffix == ".jsonl":
        for where, row in load_lines(paths[0]):
            box, phrase = any_box_of(row, where, corners=True), get(row, "expression", where).strip()
            if phrase and written(box):
                yield get(row, "img_path", where).removeprefix("images/").removeprefix("images2/"), phrase, box
        return
    data = {path: load_json(path) for path in paths}
    parts = {}
    for path, listed in data.items():
        first = listed[0] if isinstance(listed, list) and listed else {}
        parts["regions" if isinstance(first, dict) and "regions" in first else "pictures"] = path
    if len(paths) != 2 or len(parts) != 2:
        raise ValueError(f"{' and '.join(map(str, paths))}: expected region_descriptions.json and image_data.json")
    pictures = {}
    for where, row in rows(data[parts["pictures"]], parts["pictures"]):
        name = "/".join(get(row, "url", where).split("/")[-2:])  # VG_100K or VG_100K_2 stands only there
        pictures[whole(row, "image_id", where)] = name, {side: whole(row, side, where) for side in ("width", "height")}
    for where, row in rows(data[parts["regions"]], parts["regions"]):
        for i, region in enumerate(get(row, "regions", where, list), 1):
            here = f"{where}, region {i}"
            named = isinstance(region, dict) and "image_id" in region  # not in Visual Genome's first version
            number = whole(region, "image_id", here) if named else whole(row, "id", where)
            if number not in pictures:
                raise ValueError(f"{here}: the image {number} is not in {parts['pictures']}")
            name, size = pictures[number]
            bbox = [get(region, key, here, (int, float)) for key in ("x", "y", "width", "height")]
            box = any_box_of({"bbox": bbox}, here, corners=False, size=size)
            phrase = get(region, "phrase", here).strip()
            if phrase and written(box):
                yield name, phrase, box


def written(box: Box) -> bool:
    """Whether the box is still one when it is written with three decimals."""
    parsed = Box.parse(box.to_text())
    return parsed is not None and parsed.area > 0


def referred(paths: Sequence[Path]) -> Iterator[tuple[str, str, Box]]:
    for example in refcoco(paths, "train"):
        assert example.box is not None
        if written(example.box):
            yield str(example.image), example.fields["expression"], example.box


def released(path: Path) -> Iterator[dict[str, Any]]:
    source = Records(path, Path(), ("image", "region"))
    for i in range(len(source)):
        try:
            fields = check(source.raw(i))
        except ValueError as error:
            raise ValueError(f"{path}, record {i + 1}: {error}") from None
        tags = {} if fields["tags"] is None else {"tags": fields["tags"]}
        plain = {name: fields[name] for name in ("image", "question", "answer")}
        yield {**plain, "category": f"{fields['task']}_level", **tags}


def convert(args: argparse.Namespace) -> str:
    kind = args.kind or KINDS[args.name][0]
    if kind not in KINDS[args.name]:
        raise ValueError(f"{args.name} has no --as {kind}, only {', '.join(KINDS[args.name])}")
    templates = TEMPLATES if args.templates is None else load_templates(args.templates)
    images, kept, skipped, partial = ImageFolder(args.images), 0, 0, 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = args.out.with_name(args.out.name + ".new")
    try:
        with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair
            for record in records(args.name, kind, args.ann, templates, args.seed):
                if args.name != "release" and not (record["question"].strip() and record["answer"].strip()):
                    partial += 1
                elif images.without_missing([record["image"]], args.skip_missing)[0]:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    kept += 1
                else:
                    skipped += 1
        if not kept:
            raise ValueError(f"{' and '.join(map(str, args.ann))}: there is no record in it")
        new.replace(args.out)
    finally:
        new.unlink(missing_ok=True)
    lines = [f"{args.out}: {kept:,} records of {args.name} as {kind}, {len(images.found):,} pictures"]
    if skipped:
        lines.append(f"{skipped:,} records without a picture left out")
    if partial:
        lines.append(f"{partial:,} records without a question or without an answer left out")
    expected = TABLE_7.get((args.name, kind))
    if expected is not None:
        about = "about " if args.name in ROUNDED else ""
        lines.append(f"Table 7 counts {about}{expected:,}: {kept + skipped + partial - expected:+,}")
    return "\n".join(lines)


def inspect(args: argparse.Namespace) -> str:
    """What a file of records holds, what is wrong in it, and three of its records as a picture."""
    source = Records(args.file, args.images, ("image", "region"))
    counts, wrong, missing = Counter[str](), list[str](), 0
    longest: list[tuple[int, int, str]] = []
    drawable: list[tuple[int, Path, dict[str, Any]]] = []
    step = max(1, len(source) // 3)
    for i in range(len(source)):
        try:
            fields = check(source.raw(i))
        except ValueError as error:
            wrong.append(f"record {i + 1}: {error}")
            continue
        counts[f"{fields['task']}_level, {'with' if fields['tags'] is not None else 'without'} tags"] += 1
        path = source.images.path(fields["image"])
        missing += path is None
        if path is not None and len(drawable) < 3 and i >= step * len(drawable):
            drawable.append((i + 1, path, fields))
        longest = sorted([*longest, (len(fields["question"].split()), i + 1, fields["question"])], reverse=True)[:3]
    lines = [f"{args.file}: {len(source):,} records"]
    lines += [f"  {count:,} {what}" for what, count in sorted(counts.items())]
    lines += [f"  {missing:,} whose picture is not below {args.images}"]
    boxes = sum("no box of fractions" in text for text in wrong)
    lines += [f"  {len(wrong):,} that cannot be used, {boxes:,} of them for a box out of range"]
    lines += [f"    {text}" for text in wrong[:3]]
    lines += [f"  {words} words in the question of record {i}: {question:.70}" for words, i, question in longest]
    if drawable:
        sheet = Image.new("RGB", (1080, 360), "white")
        for i, (number, path, fields) in enumerate(drawable):
            found = [Box.parse(text) for text in BRACKETED.findall(f"{fields['question']} {fields['answer']}")]
            try:
                picture = draw_boxes(open_image(path), [(box, "") for box in found if box])
                picture.thumbnail((352, 290))
                sheet.paste(picture, (i * 360 + 4, 4))
            except ValueError as error:
                lines.append(f"  record {number}: {error}")
            ImageDraw.Draw(sheet).text(
                (i * 360 + 4, 300), f"{fields['question']:.55}\n{fields['answer']:.55}", fill="black"
            )
        sheet.save(args.picture)
        lines.append(f"  three of them are drawn in {args.picture}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("convert", help="official files to records")
    make.add_argument("name", choices=KINDS)
    make.add_argument("--as", dest="kind", help="vqa or vqg, rec or reg")
    make.add_argument("--ann", type=Path, nargs="+", required=True)
    make.add_argument("--images", type=Path, required=True, help="the pictures' folder")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--templates", type=Path, help="a JSON file of instructions in place of the paper's")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--skip-missing", action="store_true", help="leave out records without a picture")
    look = commands.add_parser("inspect", help="what a file of records holds")
    look.add_argument("file", type=Path)
    look.add_argument("--images", type=Path, default=Path(), help="the pictures' folder")
    look.add_argument("--picture", type=Path, default=Path("inspect.png"), help="three samples, drawn")
    args = parser.parse_args(argv)
    try:
        print(convert(args) if args.command == "convert" else inspect(args))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0
