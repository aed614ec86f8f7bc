"""From a picture to what the two vision encoders read: 224 px for the ViT, 384 px for RAM (Appendix A).

Both stretch the whole picture to a square with PIL's resampling, without padding or cropping. A box in fractions of the
original width and height therefore keeps its numbers. They differ in the filter and in the normalisation:

    lion_transform   bicubic, CLIP's mean and std     (the release's preprocessors/lion_preprocessors.py)
    ram_transform    bilinear, ImageNet's             (the release's ram/transform.py)
"""

import filecmp
import math
import os
import random
import re
import textwrap
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from .box import Box
from .files import reading

CLIP = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # mean and std, (2, 3, 1, 1)
ENDING = re.compile(r"\.(jpe?g|jfif|png|webp|avif|bmp|gif|tiff?|ppm)$", re.IGNORECASE)
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def transform(image: Image.Image, size: int, filter: Image.Resampling, normal: Tensor) -> Tensor:  # -> (3, size, size)
    pixels = torch.from_numpy(np.array(to_rgb(image).resize((size, size), filter)))
    return (pixels.permute(2, 0, 1).float() / 255 - normal[0]) / normal[1]


lion_transform = partial(transform, filter=Image.Resampling.BICUBIC, normal=CLIP)  # the ViT's input
ram_transform = partial(transform, filter=Image.Resampling.BILINEAR, normal=IMAGENET)  # Recognize Anything's input


def ram_from_lion(pixels: Tensor, size: int) -> Tensor:  # (b, 3, s, s) -> (b, 3, size, size)
    """RAM's input made from the ViT's, when there is no picture: close to `ram_transform`, not equal."""
    (mean, std), (ram_mean, ram_std) = CLIP.to(pixels.device), IMAGENET.to(pixels.device)
    plain = F.interpolate(pixels.float() * std + mean, size=(size, size), mode="bilinear", antialias=True)
    return ((plain - ram_mean) / ram_std).to(pixels.dtype)


def augment(image: Image.Image, size: int, rng: random.Random) -> Tensor:  # -> (3, size, size)
    """`lion_transform` of a random crop, mirrored with probability 0.5. For image level only: boxes would not fit."""
    image = to_rgb(image).crop(_crop(*image.size, rng))
    return lion_transform(ImageOps.mirror(image) if rng.random() < 0.5 else image, size)


