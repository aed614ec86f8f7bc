"""Boxes: fractions of the original width and height, and the text in which the language model reads and writes them.

`[0.440,0.060,0.650,0.367]`: no new tokens, the language model spells it.
"""

import math
import re
from dataclasses import astuple, dataclass

_NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


@dataclass(frozen=True)
class Box:
    """A rectangle (left, top, right, bottom) in fractions of the original width and height.

    The numbers are kept as they come: a model may well write an inverted box, which then overlaps nothing.
    A box that a person gives goes through `checked`.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    @classmethod
    def checked(cls, x1: float, y1: float, x2: float, y2: float) -> "Box":
        """The box, if it lies inside the image and has an area; else a ValueError that says what is wrong."""
        box = f"{x1:g},{y1:g},{x2:g},{y2:g}"
        for name, value in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"the box {box} lies outside the image: {name} {value:g} is not a fraction between 0 and 1"
                )
        if x1 >= x2:
            raise ValueError(f"the box {box} is {_wrong(x1, x2)}: x1 {x1:g} must be left of x2 {x2:g}")
        if y1 >= y2:
            raise ValueError(f"the box {box} is {_wrong(y1, y2)}: y1 {y1:g} must be above y2 {y2:g}")
        return cls(x1, y1, x2, y2)

    @classmethod
    def from_pixels(cls, x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> "Box":
        """The box of pixel edges in a width x height image, clamped to the image: annotations often overhang it.

        Not rounded, so that ground truth is compared as it was given; `to_text` rounds.
        """
        if not (width > 0 and height > 0) or not all(map(math.isfinite, (x1, y1, x2, y2, width, height))):
            raise ValueError(f"pixel box {x1},{y1},{x2},{y2} in an image of {width} x {height} has no fractions")
        return cls(_clamp(x1 / width), _clamp(y1 / height), _clamp(x2 / width), _clamp(y2 / height))

    @classmethod
    def parse(cls, text: str) -> "Box | None":
        """The first `[four numbers]` in a model's answer, or None where there is none or it leaves [0, 1].

        Spaces are allowed (the paper prints them), signs, other brackets and lists of boxes in one bracket are not.
        Inverted numbers still parse; they count as wrong through `iou`.
        """
        found = _BOX.search(text)
        if found is None:
            return None
        box = cls(*map(float, found.groups()))
        return box if all(value <= 1 for value in astuple(box)) else None

    def to_text(self) -> str:
        """What the language model reads and is trained to write: clamped, three decimals, no spaces."""
        return "[" + ",".join(f"{_clamp(value):.3f}" for value in astuple(self)) + "]"

    def to_pixels(self, width: float, height: float) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) as pixel edges of a width x height image, not rounded."""
        return self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height

    @property
    def area(self) -> float:
        """The fraction of the image it covers; 0 where it is inverted."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def iou(self, other: "Box") -> float:
        """Intersection over union, 0 to 1, without the extra pixel some evaluators add; a box of no area gives 0."""
        if not (self.area and other.area):
            return 0.0
        left, top = max(self.x1, other.x1), max(self.y1, other.y1)
        shared = Box(left, top, min(self.x2, other.x2), min(self.y2, other.y2)).area
        return shared / (self.area + other.area - shared)


def _clamp(value: float) -> float:
    return min(max(0.0, value), 1.0)


def _wrong(start: float, end: float) -> str:
    return "empty" if start == end else "inverted"
