"""FlanT5, LION's frozen language model, with a mixture of adapters in every feed-forward layer (section 3.1.2, eq. 1).

A pre-norm encoder and decoder, x <- x + f(RMSNorm(x)), without bias terms. Three things differ from the textbook.
Attention scores are not divided by sqrt(e). Positions enter as a learned number per head, added to the scores: computed
once per stack and shared by its self-attention layers. The feed-forward layer is gated, with the exact GELU, as BLIP-2
and the release have it (FlanT5's own is the tanh approximation). LION's adapters stand beside it and read x before the
norm:

    x <- x + W_o (gelu(W_0 y) * W_1 y) + mixture(x),    y = RMSNorm(x)

The decoder works on rows: k rows per sample (beams, candidates or returned sequences). A `Cache` holds the
cross-attention's keys and values once per sample, and those of the tokens so far per row.

Same outputs as the release's models/modeling_t5.py.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import IGNORE, PAD, T5Config
from .adapters import MixtureOfAdapters
from .layers import Recorder, attention, recomputed, split_heads


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance >= 0: exact for half of the buckets, then logarithmic; the last one takes the rest.

    With 8 buckets and a maximum of 16: distances 0 1 2 3 | 4 5 | 6 .. 7 | 8 .. 11 | 12 and more
                                        buckets   0 1 2 3 |  4  |   5    |    6    |      7
    """
    exact = buckets // 2
    log = torch.log(distance.clamp_min(1) / exact) / math.log(max_distance / exact)
    far = (exact + (log * (buckets - exact)).long()).clamp_max(buckets - 1)
    return torch.where(distance < exact, distance, far)


def relative_bias(table: nn.Embedding, length: int, max_distance: int, causal: bool) -> Tensor:  # -> (1, h, t, t)
    """The bias added to the score of query i (row) and key j (column): one number per head and bucket of j - i.

    The encoder spends half of its buckets on each direction. The decoder sees no future: -inf there.
    """
    position = torch.arange(length, device=table.weight.device)
    ahead = position[None] - position[:, None]
    buckets = table.num_embeddings
    if causal:
        index = bucket((-ahead).clamp_min(0), buckets, max_distance)
    else:
        index = bucket(ahead.abs(), buckets // 2, max_distance) + (ahead > 0) * (buckets // 2)
    bias = rearrange(table(index), "i j h -> 1 h i j").contiguous()
    return bias.masked_fill(ahead > 0, -torch.inf) if causal else bias


class Attention(nn.Module):
    """x + W_o attention(RMSNorm(x), ...), to the sequence itself (`forward`) or to an encoded one (`cross`)."""

    record: Recorder = None

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (b, n, d) -> 2 x (b, h, n, e)
        return split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)

    def forward(
        self, x: Tensor, bias: Tensor, cache: "Cache | None" = None, layer: int = 0
    ) -> Tensor:  # (b, t, d) -> (b, t, d)
        y = self.norm(x)
        k, v = self.keys_values(y)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return x + self.o(attention(split_heads(self.q(y), self.heads), k, v, bias, scale=1.0, record=self.record))

    def cross(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # (b*k, t, d) -> (b*k, t, d)
        """Cross-attention. The rows of a sample become one long query to its keys and values (b, h, n, e)."""
        b, t = len(k), x.shape[1]
        q = rearrange(self.q(self.norm(x)), "(b k) t (h e) -> b h (k t) e", b=b, h=self.heads)
        y = attention(q, k, v, mask, scale=1.0, record=self.record)
        return x + self.o(rearrange(y, "b (k t) d -> (b k) t d", t=t))


class FeedForward(nn.Module):
    """Gated feed-forward with the adapters beside it."""

    def __init__(self, config: T5Config, adapter_width: int, adapters: int):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)
        self.adapters = MixtureOfAdapters(config.width, adapter_width, adapters) if adapters else None

    def forward(self, x: Tensor, task: Tensor) -> Tensor:  # (b, t, d), (b,) -> (b, t, d)
        y = self.norm(x)
        out = x + self.wo(F.gelu(self.wi_0(y)) * self.wi_1(y))
        return out if self.adapters is None else out + self.adapters(x, task)


class EncoderLayer(nn.Module):
    def __init__(self, config: T5Config, adapter_width: int, adapters: int):
        super().__init__()
        self.attn = Attention(config)
        self.ff = FeedForward(config, adapter_width, adapters)

    def forward(self, x: Tensor, bias: Tensor, task: Tensor) -> Tensor:  # (b, n, d) -> (b, n, d)
        return self.ff(self.attn(x, bias), task)


