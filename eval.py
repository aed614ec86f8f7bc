"""Measure LION as the paper does: Tables 1, 2, 5 and 6, with the prompts of Table 8.

    python eval.py                                    the built-in tiny model on shapes nobody trained on
    python eval.py coco --weights weights/xl --ann coco_karpathy_test.json --images coco
    python eval.py refcoco_testA --weights weights/xl --ann "refs(unc).p" instances.json --images coco
    python eval.py okvqa --ann questions.json annotations.json --score results/okvqa.jsonl       without a model
    python eval.py table results                      all results of a folder as Markdown
    torchrun --nproc_per_node 4 eval.py visdial ...   the same predictions from four processes

    captions   flickr30k coco textcaps      boxes        refcoco_val _testA _testB, refcoco+_..., refcocog_val _test
    answers    okvqa aokvqa gqa             yes and no   pope_random pope_popular pope_adversarial
    ranked     iconqa vsr visdial           letters      mmbench

Predictions go to OUT/TASK.jsonl as they come, below a line that says how they were made; the same command goes on
where it stopped. Batches are fixed, so that a resumed run writes the file that an undisturbed one would have written.
Exit code 0: measured; 2: it could not be, in one sentence.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from lion_mini import GENERATION, Box, Lion, toy
from lion_mini.evaluation.benchmarks import OPEN, RANKED, kind_of, report, score, table
from lion_mini.evaluation.predictions import join, load, part
from lion_mini.evaluation.readers import SHIPPED, TASKS, Example, read
from lion_mini.images import ImageFolder, draw_boxes, lion_transform, open_image
from lion_mini.pipeline import DTYPES, TINY
from lion_mini.quantize import best_dtype, usable
from lion_mini.text.prompts import EVAL_TEMPLATES, TASK_OF, load_templates, render
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.toy.scores import toy_scores

PRESET_OF = {"caption": "caption", "rec": "locate", "reg": "describe"}  # for the others: answer


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.device == "cuda" and "LOCAL_RANK" in os.environ:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if args.dtype == "auto":  # what was chosen belongs to the results
            args.dtype = str(best_dtype(usable(args.device))).removeprefix("torch.")
        if args.task is None:
            return toy_main(args)
        if args.task == "table":
            print(table(Path(args.folder or args.out)))
            return 0
        return measure(args)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="a benchmark, or table; without one, the toy world")
    parser.add_argument("folder", nargs="?", help="of table: where the results are")
    parser.add_argument("--weights", type=Path, help="a folder that weights.py convert or train.py wrote")
    parser.add_argument("--ann", type=Path, nargs="+", default=[], help="the official annotation file or files")
    parser.add_argument("--images", type=Path, default=Path(), help="the pictures' folder")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of predictions and scores")
    parser.add_argument("--score", type=Path, metavar="FILE", help="only score this file of predictions")
    parser.add_argument("--official", action="store_true", help="write as the release: 5 beams, repetition penalty 1.5")
    parser.add_argument("--template", help="this instruction for all, with {question} or {expression}")
    parser.add_argument("--templates", type=Path, help="a JSON file of REC instructions to draw from, as the paper did")
    parser.add_argument("--seed", type=int, default=0, help="of that drawing")
    parser.add_argument("--rounds", choices=("all", "last"), default="all", help="VisDial: last is the common mistake")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--skip-missing", action="store_true", help="leave out examples without a picture")
    parser.add_argument("--no-tags", action="store_true", help="ask without RAM's tags")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--segment", type=int, default=32, help="candidates scored at a time; less memory, same scores")
    parser.add_argument("--sheet", type=int, default=12, help="REC: how many of the worst to draw")
    parser.add_argument("--scenes", type=int, default=200, help="the toy world's held-out scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 where it is fast")
    return parser.parse_args(argv)


# --- asking


def check(args: argparse.Namespace) -> None:
    if args.task not in TASKS:
        raise ValueError(f"the task {args.task!r} is unknown; there are {', '.join(TASKS)}, and table")
    if not args.ann:
        raise ValueError(f"{args.task} needs its official annotation file: name it with --ann")
    if args.weights is None and args.score is None:
        raise ValueError("no weights: name their folder with --weights, or a file of predictions with --score")
    for name in ("batch_size", "segment", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.sheet < 0:
        raise ValueError(f"--sheet must be at least 0, not {args.sheet}")
    kind = kind_of(args.task)
    place = {"caption": "", "rec": "{expression}"}.get(kind, "{question}")
    if args.template is not None:
        if place not in args.template or not args.template.strip():
            raise ValueError(f"--template {args.template!r} has no place for the {place or 'text'}")
        always = [line for line in args.template.split("\n") if "{history}" not in line and "{hint}" not in line]
        if place not in "\n".join(always):
            raise ValueError(
                f"--template: {place} needs a line of its own; one with {{history}} or {{hint}} may be left out"
            )
    if args.templates is not None and (kind != "rec" or args.template is not None):
        raise ValueError("--templates draws REC instructions; it goes with no other task, nor with --template")


def questions(args: argparse.Namespace, examples: Sequence[Example]) -> list[str]:
    kind = kind_of(args.task)
    if args.templates is None:
        template = args.template if args.template is not None else EVAL_TEMPLATES[kind]
        return [render(template, **example.fields) for example in examples]
    choices = load_templates(args.templates)[kind]
    drawn = (random.Random(f"{args.seed} {example.id}").choice(choices) for example in examples)
    return [render(template, **example.fields) for template, example in zip(drawn, examples, strict=True)]


def header(args: argparse.Namespace) -> dict[str, Any]:
    """How the predictions are made: whatever would change them."""
    kind = kind_of(args.task)
    drawn = None if args.templates is None else f"{args.templates}, seed {args.seed}"
    return {
        "task": args.task,
        "weights": str(args.weights),
        "fingerprint": fingerprint(args.weights),
        "decoding": "ranked" if kind in RANKED else "official" if args.official else "greedy",
        "template": drawn or (args.template if args.template is not None else EVAL_TEMPLATES[kind]),
        "tags": not args.no_tags,
        "rounds": args.rounds if kind == "visdial" else None,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
    }


def fingerprint(folder: Path) -> str:
    """Of both ends of every tensor, wherever they lie: other weights in a folder of the same name are other weights."""
    folder, found = TINY if folder == Path("tiny") else folder, hashlib.sha256()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--weights {folder} has no config.json: it is not a folder of weights.py or train.py")
    for path in (folder / name for name in ("config.json", *Vocabularies.FILES)):
        found.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        found.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return found.hexdigest()[:16]


def answers(
    model: Lion, args: argparse.Namespace, batch: Sequence[Example], asked: Sequence[str], images: ImageFolder
) -> list[dict[str, Any]]:
    """A prediction per example: its text, or its candidates' log-likelihoods. A picture is tagged once per batch."""
    pictures: dict[str | bytes, Image.Image] = {}
    for example in batch:
        if example.image not in pictures:
            name = images.path(example.image) if isinstance(example.image, str) else io.BytesIO(example.image)
            assert name is not None
            pictures[example.image] = open_image(name)
    tags: list[list[str]] | None = None
    if model.config.tags != "none":
        found = dict(zip(pictures, model.scored_tags(list(pictures.values())), strict=True))
        tags = [[tag for tag, _ in found[example.image]] for example in batch]
    size = model.config.vit.image_size
    pixels = torch.stack([lion_transform(pictures[example.image], size) for example in batch])
    kind = kind_of(args.task)
    tasks = [TASK_OF[kind]] * len(batch)
    if batch[0].candidates:
        scores = model.rank(pixels, asked, tags, tasks, [example.candidates for example in batch], args.segment)
        told: list[dict[str, Any]] = [{"scores": [round(value, 6) for value in row]} for row in scores]
    else:
        settings = GENERATION["official" if args.official else PRESET_OF.get(kind, "answer")]
        told = [{"text": text} for text in model.generate(pixels, asked, tags, tasks, settings)]
    return [{"id": e.id, "prompt": q, **t} for e, q, t in zip(batch, asked, told, strict=True)]


