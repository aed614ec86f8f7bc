"""Preprocessing equal to the release's, and every odd file a user may bring."""

import contextlib
import io
import math
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, relative
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from lion_mini.box import Box
from lion_mini.images import (
    CLIP,
    ImageFolder,
    _crop,
    augment,
    draw_boxes,
    lion_transform,
    open_image,
    ram_from_lion,
    ram_transform,
    to_rgb,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def photo() -> Image.Image:
    return open_image(GOLDEN / "photo.png")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reopened(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Image.Image:
    image.save(tmp_path / name, **options)
    opened = open_image(tmp_path / name)
    assert opened.mode == "RGB"
    assert lion_transform(opened, 28).shape == ram_transform(opened, 28).shape == (3, 28, 28)
    return opened


def test_transforms_equal_the_release(photo: Image.Image) -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    for name, transform in (("pre.lion", lion_transform), ("pre.ram", ram_transform)):
        found = transform(photo, golden[name].shape[-1])
        assert found.dtype == torch.float32
        assert_close(found, golden[name], rtol=0, atol=1e-6)


def test_ram_from_lion(photo: Image.Image) -> None:
    """Going through the ViT's pixels loses little, and nothing where no resampling is needed."""
    flat = Image.new("RGB", (30, 20), (10, 120, 250))
    assert_close(ram_from_lion(lion_transform(flat, 28)[None], 48)[0], ram_transform(flat, 48), rtol=0, atol=1e-5)
    found = ram_from_lion(torch.stack([lion_transform(photo, 112), lion_transform(flat, 112)]), 64)
    assert found.shape == (2, 3, 64, 64)
    assert (found[0] - ram_transform(photo, 64)).abs().mean() < 0.05
    assert relative(found[1], ram_transform(flat, 64)) < 1e-5
    assert ram_from_lion(found.bfloat16(), 32).dtype == torch.bfloat16


def test_crop_bounds() -> None:
    rng = random.Random(0)
    for width, height in ((100, 80), (80, 100), (640, 427)):
        for _ in range(300):
            left, top, right, bottom = _crop(width, height, rng)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert 0.47 < (right - left) * (bottom - top) / (width * height) <= 1
            assert 0.73 < (right - left) / (bottom - top) < 1.37
    assert _crop(1, 1, rng) == (0, 0, 1, 1)
    assert _crop(20000, 9, rng) == (9994, 0, 10006, 9)
    assert _crop(9, 20000, rng) == (0, 9994, 9, 10006)


def test_augment_is_seeded(photo: Image.Image) -> None:
    one, same, other = (augment(photo, 28, random.Random(seed)) for seed in (1, 1, 2))
    assert one.shape == (3, 28, 28)
    assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other)


def test_augment_mirrors_half() -> None:
    """A picture that is dark on the left: about half of the crops are dark on the right."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")
    rng = random.Random(0)
    mirrored = sum(bool(x[..., 0].mean() > x[..., -1].mean()) for x in (augment(ramp, 14, rng) for _ in range(200)))
    assert 70 < mirrored < 130


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (3, 7000)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    image = reopened(tmp_path, Image.new("RGB", size, RED), "odd.png")
    assert image.size == size
    expected = (torch.tensor([1.0, 0.0, 0.0])[:, None, None] - CLIP[0]) / CLIP[1]
    assert_close(lion_transform(image, 14), expected.expand(3, 14, 14))
    assert augment(image, 14, random.Random(0)).shape == (3, 14, 14)
    drawn = draw_boxes(image, [(Box(0, 0, 1, 1), "a rather long label for so thin a picture")])
    assert max(drawn.size) <= 20000
    assert drawn.getcolors(drawn.width * drawn.height) != image.getcolors()


def test_cmyk(tmp_path: Path) -> None:
    image = reopened(tmp_path, Image.new("RGB", (16, 16), RED).convert("CMYK"), "print.jpg", quality=100)
    assert np.abs(np.asarray(image, dtype=int) - np.array(RED)).max() < 8


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    opened = reopened(tmp_path, image, "palette.png", transparency=1)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    assert not opened.has_transparency_data


def test_alpha_becomes_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 255, 51))
    opened = reopened(tmp_path, rgba, "alpha.png")
    assert [opened.getpixel((x, 0)) for x in range(3)] == [BLUE, WHITE, (204, 204, 255)]
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (40, 0))
    opened = reopened(tmp_path, grey, "grey.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(40, 40, 40), WHITE]


def test_sixteen_bits(tmp_path: Path) -> None:
    """PIL's own conversion clips everything above 255 to white."""
    levels = np.array([[0, 128, 129, 257, 25700, 32768, 65535]], dtype=np.uint16)
    opened = reopened(tmp_path, Image.fromarray(levels), "deep.png")
    expected = [0, 0, 1, 1, 100, 128, 255]
    assert [opened.getpixel((x, 0)) for x in range(7)] == [(v, v, v) for v in expected]
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 100, 200))
    Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint16)).save(tmp_path / "dark.png")
    for name in ("dark.png", "dark.pgm"):  # dark pictures stay dark: their white is 65535
        dark = open_image(tmp_path / name)
        assert [dark.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize(
    ("dtype", "levels", "expected"),
    [
        (np.int32, [0, 100, 200], [0, 100, 200]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [0, 100000, 200000], [0, 128, 255]),
        (np.float32, [0, 0.2, 1], [0, 51, 255]),
        (np.float32, [0, 51.4, 255], [0, 51, 255]),
        (np.float32, [0, math.nan, 1], [0, 0, 255]),
        (np.float32, [-7, -7, -7], [0, 0, 0]),
    ],
)
def test_wide_grey_levels(tmp_path: Path, dtype: type, levels: list[float], expected: list[int]) -> None:
    opened = reopened(tmp_path, Image.fromarray(np.array([levels], dtype=dtype)), "wide.tiff")
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in expected]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "YCbCr", "LAB", "HSV", "PA", "RGBa", "I;16B"])
def test_other_modes(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_exif_orientation(tmp_path: Path) -> None:
    """Orientation 6: the camera was turned; the stored bottom left is the top left to look at."""
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 8, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = reopened(tmp_path, image, "turned.jpg", exif=exif, quality=95)
    assert opened.size == (16, 32)
    assert np.abs(np.array(opened.getpixel((1, 1))) - RED).max() < 30
    assert np.abs(np.array(opened.getpixel((14, 30))) - BLUE).max() < 30


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    opened = reopened(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    assert opened.getpixel((4, 4)) == RED


def test_file_objects(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(stream, "PNG")
    assert open_image(stream).getpixel((0, 0)) == RED
    assert not stream.closed
    with pytest.raises(ValueError, match="the image: cannot identify image file"):
        open_image(io.BytesIO(b""))


def bomb() -> bytes:
    """A PNG of 69 bytes that says it is 60,000 x 60,000."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def truncated(fmt: str) -> bytes:
    stream = io.BytesIO()
    noise(60, 40).save(stream, fmt)
    return stream.getvalue()[: len(stream.getvalue()) // 2]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.jpg", b"this is no picture", "cannot identify image file"),
        ("empty.png", b"", "cannot identify image file"),
        ("short.jpg", truncated("JPEG"), "short.jpg: image file is truncated"),
        ("short.png", truncated("PNG"), "short.png: (image file is truncated|broken PNG|unrecognized data stream)"),
        ("bomb.png", bomb(), r"bomb.png: Image size \(3600000000 pixels\) exceeds limit"),
        ("missing.png", None, "missing.png: No such file or directory"),
    ],
    ids=["text", "empty", "short jpeg", "short png", "bomb", "missing"],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=message) as caught:
            open_image(source)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_folder_or_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: it is a (folder|pipe) or a device, not a (regular )?file"):
            open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_never_raise_anything_else(fmt: str) -> None:
    rng = random.Random(0)
    stream = io.BytesIO()
    noise(16, 12).save(stream, fmt)
    for _ in range(60):
        data = bytearray(stream.getvalue())
        for _ in range(5):
            data[rng.randrange(min(len(data), rng.choice([64, len(data)])))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            open_image(io.BytesIO(bytes(data)))


def test_draw_boxes_puts_the_frame_where_the_box_is() -> None:
    image = Image.new("RGB", (400, 300), WHITE)
    drawn = draw_boxes(image, [(Box(0.25, 0.5, 0.75, 1.0), "", "#ff0000")])
    assert drawn.size == image.size
    red = (np.asarray(drawn) == RED).all(-1)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 150, 299, 299)
    assert not red[160:290, 110:290].any()
    assert image.getcolors() == [(400 * 300, WHITE)]


@pytest.mark.parametrize("box", [Box(0, 0, 0.1, 0.1), Box(0.9, 0.9, 1, 1), Box(0.9, 0, 1, 1), Box(0.8, 0.7, 0.2, 0.1)])
@pytest.mark.parametrize("label", ["dog", "caf\u00e9", "狗 \ud800 \x00\nİ", "a very long label " * 100])
def test_labels_stay_inside(box: Box, label: str) -> None:
    """At every corner the whole text is there: as many dark pixels as in the middle, none on the outermost columns."""

    def dark(where: Box, text: str) -> Any:
        drawn = draw_boxes(Image.new("RGB", (500, 300), "gray"), [(where, text, "yellow")])
        return (np.asarray(drawn) < 60).all(-1)

    found = dark(box, label)
    assert found.sum() > 20
    assert found.sum() == dark(Box(0.2, 0.5, 0.6, 0.9), label).sum()
    assert not found[:, [0, 1, -2, -1]].any()


def test_accents_are_folded() -> None:
    """PIL's own font draws a square for é, so that the plain letter says more."""
    blank = Image.new("RGB", (300, 300))
    accented, plain = (draw_boxes(blank, [(Box(0, 0, 1, 1), text)]) for text in ("caf\u00e9", "cafe"))
    assert accented.tobytes() == plain.tobytes()


def test_tiny_pictures_are_enlarged() -> None:
    tiny = Image.new("RGB", (48, 50), BLUE)
    drawn = draw_boxes(tiny, [(Box(0.5, 0.5, 1, 1), "dog")])
    assert drawn.size == (288, 300)
    assert draw_boxes(tiny, []).getcolors() == [(288 * 300, BLUE)]
    assert draw_boxes(Image.new("RGB", (2000, 20)), []).size == (4000, 40)


def test_colours() -> None:
    drawn = draw_boxes(Image.new("RGB", (300, 300)), [(Box(0, 0, 0.4, 0.4), "a"), (Box(0.5, 0.5, 1, 1), "b", None)])
    counts = drawn.getcolors(300 * 300)
    assert counts is not None
    assert {(0xE6, 0x19, 0x4B), (0x3C, 0xB4, 0x4B)} <= {color for _, color in counts}
    with pytest.raises(ValueError, match="unknown color"):
        draw_boxes(drawn, [(Box(0, 0, 1, 1), "a", "blurple")])


# --- pictures below folders


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b/1.jpg", "a/b/1.jpg"),
        ("x/b/1.jpg", "a/b/1.jpg"),  # the longest end, whatever stands directly below the root
        ("b/2.gif", "a/b/2.jpeg"),  # any ending
        ("b/3.gif", "a/b/3.gif"),  # the same one if there is a choice
        ("set/4.jpg", "set/deep/4.jpg"),  # the more equal folders
        ("5", None),
        ("5.tar", "a/5.tar.png"),
        ("b\\2.gif", "a/b/2.jpeg"),  # as Windows writes it
        ("6.jpg", "a/6.jfif"),
        ("8.jpg", "a/8.avif"),
        ("x/image.png", None),  # in ten folders, and none of them is x
        ("0/image.png", "c/0/image.png"),
        ("7.png", None),  # a pipe
        ("", None),
        ("..", None),
        ("\0", None),
        ("x" * 300, None),
    ],
)
def test_any_end_and_any_ending(tmp_path: Path, name: str, expected: str | None) -> None:
    tree = "1.jpg a/b/1.jpg a/b/2.jpeg a/b/3.gif a/b/3.jpg set/deep/4.jpg other/4.jpg a/5.tar.png a/6.jfif a/8.avif"
    for i, place in enumerate([*tree.split(), *(f"c/{number}/image.png" for number in range(10))]):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(str(i))
    os.mkfifo(tmp_path / "7.png")
    assert ImageFolder(tmp_path).path(name) == (tmp_path / expected if expected else None)


def test_the_index_is_made_only_if_it_is_needed(tmp_path: Path) -> None:
    for place in ("okvqa/1.jpg", "vqav2/1.jpg", "coco/1.jpg"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(place.replace("coco", "okvqa"))
    folder = ImageFolder(tmp_path / "nowhere", tmp_path, prefer="vqav2")
    assert folder.path("okvqa/1.jpg") == tmp_path / "okvqa" / "1.jpg"
    assert "index" not in vars(folder)
    assert folder.path("1.jpg") == tmp_path / "vqav2" / "1.jpg"
    with pytest.raises(ValueError, match=r"the image 1\.jpg may be .* or .*: name the right folder"):
        ImageFolder(tmp_path).path("1.jpg")
    (tmp_path / "vqav2" / "1.jpg").unlink()
    assert ImageFolder(tmp_path).path("1.jpg")  # the other two are the same picture
