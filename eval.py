"""Measure LION as the paper does: Tables 1, 2, 5 and 6, with the prompts of Table 8.

    python eval.py                                    the built-in tiny model on held-out scenes of the shapes world
    python eval.py coco --weights weights/xl --ann coco_karpathy_test.json --images coco
    python eval.py refcoco_testA --weights weights/xl --ann "refs(unc).p" instances.json --images coco
    python eval.py okvqa --ann questions.json annotations.json --score results/okvqa.jsonl       without a model
    python eval.py table results                      all results of a folder as Markdown
    torchrun --nproc_per_node 4 eval.py visdial ...   the same predictions from four processes

    captions   flickr30k coco textcaps      boxes        refcoco_val _testA _testB, refcoco+_..., refcocog_val _test
    answers    okvqa aokvqa gqa             yes and no   pope_random pope_popular pope_adversarial
    ranked     iconqa vsr visdial           letters      mmbench

Predictions go to OUT/TASK.jsonl as they come, below a header with all settings. The same command resumes a killed run
and ends with the same file, because batches are fixed. Exit code 0: measured; 2: an error, in one sentence.
"""

import csv
import io
import json
import random
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from lion_mini import GENERATION, Box, Lion, toy
from lion_mini.distributed import distributed
from lion_mini.evaluation.benchmarks import BENCHMARKS, best, few_annotators, read, report, score, table
from lion_mini.evaluation.predictions import join, load, part
from lion_mini.evaluation.readers import Example
from lion_mini.files import atomic_write, run
from lion_mini.images import ImageFolder, draw_boxes, lion_transform, open_image
from lion_mini.pipeline import DTYPES, TINY, read_config
from lion_mini.quantize import best_dtype
from lion_mini.text.prompts import EVAL_TEMPLATES, TASK_OF, load_templates, render
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.toy.scores import toy_scores

Examples = Sequence[Example]
Line = dict[str, Any]
DECODING = {"caption": "caption", "rec": "locate", "reg": "describe"}  # GENERATION's entry; other kinds: answer


def main(argv: Sequence[str] | None = None) -> int:
    return run(measure_or_table, parse(argv))


def measure_or_table(args: Namespace) -> None:
    try:
        if args.task == "table":
            print(table(Path(args.folder or args.out)))
        elif args.task is None:
            measure_toy(args)
        else:
            measure(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="a benchmark, or table; without one, the shapes world")
    parser.add_argument("folder", nargs="?", help="of table: where the results are")
    parser.add_argument("--weights", type=Path, help="a folder of weights.py convert or train.py")
    parser.add_argument("--ann", type=Path, nargs="+", default=[], help="the official annotation file or files")
    parser.add_argument("--images", type=Path, default=Path(), help="the pictures' folder")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of predictions and scores")
    parser.add_argument("--score", type=Path, metavar="FILE", help="only score this file of predictions")
    parser.add_argument("--official", action="store_true", help="write as the release: 5 beams, repetition penalty 1.5")
    parser.add_argument("--template", help="this instruction for all, with {question} or {expression}")
    parser.add_argument("--templates", type=Path, help="a JSON file of REC instructions to draw from, as the paper did")
    parser.add_argument("--seed", type=int, default=0, help="of --templates")
    parser.add_argument("--rounds", choices=("all", "last"), default="all", help="VisDial: last is the common mistake")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--skip-missing", action="store_true", help="leave out examples without a picture")
    parser.add_argument("--no-tags", action="store_true", help="ask without RAM's tags")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--segment", type=int, default=32, help="candidates scored at a time; less memory, same scores")
    parser.add_argument("--sheet", type=int, default=12, help="REC: how many of the worst to draw")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of the shapes world")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 where it is fast")
    return parser.parse_args(argv)


