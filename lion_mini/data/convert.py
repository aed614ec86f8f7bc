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

Instructions are drawn by `--seed` and the record's number: from Table 9's templates (or those of `--templates FILES`),
and from what the model will be asked in evaluation.
"""

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm, trange

from ..box import Box
from ..evaluation.readers import Example, any_box_of, aokvqa, captions, choose, refcoco, rows, textcaps, texts, vqa
from ..files import atomic_write, json_lines, printable, read_json, reading, run
from ..images import ImageFolder, draw_boxes, draw_sheet, open_image
from ..text.prompts import TASK_OF, load_templates, pool, render
from .records import BRACKETED, Records, TrainingExample


def make_records(name: str, kind: str, paths: Sequence[Path], templates: Mapping[str, Any], seed: int) -> Iterator:
    """The records of a data set in its order. What the files do not have is empty: question, answer or box."""
    if name == "release":
        yield from released(paths)
        return
    for i, (image, given, answer) in enumerate(samples(DATA_SETS[name][0](paths), kind)):
        if kind in ("vqg", "reg"):
            given, answer = answer, given
        template = random.Random(seed * 1_000_003 + i).choice(templates[kind])
        empty = isinstance(given, str) and not given.strip() and kind != "caption"
        question = "" if empty else render(template, question=given, answer=given, expression=given, box=given)
        answer = f"Answer: {answer.to_text()}" if isinstance(answer, Box) else answer
        yield {"image": image, "question": question, "answer": answer, "category": f"{TASK_OF[kind]}_level"}


def samples(examples: Iterable[Example], kind: str) -> Iterator[tuple[str, str, Any]]:
    """Picture; question, expression or (for captions) nothing; answer or Box. Of several answers the most frequent."""
    for example in examples:
        image, fields, answers = str(example.image), example.fields, example.references
        if kind == "caption":
            yield from ((image, "", caption.strip()) for caption in answers or ("",))
        elif "question" in fields:
            yield image, fields["question"], max(answers, key=answers.count, default="")
        else:
            box = example.box and Box(*(round(edge, 3) for edge in astuple(example.box)))  # as records write it
            yield image, fields["expression"], box if box and box.area else ""


def llava(paths: Sequence[Path]) -> Iterator[Example]:
    """Each turn alone, without the turns before it and without `<image>`. A turn that is missing is empty."""
    for path in paths:
        for where, row in json_lines(path):
            with reading(where):
                turns = [*(row["conversations"] or [{"from": "human", "value": ""}]), {"from": "gpt", "value": ""}]
                for human, gpt in zip(turns[::2], turns[1::2], strict=False):
                    if (human["from"], gpt["from"]) != ("human", "gpt"):
                        raise ValueError(f"expected human and gpt, found {human['from']} and {gpt['from']}")
                    fields = {"question": human["value"].replace("<image>", "").strip()}
                    yield Example(where, row["image"], fields, (gpt["value"].strip(),))


def ocrvqa(paths: Sequence[Path]) -> Iterator[Example]:
    for path in paths:
        for id, book in read_json(path).items():
            with reading(where := f"{path}, {id}"):
                if choose(book["split"], (1, 2, 3), "split") == 1:  # 2 and 3 are for validation and test
                    image = f"images/{id}{Path(book['imageURL']).suffix}"
                    for question, answer in zip(*(texts(book[n], n) for n in ("questions", "answers")), strict=True):
                        yield Example(where, image, {"question": question}, (answer,))


def regions(paths: Sequence[Path]) -> Iterator[Example]:
    """Visual Genome's regions, clamped to the picture, or Shikra's lines of them; no box if nothing is left of it."""
    shikra = len(paths) == 1 and paths[0].suffix == ".jsonl"
    for where, row in json_lines(paths[0]) if shikra else official_regions(paths):
        with reading(where):
            phrase, box = row["expression"].strip(), any_box_of(row, where, corners=shikra)
            yield Example(where, row["img_path"], {"expression": phrase}, box=box if box.area else None)


def official_regions(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Each region with its place, its fields named as in Shikra's lines; `bbox` is x, y, width and height."""
    listed = [each for path in paths for each in json_lines(path)]
    image_id = lambda row: str(row["image_id" if "image_id" in row else "id"])  # "id" is version 1.0's
    with reading(" and ".join(map(str, paths))):
        pictures = {image_id(row): row for _, row in listed if "url" in row}
    for where, row in listed:
        for place, region in () if "url" in row else rows(where, row, "regions"):
            with reading(place):
                id = image_id(region if "image_id" in region else row)
                if id not in pictures:
                    raise ValueError(f"image {id} is not in image_data.json, which --ann must name too")
                image = "/".join(pictures[id]["url"].split("/")[-2:])  # only the URL tells VG_100K from VG_100K_2
                bbox = [region[edge] for edge in ("x", "y", "width", "height")]
                yield place, pictures[id] | {"img_path": image, "bbox": bbox, "expression": region["phrase"]}


