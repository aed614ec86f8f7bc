"""Measure LION as the paper does: Tables 1, 2, 5 and 6, on the data sets of Table 8, with the instructions of B.2.

    python eval.py                                    the built-in tiny model on test scenes of the toy world
    python eval.py coco --weights weights/xl --ann coco_karpathy_test.json --images coco
    python eval.py refcoco_testA --weights weights/xl --ann "refs(unc).p" instances.json --images coco
    python eval.py okvqa --ann questions.json annotations.json --score results/okvqa.jsonl       without a model
    python eval.py table results                      all results of a folder as Markdown
    python eval.py --parts                            what each part contributes; also with a benchmark
    torchrun --nproc_per_node 4 eval.py visdial ...   the same predictions from four processes

    captions   flickr30k coco textcaps      boxes        refcoco_val _testA _testB, refcoco+_..., refcocog_val _test
    answers    okvqa aokvqa gqa             yes and no   pope_random pope_popular pope_adversarial
    ranked     iconqa vsr visdial           letters      mmbench

Predictions go to OUT/TASK.jsonl as they come, below a header with all settings. The same command resumes a killed run
and ends with the same file, because batches are fixed. Exit code 0: measured; 2: an error, in one sentence.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported; `run` handles it again

import csv
import io
import json
import os
import random
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import trange

from lion_mini import GENERATION, Lion, toy
from lion_mini.distributed import distributed
from lion_mini.evaluation.benchmarks import BENCHMARKS, best, draw_worst, load, read, report, score, table
from lion_mini.evaluation.parts import change, changes, parts_table
from lion_mini.evaluation.readers import Example, Line
from lion_mini.files import atomic_write, reading, run
from lion_mini.images import ImageFolder, lion_transform, open_image
from lion_mini.pipeline import DTYPES, TINY, read_config
from lion_mini.quantize import best_dtype
from lion_mini.text.prompts import DECODING, EVAL_TEMPLATES, TASK_OF, load_templates, render
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.toy.scores import ask, levels, score_table

Examples = Sequence[Example]
as_line = lambda line: json.dumps(line, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="a benchmark, or table; without one, the toy world")
    parser.add_argument("folder", nargs="?", help="of table: where the results are")
    folder = lambda name: Path(name) if name else None
    weights = lambda name: TINY if name == "tiny" else folder(name)
    parser.add_argument("--weights", type=weights, help="a folder of weights.py convert or train.py, or: tiny")
    parser.add_argument("--ann", type=Path, nargs="+", default=[], help="the official annotation file or files")
    parser.add_argument("--images", type=folder, nargs="+", default=[Path()], help="folders that have the pictures")
    parser.add_argument("--out", type=folder, default=Path("results"), help="folder of predictions and scores")
    parser.add_argument("--score", type=Path, metavar="FILE", help="only score this file of predictions")
    parser.add_argument("--official", action="store_true", help="write as the release: 5 beams, repetition penalty 1.5")
    parser.add_argument("--template", help="this instruction for all, with {question} or {expression}")
    parser.add_argument("--templates", type=Path, nargs="+", help="files of REC instructions to draw from, or: paper")
    parser.add_argument("--seed", type=int, default=0, help="of REC's instructions, which are drawn")
    parser.add_argument("--rounds", choices=("all", "last"), default="all", help="VisDial: last is the common mistake")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--skip-missing", action="store_true", help="leave out examples whose picture cannot be opened")
    parser.add_argument("--no-tags", action="store_true", help="ask without RAM's tags")
    parser.add_argument("--parts", action="store_true", help="score each part's contribution: exchange or empty it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--segment", type=int, default=32, help="candidates scored at a time; less memory, same scores")
    parser.add_argument("--sheet", type=int, default=12, help="REC: how many of the worst to draw")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes of the toy world")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 where it is fast")
    return run(evaluate, parser.parse_args(argv, Namespace(change="none")))  # "none": but for --parts


def evaluate(args: Namespace) -> None:
    """Refuse what cannot be used, else print the table or measure."""
    for name, least in (("batch_size", 1), ("segment", 1), ("limit", 1), ("scenes", 1), ("sheet", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.task not in (None, "table", *BENCHMARKS):
        raise ValueError(f"the task {args.task!r} is unknown; there are {', '.join(BENCHMARKS)}, and table")
    kind = BENCHMARKS[args.task].kind if args.task in BENCHMARKS else None
    asks = args.score is None and args.task != "table"
    for names, useful, what in (
        ("--ann --score --official --template --templates --limit --skip-missing", kind, "a benchmark, such as coco"),
        ("--official --template --templates --no-tags --parts", asks, "a model to ask, not --score or table"),
        ("--templates", kind == "rec" and args.template is None, "a task of boxes, and no --template beside it"),
        ("--rounds", args.rounds == "all" or args.task == "visdial", "the task visdial"),
        ("folder", args.task == "table", "the task table"),
    ):
        for name in names.split():
            if getattr(args, name.strip("-").replace("-", "_")) and not useful:
                raise ValueError(f"{name} needs {what}")
    if None in (args.out, *args.images):
        raise ValueError("--out or --images is empty: name a folder, or say . for the one that you are in")
    if args.task == "table":
        print(table(Path(args.folder or args.out)))
    elif kind is None:
        measure_parts(args) if args.parts else measure_toy(args)
    elif not args.ann:
        raise ValueError(f"{args.task} needs its official annotation file: name it with --ann")
    elif args.weights is None and args.score is None:
        raise ValueError("no weights: name their folder with --weights, or a file of predictions with --score")
    else:
        measure_parts(args) if args.parts else measure(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def templates(args: Namespace) -> list[str]:
    """What to ask: the instruction of the command line or of the weights, or the paper's (B.2). Several are drawn."""
    kind, own = BENCHMARKS[args.task].kind, read_config(args.weights).instructions
    if args.template is not None:
        return [args.template]
    if kind in own and not args.templates:
        return [own[kind]]
    files = [path for path in args.templates or () if path != Path("paper")]
    return [*load_templates(*files)["rec"]] if kind == "rec" else [EVAL_TEMPLATES[kind]]


