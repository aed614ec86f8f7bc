"""The official training sets (section 4, Table 7) as records, one per line, as records.py reads them.

    python -m lion_mini.data convert vqav2 --ann questions.json annotations.json --images coco --out vqa.jsonl
    python -m lion_mini.data convert vqav2 --as vqg ...     question generation: one question per answer
    python -m lion_mini.data convert vg --as reg --ann region_descriptions.json image_data.json --images vg --out reg
    python -m lion_mini.data inspect reg.jsonl --images vg

    llava                   llava_instruct_150k.json, every turn of every conversation
    vqav2, okvqa, aokvqa    official files or LAVIS' lists      --as vqa (default) or vqg
    ocrvqa                  dataset.json, the training split    --as vqa or vqg
    coco, textcaps          captions_train2014.json, TextCaps_0.1_train.json
    vg, refcoco             regions, or Shikra's lines; refs(...).p with instances.json     --as rec (default) or reg
    release                 the release's own image_level_data.json and region_level_data.json

Instructions are drawn from the paper's templates (or those of `--templates FILE`) by `--seed` and the record's number.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..box import Box
from ..evaluation.readers import Example, any_box_of, aokvqa, captions, refcoco, vqa
from ..files import atomic_write, json_lines, need, printable, read_json, reading, run
from ..images import ImageFolder, draw_boxes, open_image
from ..text.prompts import TASK_OF, TEMPLATES, load_templates, render
from .records import BRACKETED, TASKS, Records, check

Sample = tuple[str, str, Any]  # picture; question, expression or (for captions) nothing; answer or Box


def records(name: str, kind: str, paths: Sequence[Path], templates: dict[str, tuple[str, ...]], seed: int) -> Iterator:
    """The records of a data set in its order. `question` is empty if the text that its template needs is empty."""
    if name == "release":
        for path in paths:
            yield from released(path)
        return
    for i, (image, given, answer) in enumerate(filter(is_writable, DATA_SETS[name][0](paths))):
        if kind in ("vqg", "reg"):
            given, answer = answer, given
        template = random.Random(seed * 1_000_003 + i).choice(templates[kind])
        empty = isinstance(given, str) and not given.strip() and kind != "caption"
        question = "" if empty else render(template, question=given, answer=given, expression=given, box=given)
        answer = f"Answer: {answer.to_text()}" if isinstance(answer, Box) else answer
        yield {"image": image, "question": question, "answer": answer, "category": f"{TASK_OF[kind]}_level"}


def is_writable(sample: Sample) -> bool:
    """Whether the sample has no box, or one that keeps an area when it is written with three decimals."""
    rounded = Box.parse(sample[2].to_text()) if isinstance(sample[2], Box) else None
    return not isinstance(sample[2], Box) or (rounded is not None and rounded.area > 0)


def rows(paths: Sequence[Path], name: str = "") -> Iterator[tuple[str, Any]]:
    """The rows of JSON lists, or of the lists under this name, each with its place."""
    for path in paths:
        data = read_json(path, dict if name else list)
        with reading(path):
            listed = need(data[name], list, name) if name else data
        for number, row in enumerate(listed, 1):
            yield f"{path}, record {number}", row


def questions(examples: Iterable[Example]) -> Iterator[Sample]:
    """The annotators' most frequent answer; of equally frequent ones the first."""
    for example in examples:
        answer = max(example.references, key=example.references.count, default="")
        yield str(example.image), example.fields["question"], answer


def ocrvqa(paths: Sequence[Path]) -> Iterator[Sample]:
    for path in paths:
        for id, book in read_json(path).items():
            with reading(f"{path}, {id}"):
                if need(book["split"], int, "split") == 1:  # 2 and 3 are for validation and test
                    asked, answers = (need(book[field], list, field) for field in ("questions", "answers"))
                    if len(asked) != len(answers):
                        raise ValueError(f"{len(asked)} questions and {len(answers)} answers")
                    image = f"images/{id}{Path(book['imageURL']).suffix}"
                    yield from ((image, str(q), str(a)) for q, a in zip(asked, answers, strict=True))


