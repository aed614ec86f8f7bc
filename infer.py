"""Ask LION about pictures.

    python infer.py                                                         the built-in tiny LION, on a new scene
    python infer.py photo.jpg --weights weights/xl                          a caption
    python infer.py photo.jpg --weights weights/xl --ask "what is he holding?"
    python infer.py photo.jpg --weights weights/xl --locate "the dog on the left"      a box, drawn
    python infer.py photo.jpg --weights weights/xl --describe 0.1,0.2,0.4,0.9          what is in the box
    python infer.py photos/ "more/*.png" --weights weights/xl --tags                   RAM's tags alone
    python infer.py --tags --data train.json --images coco --out tagged.jsonl --weights weights/xl
                                        a training set's records with RAM's tags, one per line; goes on where it stopped

Answers are printed; `--out` (default: out) gets results.jsonl, one line per picture with tags, prompt, raw text,
answer, box and score, and the pictures with their boxes. A picture that cannot be read is reported, and the others go
on. Exit code 0: all is done; 1: some pictures failed; 2: nothing could be done.
"""

import argparse
import glob
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm, trange

from lion_mini import GENERATION, Box, Lion, toy
from lion_mini.data.records import Records
from lion_mini.data.records import check as check_record
from lion_mini.images import draw_boxes, open_image
from lion_mini.pipeline import DTYPES, Answer
from lion_mini.text.prompts import EVAL_TEMPLATES, render

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Job:
    """What to do with every picture."""

    mode: str  # caption, ask, locate, describe or tags
    text: str = ""
    box: tuple[float, float, float, float] | None = None
    pixels: bool = False

    @property
    def task(self) -> str:
        return "region" if self.mode in ("locate", "describe") else "image"

    def box_in(self, image: Image.Image) -> Box | None:
        """The box that `--describe` gave, in fractions of this picture; ValueError if it is not inside."""
        if self.box is None:
            return None
        across, down = image.size if self.pixels else (1, 1)
        x1, y1, x2, y2 = self.box
        return Box.checked(x1 / across, y1 / down, x2 / across, y2 / down)

    def question(self, image: Image.Image) -> str:
        if self.mode == "locate":
            return render(EVAL_TEMPLATES["rec"], expression=self.text)
        if self.mode == "ask":
            return render(EVAL_TEMPLATES["vqa"], question=self.text)
        box = self.box_in(image)
        return EVAL_TEMPLATES["caption"] if box is None else render(EVAL_TEMPLATES["reg"], box=box)


def job_from(args: argparse.Namespace) -> Job:
    for flag in ("ask", "locate"):
        text = getattr(args, flag)
        if text is not None:
            if not text.strip():
                raise ValueError(f"--{flag} is empty: say what you want to know")
            return Job(flag, text.strip())
    if args.describe is None:
        return Job("tags" if args.tags else "caption")
    try:
        x1, y1, x2, y2 = map(float, args.describe.split(","))
    except ValueError:
        raise ValueError(f"--describe {args.describe}: expected four numbers, x1,y1,x2,y2") from None
    if not args.pixels:
        Box.checked(x1, y1, x2, y2)
    return Job("describe", box=(x1, y1, x2, y2), pixels=args.pixels)


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Files, the pictures of folders, and what globs match, in order, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            names = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        else:
            names = [path] if path.exists() else sorted(Path(p) for p in glob.glob(pattern, recursive=True))
        if not names:
            raise ValueError(f"{pattern}: no {'picture in this folder' if path.is_dir() else 'such file or folder'}")
        found |= dict.fromkeys(names)
    return list(found)


def record(job: Job, path: Path, image: Image.Image, answer: Answer) -> dict:
    """One line of results.jsonl; boxes as fractions and as pixels of the upright picture."""
    box = Box.parse(answer.text) if job.mode == "locate" else job.box_in(image)
    return {
        "image": str(path),
        "tags": [[tag, round(score, 4)] for tag, score in answer.tags],
        "prompt": answer.prompt,
        "text": answer.text,
        "answer": (box.to_text() if box else None) if job.mode == "locate" else answer.text,
        "box": None if box is None else [box.x1, box.y1, box.x2, box.y2],
        "box_pixels": None if box is None else [round(x, 1) for x in box.to_pixels(*image.size)],
        "score": round(answer.score, 4),
    }