def prompt_of(example: Example, choices: Sequence[str], seed: int) -> str:
    """The prompt of an example. Its seed and id draw the instruction."""
    instruction = random.Random(f"{seed} {example.id}").choice(choices)
    prompt = render(instruction, **example.fields)
    name, text = next(iter(example.fields.items()), ("prompt", prompt))
    if not text.strip() or text not in prompt:
        raise ValueError(f"the {name} of {example.id} is empty or lost in {instruction!r}: give it a line of its own")
    return prompt


def header(args: Namespace, choices: Sequence[str], ranked: bool) -> Line:
    """Every setting that changes predictions, and size and time of the files that make the model."""
    names = ("config.json", *Vocabularies.FILES)
    stats = {f.name: f.stat() for f in sorted(args.weights.iterdir()) if f.name in names or f.suffix == ".safetensors"}
    return {
        "task": args.task, "weights": str(args.weights),
        "decoding": "ranked" if ranked else "official" if args.official else "greedy",
        "template": choices[0] if len(choices) == 1 else f"one of {len(choices)}, seed {args.seed}",
        "templates": choices, "tags": not args.no_tags, "rounds": args.rounds,
        "dtype": args.dtype, "batch_size": args.batch_size,
        **{name: f"{stat.st_size} bytes, mtime {stat.st_mtime_ns}" for name, stat in stats.items()},
    }  # fmt: skip


