"""Where an answer comes from: `infer.py --explain` draws it, the page of serve.py shows it.

    queries    where each of the Q-Former's queries looks in the picture, for this question
    taps       which region-level tokens a token of the answer uses, and where the aggregator looks for them in each tap
    shares     how a token of the answer divides the decoder's attention: Q-Former, aggregator, tags, the other words
    likely     the likeliest tokens in its place
    gates      how far the router opens each adapter for this task, in every feed-forward layer

The answer is written as ever, while `layers.attention` hands out its weights: means over heads, and over the decoder's
layers. Attention tells where a model looks. What it needs, only an exchange tells: `eval.py --parts`.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .box import Box
from .images import draw_boxes, plain_text
from .model.adapters import MixtureOfAdapters
from .model.generate import Generation
from .pipeline import Answer, Lion, Tags

SOURCES = {"Q-Former": "#274690", "aggregator": "#e8a86b", "tags": "#3c9d5c", "words": "#b9bfca"}
ALTERNATIVES = 3


@dataclass(frozen=True)
class Explanation:
    """Of an answer of t tokens, `</s>` included, about a picture of s x s patches. Maps leave out the CLS token."""

    answer: Answer
    tokens: list[str]
    likely: list[list[tuple[str, float]]]  # per token the best and their probabilities
    shares: Tensor  # (t, 4) of SOURCES, each row sums to 1
    queries: Tensor  # (q, s, s)
    taps: Tensor  # (t, tap, s, s), the last tap first
    names: list[str]  # of the taps
    gates: Tensor  # (layer, adapter), the encoder's layers first

    def to_json(self) -> dict[str, Any]:
        numbers = lambda tensor: [numbers(row) for row in tensor] if tensor.ndim else round(tensor.item(), 4)
        tensors = {name: numbers(getattr(self, name)) for name in ("shares", "queries", "taps", "gates")}
        likely = [[[token, round(chance, 4)] for token, chance in best] for best in self.likely]
        return {"tokens": self.tokens, "sources": [*SOURCES], "likely": likely, "names": self.names, **tensors}


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The attention weights (t, n) of each call of these modules on one sample."""
    seen: list[Tensor] = []
    for module in modules:
        module.record = lambda weights: seen.append(weights[0].float().mean(0).cpu())  # type: ignore[assignment]
    try:
        yield seen
    finally:
        for module in modules:
            module.record = None  # type: ignore[assignment]


def explain(
    lion: Lion, image: Image.Image, question: str, task: str, settings: Generation, tags: Tags = None
) -> Explanation:
    model, pieces = lion.model, lion.text.pieces
    looks = [layer.cross_attn for layer in model.qformer.layers if layer.cross_attn] if model.qformer else []
    fetches = [block.cross_attn for block in model.aggregator.blocks] if model.aggregator else []
    reads = [layer.cross_attn for layer in model.t5.decoder]
    # 1. Answer. The last pass of the decoder scores the whole answer at once.
    logits: list[Tensor] = []
    hook = model.t5.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    with recorded([*looks, *fetches, *reads]) as seen:
        [answer] = lion.respond([image], [question], [task], settings, tags)
    hook.remove()
    look, fetch, read = seen[: len(looks)], seen[len(looks) :][: len(fetches)], seen[-len(reads) :]
    # 2. The decoder's attention by source. The prompt is a sentence with tags in brackets, and the question.
    name = lambda id: pieces.tokens.get(id, f"<{id}>")  # T5's table has more rows than its vocabulary
    side, q = lion.config.vit.image_size // lion.config.vit.patch_size, lion.config.qformer.queries * bool(looks)
    n, prompt = (side**2 + 1) * bool(model.aggregator), [name(id) for id in pieces.encode(answer.prompt)]
    sentence = prompt[: -len(pieces.encode(question))]
    brackets = [i for i, token in enumerate(sentence) if "[" in token or "]" in token] or [-1, 0]
    first, end = brackets[0] + 1, brackets[-1]
    sizes = [q, n, first, end - first, len(prompt) - end]
    image, region, before, tagged, after = torch.stack(read).mean(0).split(sizes, dim=-1)  # (t, ·) each
    shares = [image.sum(-1), region.sum(-1), tagged.sum(-1), before.sum(-1) + after.sum(-1)]
    # 3. Maps. A token of the answer uses region-level tokens, and through them looks where the aggregator looked.
    as_map = lambda weights: weights[..., 1:].unflatten(-1, (side, side))
    queries = as_map(torch.stack(look).mean(0)) if looks else torch.zeros(0, side, side)
    used = region / region.sum(-1, keepdim=True).clamp_min(1e-9)  # (t, n)
    taps = [as_map(weights) for weights in (used, *(used @ weights for weights in fetch))] if n else []
    # 4. The likeliest tokens, and the gates.
    best = logits[-1][0].float().softmax(-1).topk(1 + ALTERNATIVES)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    row = lion.config.tasks.index(task)
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfAdapters) and module.gates]
    return Explanation(
        answer=answer,
        tokens=[name(id) for id in answer.ids],
        likely=[[(name(id), chance) for id, chance in zip(*pair, strict=True)] for pair in pairs],
        shares=torch.stack(shares, dim=-1),
        queries=queries,
        taps=torch.stack(taps, dim=1) if taps else torch.zeros(len(used), 0, side, side),
        names=[f"tap {tap}" for tap in lion.config.taps[: len(taps)]],
        gates=torch.tensor([[gate[row].mean().item() for gate in mixture.gates] for mixture in mixtures]),
    )


