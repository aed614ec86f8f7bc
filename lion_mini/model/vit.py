"""EVA-CLIP ViT-g/14, LION's frozen image encoder E_v (section 3.1): an image becomes CLS and one token per patch.

A plain pre-norm vision transformer, x <- x + f(LayerNorm(x)); EVA's keys have no bias. There is no final norm: the
Q-Former normalises what it reads. The vision aggregator also wants the outputs of earlier blocks, so `forward` returns
the output of any block it is asked for (a "tap").

    224 x 224 pixels -> 16 x 16 patches of 14 x 14 -> 257 tokens of width 1408 (CLS first)

Same outputs as the release's models/eva_vit.py.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import VitConfig
from .layers import Mlp, Recorder, attention


class Attention(nn.Module):
    record: Recorder = None

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (b, n, d) -> (b, n, d)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        x = self.qkv(x)
        x = x + bias.to(x.dtype)  # under autocast x is bfloat16; a float32 bias would cast it back
        q, k, v = rearrange(x, "b n (three h e) -> three b h n e", three=3, h=self.heads)
        return self.o(attention(q, k, v, record=self.record))


class Block(nn.Module):
    def __init__(self, config: VitConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:  # (b, n, d) -> (b, n, d)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Returns the last block's output and the outputs of `taps`, in the order asked for."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(
        self, image: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:  # (b, 3, s, s) -> (b, n, d), taps x (b, n, d)
        x = rearrange(self.patch_embed(image), "b d y x -> b (y x) d")
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.positions
        tapped = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in taps:
                tapped[i] = x
        return x, [tapped[i] for i in taps]