def predict(
    args: argparse.Namespace, examples: Sequence[Example], every: Sequence[str], path: Path, images: ImageFolder
) -> dict[str, Any]:
    """Ask what has not been answered yet; a file made without `--limit` knows more of `every` id than is asked.

    Several processes write files of their own, which the first one joins.
    """
    rank, world = gathered()
    first = header(args)
    ids = [example.id for example in examples]
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        join(path, every, first)
    if world > 1:
        dist.barrier()
    known = load(path, every, first)
    starts = range(0, len(examples), args.batch_size)
    todo = [s for s in starts if any(id not in known for id in ids[s : s + args.batch_size])]
    if todo:
        asked = questions(args, examples)
        model = opened(args)
        mine = path if world == 1 else part(path, rank)
        with open(mine, "a", encoding="utf-8") as file:
            if mine != path:
                file.write(json.dumps(first, ensure_ascii=False) + "\n")
            for s in tqdm(todo[rank::world], unit="batch", disable=None if rank == 0 else True):
                end = s + args.batch_size
                lines = answers(model, args, examples[s:end], asked[s:end], images)
                new = [line for line in lines if line["id"] not in known]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
                file.flush()
    if world > 1:
        dist.barrier()
    if rank == 0:
        join(path, every, first)
    return load(path, every, first) if rank == 0 else {}


