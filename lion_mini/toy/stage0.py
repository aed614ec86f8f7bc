"""Stage 0, for the toy only: stand-ins for what LION downloads, an EVA-CLIP ViT, a FlanT5 and RAM, on the shapes world.

LION begins with three models that others trained. Nobody trained any on coloured shapes, so this file does, in the
way that costs least, and then freezes them as the paper does:

    ViT    says of every patch which shape, colour, size and box lie there       (in place of EVA-CLIP's captions)
    T5     answers about the frozen ViT's tokens through a linear projector      (in place of FlanT5 and of BLIP-2,
           that is thrown away: it learns the language, to look, and to write     whose Q-Former it has read before)
           the coordinates it sees; stages 1 to 3 must earn their way with new eyes
    RAM    says which tags apply; asymmetric loss, arXiv 2009.14119

What makes minutes enough is that none of them learns from its answer alone: every patch has labels, and so has every
noun of a question (labels.py). From yes and no alone the T5 learned to compare in no run, with such labels in ten
minutes.

    `python -m lion_mini.stage0 --out out/stage0`                                         next: train.py
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from .. import toy
from ..config import IGNORE, PAD, PRESETS, LionConfig
from ..images import lion_transform, ram_transform
from ..model.ram import Ram
from ..model.t5 import T5
from ..model.vit import Vit
from ..text.prompts import tag_sentence
from ..text.tokenizers import UnigramTokenizer
from .labels import FIELDS, MEASURES, REFERENT, Meanings, field_loss, meaning_loss, owners, patch_labels

POOL = 12000  # scenes, drawn once
STEPS = {"vit": 600, "t5": 3900, "ram": 900}
Log = Callable[[str, dict[str, float]], None]


def schedule(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then half a cosine to a fiftieth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def optimise(model: nn.Module, loss: Callable[[int], Tensor], steps: int, peak: float, name: str, log: Log) -> None:
    """AdamW for so many steps; bfloat16 autocast halves their time."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    model.train()
    start, mean = time.perf_counter(), 0.0
    bar = trange(steps, desc=name, unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, peak)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = value.item() if step == 0 else 0.98 * mean + 0.02 * value.item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if step % 50 == 49:
            log(name, {"step": step + 1, "loss": mean, "seconds": time.perf_counter() - start})
    model.eval()


class Pool:
    """The scenes; questions about them are new in every step."""

    def __init__(self, count: int, split: toy.Split, config: LionConfig, first: int = 0):
        self.scenes = [toy.scene(seed, split) for seed in range(first, first + count)]
        side = config.vit.image_size // config.vit.patch_size
        self.owner = torch.from_numpy(np.stack([owners(scene, side) for scene in self.scenes]))  # (b, n)
        self.features = torch.empty(0)  # what the ViT makes of the pictures, once there is one: (b, 1 + n, d)

    def pictures(self, transform: Callable[[Image, int], Tensor], size: int) -> Tensor:  # -> (b, 3, s, s)
        """All at once, for one model: the next one's take their place in memory."""
        pixels = torch.empty(len(self.scenes), 3, size, size, dtype=torch.bfloat16)
        for row, scene in zip(pixels, self.scenes, strict=True):
            row.copy_(transform(scene.image, size))
            del scene.__dict__["image"]
        return pixels


# --- the eye


def train_vit(config: LionConfig, pool: Pool, test: Pool, steps: int, log: Log) -> Vit:
    """The ViT; both pools now have their features."""
    pixels, held_out = (one.pictures(lion_transform, config.vit.image_size) for one in (pool, test))
    vit = Vit(config.vit)
    nn.init.normal_(vit.positions, std=0.3)
    head = nn.Sequential(nn.LayerNorm(config.vit.width), nn.Linear(config.vit.width, sum(FIELDS)))
    labels = patch_labels(pool.scenes, pool.owner)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        return field_loss(head(vit(pixels[rows].float())[0][:, 1:]), labels[rows], FIELDS)

    optimise(nn.ModuleList((vit, head)), loss, steps, 2e-3, "vit", log)
    vit.to(torch.bfloat16).float()  # as it will be stored: what comes next must know it so
    wanted = patch_labels(test.scenes, test.owner)
    with torch.inference_mode():
        found = head(vit(held_out.float())[0][:, 1:]).split(FIELDS, dim=-1)
    guess = torch.stack([one.argmax(-1) for one in found], dim=-1)
    counted = wanted != IGNORE
    right = ((guess == wanted) & counted).sum((0, 1)) / counted.sum((0, 1))
    names = ("shape", "colour", "size", "x1", "y1", "x2", "y2")
    log("vit, held out", dict(zip(names, right.tolist(), strict=True)))
    pool.features, test.features = features_of(vit, pixels), features_of(vit, held_out)
    return vit