class DecoderLayer(nn.Module):
    def __init__(self, config: T5Config, adapter_width: int, adapters: int):
        super().__init__()
        self.attn = Attention(config)
        self.cross_attn = Attention(config)
        self.ff = FeedForward(config, adapter_width, adapters)

    def forward(
        self, x: Tensor, bias: Tensor, layer: int, cache: "Cache", task: Tensor
    ) -> Tensor:  # (b*k, t, d) -> (b*k, t, d)
        x = self.attn(x, bias, cache, layer)
        k, v = cache.cross[layer] if cache.cross else self.cross_attn.keys_values(cache.states)
        x = self.cross_attn.cross(x, k, v, cache.mask)
        return self.ff(x, task)


class Cache:
    """What decoding a batch remembers: keys and values of the encoder's states, and of the tokens so far.

    With gradients, each layer computes the states' keys and values when it needs them. Holding those of all layers, and
    their gradients, would be most of a training step's memory.
    """

    def __init__(self, t5: "T5", states: Tensor, mask: Tensor | None, task: Tensor, capacity: int):
        layers: Any = [] if torch.is_grad_enabled() else t5.decoder
        pairs = (layer.cross_attn.keys_values(states) for layer in layers)
        self.cross = [(k.contiguous(), v.contiguous()) for k, v in pairs]  # contiguous: they are read for every token
        self.states = states
        self.depth = len(t5.decoder)
        self.mask = None if mask is None else mask[:, None, None]
        self.task = task
        self.bias = relative_bias(t5.decoder_bias, capacity + -capacity % 8, t5.config.max_distance, causal=True)
        self.past = torch.empty(0)  # keys and values of the tokens so far: (layer, 2, b*k, h, capacity, e)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """2 x (b*k, h, t, e) -> 2 x (b*k, h, length, e). Memory for all tokens is allocated at the first."""
        if k.shape[2] == self.capacity:  # teacher forcing: the whole sequence at once
            return k, v
        if not self.past.numel():
            rows, heads, _, width = k.shape
            self.past = k.new_empty(self.depth, 2, rows, heads, self.capacity, width)
        keys, values = self.past[layer, :, :, :, : self.length]
        keys[:, :, -k.shape[2] :], values[:, :, -k.shape[2] :] = k, v
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Beam search: row i continues row `rows[i]` of the same sample."""
        for layer in self.past[..., : self.length, :]:
            layer.copy_(layer[:, rows])


class T5(nn.Module):
    """Encoder and decoder. With `adapters=0` it is the plain FlanT5."""

    recompute = False  # gradient checkpointing

    def __init__(self, config: T5Config, adapter_width: int = 0, adapters: int = 0):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = nn.ModuleList(EncoderLayer(config, adapter_width, adapters) for _ in range(config.encoder_depth))
        self.encoder_bias = nn.Embedding(config.buckets, config.heads)
        self.encoder_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.decoder = nn.ModuleList(DecoderLayer(config, adapter_width, adapters) for _ in range(config.decoder_depth))
        self.decoder_bias = nn.Embedding(config.buckets, config.heads)
        self.decoder_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def encode(
        self, x: Tensor, mask: Tensor | None, task: Tensor
    ) -> Tensor:  # (b, n, d), (b, n) True at tokens, (b,) -> (b, n, d)
        n = x.shape[1]
        bias = relative_bias(self.encoder_bias, n, self.config.max_distance, causal=False)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        bias = F.pad(bias, (0, -n % 8))[..., :n]  # rows of 8, or a GPU's kernel would copy the bias in every layer
        for layer in self.encoder:
            x = recomputed(layer, self.recompute, x, bias, task)
        return self.encoder_norm(x)

    def start(
        self, states: Tensor, mask: Tensor | None, task: Tensor, capacity: int
    ) -> Cache:  # (b, n, d), (b, n), (b,) -> a cache
        """A cache without tokens, for rows of at most `capacity` of them, the start token (PAD) included."""
        return Cache(self, states, mask, task, capacity)

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:  # (b*k, t) -> (b*k, t, v)
        """The logits after each of these tokens, which continue the ones already in the cache."""
        start, cache.length = cache.length, cache.length + ids.shape[1]
        bias = cache.bias[:, :, start : cache.length, : cache.length]
        task = cache.task.repeat_interleave(len(ids) // len(cache.task))
        x = self.shared(ids)
        for i, layer in enumerate(self.decoder):
            x = recomputed(layer, self.recompute, x, bias, i, cache, task)
        return self.lm_head(self.decoder_norm(x))

    def predict(self, labels: Tensor, cache: Cache) -> Tensor:  # (b*k, t), IGNORE after the end -> (b*k, t, v)
        """Teacher forcing: the logits of every label given the labels before it. Writes no keys or values."""
        assert labels.shape[1] == cache.capacity
        cache.length = 0
        ids = F.pad(labels[:, :-1], (1, 0), value=PAD)
        return self.decode(ids.masked_fill(ids == IGNORE, PAD), cache)