def answers(lion: Lion, args: Namespace, batch: Examples, prompts: list[str], images: ImageFolder) -> list[Line]:
    """A prediction per example: its text, or its candidates' log-likelihoods. A picture is tagged once per batch."""
    pictures, tags = dict[str | bytes, Image.Image](), None
    for image, id in {example.image: example.id for example in batch}.items():
        with suppress(*[ValueError] * args.skip_missing), reading(f"the picture of {id}"):
            pictures[image] = open_image(io.BytesIO(image) if isinstance(image, bytes) else images.path(image) or image)
    there = [example.image in pictures for example in batch]
    batch, prompts = [*compress(batch, there)], [*compress(prompts, there)]
    if not batch:
        return []
    if lion.config.tags != "none":
        tagged = dict(zip(pictures, lion.scored_tags([*pictures.values()]), strict=True))
        tags = [[tag for tag, _ in tagged[example.image]] for example in batch]
    kind, size = BENCHMARKS[args.task].kind, lion.config.vit.image_size
    pixels = torch.stack([lion_transform(pictures[example.image], size) for example in batch])
    asked = (pixels, prompts, tags, [TASK_OF[kind]] * len(batch))
    with reading(f"the batch {batch[0].id} to {batch[-1].id}"):
        if batch[0].candidates:
            rows = lion.rank(*asked, [example.candidates for example in batch], args.segment)
            said: list[Line] = [{"scores": [round(value, 6) for value in row]} for row in rows]
        else:
            settings = GENERATION["official" if args.official else DECODING[kind]]
            said = [{"text": text} for text in lion.generate(*asked, settings)]
    return [{"id": e.id, "prompt": p, **answer} for e, p, answer in zip(batch, prompts, said, strict=True)]


