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
from PIL import Image, ImageDraw
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
        """All but the answer, rounded to four decimals."""
        tensors = {"shares": self.shares, "queries": self.queries, "taps": self.taps, "gates": self.gates}
        numbers = {name: tensor.double().numpy().round(4).tolist() for name, tensor in tensors.items()}
        likely = [[[token, round(chance, 4)] for token, chance in best] for best in self.likely]
        return {"tokens": self.tokens, "sources": [*SOURCES], "likely": likely, "names": self.names, **numbers}


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The attention weights (t, n) of each call of these modules on one sample, mean over heads."""
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
    """Answer as `Lion.respond`, with the same errors, and say where the answer comes from. `tags` has one entry.

    Parts that a stage lacks have no maps, no share and no gates.
    """
    model, pieces = lion.model, lion.text.pieces
    layers: Any = model.qformer.layers if model.qformer else ()
    blocks: Any = model.aggregator.blocks if model.aggregator else ()
    looks, fetches = [layer.cross_attn for layer in layers if layer.cross_attn], [block.cross_attn for block in blocks]
    decoder: Any = model.t5.decoder
    reads = [layer.cross_attn for layer in decoder]
    # 1. Answer. The last pass of the decoder scores the whole answer at once.
    logits: list[Tensor] = []
    keep = model.t5.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    with keep, recorded([*looks, *fetches, *reads]) as weights:
        [answer] = lion.respond([image], [question], [task], settings, tags)
    look, fetch, read = weights[: len(looks)], weights[len(looks) :][: len(fetches)], weights[-len(reads) :]
    # 2. The decoder's attention by source. The prompt is a sentence with tags in brackets, and the question.
    name = lambda id: pieces.tokens.get(id, f"<{id}>")  # T5's table has more rows than its vocabulary
    side, q = lion.config.vit.image_size // lion.config.vit.patch_size, lion.config.qformer.queries * bool(looks)
    n, prompt = (side**2 + 1) * bool(model.aggregator), [name(id) for id in pieces.encode(answer.prompt)]
    sentence = prompt[: -len(pieces.encode(question))]
    brackets = [i for i, token in enumerate(sentence) if "[" in token or "]" in token] or [-1, 0]
    first, end = brackets[0] + 1, brackets[-1]
    sizes = [q, n, first, end - first, len(prompt) - end]
    whole, region, before, tagged, after = torch.stack(read).mean(0).split(sizes, dim=-1)  # (t, ·) each
    shares = [whole.sum(-1), region.sum(-1), tagged.sum(-1), before.sum(-1) + after.sum(-1)]
    # 3. Maps. A token of the answer uses region-level tokens, and through them looks where the aggregator looked.
    as_map = lambda row: row[..., 1:].unflatten(-1, (side, side))
    queries = as_map(torch.stack(look).mean(0)) if looks else torch.zeros(0, side, side)
    used = region / region.sum(-1, keepdim=True).clamp_min(1e-9)  # (t, n)
    taps = [as_map(weights) for weights in (used, *(used @ each for each in fetch))] if n else []
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


def fitted(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize([max(1, side * n // max(image.size)) for n in image.size])


def maps(image: Image.Image, this: Explanation, side: int) -> list[tuple[Image.Image, str]]:
    """The picture in patches with the answer's box, where all queries look, and where the answer leads in each tap."""
    picture, (rows, columns) = fitted(image, side), this.taps.shape[-2:]
    width, height = picture.size
    lines = ImageDraw.Draw(gridded := picture.copy())
    for k in range(1, rows):
        lines.line((0, k * height / rows, width, k * height / rows), "#888888")
        lines.line((k * width / columns, 0, k * width / columns, height), "#888888")
    if box := Box.parse(this.answer.text):
        gridded = draw_boxes(gridded, [(box, "")]).resize(picture.size)
    used = this.shares[:, 1] / this.shares[:, 1].sum().clamp_min(1e-9)
    mean = torch.einsum("t, t k i j -> k i j", used, this.taps)
    found = [(gridded, f"{rows} x {columns} patches")]
    found += [(lit(picture, this.queries.mean(0)), "all queries of the Q-Former")] if len(this.queries) else []
    return found + [(lit(picture, one), name) for one, name in zip(mean, this.names, strict=True)]


def draw_explanation(image: Image.Image, this: Explanation, width: int = 1200) -> Image.Image:
    """One sheet: picture and maps, the queries one by one, a row per token, and the gates."""
    sheet = Image.new("RGB", (width, 3000 + 20 * len(this.tokens)), "white")
    pen, y, left = ImageDraw.Draw(sheet), 12, 16
    write = lambda x, y, text, size=12, color="black": pen.text((x, y), plain_text(text), color, font_size=size)

    def tiles(pictures: Sequence[tuple[Image.Image, str]], side: int) -> None:
        nonlocal y
        columns = (width - left) // (side + 10)
        for first in range(0, len(pictures), columns):
            for k, (picture, label) in enumerate(pictures[first : first + columns]):
                sheet.paste(picture, (left + k * (side + 10), y + 18))
                write(left + k * (side + 10), y, label)
            y += 28 + max(picture.height for picture, _ in pictures)

    # 1. What was asked and answered.
    for text, size, letters in ((this.answer.prompt, 12, 180), (this.answer.text or "(no words)", 18, 110)):
        for line in textwrap.wrap(text, letters)[-3:]:
            write(left, y, line, size)
            y += size + 6
    y += 12
    # 2. The maps, and each query for itself.
    tiles(maps(image, this, 224), 224)
    tiles([(lit(fitted(image, 64), one), f"query {k}") for k, one in enumerate(this.queries)], 64)
    # 3. A row per token: the shares as a bar, and the likeliest tokens.
    word = lambda token: token.replace("▁", " ").strip() or "▁"
    for k, (name, color) in enumerate(SOURCES.items()):
        pen.rectangle((left + 120 + 120 * k, y + 2, left + 130 + 120 * k, y + 12), color)
        write(left + 136 + 120 * k, y, name)
    write(left + 630, y, "the likeliest tokens in its place")
    for token, shares, best in zip(this.tokens, this.shares.tolist(), this.likely, strict=True):
        y, x = y + 20, left + 120.0
        write(left, y, word(token))
        for share, color in zip(shares, SOURCES.values(), strict=True):
            pen.rectangle((x, y + 1, x + 480 * share, y + 13), color)
            x += 480 * share
        write(left + 630, y, "    ".join(f"{word(name)} {100 * chance:.1f} %" for name, chance in best))
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
                    write(x + 6, y + 23 + 22 * k, f"{round(gate, 2) + 0:.2f}", 12, "white" if level < 128 else "black")
        y += 28 + 22 * this.gates.shape[1]
    return sheet.crop((0, 0, width, y + 8))
