"""How much work each part is, for bench.py's limits.

A phase is (operations, bytes). Operations are multiplications and additions: two per weight and row, two per score of
attention and two per use of a score. Bytes are those of its matrices, each read once. Norms and activations are free.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lion_mini.model.lion import LionModel
from lion_mini.model.ram import Ram
from lion_mini.model.t5 import T5

Phase = tuple[float, float]


def matrices(module: nn.Module) -> Iterator[Tensor]:
    return (m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def products(*pairs: tuple[nn.Module, int]) -> float:
    """Operations of so many rows through every matrix of a module."""
    return sum(2 * rows * matrix.numel() for module, rows in pairs for matrix in matrices(module))


def stored(*modules: nn.Module) -> float:
    return sum(matrix.nbytes for module in modules for matrix in matrices(module))


def scores(queries: int, keys: int, width: int) -> float:
    """Operations of attention's own two products."""
    return 4 * queries * keys * width


def vit(model: LionModel, b: int) -> list[Phase]:
    c = model.config.vit
    return [(b * (products((model.vit, c.tokens)) + c.depth * scores(c.tokens, c.tokens, c.width)), stored(model.vit))]


def qformer(model: LionModel, b: int, t: int) -> list[Phase]:
    """Queries and text go through self-attention, queries alone through cross-attention."""
    assert model.qformer is not None
    q, n, width = model.config.qformer.queries, model.config.vit.tokens, model.config.qformer.width
    total = products((model.qformer.proj, q))
    layers: Any = model.qformer.layers
    for layer in layers:
        total += products((layer.attn, q + t), (layer.ff_query, q), (layer.ff, t)) + scores(q + t, q + t, width)
        if (cross := layer.cross_attn) is not None:
            total += products((cross.q, q), (cross.o, q), (cross.k, n), (cross.v, n)) + scores(q, n, width)
    return [(b * total, stored(model.qformer))]


def aggregator(model: LionModel, b: int) -> list[Phase]:
    assert model.aggregator is not None
    n = model.config.vit.tokens
    attention = 2 * len(model.aggregator.blocks) * scores(n, n, model.config.vit.width)
    return [(b * (products((model.aggregator, n)) + attention), stored(model.aggregator))]


def encoder(t5: T5, b: int, n: int) -> list[Phase]:
    c = t5.config
    attention = c.encoder_depth * scores(n, n, c.heads * c.head_width)
    return [(b * (products((t5.encoder, n)) + attention), stored(t5.encoder))]


def decoder(t5: T5, b: int, rows: int, n: int, tokens: int, reads: int = 0) -> list[Phase]:
    """The image's keys and values, once. Then each token reads them and the rest of the decoder; or `reads` times."""
    c, layers = t5.config, list[Any](t5.decoder)
    inner, item = c.heads * c.head_width, t5.lm_head.weight.itemsize
    image = [module for layer in layers for module in (layer.cross_attn.k, layer.cross_attn.v)]
    once = products(*((module, b * n) for module in image)), stored(*image)
    each = products((t5.decoder, rows), (t5.lm_head, rows)) - products(*((module, rows) for module in image))
    each += c.decoder_depth * scores(rows, n, inner)
    size = stored(t5.decoder, t5.lm_head) - stored(*image) + 2 * c.decoder_depth * b * n * inner * item
    return [once, (tokens * each, (reads or tokens) * size)]


def swin(ram: Ram, b: int) -> list[Phase]:
    c, side = ram.config, ram.config.image_size // ram.config.patch_size
    total = products((ram.swin.patch_embed, side**2))
    stages: Any = ram.swin.stages
    for i, stage in enumerate(stages):
        total += products((stage.blocks, side**2))
        total += len(stage.blocks) * scores(side**2, min(c.window, side) ** 2, c.width * 2**i)
        if stage.merge is not None:
            side //= 2
            total += products((stage.merge, side**2))
    return [(b * total, stored(ram.swin))]


def head(ram: Ram, b: int) -> list[Phase]:
    c = ram.config
    n = 1 + (c.image_size // c.patch_size // 2 ** (len(c.depths) - 1)) ** 2
    total = products((ram.image_proj, n), (ram.fc, c.tags))
    layers: Any = ram.head
    for layer in layers:
        cross = layer.cross_attn
        total += products((cross.q, c.tags), (cross.o, c.tags), (cross.k, n), (cross.v, n), (layer.ff, c.tags))
        total += scores(c.tags, n, c.head.width)
    return [(b * total + products((ram.wordvec_proj, c.tags)), stored(ram) - stored(ram.swin))]