def llava(paths: Sequence[Path]) -> Iterator[Sample]:
    """Each turn alone, without the turns before it and without `<image>`."""
    for where, row in rows(paths):
        with reading(where):
            said, unanswered = need(row["conversations"], list), {"from": "gpt", "value": ""}
            for number, (human, gpt) in enumerate(zip_longest(said[::2], said[1::2], fillvalue=unanswered), 1):
                with reading(f"{where}, turn {number}"):
                    if (human["from"], gpt["from"]) != ("human", "gpt"):
                        raise ValueError(f"expected human and gpt, found {human['from']} and {gpt['from']}")
                    question = human["value"].replace("<image>", "").strip()
                    yield need(row["image"], str, "image"), question, gpt["value"].strip()


def coco(paths: Sequence[Path]) -> Iterator[Sample]:
    for example in captions(paths, "train"):
        image = str(example.image)
        for caption in example.references:
            yield image if "/" in image else f"train2014/{image}", "", caption.strip()


def textcaps(paths: Sequence[Path]) -> Iterator[Sample]:
    for where, row in rows(paths, "data"):
        with reading(where):
            yield f"train_images/{need(row['image_id'], str, 'image_id')}.jpg", "", row["caption_str"].strip()


def regions(paths: Sequence[Path]) -> Iterator[Sample]:
    """Visual Genome's regions with a phrase, clamped to the picture, or Shikra's lines of them."""
    shikra = len(paths) == 1 and paths[0].suffix == ".jsonl"
    for where, row in json_lines(paths[0]) if shikra else official_regions(paths):
        with reading(where):
            if phrase := row["expression"].strip():
                image = row["img_path"].removeprefix("images/").removeprefix("images2/")
                yield image, phrase, any_box_of(row, where, corners=shikra)


