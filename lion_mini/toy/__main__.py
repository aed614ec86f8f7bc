"""`python -m lion_mini.toy --show 6` draws scenes with their boxes, tags and records."""

import argparse
import random
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..files import run
from ..images import draw_boxes
from .questions import records
from .world import Split, scene


def show(seeds: Sequence[int], split: Split) -> Image.Image:
    """A sheet with one row per scene: the image with boxes and names, and its records."""
    sheet = Image.new("RGB", (1180, 400 * len(seeds)), "white")
    for y, seed in zip(range(0, sheet.height, 400), seeds, strict=True):
        this = scene(seed, split)
        enlarged = this.image.resize((384, 384), Image.Resampling.NEAREST)
        sheet.paste(draw_boxes(enlarged, [(thing.box, thing.name) for thing in this.things]), (8, 8 + y))
        about = records(this, random.Random(seed))
        lines = [f"scene({seed}, {split!r})   tags: {about[0]['tags']}"]
        lines += [f"{r['subkind'] or r['kind']}: {r['question']}  ->  {r['answer']}" for r in about]
        text = "\n".join(textwrap.fill(line, 120, subsequent_indent="    ") for line in lines)
        ImageDraw.Draw(sheet).text((402, 10 + y), text, fill="black", font_size=12)
    return sheet


def main(args: argparse.Namespace) -> None:
    show(range(args.seed, args.seed + args.show), args.split).save(args.out)
    print(f"{args.show} scenes are in {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw scenes of the toy world with their boxes, tags and records.")
    parser.add_argument("--show", type=int, metavar="N", default=4, help="how many scenes")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    args = parser.parse_args()
    if args.show < 1:
        parser.error(f"--show must be at least 1, not {args.show}")
    sys.exit(run(main, args))