def readable(job: Job, line: dict) -> str:
    if job.mode == "tags":
        return ", ".join(tag for tag, _ in line["tags"]) or "(no tags)"
    if job.mode != "locate":
        return line["answer"] or "(an empty answer)"
    if line["box"] is None:
        return f"no box: the answer was {line['text']!r}"
    return f"{line['answer']}, pixels {line['box_pixels']}"


def look(
    model: Lion, job: Job, paths: Sequence[Path], args: argparse.Namespace
) -> Iterator[tuple[Path, Image.Image | None, dict | str]]:
    """Per path its picture and result, or None and what was wrong; `--batch-size` pictures are answered at a time."""
    given = None if args.use_tags is None else [tag.strip() for tag in args.use_tags.split(",") if tag.strip()]
    for start in range(0, len(paths), args.batch_size):
        readable_ones = []
        for path in paths[start : start + args.batch_size]:
            try:
                image = open_image(path)
                readable_ones.append((path, image, job.question(image)))
            except ValueError as error:
                yield path, None, str(error) if str(path) in str(error) else f"{path}: {error}"
        if not readable_ones:
            continue
        names, images, questions = zip(*readable_ones, strict=True)
        if job.mode == "tags":
            tagged = model.scored_tags(images)
            answers = [Answer(", ".join(tag for tag, _ in tags), "", tags, 0.0) for tags in tagged]
        else:
            tags = None if given is None else [given] * len(images)
            settings = GENERATION["official" if args.official else "answer" if job.mode == "ask" else job.mode]
            answers = model.respond(images, questions, [job.task] * len(images), settings, tags)
        for path, image, answer in zip(names, images, answers, strict=True):
            yield path, image, record(job, path, image, answer)


def opened(args: argparse.Namespace, pictures: int) -> Lion:
    model = Lion.from_pretrained(args.weights, args.device, DTYPES[args.dtype])
    if args.use_tags is not None and model.config.tags == "none":
        raise ValueError(f"--use-tags: {args.weights} answers without tags in its prompt")
    if args.no_tags:
        model.config = replace(model.config, tags="none")
    if args.dtype == "auto":
        chosen = str(model.dtype).removeprefix("torch.")
        print(f"--dtype auto: {args.weights} computes in {chosen} on {model.device}", file=sys.stderr)
    return model


def tag_records(args: argparse.Namespace) -> int:
    """Write the records of `--data` to `--out`, one per line in their order, with a field `tags` where they had none.

    Pictures that several records share are looked at once. A record whose picture cannot be read stays as it is.
    """
    if args.data.resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out} is the file that --data reads: choose another")
    source = Records(args.data, args.root, ("image", "region"))
    done, failed = resume_after(args.out, source)
    model = opened(args, len(source) - done) if done < len(source) else None
    known: dict[Path, Any] = {}
    with open(args.out, "a", encoding="utf-8", errors="surrogateescape") as out:
        for start in trange(done, len(source), args.batch_size, unit_scale=args.batch_size, disable=None):
            lines: list[tuple[Any, str, Path | None]] = []
            new: dict[Path, Image.Image] = {}
            for i in range(start, min(start + args.batch_size, len(source))):
                (record, line), path = stored(source, i), None
                try:
                    fields = check_record(source.raw(i) if record is None else record)
                    path = None if fields["tags"] is not None else source.picture(fields["image"])
                    if path is not None and path not in known:
                        new[path], known[path] = open_image(path), []
                except ValueError as error:
                    failed, path = failed + untagged(record), None
                    tqdm.write(f"{args.data}, record {i + 1}: {error}", file=sys.stderr)
                lines.append((record, line, path))
            if new and model is not None:
                known |= zip(new, model.tag(list(new.values())), strict=True)
            for record, line, path in lines:
                out.write((line if path is None else written(record | {"tags": known[path]})) + "\n")
            out.flush()
    tqdm.write(f"{args.out}: {len(source)} records" + f", {failed} of them untagged" * (failed > 0))
    return int(failed > 0)


