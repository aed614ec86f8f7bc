"""RAM, the Recognize Anything Model: image tags as high-level semantic evidence (section 3.2; arXiv 2306.03514).

LION tells its language model in words what an off-the-shelf tagger sees. Every tag of the vocabulary is a query, made
from a frozen embedding of its name. It looks at the image through cross-attention, and a linear unit then says yes or
no. Tags never attend to each other:

    image -> swin -> image_proj ----------------------+ keys and values, the same for all tags
                                                      v
    label_embed -> wordvec_proj -> relu -> [cross-attention, feed-forward] x 2 -> fc -> sigmoid > the tag's threshold

RAM is frozen and has no dropout, so an image always has the same tags. `select` returns (index, score) pairs;
lion_mini/pipeline.py applies the sigmoid and turns indices into words.

Compatible with the release's ram/models/ram.py and its files ram_swin_large_14m.pth, ram_tag_list.txt and
ram_tag_list_threshold.txt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RamConfig, TagHeadConfig
from .bert import Attention, FeedForward, bert_init
from .swin import Swin


class TagLayer(nn.Module):
    def __init__(self, config: TagHeadConfig, image_width: int):
        super().__init__()
        self.cross_attn = Attention(config.width, config.heads, config.norm_eps, context_width=image_width)
        self.ff = FeedForward(config.width, config.mlp_width, config.norm_eps)

    def forward(self, tags: Tensor, image: Tensor) -> Tensor:  # (b, c, d), (b, n, ·) -> (b, c, d)
        return self.ff(self.cross_attn(tags, image))


class Ram(nn.Module):
    """One logit per tag of the vocabulary. `label_embed` is random here; RAM's checkpoint brings the real ones."""

    def __init__(self, config: RamConfig):
        super().__init__()
        self.config = config
        self.swin = Swin(config)
        self.image_proj = nn.Linear(config.width * 2 ** (len(config.depths) - 1), config.tag_width)
        self.label_embed = nn.Parameter(nn.init.normal_(torch.empty(config.tags, config.tag_width)))
        self.wordvec_proj = nn.Linear(config.tag_width, config.head.width)
        self.head = nn.ModuleList(TagLayer(config.head, config.tag_width) for _ in range(config.head.depth))
        self.fc = nn.Linear(config.head.width, 1)
        for part in (self.swin, self.head):
            part.apply(lambda module: bert_init(module, config.init_std))

    def forward(self, image: Tensor) -> Tensor:  # (b, 3, s, s) -> (b, c), logits
        return self.recognise(self.image_proj(self.swin(image)))

    def recognise(self, context: Tensor) -> Tensor:  # (b, n, tag_width) -> (b, c), logits
        tags = F.relu(self.wordvec_proj(self.label_embed)).expand(len(context), -1, -1)
        for layer in self.head:
            tags = layer(tags, context)
        return self.fc(tags).squeeze(-1)


def select(
    scores: Tensor, thresholds: Tensor | float, top_k: int | None = None
) -> list[list[tuple[int, float]]]:  # (b, c), (c,) or one for all -> per image (tag, score) pairs
    """The tags whose score, sigmoid(logit), is above their threshold, in the order of the vocabulary.

    LION uses one threshold per tag, from a file beside RAM's. `top_k` keeps the best k of the tags above it.

    scores 0.9, 0.2, 0.7, 0.8 at threshold 0.5:   top_k=None -> tags 0, 2, 3     top_k=2 -> tags 0, 3
    """
    if not isinstance(thresholds, Tensor) and not 0 <= thresholds <= 1:
        raise ValueError(f"a threshold is a score from 0 to 1, not {thresholds}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is 1 or more, not {top_k}")
    chosen = []
    for row, above in zip(scores.tolist(), (scores > thresholds).tolist(), strict=True):
        tags = [tag for tag, yes in enumerate(above) if yes]
        best = sorted(tags, key=lambda tag: row[tag], reverse=True)[:top_k]
        chosen.append([(tag, row[tag]) for tag in sorted(best)])
    return chosen
