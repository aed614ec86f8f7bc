"""The vision aggregator, the region-level branch: section 3.1.3, equations (4) and (5).

Fine spatial detail fades in a ViT's last layers. So the aggregator starts from the last tap, rich in meaning, and
fetches detail from earlier ones, one block per tap. A norm and an MLP then project to the language model's width:

    x <- block(x, tap):   self-attention(x)  ->  cross-attention(x, tap)  ->  feed-forward(x)

LION-XL starts from block 38's output and reads taps 28 and 18. Every patch stays a token of its own (257 with CLS).
At initialisation the output projections are zero, so a block only normalises: training starts from LayerNorm(tap 38).

The release calls these parts `fusion_adapter`, `ln_adapter` and `adapter_proj`; they are no adapters of the LLM.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..config import AggregatorConfig
from .bert import Attention, FeedForward, bert_init
from .layers import Mlp, recomputed


class Block(nn.Module):
    def __init__(self, config: AggregatorConfig, width: int):
        super().__init__()
        self.attn = Attention(width, config.heads, config.norm_eps, config.dropout)
        self.cross_attn = Attention(width, config.heads, config.norm_eps, config.dropout)
        self.ff = FeedForward(width, config.mlp_width, config.norm_eps, config.dropout)

    def forward(self, x: Tensor, tap: Tensor) -> Tensor:  # (b, n, d), (b, n, d) -> (b, n, d)
        return self.ff(self.cross_attn(self.attn(x), tap))


class Aggregator(nn.Module):
    """Region-level visual tokens, one per token of the ViT. The taps are its block outputs, last first; a single tap
    has no blocks, only norm and MLP (the ablation of Figure 6)."""

    recompute = False  # gradient checkpointing

    def __init__(self, config: AggregatorConfig, width: int, taps: int, out_width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, width) for _ in range(taps - 1))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.proj = Mlp(width, config.projector_ratio * width, out_width)
        self.blocks.apply(lambda module: bert_init(module, config.init_std))
        for name, parameter in self.blocks.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                nn.init.zeros_(parameter)

    def fuse(self, taps: Sequence[Tensor]) -> Tensor:  # taps x (b, n, d) -> (b, n, d)
        x, *earlier = taps
        for block, tap in zip(self.blocks, earlier, strict=True):
            x = recomputed(block, self.recompute, x, tap)
        return x

    def forward(self, taps: Sequence[Tensor]) -> Tensor:  # taps x (b, n, d) -> (b, n, out)
        return recomputed(self.proj, self.recompute, self.norm(self.fuse(taps)))
