"""From a picture to what the two vision encoders read: 224 px for the ViT, 384 px for RAM (section 3, Appendix A).

Both stretch the whole picture to a square with PIL's resampling, neither pads nor crops: a box in fractions of the
original width and height therefore keeps its numbers. They differ in the filter and in the normalisation:

    lion_transform   bicubic, CLIP's mean and std         ram_transform   bilinear, ImageNet's

Compatible with the release's preprocessors/lion_preprocessors.py and ram/transform.py.
next: data.py
"""

import math
import os
import random
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from .box import Box

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def _channels(values: tuple[float, float, float], like: Tensor | None = None) -> Tensor:  # (3, 1, 1)
    return torch.tensor(values, device=None if like is None else like.device)[:, None, None]


def _stretched(
    image: Image.Image,
    size: int,
    resample: Image.Resampling,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:  # (3, s, s)
    pixels = np.array(to_rgb(image).resize((size, size), resample))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - _channels(mean)) / _channels(std)


def lion_transform(image: Image.Image, size: int) -> Tensor:
    """The picture as the ViT reads it: (3, size, size) float32, bicubic, CLIP's normalisation."""
    return _stretched(image, size, Image.Resampling.BICUBIC, CLIP_MEAN, CLIP_STD)


def ram_transform(image: Image.Image, size: int) -> Tensor:
    """The picture as Recognize Anything reads it: (3, size, size) float32, bilinear, ImageNet's normalisation."""
    return _stretched(image, size, Image.Resampling.BILINEAR, IMAGENET_MEAN, IMAGENET_STD)


def ram_from_lion(pixels: Tensor, size: int) -> Tensor:  # (b, 3, s, s) -> (b, 3, size, size)
    """RAM's input made from the ViT's, where the picture itself is gone; close to `ram_transform`, not equal to it."""
    plain = pixels.float() * _channels(CLIP_STD, pixels) + _channels(CLIP_MEAN, pixels)
    plain = F.interpolate(plain, size=(size, size), mode="bilinear", antialias=True)
    return ((plain - _channels(IMAGENET_MEAN, pixels)) / _channels(IMAGENET_STD, pixels)).to(pixels.dtype)


def augment(image: Image.Image, size: int, rng: random.Random) -> Tensor:
    """`lion_transform` of a random crop, half of the time mirrored: for image-level training only.

    The crop covers 0.5 to 1 of the area at an aspect ratio of 3/4 to 4/3. Region-level samples are never cropped or
    mirrored, because their boxes would stay behind.
    """
    image = to_rgb(image)
    image = image.crop(_crop(*image.size, rng))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return lion_transform(image, size)


def _crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: ten draws, then the largest centred crop whose aspect ratio is allowed."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB: what is transparent becomes white, 16 bits and floats are scaled, never clipped."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        image = _eight_bits(image, 65535)
    elif image.mode in ("I", "F"):
        image = _eight_bits(image, None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, top: float | None) -> Image.Image:
    """Grey levels 0..top as 0..255. These modes do not say what white is: the smallest usual maximum that holds all.

    That is 1 (floats only), 255 or 65535; beyond those, or below 0, the picture's own range is stretched.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    least, most = float(values.min()), float(values.max())
    if top is None and least >= 0:
        usual = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        top = next((bound for bound in usual if most <= bound), None)
    if top is None:
        values, top = values - least, (most - least) or 1.0
    return Image.fromarray(np.rint(values * 255 / top).astype(np.uint8))


def open_image(source: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """The picture of a path or binary file as upright 8-bit RGB; of an animation, the first frame.

    Whatever is wrong with it (missing, no image, cut short, too many pixels) is a ValueError in one sentence that
    names the path.
    """
    name = getattr(source, "name", "the image") if hasattr(source, "read") else source
    try:
        with Image.open(source) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, LookupError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"it is damaged ({error})"
        raise ValueError(f"{name} cannot be read: {why}") from None
    except (ArithmeticError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read: it is damaged ({error})") from None


def draw_boxes(image: Image.Image, boxes: Sequence[tuple[Box, str] | tuple[Box, str, str | None]]) -> Image.Image:
    """A copy of the picture with (box, label) or (box, label, colour) drawn on; colours are PIL's names or #rrggbb.

    A tiny picture is enlarged by a whole factor until its labels can be read (short side 256 px, unless that makes
    the long side more than 4096), so the result may be larger than what came in. Labels stay inside the picture: one
    that is too long ends in dots; letters other than Latin come out as empty squares. Inverted boxes are drawn as the
    rectangle between their corners. An unknown colour raises ValueError.
    """
    factor = max(1, min(math.ceil(256 / min(image.size)), 4096 // max(image.size)))
    width, height = image.width * factor, image.height * factor
    picture = to_rgb(image).resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    side = min(width, height)
    font_size = max(6, min(max(12, side // 22), int(0.7 * height)))
    font, pad = ImageFont.load_default(font_size), font_size // 4
    for count, (box, label, *color) in enumerate(boxes):
        fill = ImageColor.getrgb((color[0] if color else None) or COLORS[count % len(COLORS)])[:3]
        x1, y1, x2, y2 = box.to_pixels(width, height)
        left, right = (min(max(int(x), 0), width - 1) for x in sorted((x1, x2 - 1)))
        top, bottom = (min(max(int(y), 0), height - 1) for y in sorted((y1, y2 - 1)))
        draw.rectangle((left, top, right, bottom), outline=fill, width=max(2, side // 150))
        text = _fitting(label, font, width - 2 * pad)
        if text:
            w, h = math.ceil(font.getlength(text)) + 2 * pad, math.ceil(font_size * 1.3)
            x = max(0, min(left, width - w))
            y = max(0, min(top - h if top >= h else top, height - h))
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=fill)
            light = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
            draw.text((x + pad, y + h / 2), text, fill="black" if light else "white", font=font, anchor="lm")
    return picture


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The label on one line, cut until it is at most `width` pixels long; accents go, since PIL's own font has none."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c))
    whole = text = " ".join(plain.split())[:300]
    while text and font.getlength(text) > width:
        whole = whole[:-1]
        text = whole and whole + "..."
    return text


class ImageFolder:
    """The pictures below a folder. Any end of a path will do: people keep only the inner folders of the official trees."""

    def __init__(self, root: Path):
        self.root, self.found = root, dict[str, Path | None]()

    def path(self, name: str) -> Path | None:
        """`find`, remembered."""
        if name not in self.found:
            self.found[name] = self.find(name)
        return self.found[name]

    def find(self, name: str) -> Path | None:
        """Where the picture of this name is; None if it is missing."""
        parts = Path(name).parts
        ends = (self.root.joinpath(*parts[i:]) for i in range(len(parts)))
        return next((path for path in ends if os.path.isfile(path)), None)  # Path.is_file raises where it may not look

    def without_missing(self, names: Sequence[str | bytes], skip: bool) -> list[bool]:
        """Which of them are there; unless `skip`, a ValueError if one is not."""
        there = [isinstance(name, bytes) or self.path(name) is not None for name in names]
        if not all(there) and not skip:
            first = f"{names[there.index(False)]!s} is not below {self.root}"
            count = f", and {there.count(False) - 1} of {len(there) - 1} others are not" if len(there) > 1 else ""
            raise ValueError(
                f"the image {first}{count}: name their folder with --images, or go on without them with --skip-missing"
            )
        return there
