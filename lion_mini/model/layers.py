"""What two or more components share: attention and the plain MLP.

The axis letters of all files; a file that needs more names its own:

    b batch   t text tokens, or all that look   n tokens looked at   q learned queries   d width   h heads
    e head width   v vocabulary   c tags   s side of the image
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Recorder = Callable[[Tensor], Any] | None  # is given the attention weights (b, h, t, n); None in normal use


def split_heads(x: Tensor, heads: int) -> Tensor:  # (b, t, h*e) -> (b, h, t, e)
    return rearrange(x, "b t (h e) -> b h t e", h=heads)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    record: Recorder = None,
) -> Tensor:  # (b, h, t, e), (b, h, n, e), (b, h, n, e) -> (b, t, h*e)
    """softmax(q k^T * scale + mask) v for all heads; scale is 1/sqrt(e) by default.

    `mask` broadcasts to (b, h, t, n). It is boolean, True where a query may look, or a bias to add. Every attention
    module has an attribute `record`: a function that is called with the weights (b, h, t, n), or None.
    """
    if record is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        x = plain_attention(q, k, v, mask, scale or q.shape[-1] ** -0.5, dropout, record)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return rearrange(x, "b h t e -> b t (h e)")


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, record: Recorder
) -> Tensor:  # (b, h, t, e), (b, h, n, e), (b, h, n, e) -> (b, h, t, e)
    """Spelled out: to see the weights, and because the fused kernel is 3 to 9 times slower in bfloat16 on a CPU."""
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(v.dtype)
    if record is not None:
        record(weights)
    return F.dropout(weights, dropout) @ v


def recomputed(layer: nn.Module, recompute: bool, x: Tensor, *rest: Any) -> Tensor:
    """layer(x, *rest), with gradient checkpointing if `recompute`: the same gradients, slower, in less memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, x, *rest, use_reentrant=False)
    return layer(x, *rest)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:  # (b, n, d) -> (b, n, out)
        return self.fc2(F.gelu(self.fc1(x)))