def resume_after(out: Path, source: Records) -> tuple[int, int]:
    """How many records `out` has already, and how many of them without tags; the next one's torn line is cut off."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: with --data it is the file to write")
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        return 0, 0
    with open(out, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        whole = [line.rstrip("\n") for line in file if line.endswith("\n")]
    record, line = stored(source, min(max(len(whole), 1), len(source)) - 1)
    if whole:
        ours = whole[-1] == line or without_tags(parsed(whole[-1])) == without_tags(record)
    else:
        torn = out.read_text(encoding="utf-8", errors="surrogateescape")
        ours = line.startswith(torn) or torn.startswith(line[:-1])  # its tags would follow
    if not ours or len(whole) > len(source):
        raise ValueError(f"--out {out} holds something else than the first records of --data: choose another file")
    os.truncate(out, sum(len(line.encode("utf-8", "surrogateescape")) + 1 for line in whole))
    return len(whole), sum(map(untagged, map(parsed, whole)))


def stored(source: Records, index: int) -> tuple[Any, str]:
    """A record, and the line that it is written as; one that is no JSON stays the text that it is."""
    try:
        record = source.raw(index)
        return record, written(record)
    except ValueError:
        with open(source.path, "rb") as file:
            file.seek(source.starts[index])
            return None, file.readline().decode("utf-8", "surrogateescape").strip()


def untagged(record: Any) -> bool:
    return not isinstance(record, dict) or record.get("tags") is None


def written(record: Any) -> str:
    """As text, but for half a surrogate pair, which is none: that stays the escape that json reads back."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def without_tags(record: Any) -> Any:
    return {key: value for key, value in record.items() if key != "tags"} if isinstance(record, dict) else record


def demonstrate(args: argparse.Namespace) -> int:
    """Draw a scene that no training saw, and let the model say all that it can about it."""
    seed = random.randrange(10**9) if args.seed is None else args.seed
    scene = toy.scene(seed, "test")
    model = opened(args, pictures=1)
    args.out.mkdir(parents=True, exist_ok=True)
    scene.image.save(args.out / "scene.png")
    rng = random.Random(seed)
    thing = rng.choice(scene.things)
    corners = thing.box.x1, thing.box.y1, thing.box.x2, thing.box.y2
    _, question, truth = rng.choice(list(toy.questions(scene.things, rng)))
    expression = toy.expression(scene.things, thing, rng)
    jobs = [
        (Job("tags"), ", ".join(sorted(set().union(*(t.words for t in scene.things))))),
        (Job("caption"), toy.caption(scene.things)),
        (Job("ask", question), truth),
        (Job("locate", expression), thing.box.to_text()),
        (Job("describe", box=corners), f"the {thing.size} {thing.name}"),
    ]
    tqdm.write(f"scene {seed}, drawn to {args.out / 'scene.png'}")
    boxes = [(thing.box, "true", "#3cb44b")]
    with open(args.out / "results.jsonl", "w", encoding="utf-8") as out:
        for job, truth in jobs:
            [(_, _, line)] = look(model, job, [args.out / "scene.png"], args)
            if isinstance(line, str):
                raise ValueError(line)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            asked = job.text or (line["box"] and Box(*line["box"]).to_text()) or ""
            tqdm.write(f"{job.mode:9} {asked:32} {readable(job, line)}   (true: {truth})")
            if job.mode == "locate" and line["box"] is not None:
                boxes.append((Box(*line["box"]), expression, "#e6194b"))
    draw_boxes(scene.image, boxes).save(args.out / "scene-box.png")
    tqdm.write(f"{args.out / 'scene-box.png'}: where {expression} is, and where the model sees it")
    return 0