@torch.inference_mode()
def features_of(vit: Vit, pixels: Tensor) -> Tensor:  # (b, 3, s, s) -> (b, n, d)
    return torch.cat([vit(part.float())[0].bfloat16() for part in pixels.split(500)])


# --- the language model

SHARES = {
    "existence": 1.5, "counting": 2.0, "colour": 1.0, "shape": 0.5, "comparison": 1.5, "relation": 2.5,
    "caption": 1.0, "vqg": 0.1, "dialogue": 0.5, "rec": 3.0, "reg": 1.5,
}  # fmt: skip
SCENES, QUESTIONS = 32, 4  # of a step
BARE = {
    "caption": ["A short image description:"], "vqa": ["{question}"], "vqg": ["Question: {answer}"],
    "dialogue": ["{question}"], "rec": ["Where is {expression}?"], "reg": ["What is at {box}?"],
}  # fmt: skip


def grounded(scene: toy.Scene) -> toy.Record:
    """All that is there with its boxes: much to learn from one picture. Only stage 0 asks this."""
    said = ", ".join(f"{t.size} {t.name} {t.box.to_text()}" for t in scene.things)
    return {"kind": "grounded", "subkind": "", "question": "Describe the image with coordinates.", "answer": said}


class Reader(nn.Module):
    """T5, the projector through which it learns to look, and heads that say what it takes words to mean.

    Nouns are asked after the second layer already: so the third can compare what they mean.
    """

    def __init__(self, config: LionConfig, pieces: UnigramTokenizer):
        super().__init__()
        width = config.t5.width
        self.t5 = T5(config.t5)
        self.projector = nn.Sequential(nn.LayerNorm(config.vit.width), nn.Linear(config.vit.width, width))
        self.nouns = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(REFERENT) + MEASURES[0]))
        self.relations = nn.Linear(width, MEASURES[1])
        self.early = torch.empty(0)
        self.t5.encoder[1].register_forward_hook(lambda module, args, out: setattr(self, "early", out))
        self.pieces = pieces
        self.meanings = Meanings(pieces)
        self.encode = self.meanings.encode

    def start(self, features: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's input for the tokens of the ViT, (b, n, ·), and prompts: `T5.encode`'s arguments."""
        ids = self.pad([self.encode(prompt) for prompt in prompts], PAD)
        mask = F.pad(ids != PAD, (features.shape[1], 0), value=True)
        x = torch.cat((self.projector(features), self.t5.shared(ids)), dim=1)
        return x, mask, torch.zeros(len(ids), dtype=torch.long)

    def pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    def forward(
        self, features: Tensor, prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # -> (b, t, v), (b, t), 2 x (b, prompt, d)
        """Logits and labels of the answers, and the prompts' words after the encoder's second and after its last layer,
        as `nouns` and `relations` read them."""
        x, mask, task = self.start(features, prompts)
        labels = self.pad([self.encode(answer) for answer in answers], IGNORE)
        states = self.t5.encode(x, mask, task)
        logits = self.t5.predict(labels, self.t5.start(states, mask, task, labels.shape[1]))
        return logits, labels, self.early[:, features.shape[1] :], states[:, features.shape[1] :]


@torch.no_grad()
def start_from_words(reader: Reader, features: Tensor, labels: Tensor) -> None:
    """Let the projector begin as the least-squares map from the ViT's tokens to the embeddings of the words that
    describe what lies there, coordinates turned by one rotation per place in a box. The words weigh more: three
    quarters of what the ViT's tokens vary by is coordinates, and a question's "red" would not find its shape."""
    width, embedding = reader.t5.config.width, reader.t5.shared.weight
    numbers = embedding[[reader.pieces.pieces[f"{i / toy.GRID:.3f}"][0] for i in range(toy.GRID + 1)]]
    names = [[reader.pieces.encode(word)[0] for word in field] for field in (toy.SHAPES, toy.COLOURS, toy.SIDES)]
    turned = [numbers @ torch.linalg.qr(torch.randn(width, width))[0] for _ in range(4)]
    tables = [*(embedding[ids] for ids in names), *turned]
    wanted = torch.zeros(*labels.shape[:2], width)
    for i, table in enumerate(tables):
        known = (labels[..., i] != IGNORE) & (labels[..., i] < len(table))
        wanted[known] += (1.0 if i < 3 else 0.25) * table[labels[..., i][known]]
    norm, linear = reader.projector
    assert isinstance(linear, nn.Linear)
    x = F.pad(norm(features[:, 1:].float()).flatten(0, 1), (0, 1), value=1.0).double()
    squares = x.T @ x + 1e-5 * len(x) * torch.eye(x.shape[1])  # one direction is empty after a LayerNorm
    solved = torch.linalg.solve(squares, x.T @ wanted.flatten(0, 1).double())  # two threads' lstsq differs in each run
    linear.weight.copy_(solved[:-1].T)
    linear.bias.copy_(solved[-1])


def glimpse(owner: Tensor, few: bool, tokens: int) -> Tensor:  # (n,) -> (tokens,) or (1 + n,)
    """Which of the ViT's tokens the T5 is shown, in any order, so that it goes by what they say, not by where they
    stand. Half of the time it is all, as the aggregator will show it; else few, one for each thing and some of
    the background, as a Q-Former might choose."""
    order = torch.randperm(len(owner) + 1)
    if not few:
        return order
    whose = F.pad(owner, (1, 0), value=-1)[order]
    first = torch.cat([(whose == i).nonzero()[:1, 0] for i in range(int(owner.max()) + 1)])
    rest = (whose == -1).nonzero()[: tokens - len(first), 0]
    chosen = order[torch.cat((first, rest))]
    chosen = F.pad(chosen, (0, tokens - len(chosen)), value=0)
    return chosen[torch.randperm(tokens)]


def asked(
    scene: toy.Scene, rng: random.Random, count: int, instructions: Mapping[str, Sequence[str]]
) -> list[toy.Record]:
    found = toy.records(scene, rng, instructions=instructions)
    weights = [SHARES[r["subkind"] or r["kind"]] for r in found]
    return rng.choices(found, weights, k=count)


def prompt(record: toy.Record, tagged: bool, rng: random.Random) -> str:
    """Tags come in any order, so that nothing but its place tells the "small" of a question from a tag."""
    if not tagged or "tags" not in record:
        return record["question"]
    tags = record["tags"].split(", ")
    rng.shuffle(tags)
    return tag_sentence(tags) + record["question"]


def train_t5(
    config: LionConfig, pool: Pool, test: Pool, pieces: UnigramTokenizer, steps: int, seed: int, log: Log
) -> T5:
    reader, rng = Reader(config, pieces), random.Random(seed)
    start_from_words(reader, pool.features[:2000], patch_labels(pool.scenes[:2000], pool.owner[:2000]))
    reader.t5.lm_head.weight.data.copy_(0.1 * reader.t5.shared.weight)  # to write a word that it reads is then easy

    def loss(step: int) -> Tensor:
        early = step < 0.6 * steps  # first the questions alone, then the instructions around them
        few, bare = rng.random() < (0.8 if early else 0.5), rng.random() < (0.9 if early else 0.3)
        instructions = BARE if bare else {kind: [rng.choice(texts)] for kind, texts in toy.INSTRUCTIONS.items()}
        tagged = rng.random() < 0.4  # from the first step: who learned without tags takes them for the question
        each = 1 if step % 20 == 19 else QUESTIONS  # long answers stand in batches of their own: less padding
        rows = rng.sample(range(len(pool.scenes)), min(2 * SCENES if each == 1 else SCENES, len(pool.scenes)))
        if each == 1:
            records = [grounded(pool.scenes[row]) for row in rows]
        else:
            records = [record for row in rows for record in asked(pool.scenes[row], rng, each, instructions)]
        rows = [row for row in rows for _ in range(each)]
        seen = torch.stack([pool.features[row][glimpse(pool.owner[row], few, config.qformer.queries)] for row in rows])
        prompts = [prompt(record, tagged, rng) for record in records]
        logits, labels, early_words, words = reader(seen.float(), prompts, [r["answer"] for r in records])
        wanted = reader.meanings.prompts(prompts, records, [pool.scenes[row] for row in rows])
        known = (wanted != IGNORE).any(-1)
        meant = torch.cat((reader.nouns(early_words[known]), reader.relations(words[known])), dim=-1)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        if step % 1000 == 999:
            log("t5, held out", score(reader, test, random.Random(0), few=False))
            reader.train()
        answer = (losses.sum(1) / (labels != IGNORE).sum(1)).mean()  # else a long box outweighs a yes
        return answer + meaning_loss(meant, wanted[known])

    optimise(reader, loss, steps, 1e-3, "t5", log)  # 1.6e-3 does not get off its plateau
    log("t5, held out", score(reader, test, random.Random(0), few=False))
    log("t5, held out, few", score(reader, test, random.Random(0), few=True))
    log("t5, held out, tags", score(reader, test, random.Random(0), few=False, tagged=True))
    return reader.t5


@torch.inference_mode()
def score(reader: Reader, pool: Pool, rng: random.Random, few: bool, tagged: bool = False) -> dict[str, float]:
    """The share of answers that greedy decoding would give word for word, per kind of question."""
    right: dict[str, list[float]] = {}
    for first in range(0, len(pool.scenes), 25):
        part = range(first, min(first + 25, len(pool.scenes)))
        pairs = [(row, r) for row in part for r in [*toy.records(pool.scenes[row], rng), grounded(pool.scenes[row])]]
        seen = torch.stack([pool.features[row][glimpse(pool.owner[row], few, 12)] for row, _ in pairs]).float()
        with torch.autocast("cpu", torch.bfloat16):
            prompts = [prompt(r, tagged, rng) for _, r in pairs]
            logits, labels, *_ = reader(seen, prompts, [r["answer"] for _, r in pairs])
        same = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
        for (_, r), yes in zip(pairs, same.tolist(), strict=True):
            right.setdefault(r["subkind"] or r["kind"], []).append(yes)
    return {kind: sum(found) / len(found) for kind, found in sorted(right.items())}


# --- the tagger


def asymmetric_loss(logits: Tensor, wanted: Tensor, focus: float = 2.0, margin: float = 0.05) -> Tensor:
    """Cross-entropy per tag, in which an easy no, p ** focus, counts little, and one below the margin nothing."""
    p = logits.sigmoid()
    q = (p - margin).clamp_min(0)
    yes = -wanted * p.clamp_min(1e-6).log()
    no = -(1 - wanted) * q**focus * (1 - q).clamp_min(1e-6).log()
    return (yes + no).sum(-1).mean()


def train_ram(config: LionConfig, pool: Pool, test: Pool, steps: int, seed: int, log: Log) -> tuple[Ram, list[float]]:
    """RAM, from tags as faulty as those of a real tagger's captions, and a threshold per tag for the best F1."""
    assert config.ram
    ram, rng = Ram(config.ram), random.Random(seed)
    pixels, held_out = (one.pictures(ram_transform, config.ram.image_size) for one in (pool, test))
    wanted = tag_table([toy.tags(scene.things, rng) for scene in pool.scenes])
    side = config.ram.image_size // config.ram.patch_size // 2 ** (len(config.ram.depths) - 1)
    owner = torch.from_numpy(np.stack([owners(scene, side) for scene in pool.scenes]))
    labels, head = patch_labels(pool.scenes, owner), nn.Linear(config.ram.tag_width, sum(FIELDS[:3]))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pool.scenes), (64,))
        context = ram.image_proj(ram.swin(pixels[rows].float()))  # the mean comes first
        seen = field_loss(head(context[:, 1:]), labels[rows], FIELDS[:3])
        return asymmetric_loss(ram.recognise(context).float(), wanted[rows]) + seen

    optimise(nn.ModuleList((ram, head)), loss, steps, 3e-3, "ram", log)

    def scores(pixels: Tensor) -> Tensor:
        return torch.cat([ram(part.float()).sigmoid() for part in pixels.split(100)])

    with torch.inference_mode():
        thresholds = best_thresholds(scores(pixels[:1000]), wanted[:1000])
        truth = tag_table([sorted(set().union(*(t.words for t in scene.things))) for scene in test.scenes])
        found = (scores(held_out) > torch.tensor(thresholds)).float()
    hits = (found * truth).sum().item()
    log("ram, held out", {"precision": hits / max(1.0, found.sum().item()), "recall": hits / truth.sum().item()})
    return ram, thresholds