def opened(args: argparse.Namespace) -> Lion:
    model = Lion.from_pretrained(args.weights or "tiny", args.device, DTYPES[args.dtype])
    if args.no_tags:
        model.config = replace(model.config, tags="none")
    return model


def gathered() -> tuple[int, int]:
    """This process' number and how many there are, alone or from torchrun."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the first to be ready waits for the last
    return dist.get_rank(), dist.get_world_size()


# --- scoring


def measure(args: argparse.Namespace) -> int:
    check(args)
    examples = read(args.task, args.ann, args.rounds)
    notes = []
    if len(examples) != SHIPPED[args.task] and args.rounds == "all":
        notes.append(f"{len(examples):,} examples in the file, {SHIPPED[args.task]:,} in the paper's benchmark")
    every = [example.id for example in examples]
    examples = examples[: args.limit]
    images = ImageFolder(args.images)
    if args.score is None:
        there = images.without_missing([example.image for example in examples], args.skip_missing)
        if not all(there):
            notes.append(f"{there.count(False):,} examples without a picture left out")
            examples = [example for example, is_there in zip(examples, there, strict=True) if is_there]
        if not examples:
            raise ValueError(f"not one picture of {args.task} is below {args.images}")
        path = args.out / f"{args.task}.jsonl"
        predictions = predict(args, examples, every, path, images)
        if gathered_rank() != 0:
            return 0
    else:
        path = args.score
        predictions = load(path, every, None)
        if not predictions:
            raise ValueError(f"{path} holds no prediction for {args.task}")
        absent = sum(example.id not in predictions for example in examples)
        if absent:
            notes.append(f"{absent:,} examples without a prediction left out")
            examples = [example for example in examples if example.id in predictions]
        if not examples:
            raise ValueError(f"{path} holds no prediction for the first {args.limit} examples of {args.task}")
    notes += settings(args, path)
    if args.limit is not None:
        notes.append(f"only the first {args.limit:,}")
    scores = score(args.task, examples, [predictions[example.id] for example in examples])
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"task": args.task, "count": len(examples), "scores": scores, "differs": notes}
    (args.out / f"{args.task}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report(result))
    if kind_of(args.task) == "mmbench" and any(example.target is None for example in examples):
        print(submission(args.out / "mmbench-submission.tsv", examples, predictions))
    if kind_of(args.task) == "rec" and args.sheet and images.path(str(examples[0].image)) is not None:
        sheet = args.out / f"{args.task}.png"
        contact_sheet(examples, predictions, images, args.sheet).save(sheet)
        print(f"the worst are drawn in {sheet}: the truth green, the prediction red")
    return 0


def gathered_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def settings(args: argparse.Namespace, path: Path) -> list[str]:
    """What differs from the paper's setting, as the predictions' own first line tells it."""
    with open(path, encoding="utf-8") as file:
        made = json.loads(file.readline().strip() or "{}")
    if made.get("task", args.task) != args.task:
        raise ValueError(f"{path} holds predictions for {made['task']}, not for {args.task}")
    kind, notes = kind_of(args.task), []
    if "task" not in made:
        notes.append("the file does not say how its predictions were made")
    if made.get("decoding") == "official":
        notes.append("5 beams and repetition penalty 1.5, where the paper writes greedily")
    if kind == "rec":
        if made.get("template") == EVAL_TEMPLATES["rec"]:
            notes.append("one instruction for all, where the paper draws one of 54")
    elif made.get("template", EVAL_TEMPLATES[kind]) != EVAL_TEMPLATES[kind]:
        notes.append(f"the instruction {made['template']!r}")
    if made.get("tags") is False:
        notes.append("no image tags")
    if made.get("rounds") == "last":
        notes.append("only the last rounds")
    family = args.task.partition("_")[0]
    return notes + ([OPEN[family]] if family in OPEN else [])


def submission(path: Path, examples: Sequence[Example], predictions: dict[str, Any]) -> str:
    """The test set's answers are hidden: its server wants the letters."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("index", "question", "prediction"))
        for e in examples:
            row = predictions[e.id]["scores"]
            writer.writerow((e.id, e.fields["question"], e.references[max(range(len(row)), key=row.__getitem__)]))
    return f"the answers are hidden in this file: {path} is for MMBench's server"