def lit(picture: Image.Image, weights: Tensor) -> Image.Image:  # (s, s)
    """The picture, dark where nobody looks."""
    bright = (255 * weights / weights.max().clamp_min(1e-9)).byte().numpy()
    mask = Image.fromarray(bright).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.eval(picture, lambda level: level // 5), mask)


def draw_explanation(image: Image.Image, this: Explanation, width: int = 1200) -> Image.Image:
    """One sheet: picture and maps, the queries one by one, a row per token, and the gates."""
    sheet, (small, large) = (
        Image.new("RGB", (width, 3000 + 20 * len(this.tokens)), "white"),
        map(ImageFont.load_default, (12, 18)),
    )
    pen, y, left = ImageDraw.Draw(sheet), 12, 16
    write = lambda x, y, text, font=small, color="black": pen.text((x, y), plain_text(text), color, font)

    def tiles(pictures: Sequence[tuple[Image.Image, str]], side: int) -> None:
        nonlocal y
        columns = (width - left) // (side + 10)
        for first in range(0, len(pictures), columns):
            for k, (picture, label) in enumerate(pictures[first : first + columns]):
                sheet.paste(picture, (left + k * (side + 10), y + 18))
                write(left + k * (side + 10), y, label)
            y += 28 + max(picture.height for picture, _ in pictures)

    # 1. What was asked and answered.
    for text, font, letters in ((this.answer.prompt, small, 180), (this.answer.text or "(no words)", large, 110)):
        for line in textwrap.wrap(text, letters)[-3:]:
            write(left, y, line, font)
            y += font.size + 6
    y += 12
    # 2. The picture in patches, where the queries look together, and where the answer leads in each tap.
    fit = lambda side: image.convert("RGB").resize([max(1, side * n // max(image.size)) for n in image.size])
    box, picture = Box.parse(this.answer.text), fit(224)
    gridded, (rows, columns) = picture.copy(), this.taps.shape[-2:]
    lines = ImageDraw.Draw(gridded)
    for k in range(1, rows):
        lines.line((0, k * gridded.height / rows, gridded.width, k * gridded.height / rows), "#888888")
        lines.line((k * gridded.width / columns, 0, k * gridded.width / columns, gridded.height), "#888888")
    if box:
        gridded = draw_boxes(gridded, [(box, "")]).resize(gridded.size)
    weight = this.shares[:, 1] / this.shares[:, 1].sum().clamp_min(1e-9)
    mean = torch.einsum("t, t k i j -> k i j", weight, this.taps)
    maps = [(gridded, f"{rows} x {columns} patches")]
    maps += [(lit(picture, this.queries.mean(0)), "all queries of the Q-Former")] * (len(this.queries) > 0)
    tiles([*maps, *((lit(picture, one), name) for one, name in zip(mean, this.names, strict=True))], 224)
    thumb = fit(64)
    tiles([(lit(thumb, one), f"query {k}") for k, one in enumerate(this.queries)], 64)
    # 3. A row per token: the shares as a bar, and the likeliest tokens.
    for k, (name, color) in enumerate(SOURCES.items()):
        pen.rectangle((left + 120 + 120 * k, y + 2, left + 130 + 120 * k, y + 12), color)
        write(left + 136 + 120 * k, y, name)
    write(left + 630, y, "the likeliest tokens in its place")
    for token, shares, best in zip(this.tokens, this.shares.tolist(), this.likely, strict=True):
        y, x = y + 20, left + 120.0
        write(left, y, token.replace("▁", " ").strip() or "▁", small)
        for share, color in zip(shares, SOURCES.values(), strict=True):
            pen.rectangle((x, y + 1, x + 480 * share, y + 13), color)
            x += 480 * share
        write(
            left + 630, y, "    ".join(f"{name.replace('▁', ' ').strip() or '▁'} {100 * p:.1f} %" for name, p in best)
        )
    y += 36
    # 4. The gates.
    if len(this.gates):
        write(left, y, "the router's mean gate in each feed-forward layer, the encoder's first")
        wide = min(60, (width - 140) // len(this.gates))
        for k, adapter in enumerate(this.gates.T.tolist()):
            write(left, y + 22 + 22 * k, f"adapter {k}")
            for i, gate in enumerate(adapter):
                x, level = left + 90 + wide * i, round(255 * (1 - min(max(gate, 0), 1)))
                pen.rectangle((x, y + 20 + 22 * k, x + wide - 2, y + 39 + 22 * k), (level, level, 255))
                if wide > 30:
                    write(x + 6, y + 23 + 22 * k, f"{gate:.2f}", small, "white" if level < 128 else "black")
        y += 28 + 22 * this.gates.shape[1]
    return sheet.crop((0, 0, width, y + 8))
