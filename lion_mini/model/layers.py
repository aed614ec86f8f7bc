"""What two or more components share: attention and the plain MLP.

The axis letters of this project, in every shape comment and einops string:

    b batch   n image tokens   q queries   t text tokens   d width   h heads   e width of a head   v vocabulary   c tags

next: vit.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def split_heads(x: Tensor, heads: int) -> Tensor:  # (b, t, h*e) -> (b, h, t, e)
    return rearrange(x, "b t (h e) -> b h t e", h=heads)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:  # (b, h, t, e), (b, h, n, e), (b, h, n, e) -> (b, t, h*e)
    """softmax(q k^T * scale + mask) v for all heads; scale is 1/sqrt(e) unless told.

    `mask` broadcasts to (b, h, t, n): either boolean, True where a query may look, or a bias that is added.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        x = plain_attention(q, k, v, mask, scale or q.shape[-1] ** -0.5, dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return rearrange(x, "b h t e -> b t (h e)")


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:  # (b, h, t, e), (b, h, n, e), (b, h, n, e) -> (b, h, t, e)
    """For bfloat16 on a CPU, where PyTorch's fused kernel takes three to nine times as long."""
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v


def run(layer: nn.Module, recompute: bool, x: Tensor, *rest: Any) -> Tensor:
    """layer(x, *rest). With `recompute`, training forgets what happens inside and computes it again for the gradients:
    the same numbers, slower, in a fraction of the memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, x, *rest, use_reentrant=False)
    return layer(x, *rest)


class Mlp(nn.Module):
    """Two linear layers with a GELU (the exact one, with erf) between."""

    def __init__(self, width: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:  # (b, n, d) -> (b, n, out)
        return self.fc2(F.gelu(self.fc1(x)))
