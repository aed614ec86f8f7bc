"""Scenes of the toy world: coloured shapes on a light, noisy ground, about which everything is known.

A scene holds 2 to 5 things. No two of them share both colour and shape, so "the red circle" is never ambiguous. Large
things may overlap a little. Positions lie on a grid of 24 units, so a box needs only 25 coordinates to be exact.
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
COORDINATES = tuple(f"{i / GRID:.3f}" for i in range(GRID + 1))
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
    def edges(self) -> tuple[int, int, int, int]:  # left, top, right, bottom
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def box(self) -> Box:
        return Box(*(round(edge / GRID, 3) for edge in self.edges))

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
    x1, y1, x2, y2 = (edge * UNIT for edge in thing.edges)
    right, bottom, arm = x2 - 1, y2 - 1, round((x2 - x1) * 0.34)
    if thing.shape == "circle":
        draw.ellipse((x1, y1, right, bottom), fill)
    elif thing.shape == "square":
        draw.rectangle((x1, y1, right, bottom), fill)
    elif thing.shape == "triangle":
        draw.polygon(((x1, bottom), (right, bottom), ((x1 + x2) / 2, y1)), fill)
    else:
        draw.rectangle((x1 + arm, y1, right - arm, bottom), fill)
        draw.rectangle((x1, y1 + arm, right, bottom - arm), fill)


def scene(seed: int, split: Split) -> Scene:
    """The scene of this seed. The checksum of an arrangement decides its split: one in ten is held out."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = random.Random(f"{split} {seed}")
    while True:
        count = rng.randint(2, MOST)
        names = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
        cells = sorted(rng.sample(range(9), count))
        things = tuple(place(*name, cell, rng) for name, cell in zip(names, cells, strict=True))
        arrangement = sorted((t.shape, t.colour, t.size, t.cell) for t in things)
        if (zlib.crc32(repr(arrangement).encode()) % 10 == 0) == (split == "test"):
            return Scene(seed, split, things)


def place(shape: str, colour: str, cell: int, rng: random.Random) -> Thing:
    """A thing of random size and position in its cell, which a large one may leave by one unit."""
    side = rng.choice(SIDES[size := rng.choice(tuple(SIDES))])
    corner = (at * CELL + rng.randint(-(size == "large"), max(1, CELL - side)) for at in (cell % 3, cell // 3))
    left, top = (min(max(0, edge), GRID - side) for edge in corner)
    return Thing(shape, colour, size, cell, left, top, side)
