"""The tagger against the release's numbers (golden), against transformers' Swin, and by hand."""

from dataclasses import replace
from typing import Any

import peers
import pytest
import torch
from conftest import GOLDEN, oracle, randomise, relative
from torch import Tensor

from lion_mini import Lion
from lion_mini.config import RamConfig, TagHeadConfig
from lion_mini.images import open_image, ram_transform
from lion_mini.model.ram import Ram, select
from lion_mini.model.swin import Block, Swin

SMALL = RamConfig(
    image_size=48, width=12, depths=(2, 3), heads=(2, 4), window=3, tag_width=20, tags=7,
    head=TagHeadConfig(width=16, depth=2, heads=4, mlp_width=28),
)  # fmt: skip


@pytest.fixture
def small() -> Ram:
    ram = Ram(SMALL)
    randomise(ram)
    return ram


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_golden_tokens_and_logits(numbers: dict[str, Tensor], golden_model: Lion) -> None:
    assert golden_model.ram is not None
    assert relative(golden_model.ram.swin(numbers["ram.image"]), numbers["ram.swin"]) < 1e-4
    assert relative(golden_model.ram(numbers["ram.image"]), numbers["ram.logits"]) < 1e-4


def test_golden_tags(numbers: dict[str, Tensor], facts: dict, golden_model: Lion) -> None:
    """With every tag's own threshold the tags are the release's: joined by bars from RAM, by commas from LION."""
    assert golden_model.ram is not None
    text = golden_model.text
    chosen = select(golden_model.ram(numbers["ram.image"]).sigmoid().cpu(), torch.tensor(text.thresholds))
    found = [[text.tags[tag] for tag, _ in tags] for tags in chosen]
    assert [" | ".join(tags) for tags in found] == facts["ram"]["tags_raw"]
    assert [", ".join(tags) for tags in found] == facts["ram"]["tags"]


def test_lion_tags_pictures(golden_model: Lion) -> None:
    """Lion.tag uses the photo itself, and gives words for indices and scores on request."""
    image = open_image(GOLDEN / "photo.png")
    tags: Any = golden_model.tag([image, image.rotate(90)], threshold=0.3)
    scored: Any = golden_model.tag([image, image.rotate(90)], threshold=0.3, return_scores=True)
    assert tags == [[tag for tag, _ in one] for one in scored]
    pixels = ram_transform(image, 64)[None].to(golden_model.device)
    assert golden_model.ram is not None
    scores = golden_model.ram(pixels)[0].sigmoid()
    assert tags[0] == [golden_model.text.tags[i] for i in range(len(scores)) if scores[i] > 0.3]
    best: Any = golden_model.tag([image], threshold=0, top_k=1)
    assert best == [[golden_model.text.tags[int(scores.argmax())]]]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,  # grids of 12 and 6 tokens a side, both shifted
        replace(SMALL, image_size=24),  # 6 and 3: the second is a single window
        replace(SMALL, window=6),  # 12 and 6, shifted by 3
        replace(SMALL, image_size=64, patch_size=8, window=2, depths=(1, 3, 2), heads=(1, 3, 6)),  # 8, 4, 2
    ],
)
def test_transformers_agrees(config: RamConfig) -> None:
    oracle()
    swin = Swin(config)
    randomise(swin)
    theirs = peers.swin(swin, config)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        found, expected = swin(pixels), theirs(pixels)
    assert relative(found[:, 0], expected.pooler_output) < 1e-4
    assert relative(found[:, 1:], expected.last_hidden_state) < 1e-4


@pytest.mark.parametrize(("side", "window", "shift"), [(6, 3, 1), (8, 4, 2), (6, 3, 0), (4, 4, 0)])
def test_who_sees_whom(side: int, window: int, shift: int) -> None:
    """A token reaches exactly the tokens of its window; a shifted window ends where the image does."""
    block = Block(10, 2, window, shift)
    randomise(block)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    home = (place - shift).div(window, rounding_mode="floor")  # nothing is rolled: row -1 is a cut-off window
    expected = (home[:, None] == home).all(-1)
    grid = torch.randn(side, side, 10)
    changed = grid + torch.eye(side * side).view(-1, side, side, 1) * torch.randn(10)  # one token in each copy
    with torch.no_grad():
        reached = (block(changed) - block(grid[None])).abs().amax(-1).flatten(1) > 1e-6
    assert torch.equal(reached, expected)


def test_window_larger_than_the_grid(image: Tensor) -> None:
    """Any window from the grid's side on is the same model, without a shift."""
    exact, larger = (Swin(replace(SMALL, image_size=24, window=window)) for window in (6, 99))
    randomise(exact)
    larger.load_state_dict(exact.state_dict(), strict=True)
    assert torch.equal(exact(image[..., :24, :24]), larger(image[..., :24, :24]))


def test_built_on_meta_and_filled(small: Ram, image: Tensor) -> None:
    with torch.device("meta"):
        empty = Ram(SMALL)
    empty.load_state_dict(small.state_dict(), strict=True, assign=True)
    tensors = [*empty.parameters(), *empty.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert torch.equal(empty(image), small(image))
    assert set(small.state_dict()) == {name for name, _ in small.named_parameters()}


def test_bfloat16(small: Ram, image: Tensor) -> None:
    with torch.no_grad():
        expected = small(image)
        found = small.bfloat16()(image.bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 0.05


def test_train_mode_changes_nothing(small: Ram, image: Tensor) -> None:
    """The release tags in train mode, with dropout; here the mode does not matter."""
    assert torch.equal(small.train()(image), small.eval()(image))


def test_tags_do_not_see_each_other(small: Ram, image: Tensor) -> None:
    expected = small(image)[:, :3]
    small.label_embed.data = small.label_embed[:3].clone()
    assert relative(small(image), expected) < 1e-5


def test_select_keeps_the_order_of_the_vocabulary() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.75, 0.875], [0.125, 0.75, 0.75, 0.0]])
    assert select(scores, 0.25) == [[(0, 0.5), (2, 0.75), (3, 0.875)], [(1, 0.75), (2, 0.75)]]
    assert select(scores, 0.25, top_k=2) == [[(2, 0.75), (3, 0.875)], [(1, 0.75), (2, 0.75)]]
    assert select(scores, torch.tensor([0.0, 1.0, 0.75, 0.5]), top_k=5) == [[(0, 0.5), (3, 0.875)], [(0, 0.125)]]
    assert select(scores, 1.0) == [[], []]
    wrong: tuple[tuple[float, int | None], ...] = ((1.5, None), (-0.1, None), (0.5, 0))
    for threshold, top_k in wrong:
        with pytest.raises(ValueError, match=r"not (1\.5|-0\.1|0)"):
            select(scores, threshold, top_k)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="stage 0 of Swin has 12 x 12 tokens"):
        Swin(replace(SMALL, window=5))
    with pytest.raises(ValueError, match="stage 0 of Swin has 9 x 9 tokens"):
        Swin(replace(SMALL, image_size=36))
    with pytest.raises(ValueError, match=r"48 x 48 pixels, got \(1, 3, 24, 24\)"):
        Swin(SMALL)(torch.zeros(1, 3, 24, 24))