def check(args: Namespace) -> None:
    for name, least in (("batch_size", 1), ("segment", 1), ("limit", 1), ("scenes", 1), ("sheet", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.task is None:
        for name in ("ann", "score", "official", "template", "templates", "limit", "skip_missing"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} needs a benchmark: name it first, as in eval.py coco")
        return
    if args.task not in BENCHMARKS:
        raise ValueError(f"the task {args.task!r} is unknown; there are {', '.join(BENCHMARKS)}, and table")
    if not args.ann:
        raise ValueError(f"{args.task} needs its official annotation file: name it with --ann")
    if args.weights is None and args.score is None:
        raise ValueError("no weights: name their folder with --weights, or a file of predictions with --score")
    kind = BENCHMARKS[args.task].kind
    if args.templates is not None and (kind != "rec" or args.template is not None):
        raise ValueError("--templates draws REC instructions; it goes with no other task, nor with --template")
    if args.template is None:
        args.template = EVAL_TEMPLATES[kind]


# --- predictions


def instructions(args: Namespace, examples: Examples) -> list[str]:
    """The prompt of each example, from --templates drawn by seed and id."""
    choices = (args.template,) if args.templates is None else load_templates(args.templates)["rec"]
    prompts = []
    for example in examples:
        template = random.Random(f"{args.seed} {example.id}").choice(choices)
        prompts.append(render(template, **example.fields))
        name, text = next(iter(example.fields.items()), ("", ""))
        if text not in prompts[-1]:
            raise ValueError(f"--template {template!r} leaves the {name} out: put {{{name}}} on a line of its own")
    return prompts


def header(args: Namespace, ranked: bool) -> dict[str, Any]:
    """Every setting that changes predictions, and size and time of the files that make the model."""
    kind, folder = BENCHMARKS[args.task].kind, TINY if args.weights == Path("tiny") else args.weights
    read_config(folder)
    settings = {
        "task": args.task,
        "weights": str(args.weights),
        "decoding": "ranked" if ranked else "official" if args.official else "greedy",
        "template": args.template if args.templates is None else f"{args.templates}, seed {args.seed}",
        "tags": not args.no_tags,
        "rounds": args.rounds if kind == "visdial" else None,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
    }
    files = [folder / name for name in ("config.json", *Vocabularies.FILES)] + sorted(folder.glob("*.safetensors"))
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return settings | {name: f"{stat.st_size} bytes, mtime {stat.st_mtime_ns}" for name, stat in stats.items()}


def answers(lion: Lion, args: Namespace, batch: Examples, prompts: list[str], images: ImageFolder) -> Iterator[Line]:
    """A prediction per example: its text, or its candidates' log-likelihoods. A picture is tagged once per batch."""
    pictures = {image: open_picture(image, images) for image in dict.fromkeys(example.image for example in batch)}
    tags: list[list[str]] | None = None
    if lion.config.tags != "none":
        tagged = dict(zip(pictures, lion.scored_tags([*pictures.values()]), strict=True))
        tags = [[tag for tag, _ in tagged[example.image]] for example in batch]
    kind, size = BENCHMARKS[args.task].kind, lion.config.vit.image_size
    pixels = torch.stack([lion_transform(pictures[example.image], size) for example in batch])
    tasks = [TASK_OF[kind]] * len(batch)
    if batch[0].candidates:
        rows = lion.rank(pixels, prompts, tags, tasks, [example.candidates for example in batch], args.segment)
        found: list[Line] = [{"scores": [round(value, 6) for value in row]} for row in rows]
    else:
        settings = GENERATION["official" if args.official else DECODING.get(kind, "answer")]
        found = [{"text": text} for text in lion.generate(pixels, prompts, tags, tasks, settings)]
    return ({"id": e.id, "prompt": p, **answer} for e, p, answer in zip(batch, prompts, found, strict=True))


def open_picture(image: str | bytes, images: ImageFolder) -> Image.Image:
    return open_image(io.BytesIO(image) if isinstance(image, bytes) else images.path(image) or image)


def predict(args: Namespace, examples: Examples, ids: list[str], path: Path, images: ImageFolder) -> tuple[Line, Line]:
    """Answer the remaining examples; `ids` are the whole file's. Header and predictions by id, empty if rank > 0."""
    prompts = instructions(args, examples)

    # 1. Rank 0 joins what an earlier run left.
    rank, world, device = distributed(args.device, timedelta(days=7))
    args.dtype = str(best_dtype(device)).removeprefix("torch.") if args.dtype == "auto" else args.dtype
    made = header(args, ranked=bool(examples[0].candidates))
    if rank == 0:
        join(path, ids, made)
    if world > 1:
        dist.barrier()
    _, known = load(path, ids, made)

    # 2. The ranks take turns at the batches, and each writes a file of its own.
    starts = range(0, len(examples), args.batch_size)
    todo = [s for s in starts if any(e.id not in known for e in examples[s : s + args.batch_size])]
    if todo:
        lion = open_lion(args, device)
        with open(part(path, rank) if rank else path, "a", encoding="utf-8") as file:
            if rank:
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
            for s in tqdm(todo[rank::world], unit="batch", disable=None if rank == 0 else True):
                these = slice(s, s + args.batch_size)
                lines = answers(lion, args, examples[these], prompts[these], images)
                new = (line for line in lines if line["id"] not in known)
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
                file.flush()

    # 3. Rank 0 joins the files.
    if world > 1:
        dist.barrier()
    if rank > 0:
        return {}, {}
    join(path, ids, made)
    return load(path, ids, made)


def open_lion(args: Namespace, device: str | torch.device) -> Lion:
    lion = Lion.from_pretrained(args.weights or "tiny", device, DTYPES[args.dtype])
    if args.no_tags:
        lion.config = replace(lion.config, tags="none")
    return lion


# --- scores


def measure(args: Namespace) -> None:
    check(args)
    benchmark, images, path = BENCHMARKS[args.task], ImageFolder(args.images), args.out / f"{args.task}.jsonl"
    examples = read(args.task, args.ann)
    if benchmark.kind == "visdial" and args.rounds == "last":
        examples = [example for example in examples if example.group == "last"]
    ids, asked = [example.id for example in examples], examples[: args.limit]
    if args.score is None:
        there = images.without_missing([example.image for example in asked], args.skip_missing)
        examples = [example for example, is_there in zip(asked, there, strict=True) if is_there]
        if not examples:
            raise ValueError(f"not one picture of {args.task} is below {args.images}")
        made, predictions = predict(args, examples, ids, path, images)
        if not predictions:  # rank 0 scores
            return
    else:
        path = args.score
        made, predictions = load(path, ids, {"task": args.task})
        examples = [example for example in asked if example.id in predictions]
        if not examples:
            raise ValueError(f"{path} holds no prediction for the {len(asked):,} examples of {args.task}")
    lost = "picture" if args.score is None else "prediction"
    notes = {
        f"{len(ids):,} examples in the file, {benchmark.count:,} in the paper's benchmark": len(ids) != benchmark.count,
        f"{len(asked) - len(examples):,} examples without a {lost} left out": len(examples) < len(asked),
        f"only the first {args.limit}": args.limit is not None,
        few_annotators(args.task, examples): True,
        benchmark.differs: True,
    }
    differs = [note for note, holds in (notes | settings(benchmark.kind, made)).items() if note and holds]
    scores = score(args.task, examples, [predictions[example.id] for example in examples])
    result = {"task": args.task, "count": len(examples), "scores": scores, "differs": differs}
    with atomic_write(args.out / f"{args.task}.json") as new:
        new.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report(result))
    if benchmark.kind == "mmbench" and not scores:
        path = args.out / "mmbench-submission.tsv"
        submit(path, examples, predictions)
        print(f"the answers are hidden in this file: {path} is for MMBench's server")
    if benchmark.kind == "rec" and args.sheet and images.path(str(examples[0].image)) is not None:
        sheet = args.out / f"{args.task}.png"
        draw_worst(examples, predictions, images, args.sheet).save(sheet)
        print(f"the worst are drawn in {sheet}: the truth green, the prediction red")


def settings(kind: str, made: Mapping[str, Any]) -> dict[str, bool]:
    """Every setting that may differ from the paper's, and whether it does in the header of the predictions."""
    template = made.get("template", EVAL_TEMPLATES[kind])
    return {
        "the file does not say how its predictions were made": not made,
        "5 beams and repetition penalty 1.5, where the paper writes greedily": made.get("decoding") == "official",
        "one instruction for all, where the paper draws one of 54": made.get("template") == EVAL_TEMPLATES["rec"],
        f"the instruction {template!r}": template != EVAL_TEMPLATES[kind] and kind != "rec",
        "no image tags": made.get("tags") is False,
        "only the last rounds": made.get("rounds") == "last",
    }


def submit(path: Path, examples: Examples, predictions: Line) -> None:
    """The letters that MMBench's server scores, for the test set without answers."""
    rows = [(e.id, e.fields["question"], e.references[best(predictions[e.id]["scores"])]) for e in examples]
    with atomic_write(path) as new, open(new, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("index", "question", "prediction"), *rows])