def _crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: 0.5 to 1 of the area, aspect ratio 3/4 to 4/3; after ten misses, the centre."""
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * (4 / 3))), min(height, round(width / (3 / 4)))
    return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB. Transparent pixels become white; 16-bit and float greys are scaled, not clipped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
        least, most = levels.min(), levels.max()
        # White is the least usual maximum that holds all levels; else their own range is stretched.
        mode = "I;16" if image.format in ("PNG", "PPM") else image.mode  # "I" of these two means 16 bits
        usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(mode, (65535,))
        fits = [white for white in usual if least >= 0 and most <= white]
        black, white = (0, fits[0]) if fits else (least, (most - least) or 1)
        image = Image.fromarray(np.rint((levels - black) * 255 / white).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of a path or binary file, upright, as 8-bit RGB. A ValueError names the path and the fault."""
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "the image")
    with reading(name):
        if os.path.exists(name) and not os.path.isfile(name):  # a pipe would never answer
            raise ValueError("it is a folder or a device, not a file")
        with Image.open(source) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def draw_boxes(image: Image.Image, boxes: Sequence[tuple[Box, str] | tuple[Box, str, str | None]]) -> Image.Image:
    """A copy of the picture with (box, label) or (box, label, colour) drawn on; colours are PIL's names or #rrggbb.

    A tiny picture is enlarged by a whole factor, so that labels can be read. Labels stay inside; long ones end in dots.
    """
    factor = max(1, min(math.ceil(256 / min(image.size)), 4096 // max(image.size)))
    width, height = image.width * factor, image.height * factor
    picture = to_rgb(image).resize((width, height), Image.Resampling.NEAREST)
    draw, side = ImageDraw.Draw(picture), min(width, height)
    font_size = max(6, min(max(12, side // 22), int(0.7 * height)))
    font, pad = ImageFont.load_default(font_size), font_size // 4
    for i, (box, label, *color) in enumerate(boxes):
        # 1. The frame.
        fill = ImageColor.getrgb((color[0] if color else None) or COLORS[i % len(COLORS)])[:3]
        left, right = (min(max(int(x), 0), width - 1) for x in sorted((box.x1 * width, box.x2 * width - 1)))
        top, bottom = (min(max(int(y), 0), height - 1) for y in sorted((box.y1 * height, box.y2 * height - 1)))
        draw.rectangle((left, top, right, bottom), outline=fill, width=max(2, side // 150))
        # 2. The label on a filled strip: above the box, or inside if there is no room.
        if text := _fitting(label, font, width - 2 * pad):
            w, h = math.ceil(font.getlength(text)) + 2 * pad, math.ceil(font_size * 1.3)
            x, y = max(0, min(left, width - w)), max(0, min(top - h if top >= h else top, height - h))
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=fill)
            light = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
            draw.text((x + pad, y + h / 2), text, fill="black" if light else "white", font=font, anchor="lm")
    return picture


def draw_sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int = 3, side: int = 340) -> Image.Image:
    """Pictures in rows, each in a square of `side` pixels with its text below: two lines per line of the text."""
    font, height = ImageFont.load_default(11), side + 80
    sheet = Image.new("RGB", (side * min(columns, len(pictures)), height * -(-len(pictures) // columns)), "white")
    for i, (picture, text) in enumerate(pictures):
        x, y = i % columns * side + 4, i // columns * height + 4
        sheet.paste(ImageOps.contain(picture, (side - 8, side - 8)), (x, y))
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, side // 6)[:2]]
        text = plain_text("\n".join(lines))
        ImageDraw.Draw(sheet).multiline_text((x, y + side - 4), text, fill="black", font=font, spacing=1)
    return sheet


def plain_text(text: str) -> str:
    """With ? for letters that PIL's own font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The label on one line, cut to `width` pixels, without accents: PIL's own font has none."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c))
    whole = " ".join(plain.split())[:300]
    cuts = (whole[:n] + "..." * (n < len(whole)) for n in range(len(whole), 0, -1))
    return next((text for text in cuts if font.getlength(text) <= width), "")


class ImageFolder:
    """The pictures below some folders. Any end of a path finds one, with any ending: official trees differ."""

    def __init__(self, *roots: Path, prefer: str = ""):
        self.roots, self.prefer = [root.absolute() for root in roots], prefer

    def path(self, name: str) -> Path | None:
        """The picture's path, or None if it is missing. A ValueError if different pictures fit equally well.

        The longest end decides, then the same ending, then the number of equal folders; `prefer` is one more.
        """
        key, suffix = reversed_parts(Path(name.replace("\\", "/"))), Path(name).suffix
        paths = [root / name for root in self.roots if os.path.isfile(root / name)]
        if not paths:
            near = self.index.get(key[:2]) or self.index.get(key[:1], [])
            paths = [Path(file) for file in near if len(near) < 10 and os.path.isfile(file)]  # image.png is no clue
        end = lambda path: [a == b for a, b in zip(reversed_parts(path), key, strict=False)]
        rank = lambda path: (end(path), path.suffix == suffix, len({self.prefer, *key[1:]} & {*path.parts}))
        best, *others = sorted(paths, key=rank, reverse=True) or [Path()]
        for other in others:
            if rank(other) == rank(best) and not filecmp.cmp(best, other, shallow=False):
                raise ValueError(f"the image {name} may be {best} or {other}: name the right folder with --images")
        return best if paths else None

    @cached_property
    def index(self) -> dict[tuple[str, ...], list[str]]:
        """Every file below the roots, by its name and by its name and folder. Made once, if a direct path fails."""
        index, visited = defaultdict[tuple[str, ...], list[str]](list), set[str]()
        for folder, inner, names in chain.from_iterable(os.walk(root, followlinks=True) for root in self.roots):
            if (place := os.path.realpath(folder)) in visited:  # a link that leads back
                inner[:], names[:] = [], []
            visited.add(place)
            for name in names:
                stem = ENDING.sub("", name)
                for key in ((stem,), (stem, os.path.basename(folder))):
                    index[key].append(os.path.join(folder, name))
        return index

    def relative(self, path: Path) -> str:
        """How a record names the picture: by its path below its root."""
        return str(next((path.relative_to(root) for root in self.roots if path.is_relative_to(root)), path))

    def without_missing(self, names: Sequence[str | bytes], skip: bool) -> list[bool]:
        """A flag per picture: is it there? A ValueError if one is missing, unless `skip`."""
        there = [isinstance(name, bytes) or self.path(name) is not None for name in names]
        if not skip and not all(there):
            fault = f"the image {names[there.index(False)]!s} is not below {' or '.join(map(str, self.roots))}"
            raise ValueError(f"{fault}: name their folder with --images, or go on without them with --skip-missing")
        return there


def reversed_parts(path: Path) -> tuple[str, ...]:  # file without its ending, folder, folder above, ...
    return ENDING.sub("", path.name), *path.parts[-2::-1]
