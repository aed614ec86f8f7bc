"""BERT's two sublayers, from which the Q-Former, the vision aggregator and RAM's tagging head build their layers.

Both are *post-norm*: the residual is added first and the sum is normalised, x <- LayerNorm(x + f(x)). ViT, Swin and T5
normalise before f. The three users differ only in which sublayers a layer has:

    Q-Former     self-attention, cross-attention (queries only), feed-forward (one for queries, one for text)
    aggregator   self-attention, cross-attention, feed-forward
    RAM's head                   cross-attention, feed-forward

Same outputs as BertAttention, BertIntermediate and BertOutput of the release's models/Qformer.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Recorder, attention, split_heads


class Attention(nn.Module):
    """LayerNorm(x + W_o attention(x, context)). The context is x itself by default and may have another width."""

    record: Recorder = None

    def __init__(self, width: int, heads: int, norm_eps: float, dropout: float = 0.0, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.o = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:  # (b, t, d), (b, n, ·) -> (b, t, d)
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(context), self.v(context)))
        out = self.o(attention(q, k, v, mask, dropout=self.dropout * self.training, record=self.record))
        return self.norm(x + F.dropout(out, self.dropout, self.training))


class FeedForward(nn.Module):
    """LayerNorm(x + W_o gelu(W_i x)), with the exact GELU."""

    def __init__(self, width: int, hidden: int, norm_eps: float, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.wi = nn.Linear(width, hidden)
        self.wo = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, d) -> (b, t, d)
        return self.norm(x + F.dropout(self.wo(F.gelu(self.wi(x))), self.dropout, self.training))


def bert_init(module: nn.Module, std: float) -> None:
    """BERT's initialisation: normal weights, zero biases; LayerNorms keep PyTorch's ones and zeros."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