def official_regions(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Each region with its place, its fields named as in Shikra's lines; `bbox` is x, y, width and height."""
    pictures, described = dict[int, dict[str, Any]](), list[tuple[str, Any]]()
    for where, row in rows(paths):
        with reading(where):
            if "regions" in row:
                described.append((where, row))
            else:  # only the URL tells VG_100K from VG_100K_2
                size = {side: int(need(row[side], (int, str), side)) for side in ("width", "height")}
                pictures[int(row["image_id"])] = {"img_path": "/".join(row["url"].split("/")[-2:]), **size}
    if not pictures or not described:
        raise ValueError(f"{' and '.join(map(str, paths))}: expected region_descriptions.json and image_data.json")
    for where, row in described:
        with reading(where):
            for number, region in enumerate(need(row["regions"], list), 1):
                with reading(place := f"{where}, region {number}"):
                    id = int(region["image_id"] if "image_id" in region else row["id"])  # version 1.0
                    if id not in pictures:
                        raise ValueError(f"image_data.json has no image {id}")
                    bbox = [region[key] for key in ("x", "y", "width", "height")]
                    yield place, pictures[id] | {"bbox": bbox, "expression": region["phrase"]}


def expressions(paths: Sequence[Path]) -> Iterator[Sample]:
    yield from ((str(each.image), each.fields["expression"], each.box) for each in refcoco(paths, "train"))


def released(path: Path) -> Iterator[dict[str, Any]]:
    source = Records(path, Path(), TASKS)
    for i in range(len(source)):
        with reading(source.name(i)):
            fields = check(source.raw(i))
            task, tags = fields.pop("task"), fields.pop("tags")
            yield fields | {"category": f"{task}_level"} | ({} if tags is None else {"tags": tags})


DATA_SETS: dict[str, tuple[Callable, dict[str, int]]] = {  # the reader; kinds of record, and their number in Table 7
    "llava": (llava, {"dialogue": 361_000}),
    "vqav2": (lambda paths: questions(vqa(paths)), {"vqa": 443_757, "vqg": 443_757}),
    "okvqa": (lambda paths: questions(vqa(paths)), {"vqa": 9_009, "vqg": 9_009}),
    "aokvqa": (lambda paths: questions(aokvqa(paths)), {"vqa": 17_056, "vqg": 17_056}),
    "ocrvqa": (ocrvqa, {"vqa": 801_579, "vqg": 0}),  # the table's 470K of VQG are without it, its 1.3M of VQA with it
    "coco": (coco, {"caption": 414_113}),
    "textcaps": (textcaps, {"caption": 109_765}),
    "vg": (regions, {"rec": 3_600_000, "reg": 3_600_000}),
    "refcoco": (expressions, {"rec": 0, "reg": 0}),
    "release": (released, {"as it is": 0}),
}
KINDS = {name: tuple(counts) for name, (_, counts) in DATA_SETS.items()}


def convert(args: argparse.Namespace) -> None:
    kind = args.kind or KINDS[args.name][0]
    if kind not in KINDS[args.name]:
        raise ValueError(f"{args.name} has no --as {kind}, only {', '.join(KINDS[args.name])}")
    templates = TEMPLATES if args.templates is None else load_templates(args.templates)
    images, kept, skipped, partial = ImageFolder(args.images), 0, 0, 0
    with atomic_write(args.out) as new:
        with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:  # escapes half a surrogate pair
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
    print(f"{args.out}: {kept:,} records of {args.name} as {kind}, {len(images.found):,} pictures")
    for count, lack in ((skipped, "a picture"), (partial, "a question or without an answer")):
        if count:
            print(f"{count:,} records without {lack} left out")
    if expected := DATA_SETS[args.name][1][kind]:
        about = "about " * (expected % 1000 == 0)  # the table rounds to thousands
        print(f"Table 7 counts {about}{expected:,}: {kept + skipped + partial - expected:+,}")


def inspect(args: argparse.Namespace) -> None:
    """Print what a file of records holds and what is wrong in it, and draw three of its records."""
    source = Records(args.file, args.images, TASKS)
    counts, wrong, missing = Counter[str](), list[str](), 0
    longest, drawable = list[tuple[int, int, str]](), list[tuple[int, Path, dict[str, Any]]]()
    for number in range(1, len(source) + 1):
        try:
            with reading(f"record {number}"):
                fields = check(source.raw(number - 1))
        except ValueError as error:
            wrong.append(str(error))
            continue
        counts[f"{fields['task']}_level, {'with' if fields['tags'] is not None else 'without'} tags"] += 1
        path = source.images.path(fields["image"])
        missing += path is None
        if path is not None and len(drawable) < 3 and number > max(1, len(source) // 3) * len(drawable):
            drawable.append((number, path, fields))
        longest.append((len(fields["question"].split()), number, printable(fields["question"])))
        longest = sorted(longest, reverse=True)[:3]
    print(f"{args.file}: {len(source):,} records")
    for name, count in sorted(counts.items()):
        print(f"  {count:,} {name}")
    print(f"  {missing:,} whose picture is not below {args.images}")
    boxes = sum("no box of fractions" in text for text in wrong)
    print(f"  {len(wrong):,} that cannot be used, {boxes:,} of them for a box out of range")
    print("".join(f"    {text}\n" for text in wrong[:3]), end="")
    for words, number, question in longest:
        print(f"  {words} words in the question of record {number}: {question:.70}")
    if drawable:
        draw(drawable).save(args.picture)
        print(f"  three of them are drawn in {args.picture}")


def draw(samples: Iterable[tuple[int, Path, dict[str, Any]]]) -> Image.Image:
    """Records side by side: the picture with its boxes, question and answer. A damaged picture is named."""
    sheet = Image.new("RGB", (1080, 360), "white")
    for column, (number, path, fields) in enumerate(samples):
        boxes = [Box.parse(text) for text in BRACKETED.findall(f"{fields['question']} {fields['answer']}")]
        try:
            picture = draw_boxes(open_image(path), [(box, "") for box in boxes if box])
            picture.thumbnail((352, 290))
            sheet.paste(picture, (column * 360 + 4, 4))
        except ValueError as error:
            print(f"  record {number}: {error}")
        text = "\n".join(f"{printable(fields[name]):.55}" for name in ("question", "answer"))
        ImageDraw.Draw(sheet).text((column * 360 + 4, 300), text, fill="black")
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("convert", help="official files to records")
    make.set_defaults(command=convert)
    make.add_argument("name", choices=KINDS)
    make.add_argument("--as", dest="kind", help="vqa or vqg, rec or reg")
    make.add_argument("--ann", type=Path, nargs="+", required=True)
    make.add_argument("--images", type=Path, required=True, help="the pictures' folder")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--templates", type=Path, help="a JSON file of instructions in place of the paper's")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--skip-missing", action="store_true", help="leave out records without a picture")
    look = commands.add_parser("inspect", help="what a file of records holds")
    look.set_defaults(command=inspect)
    look.add_argument("file", type=Path)
    look.add_argument("--images", type=Path, default=Path(), help="the pictures' folder")
    look.add_argument("--picture", type=Path, default=Path("inspect.png"), help="three samples, drawn")
    args = parser.parse_args(argv)
    return run(args.command, args)