def check(args: argparse.Namespace) -> None:
    if args.images and args.data is not None:
        raise ValueError("give pictures to look at, or a file of records with --data, not both")
    if args.data is not None and not args.tags:
        raise ValueError("--data is for --tags: it adds them to a training set's records")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: there are {', '.join(DTYPES)}; T5 overflows in float16")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.use_tags is not None and not args.use_tags.strip(" ,"):
        raise ValueError("--use-tags is empty: for no tags at all say --no-tags")
    if args.pixels and args.describe is None:
        raise ValueError("--pixels is for --describe: it says what the four numbers are")
    for flag in ("caption", "ask", "locate", "describe", "tags"):
        if getattr(args, flag) and not args.images and args.data is None:
            raise ValueError(f"--{flag} needs a picture: name one, or a folder of them")
    if args.tags and (args.no_tags or args.use_tags is not None or args.official):
        raise ValueError("--tags asks the tagger alone: --use-tags, --no-tags and --official do not go with it")


def run(args: argparse.Namespace) -> int:
    job = job_from(args)
    check(args)
    if args.data is not None:
        return tag_records(args)
    if not args.images:
        return demonstrate(args)
    paths = find_images(args.images)
    model = opened(args, len(paths))
    failed, out = 0, None
    drawn: set[str] = set()
    bar = tqdm(total=len(paths), unit="image", disable=None if len(paths) > 1 else True)
    for path, image, line in look(model, job, paths, args):
        bar.update()
        if image is None or isinstance(line, str):
            if len(paths) == 1:
                raise ValueError(str(line))
            failed += 1
            tqdm.write(str(line), file=sys.stderr)
            continue
        if out is None:
            args.out.mkdir(parents=True, exist_ok=True)
            # A file's name need not be text: json reads such bytes back from the escapes that they become.
            out = open(args.out / "results.jsonl", "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()
        tqdm.write(f"{path}: {readable(job, line)}".encode("utf-8", "backslashreplace").decode())
        if line["box"] is not None:
            names = (f"{path.stem}-{i}" if i else path.stem for i in count())
            drawn.add(name := next(name for name in names if name not in drawn))
            label = job.text if job.mode == "locate" else line["answer"]
            draw_boxes(image, [(Box(*line["box"]), label)]).save(args.out / f"{name}-box.png")
    bar.close()
    if out is None:
        raise ValueError(f"not one of the {len(paths)} pictures could be read")
    out.close()
    tqdm.write(f"{args.out / 'results.jsonl'}: {len(paths) - failed} pictures" + f", {failed} failed" * (failed > 0))
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="pictures, folders or globs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--caption", action="store_true", help="describe the picture in a sentence (the default)")
    mode.add_argument("--ask", metavar="QUESTION", help="answer a question")
    mode.add_argument("--locate", metavar="EXPRESSION", help="find what the words refer to")
    mode.add_argument("--describe", metavar="X1,Y1,X2,Y2", help="say what is in the box, in fractions of the picture")
    mode.add_argument("--tags", action="store_true", help="only RAM's tags")
    parser.add_argument("--data", type=Path, help="with --tags: a file of training records, JSON or JSON lines, to tag")
    parser.add_argument("--images", type=Path, dest="root", default=Path(), help="the folder of --data's pictures")
    parser.add_argument("--pixels", action="store_true", help="--describe gives pixels of the upright picture")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--use-tags", metavar='"A, B"', help="these tags in place of RAM's")
    source.add_argument("--no-tags", action="store_true", help="ask without tags")
    parser.add_argument(
        "--official", action="store_true", help="the release's settings: 5 beams, repetition penalty 1.5"
    )
    parser.add_argument("--weights", type=Path, default=Path("tiny"), help="a folder of weights.py or train.py")
    parser.add_argument("--seed", type=int, help="which scene to draw where no picture is given; default: a new one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)}; auto: bfloat16 where it is fast")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of results.jsonl and drawn boxes, or file"
    )
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
