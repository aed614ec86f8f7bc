"""Scenes of the toy world: coloured shapes on a light, noisy ground, about which everything is known.

A scene holds 2 to 5 things. No two of them share both colour and shape, so "the red circle" is never ambiguous. Large
things may overlap a little. Positions lie on a grid of 24 units, so a box needs only 25 coordinates to be exact. Each
coordinate is one piece of the vocabulary: "[0.042,0.125,0.375,0.458]".

`scene(7, "train")` is a pure function of seed and split. No arrangement of things occurs in both splits.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..box import Box

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 215),
    "yellow": (225, 195, 30), "purple": (150, 50, 170), "black": (35, 35, 35),
}  # fmt: skip
SIDES = {"small": (4, 5), "large": (7, 8)}  # in grid units
TAGS = (*SHAPES, *COLOURS, *SIDES)
GRID, CELL, UNIT = 24, 8, 4  # the image in units, a cell in units, a unit in pixels
MOST = 5  # things in a scene

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Thing:
    """One shape. `left`, `top` and `side` are in grid units; `cell` is 0 to 8 in reading order."""

    shape: str
    colour: str
    size: str
    cell: int
    left: int
    top: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def words(self) -> set[str]:
        return {self.shape, self.colour, self.size}

    @property
    def box(self) -> Box:
        edges = (self.left, self.top, self.left + self.side, self.top + self.side)
        return Box(*(round(edge / GRID, 3) for edge in edges))

    def centre(self, axis: int) -> float:
        return (self.left, self.top)[axis] + self.side / 2


@dataclass(frozen=True)
class Scene:
    """Things in reading order, which is also the order of drawing."""

    seed: int
    split: Split
    things: tuple[Thing, ...]

    @cached_property
    def image(self) -> Image.Image:
        rng = np.random.default_rng(zlib.crc32(f"{self.split} {self.seed}".encode()))
        side = GRID * UNIT
        ground = Image.new("RGB", (side, side), tuple(rng.integers(225, 256, 3).tolist()))
        for thing in self.things:
            colour = np.array(COLOURS[thing.colour]) + rng.integers(-15, 16, 3)
            paint(ImageDraw.Draw(ground), thing, tuple(colour.clip(0, 255).tolist()))
        noise = rng.standard_normal((side, side, 3), dtype=np.float32) * rng.uniform(2, 8)
        return Image.fromarray((np.asarray(ground) + noise).clip(0, 255).astype(np.uint8))


def paint(draw: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...]) -> None:
    x, y, side = thing.left * UNIT, thing.top * UNIT, thing.side * UNIT
    right, bottom = x + side - 1, y + side - 1
    match thing.shape:
        case "circle":
            draw.ellipse((x, y, right, bottom), fill=fill)
        case "square":
            draw.rectangle((x, y, right, bottom), fill=fill)
        case "triangle":
            draw.polygon(((x, bottom), (right, bottom), (x + side / 2, y)), fill=fill)
        case "cross":
            arm = round(side * 0.34)
            draw.rectangle((x + arm, y, right - arm, bottom), fill=fill)
            draw.rectangle((x, y + arm, right, bottom - arm), fill=fill)


def scene(seed: int, split: Split) -> Scene:
    """The scene of this seed. The checksum of an arrangement decides its split: one in ten is held out."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = random.Random(f"{split} {seed}")
    while True:
        things = arrange(rng)
        arrangement = sorted((t.shape, t.colour, t.size, t.cell) for t in things)
        if (zlib.crc32(repr(arrangement).encode()) % 10 == 0) == (split == "test"):
            return Scene(seed, split, things)


def arrange(rng: random.Random) -> tuple[Thing, ...]:
    count = rng.randint(2, MOST)
    names = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    things = []
    for (shape, colour), cell in zip(names, sorted(rng.sample(range(9), count)), strict=True):
        size = rng.choice(tuple(SIDES))
        side = rng.choice(SIDES[size])
        slack = max(1, CELL - side)  # a large thing may leave its cell by one unit
        row, column = divmod(cell, 3)
        left, top = (
            min(max(0, at * CELL + rng.randint(-(size == "large"), slack)), GRID - side) for at in (column, row)
        )
        things.append(Thing(shape, colour, size, cell, left, top, side))
    return tuple(things)