def contact_sheet(
    examples: Sequence[Example], predictions: dict[str, Any], images: ImageFolder, count: int
) -> Image.Image:
    """The answers that overlap the truth least, four in a row."""
    rows = []
    for example in examples:
        assert example.box is not None
        box = Box.parse(predictions[example.id]["text"])
        rows.append((box.iou(example.box) if box else -1.0, example, box))
    worst = sorted(rows, key=lambda row: row[0])[:count]
    width, height = 360, 300
    sheet = Image.new("RGB", (width * min(4, len(worst)), height * -(-len(worst) // 4)), "white")
    for i, (iou, example, box) in enumerate(worst):
        path = images.path(str(example.image))
        if path is None:
            continue
        assert example.box is not None
        label = f"{example.fields['expression']} ({'no box' if box is None else f'IoU {iou:.2f}'})"
        drawn = [(example.box, label, "green"), *([(box, "", "red")] if box else [])]
        picture = draw_boxes(open_image(path), drawn)
        picture.thumbnail((width - 8, height - 8))
        sheet.paste(picture, (i % 4 * width + 4, i // 4 * height + 4))
    return sheet


# --- the shapes world


def toy_main(args: argparse.Namespace) -> int:
    if args.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, not {args.scenes}")
    for name in ("ann", "score", "official", "template", "templates", "limit", "skip_missing"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with a benchmark: name it first, as in: eval.py coco")
    model = opened(args)
    scores = toy_scores(model, [toy.scene(i, "test") for i in range(args.scenes)])
    print(f"{args.scenes} held-out scenes of the shapes world, computed in {str(model.dtype).removeprefix('torch.')}")
    print(f"{'':22}{'LION':>7}{'blind':>8}   the blind guess")
    for row in scores:
        print(f"{row.name:22}{row.score:7.1%}{row.baseline:8.1%}   {row.blind} ({row.count} questions)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