def draw_worst(examples: Examples, predictions: Line, images: ImageFolder, count: int) -> Image.Image:
    """A sheet of the answers that overlap the truth least, four in a row."""
    boxes = [Box.parse(predictions[example.id]["text"]) for example in examples]
    rows = [(box.iou(e.box) if box and e.box else -1.0, box, e) for box, e in zip(boxes, examples, strict=True)]
    worst = sorted(rows, key=lambda row: row[0])[:count]
    width, height = 360, 300
    sheet = Image.new("RGB", (width * min(4, len(worst)), height * -(-len(worst) // 4)), "white")
    for i, (iou, box, example) in enumerate(worst):
        if images.path(str(example.image)) is not None and example.box:
            label = f"{example.fields['expression']} ({f'IoU {iou:.2f}' if box else 'no box'})"
            drawn = [(example.box, label, "green"), *([(box, "", "red")] if box else [])]
            picture = draw_boxes(open_picture(example.image, images), drawn)
            picture.thumbnail((width - 8, height - 8))
            sheet.paste(picture, (i % 4 * width + 4, i // 4 * height + 4))
    return sheet


# --- the shapes world


def measure_toy(args: Namespace) -> None:
    check(args)
    lion = open_lion(args, args.device)
    rows = toy_scores(lion, [toy.scene(i, "test") for i in range(args.scenes)])
    print(f"{args.scenes} held-out scenes of the shapes world, computed in {str(lion.dtype).removeprefix('torch.')}")
    print(f"{'':22}{'LION':>7}{'blind':>8}   the blind guess")
    for row in rows:
        print(f"{row.name:22}{row.score:7.1%}{row.baseline:8.1%}   {row.blind} ({row.count} questions)")


if __name__ == "__main__":
    sys.exit(main())
