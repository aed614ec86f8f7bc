"""Scenes of the toy world: coloured shapes on sand, grass, water or brick, about which everything is known.

A scene holds 4 to 8 things, each in a cell of its own; one to three are large. No two of them share both colour and
shape, so "the red circle" is never ambiguous. Edges lie on a grid of 32 units, so 33 coordinates describe them all.

The four grounds have one mean colour and differ in a pattern of single pixels. At 96 pixels, which RAM sees, it is
plain; halved to 48, as the ViT sees it, it averages out. So only tags can tell the ground.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..box import Box

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (205, 45, 45), "green": (45, 150, 65), "blue": (50, 85, 205),
    "yellow": (225, 180, 20), "purple": (140, 55, 165), "black": (40, 40, 45),
}  # fmt: skip
GROUNDS = ("sand", "grass", "water", "brick")
SIDES = {"small": (4, 5), "large": (8, 9, 10)}  # in grid units
TAGS = (*COLOURS, *GROUNDS)
GRID, CELL, UNIT = 32, 11, 3  # the image in units, the distance of two cells in units, a unit in pixels
COORDINATES = tuple(f"{i / GRID:.3f}" for i in range(GRID + 1))
LEAST, MOST, LARGE = 4, 8, 3  # things in a scene, and the most large ones among them
HELD_OUT = [("circle", "purple"), ("square", "yellow"), ("triangle", "black"), ("cross", "green")]
SEEN = [pair for pair in product(SHAPES, COLOURS) if pair not in HELD_OUT]

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


@dataclass(frozen=True)
class Scene:
    """Things in reading order. `held_out`: one of them joins a colour and a shape that no training scene joins."""

    seed: int
    split: Split
    ground: str
    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        return any((thing.shape, thing.colour) in HELD_OUT for thing in self.things)

    @cached_property
    def image(self) -> Image.Image:
        rng = np.random.default_rng(zlib.crc32(f"{self.split} {self.seed}".encode()))
        side = GRID * UNIT
        y, x = np.indices((side, side))
        pattern = {"sand": 0 * x, "grass": x % 2 * 2 - 1, "water": y % 2 * 2 - 1, "brick": (x + y) % 2 * 2 - 1}
        pixels = rng.integers(-10, 11, 3) + (214, 208, 192) + 16 * rng.random() ** 2 * pattern[self.ground][..., None]
        for thing in self.things:
            x1, y1, x2, y2 = (UNIT * edge for edge in thing.edges)
            cover, colour = silhouette(thing)[..., None], COLOURS[thing.colour] + rng.integers(-12, 13, 3)
            pixels[y1:y2, x1:x2] += (colour - pixels[y1:y2, x1:x2]) * cover
        pixels = pixels + 3 * rng.standard_normal((side, side, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def silhouette(thing: Thing) -> np.ndarray:  # -> (side, side)
    """The share of each pixel of its box that the thing covers: drawn four times as large, then averaged."""
    side = UNIT * thing.side
    image = Image.new("L", (4 * side, 4 * side))
    draw, last, arm = ImageDraw.Draw(image), 4 * side - 1, round(4 * side * 0.34)
    if thing.shape == "circle":
        draw.ellipse((0, 0, last, last), 255)
    elif thing.shape == "square":
        draw.rectangle((0, 0, last, last), 255)
    elif thing.shape == "triangle":
        draw.polygon(((0, last), (last, last), (2 * side, 0)), 255)
    else:
        draw.rectangle((arm, 0, last - arm, last), 255)
        draw.rectangle((0, arm, last, last - arm), 255)
    return np.asarray(image.reduce(4)) / 255


def scene(seed: int, split: Split) -> Scene:
    """The scene of this seed. Every second test scene is held out, no training scene is.

    The checksum of an arrangement decides its split as well, so that training and test scenes share none.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng, held_out = random.Random(f"{split} {seed}"), split == "test" and seed % 2 == 1
    while True:
        count = rng.randint(LEAST, MOST)
        names = rng.sample([*SEEN, *HELD_OUT] if held_out else SEEN, count)
        cells, large = sorted(rng.sample(range(9), count)), rng.sample(range(count), rng.randint(1, LARGE))
        things = tuple(place(*names[i], "large" if i in large else "small", cells[i], rng) for i in range(count))
        made = Scene(seed, split, rng.choice(GROUNDS), things)
        arrangement = sorted((t.shape, t.colour, t.size, t.cell) for t in things)
        if (zlib.crc32(repr(arrangement).encode()) % 10 == 0) == (split == "test") and made.held_out == held_out:
            return made


def place(shape: str, colour: str, size: str, cell: int, rng: random.Random) -> Thing:
    """A thing at a random place in its cell."""
    side = rng.choice(SIDES[size])
    left, top = (at * CELL + rng.randint(0, GRID - 2 * CELL - side) for at in (cell % 3, cell // 3))
    return Thing(shape, colour, size, cell, left, top, side)
