"""Ask LION about pictures.

    python infer.py                                                         the built-in tiny LION, on a new scene
    python infer.py photo.jpg --weights weights/xl                          a caption
    python infer.py photo.jpg --weights weights/xl --ask "what is he holding?"
    python infer.py photo.jpg --weights weights/xl --locate "the dog on the left"      a box, drawn
    python infer.py photo.jpg --weights weights/xl --describe 0.1,0.2,0.4,0.9          what is in the box
    python infer.py photo.jpg --weights weights/xl --prompt "Any instruction." --max-new-tokens 60
    python infer.py photo.jpg --weights weights/xl --ask "is he old?" --explain      where the answer comes from, drawn
    python infer.py --weights weights/xl --serve                                     most of this in a browser
    python infer.py photos/ "more/*.png" --weights weights/xl --tags                   RAM's tags alone
    python infer.py --tags --data train.json --images coco --out tagged.jsonl --weights weights/xl     tags of records

Answers are printed. `--out` (default: out) gets results.jsonl, a line per picture, and drawings.
It replaces earlier results, but no other file. Exit code 0: all is done; 1: some pictures failed; 2: nothing is done.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported; `run` handles it again

import argparse
import glob
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from tqdm import tqdm, trange

from lion_mini import GENERATION, Box, Lion, toy
from lion_mini.data.convert import tag_records
from lion_mini.data.records import Records, split_tags
from lion_mini.explain import Explanation, draw_explanation, explain
from lion_mini.files import printable, reading, run
from lion_mini.images import ENDING, draw_boxes, open_image
from lion_mini.pipeline import DTYPES, Answer
from lion_mini.serve import serve
from lion_mini.text.prompts import DECODING, KIND, TASK_OF, render

Picture = tuple[Path, Image.Image, Box | None]  # the box to describe


def check_flags(args: argparse.Namespace) -> None:
    """A ValueError if flags contradict each other, or if a value cannot be used."""
    mode, text = args.job or ("", "")
    asks, length = args.no_tags or args.use_tags or args.official or args.max_new_tokens, args.max_new_tokens
    for wrong, sentence in (
        (mode in ("ask", "locate", "prompt") and not text.strip(), f"--{mode} is empty: say what you want to know"),
        (args.images and args.data, "give pictures to look at, or a file of records with --data, not both"),
        (args.data and mode != "tags", "--data is for --tags: it adds them to training records"),
        (args.dtype not in DTYPES, f"--dtype {args.dtype}: there are {', '.join(DTYPES)}; T5 overflows in float16"),
        (args.batch_size < 1, f"--batch-size must be at least 1, not {args.batch_size}"),
        (length is not None and not 0 < length <= 10_000, f"--max-new-tokens must be 1 to 10,000, not {length}"),
        ("" in (args.out, *args.images), "a file or folder without a name: say . for the folder that you are in"),
        (args.use_tags == [], "--use-tags is empty: for no tags at all say --no-tags"),
        (args.pixels and mode != "describe", "--pixels is for --describe: its four numbers are pixels then"),
        (mode and not args.images and not args.data, f"--{mode} needs a picture: name one, or a folder of them"),
        (mode == "tags" and args.explain, "--explain is about answers, and --tags asks nothing"),
        (args.serve and (mode or args.images or args.explain), "--serve opens a page: choose and ask there"),
        (not 0 <= args.port < 65536, f"--port must be 0 (any free one) to 65535, not {args.port}"),
        (args.task and mode != "prompt", "--task is for --prompt: every other question has its own"),
        (mode == "tags" and asks, "--tags asks nothing: leave out --use-tags, --no-tags, --official, --max-new-tokens"),
    ):
        if wrong:
            raise ValueError(sentence)
    if mode == "describe" and not args.pixels:
        box_of(text)


def box_of(corners: str, width: int = 1, height: int = 1) -> Box:
    """The box to describe, in fractions. A ValueError if it does not lie inside the picture."""
    with reading(f"--describe {corners}: expected four numbers, x1,y1,x2,y2"):
        x1, y1, x2, y2 = map(float, corners.split(","))
    return Box.checked(x1 / width, y1 / height, x2 / width, y2 / height)


def find_images(patterns: list[str]) -> list[Path]:
    """Files, the pictures of folders, and what globs match, in order, each once."""
    paths: list[Path] = []
    for path in map(Path, patterns):
        if path.is_dir():
            matches = sorted(file for file in path.iterdir() if ENDING.search(file.name))
        else:
            matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise ValueError(f"{path}: no {'picture in this folder' if path.is_dir() else 'such file or folder'}")
        paths += matches
    return list(dict.fromkeys(paths))


def open_lion(args: argparse.Namespace) -> Lion:
    lion = Lion.from_pretrained(args.weights, args.device, DTYPES[args.dtype])
    if args.use_tags and lion.config.tags == "none":
        raise ValueError(f"--use-tags: {args.weights} answers without tags in its prompt")
    lion.config = replace(lion.config, tags="none") if args.no_tags else lion.config
    if args.dtype == "auto":
        print(f"--dtype auto: {args.weights} computes in {str(lion.dtype)[6:]} on {lion.device}", file=sys.stderr)
    return lion


def ask(lion: Lion, mode: str, text: str, pictures: Sequence[Picture], args: argparse.Namespace) -> list[dict]:
    """A line of results.jsonl for each picture; boxes in fractions, and in pixels of the upright picture."""
    paths, images, boxes = map(list, zip(*pictures, strict=True))
    explained: list[Explanation] = []
    if mode == "tags":
        answers = [Answer(", ".join(tag for tag, _ in tags), "", tags, 0.0) for tags in lion.scored_tags(images)]
    else:
        kind = KIND.get(mode) or ("rec" if args.task == "region" else "caption")  # a prompt is decoded like these
        settings = GENERATION["official" if args.official else DECODING[kind]]
        settings = replace(settings, max_new_tokens=args.max_new_tokens or settings.max_new_tokens)
        template = "{question}" if mode == "prompt" else lion.instruction(kind)
        prompts = [render(template, question=text, expression=text, box=box or "") for box in boxes]
        tags = args.use_tags and [args.use_tags] * len(images)
        task = args.task or TASK_OF[kind]
        if args.explain:
            pairs = zip(images, prompts, strict=True)
            explained = [explain(lion, *pair, task, settings, tags and tags[:1]) for pair in pairs]
            answers = [one.answer for one in explained]
        else:
            answers = lion.respond(images, prompts, [task] * len(images), settings, tags)
    if mode in ("locate", "prompt"):
        boxes = [Box.parse(answer.text) for answer in answers]
    lines = [
        {
            "image": str(path), "tags": [[tag, round(score, 4)] for tag, score in answer.tags],
            "prompt": answer.prompt, "text": answer.text, "score": round(answer.score, 4),
            "answer": answer.text if mode != "locate" else box and box.to_text(),
            "box": box and list(astuple(box)), "box_pixels": box and [round(x, 1) for x in box.to_pixels(*image.size)],
        }
        for path, image, box, answer in zip(paths, images, boxes, answers, strict=True)
    ]  # fmt: skip
    return [line | {"explanation": one} for line, one in zip(lines, explained, strict=True)] if explained else lines


def write(file: IO[str], line: dict) -> None:
    file.write(json.dumps(line, ensure_ascii=False, default=Explanation.to_json) + "\n")


def readable(mode: str, line: dict) -> str:
    box, text = line["box_pixels"], line["text"]
    if mode == "locate" and not box:
        return f"no box: the answer was {text!r}"
    answer = line["answer"] or ("(no tags)" if mode == "tags" else "(an empty answer)")
    return f"{answer}, pixels {box}" if box and mode != "describe" else answer


def unused(path: Path) -> Path:
    """The path, with a number if such a file exists. Results of an earlier run do not count."""
    names = (path.with_stem(f"{path.stem}-{i}") if i else path for i in count())
    ours = lambda file: file.is_file() and file.suffix == ".jsonl" and b'"box_pixels": ' in file.open("rb").readline()
    return next(name for name in names if not name.exists() or ours(name))


def demonstrate(args: argparse.Namespace) -> int:
    """Draw a scene that no training saw, and ask everything about it."""
    seed = random.randrange(10**9) if args.seed is None else args.seed
    scene, rng, lion = toy.scene(seed, "test"), random.Random(seed), open_lion(args)
    args.out.mkdir(parents=True, exist_ok=True)
    scene.image.save(path := unused(args.out / "scene.png"))
    print(f"scene {seed}, drawn to {path}")
    thing = rng.choice(scene.things)
    (_, *ground), *others = toy.questions(scene, rng)  # only tags tell the ground
    _, *other = rng.choice(others)
    expression = toy.expression(scene.things, thing, rng)
    box, boxes = thing.box, [(thing.box, "true", "#3cb44b")]
    with open(unused(args.out / "results.jsonl"), "w", encoding="utf-8") as file:
        for mode, text, truth in (
            ("tags", "", ", ".join(toy.true_tags(scene))),
            ("caption", "", toy.caption(scene.things)),
            ("ask", *ground),
            ("ask", *other),
            ("locate", expression, box.to_text()),
            ("describe", box.to_text(), f"the {thing.size} {thing.name}"),
        ):
            [line] = ask(lion, mode, text, [(path, scene.image, box if mode == "describe" else None)], args)
            write(file, line)
            if args.explain and mode != "tags":
                draw_explanation(scene.image, line["explanation"]).save(
                    unused(path.with_stem(f"scene-{mode}-explained"))
                )
            print(f"{mode:9} {text:32} {readable(mode, line)}   (true: {truth})")
            if mode == "locate" and line["box"]:
                boxes.append((Box(*line["box"]), expression, "#e6194b"))
    draw_boxes(scene.image, boxes).save(drawing := unused(path.with_stem(f"{path.stem}-box")))
    print(f"{drawing}: where {expression} is, and where the model sees it")
    return 0


def infer(args: argparse.Namespace) -> int:
    check_flags(args)
    args.out = Path(args.out)
    if args.data:
        source, opened = Records(args.data, args.roots), cache(partial(open_lion, args))
        lacking = tag_records(source, args.out, args.batch_size, lambda images: opened().tag(images))
        tqdm.write(f"{args.out}: {len(source)} records" + f", {lacking} of them untagged" * (lacking > 0))
        return int(lacking > 0)
    if args.serve:
        return serve(open_lion(args), lambda: toy.scene(random.randrange(10**9), "test").image, args.port)
    if not args.images:
        return demonstrate(args)
    paths, lion, (mode, text) = find_images(args.images), open_lion(args), args.job or ("caption", "")
    file, done = unused(args.out / "results.jsonl"), 0
    for start in trange(0, len(paths), args.batch_size, unit_scale=args.batch_size, disable=None):
        # 1. Open the pictures. One that cannot be used is reported and left out.
        pictures: list[Picture] = []
        for path in paths[start : start + args.batch_size]:
            try:
                with reading(path):
                    image = open_image(path)
                    size = image.size if args.pixels else (1, 1)
                    pictures.append((path, image, box_of(text, *size) if mode == "describe" else None))
            except ValueError as error:
                if len(paths) == 1:
                    raise
                tqdm.write(str(error), file=sys.stderr)

        # 2. Ask, write and print. A file's name need not be text: its bytes become escapes, which JSON reads back.
        lines = ask(lion, mode, text, pictures, args) if pictures else []
        for (path, image, _), line in zip(pictures, lines, strict=True):
            args.out.mkdir(parents=True, exist_ok=True)
            with open(file, "a" if done else "w", encoding="utf-8", errors="backslashreplace") as out:
                write(out, line)
            done += 1
            tqdm.write(printable(f"{path}: {readable(mode, line)}"))

            # 3. Draw box and explanation. A long name is cut to make room.
            stem = path.stem.encode(errors="ignore")[:200].decode(errors="ignore")
            if args.explain:
                draw_explanation(image, line["explanation"]).save(unused(args.out / f"{stem}-explained.png"))
            if line["box"]:
                label = line["answer"] if mode == "describe" else text
                draw_boxes(image, [(Box(*line["box"]), label)]).save(unused(args.out / f"{stem}-box.png"))
    if not done:
        raise ValueError(f"not one of the {len(paths)} pictures could be read")
    tqdm.write(f"{file}: {done} pictures" + f", {len(paths) - done} failed" * (done < len(paths)))
    return int(done < len(paths))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", help="pictures, folders or globs")
    mode = partial(parser.add_mutually_exclusive_group().add_argument, dest="job")
    job = lambda mode: lambda text: (mode, text.strip())
    mode("--caption", action="store_const", const=("caption", ""), help="describe the picture in a sentence (default)")
    mode("--ask", metavar="QUESTION", type=job("ask"), help="answer a question")
    mode("--locate", metavar="EXPRESSION", type=job("locate"), help="find what the words refer to")
    mode("--describe", metavar="X1,Y1,X2,Y2", type=job("describe"), help="say what is in the box, given in fractions")
    mode("--prompt", metavar="TEXT", type=lambda text: ("prompt", text), help="ask in words of your own, as they are")
    mode("--tags", action="store_const", const=("tags", ""), help="only RAM's tags")
    add("--task", help="the router's row for --prompt: image (default) or region")
    add("--max-new-tokens", type=int, metavar="N", help="how long an answer may be (10 to 40; --official: 256)")
    add("--data", type=Path, help="with --tags: a file of training records, JSON or JSON lines, to tag")
    add("--images", type=Path, nargs="+", dest="roots", default=[Path()], help="the folders of --data's pictures")
    add("--pixels", action="store_true", help="--describe gives pixels of the upright picture")
    tags = parser.add_mutually_exclusive_group()
    tags.add_argument("--use-tags", metavar='"A, B"', type=split_tags, help="these tags in place of RAM's")
    tags.add_argument("--no-tags", action="store_true", help="ask without tags")
    add("--explain", action="store_true", help="draw where each answer comes from, and write the numbers")
    add("--serve", action="store_true", help="a page on this machine to choose pictures and ask in")
    add("--port", type=int, default=8000, help="of --serve")
    add("--official", action="store_true", help="the release's settings: 5 beams, repetition penalty 1.5")
    add("--weights", type=Path, default=Path("tiny"), help="a folder of weights.py or train.py")
    add("--seed", type=int, help="which scene to draw where no picture is given; default: a new one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help=f"{', '.join(DTYPES)}; auto: bfloat16 where it is fast")
    add("--batch-size", type=int, default=8, help="pictures at a time")
    add("--out", default="out", help="folder of results.jsonl and drawn boxes, or file")
    return run(infer, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
