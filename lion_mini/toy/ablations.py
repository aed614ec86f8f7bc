"""The paper's ablations in small: all from the same frozen parts, by the same recipes, measured on the same scenes.

    python -m lion_mini.toy.ablations               # 8 trainings per seed, 3 seeds; the same command continues
    python -m lion_mini.toy.ablations --steps 20    # flags that are not its own go to train.py

The single stage has as many steps as all three stages; stage 1 alone has fewer, as in the paper.
"""

import argparse
import fcntl
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image, ImageDraw

from .. import files
from ..evaluation.parts import change
from ..pipeline import Lion, read_config
from ..training.report import say
from .questions import EXTREMES, RELATIONS
from .scores import Reply, ask, levels
from .training import copy_stage0
from .world import scene

TRAIN = Path(__file__).parents[2] / "train.py"
RUNS = {  # the folders that each starts from, and its flags
    "stage1": (["stage0"], "--stage 1"),
    "stage2": (["stage0"], "--stage 2"),
    "no-aggregator": (["stage0"], "--stage 2 --no-aggregator"),
    "single-stage": (["stage0"], "--stage 3 --single-stage --tags none"),
    "no-router": (["stage1", "stage2"], "--stage 3 --no-router --tags none"),
    "no-tags": (["stage1", "stage2"], "--stage 3 --tags none"),
    "plain": (["stage1", "stage2"], "--stage 3 --tags plain"),
    "full": (["stage1", "stage2"], "--stage 3"),
}
WRONG = {"plain-wrong": "plain", "full-wrong": "full"}  # measured with the tags of another scene
MODELS = (*RUNS, *WRONG)
IMAGE, REC = ([f"{level}, held-{half}" for half in ("in", "out")] for level in ("image level", "REC"))
SPACE, WAYS = "counting, relation", ["REC, by attributes", "REC, by order", "REC, by relation"]
COLUMNS = (*IMAGE, SPACE, "ground", *REC, *WAYS, "REG")
COLOURS = "#c3cbdb", "#7f96c4", "#e8a86b", "#274690"
TABLES = {  # per title its models, and the paper's claims: a sum over models that is positive, in these columns
    "Table 3, without tags: one stage or three": (
        {"single-stage": "single stage", "no-router": "stage-wise", "no-tags": "with router"}, {
        "Stage-wise tuning helps both levels": ({"no-router": 1, "single-stage": -1}, [*IMAGE, *REC]),
        "The router helps held-out image level and REC": ({"no-tags": 1, "no-router": -1}, [IMAGE[1], *REC])}),
    "Table 4: two levels of visual knowledge": (
        {"stage1": "image level alone", "no-tags": "with grounding", "full": "and with tags"}, {
        "Grounding helps image level, space and number above all": ({"no-tags": 1, "stage1": -1}, [*IMAGE, SPACE]),
        "Tags help where the picture does not tell": ({"full": 1, "no-tags": -1}, [*IMAGE, "ground"])}),
    "Section 3.2: tags behind a soft prompt": (
        {"plain": "plain", "plain-wrong": "plain, wrong tags", "full": "soft", "full-wrong": "soft, wrong tags"}, {
        "Another picture's tags cost less with a soft prompt (the loss without one, minus the loss with it)": (
            {"plain": 1, "plain-wrong": -1, "full": -1, "full-wrong": 1}, [*IMAGE, *REC])}),
    "Figure 6: stage 2 without the aggregator": (
        {"no-aggregator": "without aggregator", "stage2": "with aggregator"}, {
        "The aggregator helps REC, however expressed": ({"stage2": 1, "no-aggregator": -1}, [*REC, *WAYS])}),
}  # fmt: skip