def tag_table(said: Sequence[Sequence[str]]) -> Tensor:  # -> (b, c)
    return torch.tensor([[float(tag in tags) for tag in toy.TAGS] for tags in said])


def best_thresholds(scores: Tensor, wanted: Tensor) -> list[float]:  # (b, c), (b, c) -> c
    """Per tag the score above which F1 = 2 hits / (found + wanted) is greatest."""
    floors = torch.linspace(0.05, 0.95, 91)
    found = (scores[None] > floors[:, None, None]).float()
    f1 = 2 * (found * wanted).sum(1) / (found.sum(1) + wanted.sum(0)).clamp_min(1)
    return [round(floor, 2) for floor in floors[f1.argmax(0)].tolist()]


# --- all of it


def run(out: str | Path, quick: bool = False, seed: int = 0, log: Log = lambda name, values: None) -> Path:
    """Train the three and write them as a download would come: `model.safetensors` with the names that they have in
    `Lion.state_dict()`, T5 without adapters, `config.json`, both tokenizers' files, tags and thresholds."""
    # oneDNN keeps its work for the last 1,024 shapes, and here every step has new ones: half a gigabyte and more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    folder, config, started = Path(out), PRESETS["tiny"], time.perf_counter()
    toy.write_vocabularies(folder)
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    pool, test = Pool(200 if quick else POOL, "train", config), Pool(20 if quick else 300, "test", config)
    steps = {"vit": 3, "t5": 5, "ram": 3} if quick else STEPS
    vit = train_vit(config, pool, test, steps["vit"], log)
    pieces = UnigramTokenizer.from_file(folder / "tokenizer.json")
    t5 = train_t5(config, pool, test, pieces, steps["t5"], seed, log)
    ram, thresholds = train_ram(config, pool, test, steps["ram"], seed, log)
    parts = {"vit": vit, "t5": t5, "ram": ram}
    tensors = {f"{part}.{k}": v.bfloat16() for part, model in parts.items() for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    made_by = f"stage 0: lion_mini/stage0.py (seed {seed}, {(time.perf_counter() - started) / 60:.1f} minutes)"
    (folder / "config.json").write_text(replace(config, made_by=made_by).to_json() + "\n", encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("".join(f"{t}\n" for t in thresholds), encoding="utf-8")
    torch.set_rng_state(random_state)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy's stand-ins for EVA-CLIP, FlanT5 and RAM.")
    parser.add_argument("--out", type=Path, default=Path("out/stage0"))
    parser.add_argument("--quick", action="store_true", help="a few steps each, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()

    def log(name: str, values: dict[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{time.perf_counter() - started:6.0f} s  {name}: {figures}", flush=True)

    run(options.out, options.quick, options.seed, log)


if __name__ == "__main__":
    main()
