"""Boxes in fractions of the image's width and height, and their text `[0.440,0.060,0.650,0.367]` (section 3.1.1)."""

import math
import re
from dataclasses import astuple, dataclass

_NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
_clamp = lambda value: min(max(0.0, value), 1.0)


@dataclass(frozen=True)
class Box:
    """Left, top, right and bottom edge. A model may write an inverted box, so only `checked` refuses one."""

    x1: float
    y1: float
    x2: float
    y2: float

    @classmethod
    def checked(cls, x1: float, y1: float, x2: float, y2: float) -> "Box":
        """The box; a ValueError if it is not inside the image or has no area."""
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            fault = "is inverted, empty or outside the image: 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 must hold"
            raise ValueError(f"the box {x1:g},{y1:g},{x2:g},{y2:g} {fault}")
        return cls(x1, y1, x2, y2)

    @classmethod
    def from_pixels(cls, x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> "Box":
        """From pixel edges in a width x height image, clamped (annotations often overhang it) but not rounded."""
        if not (width > 0 and height > 0) or not all(map(math.isfinite, (x1, y1, x2, y2, width, height))):
            raise ValueError(f"pixel box {x1},{y1},{x2},{y2} in an image of {width} x {height} has no fractions")
        return cls(_clamp(x1 / width), _clamp(y1 / height), _clamp(x2 / width), _clamp(y2 / height))

    @classmethod
    def parse(cls, text: str) -> "Box | None":
        """The first `[four numbers]` in a model's answer, as the paper prints them; None if a number exceeds 1."""
        match = _BOX.search(text)
        box = match and cls(*map(float, match.groups()))
        return box if box and max(astuple(box)) <= 1 else None

    def to_text(self) -> str:
        """What the language model reads and learns to write, without new tokens: clamped, three decimals, no spaces."""
        return "[" + ",".join(f"{_clamp(value):.3f}" for value in astuple(self)) + "]"

    def to_pixels(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Pixel edges in a width x height image, not rounded."""
        return self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height

    @property
    def area(self) -> float:
        """The fraction of the image that it covers; 0 if it is inverted."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def iou(self, other: "Box") -> float:
        """Intersection over union, 0 to 1, without an extra pixel per side; 0 if either box has no area."""
        left, top = max(self.x1, other.x1), max(self.y1, other.y1)
        shared = Box(left, top, min(self.x2, other.x2), min(self.y2, other.y2)).area
        return shared / (self.area + other.area - shared) if self.area and other.area else 0.0