def main(args: argparse.Namespace) -> None:
    if not TRAIN.is_file():
        raise ValueError(f"{TRAIN} is missing: run this in a checkout of the project")
    # 1. The start.
    if not (start := args.out / "stage0").exists():
        copy_stage0(start)
    # 2. Wait for a training that outlived a killed command: it inherited the lock.
    with open(args.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # 3. Train and measure one model after the other; report all so far.
        for seed, name in product(range(args.seeds), MODELS):
            folder = args.out / f"seed{seed}"
            if name in RUNS:
                train(folder, name, [*args.flags, "--seed", str(seed)], lock.fileno())
            measure(folder, name, args.scenes)
            report(args)


def train(folder: Path, name: str, more: Sequence[str], lock: int) -> None:
    (starts, flags), out = RUNS[name], folder / name
    words = ["train.py", *flags.split(), *more, "--init"]
    if (out / "config.json").exists():
        if shlex.join(words) not in read_config(out).made_by.split("\n")[-1]:
            raise ValueError(f"{out} was not trained by {shlex.join(words)} ...: use the same flags, or another --out")
        return
    words += [str((folder.parent if start == "stage0" else folder) / start) for start in starts]
    words += ["--resume", "--out", str(out)]
    say(f"python {shlex.join(words)}")
    # Without subprocess.run, which kills at Ctrl-C: train.py saves a checkpoint then.
    with subprocess.Popen([sys.executable, str(TRAIN), *words[1:]], pass_fds=[lock]) as process:
        if code := process.wait():
            raise ValueError(f"{out}: train.py ended with exit code {code}; run this again to continue")


def measure(folder: Path, name: str, scenes: int) -> None:
    path = folder / f"{name}.json"
    if not path.exists() or files.read_json(path)["scenes"] != scenes:
        lion = Lion.from_pretrained(folder / WRONG.get(name, name))
        change(lion.model, "tags of another picture" if name in WRONG else "none")
        replies = ask(lion, [scene(seed, "test") for seed in range(scenes)])
        with files.atomic_write(path) as new:
            new.write_text(json.dumps({"scenes": scenes, "percent": percents(replies)}, indent=1), encoding="utf-8")


def percents(replies: Sequence[Reply]) -> dict[str, float]:
    """Right answers by kind of question, level and way of expression: in all scenes, and in each half of them."""
    right: dict[str, list[bool]] = {}
    for reply in replies:
        names = [reply.kind, *levels([reply])]
        names += {"counting": [SPACE], "relation": [SPACE], "rec": [way(reply.record["question"])]}.get(reply.kind, [])
        for name in names:
            for column in (name, f"{name}, held-{'out' if reply.scene.held_out else 'in'}"):
                right.setdefault(column, []).append(reply.right)
    return {column: 100 * fmean(values) for column, values in right.items()}


def way(question: str) -> str:
    """How a REC question's expression was made: its words tell, its record does not."""
    by_order, by_relation = (re.search(rf"\b({'|'.join(words)})\b", question) for words in (EXTREMES, RELATIONS))
    return WAYS[1 if by_order else 2 if by_relation else 0]


def report(args: argparse.Namespace) -> None:
    """Write ablations.json, ablations.md and ablations.png with all that is measured so far."""
    seeds, found = range(args.seeds), dict[str, dict[int, dict[str, float]]]()
    for name, seed in product(MODELS, seeds):
        path = args.out / f"seed{seed}" / f"{name}.json"
        if path.exists() and (measured := files.read_json(path))["scenes"] == args.scenes:
            found.setdefault(name, {})[seed] = measured["percent"]
    whole = sum(all(seed in found.get(name, ()) for name in MODELS) for seed in seeds)
    values = lambda signs, column: [
        sum(sign * found[name][seed][column] for name, sign in signs.items())
        for seed in seeds
        if all(column in found.get(name, {}).get(seed, ()) for name in signs)
    ]
    lines = [f"{args.scenes} test scenes; {whole} of {args.seeds} seeds are complete. The tables show right answers in"]
    lines += [
        "percent, mean ± standard deviation over the seeds: captions and REG word for word, boxes that overlap by"
    ]
    lines += ["half. Under them are differences between models of one seed in points, mean ± standard error."]
    for title, (labels, claims) in TABLES.items():
        hidden = {SPACE, *WAYS}.difference(*(places for _, places in claims.values()))
        columns = [name for name in COLUMNS if name not in hidden and any(values({model: 1}, name) for model in labels)]
        lines += ["", f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for model, label in labels.items():
            lines.append(f"| {label} | {' | '.join(spread(values({model: 1}, column)) for column in columns)} |")
        for text, (signs, places) in claims.items():
            lines += ["", f"{text}:", "", *(f"- {column}: {verdict(values(signs, column))}" for column in places)]
    texts = {"json": json.dumps({"scenes": args.scenes, "percent": found}, indent=1), "md": "\n".join(lines)}
    for ending, text in texts.items():
        with files.atomic_write(args.out / f"ablations.{ending}") as new:
            new.write_text(text + "\n", encoding="utf-8")
    with files.atomic_write(args.out / "ablations.png") as new:
        draw(values).save(new, "png")


def spread(values: Sequence[float]) -> str:
    error = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{error}" if values else "–"


def verdict(values: Sequence[float]) -> str:
    """The mean difference of the paired seeds, and whether it is greater than its standard error."""
    if len(values) < 2:
        return f"too few seeds to say, {len(values)}"
    error = stdev(values) / sqrt(len(values))
    holds = "holds" if fmean(values) > error else "does not hold"
    return f"{fmean(values):+.1f} ± {error:.1f}, {len(values)} seeds: {holds}"


def draw(values: Callable[[dict[str, int], str], list[float]]) -> Image.Image:
    """The columns of each table's claims as bars, with the standard deviation over the seeds."""
    pen = ImageDraw.Draw(picture := Image.new("RGB", (1200, 700), "white"))
    for i, (title, (labels, claims)) in enumerate(TABLES.items()):
        left, right, base = 45 + 600 * (i % 2), 585 + 600 * (i % 2), 300 + 350 * (i // 2)
        pen.text((left, base - 285), title, "black", font_size=17)
        for percent in (0, 50, 100):
            pen.line((left, base - 2 * percent, right, base - 2 * percent), "#dddddd")
            pen.text((left - 6, base - 2 * percent), str(percent), "#666666", anchor="rm", font_size=11)
        columns = [column for column in COLUMNS if any(column in places for _, places in claims.values())]
        slot = (right - left) / len(columns)
        for k, (model, colour) in enumerate(zip(labels, COLOURS, strict=False)):
            corner, width = left + 140 * k, 0.84 * slot / len(labels)
            pen.rectangle((corner, base - 251, corner + 11, base - 240), colour)
            pen.text((corner + 17, base - 245), labels[model], "black", anchor="lm", font_size=13)
            for j, column in enumerate(columns):
                if shares := values({model: 1}, column):
                    x, top = left + slot * (j + 0.08) + width * (k + 0.5), base - 2 * fmean(shares)
                    error = 2 * stdev(shares) if len(shares) > 1 else 0.0
                    pen.rectangle((x - width / 2 + 1, top, x + width / 2 - 1, base), colour)
                    pen.line((x, top - error, x, top + error), "black", 2)
                    pen.text((x, top - error - 3), f"{fmean(shares):.1f}", "black", anchor="ms", font_size=11)
        for j, column in enumerate(columns):
            name = column.replace(", ", "\n")
            pen.text((left + slot * (j + 0.5), base + 6), name, "black", anchor="ma", align="center", font_size=12)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of all runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--scenes", type=int, default=1000, help="how many test scenes, every second one held out")
    known, flags = parser.parse_known_args()
    if min(known.seeds, known.scenes) < 1:
        parser.error("--seeds and --scenes must be at least 1")
    sys.exit(files.run(main, argparse.Namespace(**vars(known), flags=flags)))