def released(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for source in (Records(path, Path()) for path in paths):
        for fields in map(source.fields, range(len(source))):
            names = [name for name in ("image", "question", "answer", "tags") if fields[name] is not None]
            yield {name: fields[name] for name in names} | {"category": f"{fields['task']}_level"}


DATA_SETS: dict[str, tuple[Callable, dict[str, int]]] = {  # the reader; kinds of record, and their number in Table 7
    "llava": (llava, {"dialogue": 361_000}),
    "vqav2": (vqa, {"vqa": 443_757, "vqg": 443_757}),
    "okvqa": (vqa, {"vqa": 9_009, "vqg": 9_009}),
    "aokvqa": (aokvqa, {"vqa": 17_056, "vqg": 17_056}),
    "ocrvqa": (ocrvqa, {"vqa": 801_579, "vqg": 0}),  # the table's 470K of VQG are without it, its 1.3M of VQA with it
    "coco": (partial(captions, split="train"), {"caption": 414_113}),
    "textcaps": (textcaps, {"caption": 109_765}),
    "vg": (regions, {"rec": 3_600_000, "reg": 3_600_000}),
    "refcoco": (partial(refcoco, split="train"), {"rec": 0, "reg": 0}),
    "release": (released, {"as it is": 0}),
}
TASKS_OF_SET = {name: tuple(counts) for name, (_, counts) in DATA_SETS.items()}


def convert(args: argparse.Namespace) -> None:
    kind = TASKS_OF_SET[args.name][0] if args.kind is None else args.kind
    if kind not in TASKS_OF_SET[args.name]:
        raise ValueError(f"{args.name} has no --as {kind}, only {', '.join(TASKS_OF_SET[args.name])}")
    reads = map(Path.resolve, (*args.ann, *args.templates))
    if args.out.resolve() in reads or (args.out.exists() and not args.out.is_file()):
        raise ValueError(f"--out {args.out} is a folder, a device or a file that is read: choose another one")
    templates = pool(load_templates(*args.templates))
    empty = "a phrase, or a box inside the picture" if kind in ("rec", "reg") else "a question or an answer"
    images, written, lacks = ImageFolder(*args.images, prefer=args.name), Counter[Path](), Counter[str]()
    find = cache(images.path)
    with atomic_write(args.out) as new, open(new, "wb") as file:
        for record in make_records(args.name, kind, args.ann, templates, args.seed):
            path = find(record["image"])
            if args.name != "release" and not (record["question"].strip() and record["answer"].strip()):
                lacks[empty] += 1
            elif path is None:
                lacks["a picture"] += 1
                images.without_missing([record["image"]], args.skip_missing)
            else:
                written[path] += 1
                file.write(as_line(record | {"image": images.relative(path)}) + b"\n")
        left_out = [f"{count:,} records without {lack} left out" for lack, count in lacks.items()]
        if not written:
            raise ValueError("; ".join((f"{' and '.join(map(str, args.ann))}: no record can be written", *left_out)))
    summary = f"{args.out}: {written.total():,} records of {args.name} as {kind}, {len(written):,} pictures"
    print(summary, *left_out, sep="\n")
    if expected := DATA_SETS[args.name][1][kind]:
        about = "about " * (expected % 1000 == 0)  # the table rounds to thousands
        print(f"Table 7 counts {about}{expected:,}: {written.total() + lacks.total() - expected:+,}")


def inspect(args: argparse.Namespace) -> None:
    """Print what a file of records holds and what is wrong in it, and draw up to three of its records."""
    source, counts, missing = Records(args.file, args.images), Counter[str](), 0
    wrong, longest, drawn = list[str](), list[tuple[int, int, str]](), list[TrainingExample]()
    for number in range(1, len(source) + 1):
        try:
            fields = source.fields(number - 1)
            there = os.path.isfile(source.picture(fields))
            if there and len(drawn) < 3 and number > len(source) // 3 * len(drawn):
                drawn.append(source.read(number - 1, random.Random()))
        except ValueError as error:
            wrong.append(str(error))
            continue
        missing += not there
        counts[f"{fields['task']}_level, {'with' if fields['tags'] is not None else 'without'} tags"] += 1
        words = len(fields["question"].split())
        longest = sorted([*longest, (words, number, printable(fields["question"]))], reverse=True)[:3]
    boxes = sum("no box of fractions" in text for text in wrong)
    print(
        f"{args.file}: {len(source):,} records",
        *(f"  {count:,} {name}" for name, count in sorted(counts.items())),
        f"  {missing:,} whose picture is not below {' or '.join(map(str, args.images))}",
        f"  {len(wrong):,} that cannot be used, {boxes:,} of them for a box out of range",
        *(f"    {text}" for text in wrong[:3]),
        *(f"  {words} words in the question of record {number}: {question:.70}" for words, number, question in longest),
        sep="\n",
    )
    if drawn:
        with reading(args.picture):
            draw_sheet([draw_record(example) for example in drawn]).save(args.picture)
        print(f"  {len(drawn)} of them are drawn in {args.picture}")


def draw_record(example: TrainingExample) -> tuple[Image.Image, str]:
    """The picture with the record's boxes, and its question and answer."""
    boxes = [Box.parse(text) for text in BRACKETED.findall(f"{example.question} {example.answer}")]
    picture = draw_boxes(example.image, [(box, "") for box in boxes if box])
    return picture, f"{printable(example.question)}\n{printable(example.answer)}"


def tag_records(source: Records, out: Path, batch_size: int, tagger: Callable[[list], list]) -> int:
    """Write the records to `out`, after the first ones if they are there, and tag the pictures of those without tags.

    A record that cannot be used is named on stderr and copied. `tagger` maps pictures to lists of tags, and is called
    only if some are missing. Returns how many records have no tags.
    """
    done, tags = resume(source, out), dict[Path, list[str]]()
    with open(out, "ab") as file:
        for start in trange(done, len(source), batch_size, unit_scale=batch_size, disable=None):
            batch = range(start, min(start + batch_size, len(source)))
            paths, new = dict[int, Path](), dict[Path, Image.Image]()  # per untagged record; the pictures to be tagged
            for i in batch:
                try:
                    fields = source.fields(i)
                    if fields["tags"] is None:
                        paths[i] = path = source.picture(fields)
                        with reading(fields["name"]):
                            new |= {} if path in tags else {path: open_image(path)}
                except ValueError as error:
                    tqdm.write(str(error), file=sys.stderr)
            tags.update(zip(new, tagger(list(new.values())) if new else (), strict=True))
            for i in batch:
                file.write(copied(source.line(i), {"tags": tags[paths[i]]} if paths.get(i) in tags else {}) + b"\n")
            file.flush()
    with open(out, "rb") as file:
        return sum(not re.search(rb'"tags": [\["]', line) for line in file)  # quotes inside a text are escaped


def resume(source: Records, out: Path) -> int:
    """Count the records in `out`. A killed run's torn last line is cut off."""
    if (out.exists() and not out.is_file()) or out.resolve() == source.path.resolve():
        raise ValueError(f"--out {out} is a folder, a device or the file that --data reads: choose another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    *lines, torn = out.read_bytes().split(b"\n") if out.exists() else [b""]
    last = lines[-1] if lines else torn
    begun = copied(source.line(min(max(len(lines), 1), len(source)) - 1), {})[:-1]  # tags may follow
    if len(lines) > len(source) or not last.startswith(begun[: len(last)]):
        raise ValueError(f"--out {out} does not hold the first records of --data: choose another file")
    if torn:
        os.truncate(out, out.stat().st_size - len(torn))
    return len(lines)


def copied(line: bytes, more: dict[str, Any]) -> bytes:
    """The record as one line of JSON, with `more` fields behind its own. A line that is no record stays as it is."""
    with suppress(ValueError, RecursionError, AttributeError):
        record = {name: value for name, value in json.loads(line).items() if (name, value) != ("tags", None)}
        return as_line(record | more)
    return line.strip()


def as_line(record: dict[str, Any]) -> bytes:  # half a surrogate pair, which is no UTF-8, becomes an escape
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("convert", help="official files to records")
    make.set_defaults(command=convert)
    make.add_argument("name", choices=TASKS_OF_SET)
    make.add_argument("--as", dest="kind", help="vqa or vqg, rec or reg")
    make.add_argument("--ann", type=Path, nargs="+", required=True)
    make.add_argument("--images", type=Path, nargs="+", required=True, help="folders that have the pictures below them")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--templates", type=Path, nargs="+", default=[], help="instructions in place of Table 9's, JSON")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--skip-missing", action="store_true", help="leave out records without a picture")
    look = commands.add_parser("inspect", help="what a file of records holds")
    look.set_defaults(command=inspect)
    look.add_argument("file", type=Path)
    look.add_argument("--images", type=Path, nargs="+", default=[Path()], help="folders of the pictures")
    look.add_argument("--picture", type=Path, default=Path("inspect.png"), help="three samples, drawn")
    args = parser.parse_args(argv)
    return run(args.command, args)
