"""Q-Former, the image-level branch (section 3.1.2; BLIP-2, InstructBLIP): the question decides what is read.

Learned queries and the question's tokens go through BERT side by side. All of them attend to each other. In every
second layer the queries alone also look at the image. Queries and text then have separate feed-forward layers. Only
the queries' outputs are projected to the language model's width:

    layer 0, 2, ...    self(queries + text)  ->  cross(queries, image)  ->  ff_query(queries) | ff(text)
    layer 1, 3, ...    self(queries + text)                             ->  ff_query(queries) | ff(text)

The mask of 2 queries and a padded batch of the texts "a b c" and "d" (0: nobody attends here):

    q q a b c    1 1 1 1 1
    q q d . .    1 1 1 0 0

Same outputs as the release's models/Qformer.py and models/lion_t5.py.
"""

import torch
from torch import Tensor, nn

from ..config import QFormerConfig
from .bert import Attention, FeedForward, bert_init
from .layers import recomputed


class Layer(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int, cross: bool):
        super().__init__()
        width, heads, eps, dropout = config.width, config.heads, config.norm_eps, config.dropout
        self.attn = Attention(width, heads, eps, dropout)
        self.cross_attn = Attention(width, heads, eps, dropout, context_width=image_width) if cross else None
        self.ff_query = FeedForward(width, config.mlp_width, eps, dropout)
        self.ff = FeedForward(width, config.mlp_width, eps, dropout)

    def forward(
        self, x: Tensor, image: Tensor, mask: Tensor | None, queries: int
    ) -> Tensor:  # (b, q+t, d), (b, n, ·) -> (b, q+t, d)
        x = self.attn(x, mask=mask)
        query, text = x[:, :queries], x[:, queries:]
        if self.cross_attn is not None:
            query = self.cross_attn(query, image)
        return torch.cat((self.ff_query(query), self.ff(text)), dim=1)


class QFormer(nn.Module):
    """The queries' outputs, projected: the image-level visual tokens."""

    recompute = False  # gradient checkpointing

    def __init__(self, config: QFormerConfig, image_width: int, out_width: int):
        super().__init__()
        self.config = config
        self.image_norm = nn.LayerNorm(image_width, eps=1e-5)
        self.queries = nn.Parameter(torch.zeros(1, config.queries, config.width))
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, image_width, cross=i % config.cross_every == 0) for i in range(config.depth)
        )
        self.apply(lambda module: bert_init(module, config.init_std))
        nn.init.normal_(self.queries, std=config.init_std)
        self.proj = nn.Linear(config.width, out_width)

    def attend(
        self, image: Tensor, ids: Tensor, mask: Tensor | None
    ) -> Tensor:  # (b, n, ·), (b, t), (b, t) -> (b, q+t, d)
        """The last layer's output. `mask` is True at text tokens; None if no row is padded."""
        image = self.image_norm(image)
        text = self.words(ids) + self.positions.weight[: ids.shape[1]]
        x = torch.cat((self.queries.expand(len(ids), -1, -1), text), dim=1)
        x = nn.functional.dropout(self.norm(x), self.config.dropout, self.training)
        if mask is not None:
            mask = nn.functional.pad(mask, (self.config.queries, 0), value=True)[:, None, None]
        for layer in self.layers:
            x = recomputed(layer, self.recompute, x, image, mask, self.config.queries)
        return x

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # ... -> (b, q, out)
        return self.proj(self.attend(image, ids, mask)[:, : self.config.queries])
