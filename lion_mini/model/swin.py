"""Swin Transformer, the image encoder of the tagger RAM (section 3.2; Swin: arXiv 2103.14030).

Tokens lie on a square grid and attend only within windows of it. Every second block shifts the windows by half their
side, so that neighbours across a border meet. After each stage but the last, 2 x 2 tokens merge into one of twice the
width. Windows shift by rolling the grid. One axis of 8 tokens, window 4, shift 2:

    even blocks    0 1 2 3 | 4 5 6 7
    odd blocks     2 3 4 5 | 6 7 0 1      rolled by -2: tokens 2 and 5 now share a window

The last window then holds strangers: 0 and 1 come from the opposite edge of the image. A mask keeps them from 6 and 7,
for each axis alike (rows are queries, columns keys, x is -100):

           6 7 0 1
       6   . . x x
       7   . . x x
       0   x x . .
       1   x x . .

A grid no larger than the window is one window and is not shifted.

In the shapes below y and x are rows and columns of the grid, w counts windows and n the tokens of one window.

Same outputs as the release's ram/models/swin_transformer.py.
"""

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from ..config import RamConfig
from .layers import Mlp, Recorder, attention


def relative_index(window: int, device: torch.device) -> Tensor:  # -> (n, n)
    """Row of the bias table for every query and key of a window: which of the (2 window - 1)^2 offsets lies between.

    window 2, tokens a b / c d: offsets of a from a, b, c, d are (0,0), (0,-1), (-1,0), (-1,-1) -> rows 4, 3, 1, 0
    """
    side = torch.arange(window, device=device)
    place = torch.cartesian_prod(side, side)  # (n, 2): row and column
    dy, dx = (place[:, None] - place + window - 1).unbind(-1)
    return dy * (2 * window - 1) + dx


def stranger_mask(side: int, window: int, shift: int, device: torch.device) -> Tensor:  # -> (w, 1, n, n)
    """-100 between tokens of a window that the roll by -shift brought together from opposite edges, else 0."""
    wrapped = (torch.arange(side, device=device) >= side - shift).long()
    origin = 2 * wrapped[:, None] + wrapped
    origin = rearrange(origin, "(y i) (x j) -> (y x) (i j)", i=window, j=window)
    return -100.0 * (origin[:, None, :, None] != origin[:, None, None, :])  # not -inf: the release's value


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:  # (b, 3, s, s) -> (b, y, x, d)
        return self.norm(rearrange(self.proj(image), "b d y x -> b y x d"))


class WindowAttention(nn.Module):
    """Attention within each window, with a learned bias for every offset between two of its tokens."""

    record: Recorder = None

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (b, w, n, d), (w, 1, n, n) -> (b, w, n, d)
        q, k, v = rearrange(self.qkv(x), "b w n (three h e) -> three (b w) h n e", three=3, h=self.heads)
        bias = rearrange(self.bias_table[relative_index(self.window, x.device)], "n m h -> 1 h n m").contiguous()
        if mask is not None:
            bias = repeat(bias + mask.to(bias.dtype), "w h n m -> (b w) h n m", b=len(x))
        return rearrange(self.o(attention(q, k, v, bias, record=self.record)), "(b w) n d -> b w n d", b=len(x))


class Block(nn.Module):
    """x <- x + attention(norm(x)) in windows moved by `shift`, then x <- x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:  # (b, y, x, d) -> (b, y, x, d)
        side, window, shift = x.shape[1], self.window, self.shift
        mask = stranger_mask(side, window, shift, x.device) if shift else None
        h = self.norm1(x).roll((-shift, -shift), dims=(1, 2))
        h = rearrange(h, "b (y i) (x j) d -> b (y x) (i j) d", i=window, j=window)
        h = rearrange(self.attn(h, mask), "b (y x) (i j) d -> b (y i) (x j) d", y=side // window, i=window)
        x = x + h.roll((shift, shift), dims=(1, 2))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """2 x 2 neighbours become one token of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (b, 2y, 2x, d) -> (b, y, x, 2d)
        x = rearrange(x, "b (y i) (x j) d -> b y x (j i d)", i=2, j=2)  # the release runs down columns first
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    def __init__(self, width: int, heads: int, window: int, depth: int, shift: int, merge: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, window, shift=shift * (i % 2)) for i in range(depth))
        self.merge = Merge(width) if merge else None

    def forward(self, x: Tensor) -> Tensor:  # (b, y, x, d) -> (b, y/2, x/2, 2d), or the same shape without a merge
        for block in self.blocks:
            x = block(x)
        return x if self.merge is None else self.merge(x)


class Swin(nn.Module):
    """The tagger's image encoder: the mean of the tokens first, then the tokens, row by row.

    Raises ValueError where a stage's grid cannot be cut into windows or merged, and for an image of another size.
    """

    def __init__(self, config: RamConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.stages = nn.ModuleList()
        side, last = config.image_size // config.patch_size, len(config.depths) - 1
        for i, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            window, shift = (config.window, config.window // 2) if side > config.window else (side, 0)
            if side % window or (i < last and side % 2):
                raise ValueError(
                    f"stage {i} of Swin has {side} x {side} tokens: no multiple of window {window}, or odd"
                )
            self.stages.append(SwinStage(config.width * 2**i, heads, window, depth, shift, merge=i < last))
            side //= 2
        self.norm = nn.LayerNorm(config.width * 2**last)

    def forward(self, image: Tensor) -> Tensor:  # (b, 3, s, s) -> (b, 1 + y*x, d)
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"Swin reads {self.image_size} x {self.image_size} pixels, got {tuple(image.shape)}")
        x = self.patch_embed(image)
        for stage in self.stages:
            x = stage(x)
        x = rearrange(self.norm(x), "b y x d -> b (y x) d")
        return torch.cat((reduce(x, "b n d -> b 1 d", "mean"), x), dim=1)