def predict(args: Namespace, examples: Examples, ids: list[str], path: Path, images: ImageFolder) -> tuple[Line, Line]:
    """Answer the remaining examples; `ids` are the whole file's. Header and predictions by id, empty if rank > 0."""
    choices, there = templates(args), images.without_missing([e.image for e in examples], args.skip_missing)
    examples = [*compress(examples, there)]
    prompts = [prompt_of(example, choices, args.seed) for example in examples]
    rank, world, device = distributed(args.device)
    args.dtype = str(best_dtype(device)).removeprefix("torch.") if args.dtype == "auto" else args.dtype
    made, known = header(args, choices, ranked=any(e.candidates for e in examples)), dict[str, Line]()

    # 1. Rank 0 keeps what an earlier run left, and tells the others.
    if rank == 0:
        if path.is_file():
            if not (found := path.read_bytes()).startswith(f'{{"task": "{args.task}", "weights": '.encode()):
                raise ValueError(f"{path} has no header, so it is none of this script: choose another --out")
            os.truncate(path, found.rfind(b"\n") + 1)  # a kill may have cut off a line
            known = load(path, ids, made)[1]
        with atomic_write(path) as whole:
            kept = [known[id] for id in ids if id in known]
            whole.write_text("".join(map(as_line, [made, *kept])), encoding="utf-8", errors="backslashreplace")
    known = gather(known, world)[0]

    # 2. The ranks take turns at the batches, and rank 0 writes.
    batches = [slice(start, start + args.batch_size) for start in range(0, len(examples), args.batch_size)]
    todo = [batch for batch in batches if any(example.id not in known for example in examples[batch])]
    if todo:
        lion = open_lion(args, device)
    for i in trange(0, len(todo), world, unit="batch", disable=None if rank == 0 else True):
        mine = todo[i + rank : i + rank + 1]  # one batch, or none in the last round
        lines = [line for batch in mine for line in answers(lion, args, examples[batch], prompts[batch], images)]
        new = {line["id"]: line for line in chain(*gather(lines, world)) if line["id"] not in known}
        known |= new
        if rank == 0:
            with reading(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(map(as_line, new.values()))
    return (made, known) if rank == 0 else ({}, {})


def gather(value: Any, world: int) -> list[Any]:
    """The value of every rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def open_lion(args: Namespace, device: str | torch.device) -> Lion:
    lion = Lion.from_pretrained(args.weights or TINY, device, DTYPES[args.dtype])
    lion.config = replace(lion.config, tags="none" if args.no_tags else lion.config.tags)
    change(lion.model, args.change)
    return lion


def wanted(args: Namespace) -> tuple[list[str], Examples]:
    """The ids of the whole file, and the examples to ask."""
    examples = [e for e in read(args.task, args.ann) if args.rounds == "all" or e.group == "last"]
    return [example.id for example in examples], examples[: args.limit]


def measure(args: Namespace) -> None:
    benchmark, images = BENCHMARKS[args.task], ImageFolder(*args.images, prefer=args.task)
    path, lost = args.score or args.out / f"{args.task}.jsonl", "prediction" if args.score else "picture"
    ids, asked = wanted(args)

    # 1. Predict, or load predictions.
    if args.score is None:
        made, predictions = predict(args, asked, ids, path, images)
        if not made:  # rank 0 scores
            return
    else:
        made, predictions = load(path, ids, {"task": args.task})
    if not (examples := [example for example in asked if example.id in predictions]):
        where = args.score or " or ".join(map(str, args.images))
        raise ValueError(f"{where} holds no {lost} for the {len(asked):,} examples of {args.task}")

    # 2. Score, and say what differs from the paper's setting.
    with reading(path):
        scores = score(args.task, examples, [predictions[example.id] for example in examples])
    few = sum(len(e.references) < 10 for e in examples) * bool({"VQA accuracy", "direct answer"} & scores.keys())
    template, rec = made.get("template", usual := EVAL_TEMPLATES[benchmark.kind]), benchmark.kind == "rec"
    notes = {
        f"{len(ids):,} examples in the file, {benchmark.count:,} in the paper's benchmark":
            benchmark.count not in (0, len(ids)),
        f"{len(asked) - len(examples):,} examples without a {lost} left out": len(examples) < len(asked),
        f"only the first {args.limit}": args.limit is not None,
        f"{few:,} questions have fewer than ten annotators and count too low (one alone: 0; a direct answer: 1/3)": few,
        benchmark.differs: benchmark.differs,
        "the file does not say how its predictions were made": not made,
        "5 beams and repetition penalty 1.5, where the paper writes greedily": made.get("decoding") == "official",
        f"the instruction: {template}" + "; the paper draws from its training list" * rec:
            made and (rec or template != usual),
        "no image tags": made.get("tags") is False,
        "only the last rounds": made.get("rounds") == "last",
    }  # fmt: skip
    result = {"task": args.task, "count": len(examples), "scores": scores}
    result["differs"] = [note for note, holds in notes.items() if holds]
    with atomic_write(args.out / f"{args.task}.json") as new:
        new.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report(result))

    # 3. Write MMBench's letters for its server; draw the worst boxes.
    if benchmark.kind == "mmbench" and not scores:
        letters = [(e.id, e.fields["question"], e.references[best(predictions[e.id]["scores"])]) for e in examples]
        submission = args.out / "mmbench-submission.tsv"
        with atomic_write(submission) as new, open(new, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("index", "question", "prediction"), *letters])
        print(f"the answers are hidden in this file: {submission} is for MMBench's server")
    if benchmark.kind == "rec" and args.sheet and images.path(str(examples[0].image)):
        with atomic_write(sheet := args.out / f"{args.task}.png") as new:
            draw_worst(examples, predictions, images, args.sheet).save(new, "PNG")
        print(f"the worst are drawn in {sheet}: the truth green, the prediction red")


def measure_toy(args: Namespace) -> None:
    lion = open_lion(args, args.device)
    print(f"{args.scenes} test scenes of the toy world, computed in {str(lion.dtype).removeprefix('torch.')}")
    print(score_table(ask(lion, [toy.scene(i, "test") for i in range(args.scenes)])))


def measure_parts(args: Namespace) -> None:
    """Score a benchmark or the toy world as usual, and again after each change to one of the model's parts."""
    config, name = read_config(args.weights or TINY), args.task or "toy"
    rows, images = dict[str, dict[str, float]](), ImageFolder(*args.images, prefer=name)
    for each in changes(replace(config, tags="none") if args.no_tags else config):
        args.change = each
        if args.task is None:
            replies = ask(open_lion(args, args.device), [toy.scene(i, "test") for i in range(args.scenes)])
            rows[each] = {level: 100 * share for level, share in levels(replies).items()}
        else:
            ids, asked = wanted(args)
            known = predict(args, asked, ids, args.out / f"{name}{f', {each}' * (each != 'none')}.jsonl", images)[1]
            if examples := [e for e in asked if e.id in known]:  # on rank 0
                rows[each] = dict(score(name, examples, [known[e.id] for e in examples]))
    if rows:
        with atomic_write(args.out / f"{name}-parts.json") as new:
            new.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(parts_table(rows))


if __name__ == "__main__":
    sys.exit(main())
