"""Stage 0, for the toy only: train small stand-ins for EVA-CLIP, FlanT5 and RAM, which a real LION downloads.

    ViT    classifies every patch: shape, colour, size and box of the thing there
    T5     answers questions about the frozen ViT's tokens, through a linear projector that is then discarded
    RAM    says which tags apply

Answers alone teach too slowly. So every patch has labels too, and every noun and relation of a question (labels.py).

    python -m lion_mini.toy.stage0 --out out/stage0
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from ..config import IGNORE, PAD, PRESETS, LionConfig
from ..images import lion_transform, ram_transform
from ..model.ram import Ram
from ..model.t5 import T5
from ..model.vit import Vit
from ..pipeline import pad
from ..text.prompts import tag_sentence
from ..text.tokenizers import UnigramTokenizer
from ..training.stages import groups
from .labels import FIELDS, HEADS, Meanings, asymmetric_loss, field_loss, meaning_loss, owners, patch_labels, tag_labels
from .questions import INSTRUCTIONS, Record, records, tags
from .vocab import write_vocabularies
from .world import COLOURS, GRID, SHAPES, SIDES, Scene, Split, scene

POOL = 12000  # training scenes
STEPS = {"vit": 600, "t5": 3900, "ram": 900}
WARMUP = 50  # steps
SHARES = {  # T5's questions by kind and sub-kind
    "existence": 1.5, "counting": 2.0, "colour": 1.0, "shape": 0.5, "comparison": 1.5, "relation": 2.5,
    "caption": 1.0, "vqg": 0.1, "dialogue": 0.5, "rec": 3.0, "reg": 1.5,
}  # fmt: skip
BARE = {
    "caption": ["A short image description:"], "vqa": ["{question}"], "vqg": ["Question: {answer}"],
    "dialogue": ["{question}"], "rec": ["Where is {expression}?"], "reg": ["What is at {box}?"],
}  # fmt: skip
Pairs = Sequence[tuple[int, Record]]  # the index of a scene in its pool, and a record about it
Log = Callable[[str, dict[str, float]], None]


def optimise(model: nn.Module, loss: Callable[[int], Tensor], steps: int, peak: float, name: str, log: Log) -> None:
    """AdamW in bfloat16 autocast: linear warm-up to `peak`, then cosine decay to a fiftieth of it."""
    optimizer = torch.optim.AdamW(groups(dict(model.named_parameters()), {}, 0.02), betas=(0.9, 0.98), fused=True)
    model.train()
    start, mean = time.perf_counter(), 0.0
    for step in (bar := trange(steps, desc=name, unit="step", disable=None)):
        done = max(0, step - WARMUP) / max(1, steps - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = min(peak, peak * (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
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
    """Scenes. Every step draws new questions about them."""

    def __init__(self, count: int, split: Split, side: int):
        self.scenes = [scene(seed, split) for seed in range(count)]
        self.owner = owners(self.scenes, side)  # (b, n)
        self.features = torch.empty(0)  # the trained ViT's tokens: (b, 1 + n, d)

    def pixels(self, transform: Callable[[Image, int], Tensor], size: int) -> Tensor:  # -> (b, 3, s, s)
        pixels = torch.empty(len(self.scenes), 3, size, size, dtype=torch.bfloat16)
        for row, each in zip(pixels, self.scenes, strict=True):
            row.copy_(transform(each.image, size))
            del each.__dict__["image"]  # redrawn for the next model: 12,000 images take 330 MB
        return pixels


def train_vit(config: LionConfig, pool: Pool, test: Pool, steps: int, log: Log) -> Vit:
    """Train the ViT and fill in `features` of both pools."""
    pixels, held_out = (each.pixels(lion_transform, config.vit.image_size) for each in (pool, test))
    vit = Vit(config.vit)
    nn.init.normal_(vit.positions, std=0.3)
    head = nn.Sequential(nn.LayerNorm(config.vit.width), nn.Linear(config.vit.width, sum(FIELDS)))
    labels = patch_labels(pool.scenes, pool.owner)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        return field_loss(head(vit(pixels[rows].float())[0][:, 1:]), labels[rows], FIELDS)

    optimise(nn.ModuleList((vit, head)), loss, steps, 2e-3, "vit", log)
    vit.to(torch.bfloat16).float()  # T5 must learn from the weights as they will be stored
    with torch.inference_mode():
        logits = head(vit(held_out.float())[0][:, 1:]).split(FIELDS, dim=-1)
        for each, images in ((pool, pixels), (test, held_out)):
            each.features = torch.cat([vit(part.float())[0].bfloat16() for part in images.split(500)])
    wanted = patch_labels(test.scenes, test.owner)
    known, right = wanted != IGNORE, torch.stack([part.argmax(-1) for part in logits], dim=-1) == wanted
    accuracy = (right & known).sum((0, 1)) / known.sum((0, 1))
    log("vit, held out", dict(zip(("shape", "colour", "size", "x1", "y1", "x2", "y2"), accuracy.tolist(), strict=True)))
    return vit


def grounded(scene: Scene) -> Record:
    """A caption with boxes, which only stage 0 asks for: one image teaches many coordinates."""
    answer = ", ".join(f"{t.size} {t.name} {t.box.to_text()}" for t in scene.things)
    return {"kind": "grounded", "subkind": "", "question": "Describe the image with coordinates.", "answer": answer}


class Reader(nn.Module):
    """T5, the projector from the ViT's tokens to its input, and the heads that read meanings from its states.

    Nouns are read after the encoder's second layer already, so the third can compare them.
    """

    def __init__(self, config: LionConfig, pieces: UnigramTokenizer):
        super().__init__()
        width = config.t5.width
        self.t5 = T5(config.t5)
        self.projector = nn.Sequential(nn.LayerNorm(config.vit.width), nn.Linear(config.vit.width, width))
        self.nouns = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HEADS[0]))
        self.relations = nn.Linear(width, HEADS[1])
        self.early = torch.empty(0)
        self.t5.encoder[1].register_forward_hook(lambda module, args, out: setattr(self, "early", out))
        self.pieces, self.meanings, self.queries = pieces, Meanings(pieces), config.qformer.queries

    def forward(self, pool: Pool, pairs: Pairs, few: bool, tagged: bool, rng: random.Random) -> tuple[Tensor, ...]:
        """Logits (b, t, v) and labels (b, t) of the answers; predictions and labels (k, ·) of k words' meanings."""
        seen = torch.stack([pool.features[i][glimpse(pool.owner[i], few, self.queries)] for i, _ in pairs]).float()
        prompts = [prompt(record, tagged, rng) for _, record in pairs]
        encode, n = self.meanings.encode, seen.shape[1]
        ids, _ = pad([encode(text) for text in prompts], PAD)
        labels, _ = pad([encode(record["answer"]) for _, record in pairs], IGNORE)
        mask, task = F.pad(ids != PAD, (n, 0), value=True), torch.zeros(len(ids), dtype=torch.long)
        states = self.t5.encode(torch.cat((self.projector(seen), self.t5.shared(ids)), dim=1), mask, task)
        logits = self.t5.predict(labels, self.t5.start(states, mask, task, labels.shape[1]))
        wanted = self.meanings.prompts(prompts, [record for _, record in pairs], [pool.scenes[i] for i, _ in pairs])
        known = (wanted != IGNORE).any(-1)
        meant = torch.cat((self.nouns(self.early[:, n:][known]), self.relations(states[:, n:][known])), dim=-1)
        return logits, labels, meant, wanted[known]


@torch.no_grad()
def start_from_words(reader: Reader, features: Tensor, labels: Tensor) -> None:  # (b, 1 + n, d), (b, n, fields)
    """Initialise the projector as the least-squares map from the ViT's tokens to the embeddings of the words for them.

    Coordinates are rotated, each of a box's four differently. They are three quarters of the tokens' variance, so they
    count a quarter: else a question's "red" does not find its shape.
    """
    width, embedding = reader.t5.config.width, reader.t5.shared.weight
    numbers = embedding[[reader.pieces.pieces[f"{i / GRID:.3f}"][0] for i in range(GRID + 1)]]
    tables = [embedding[[reader.pieces.encode(word)[0] for word in field]] for field in (SHAPES, COLOURS, SIDES)]
    tables += [numbers @ torch.linalg.qr(torch.randn(width, width))[0] for _ in range(4)]
    wanted = torch.zeros(*labels.shape[:2], width)
    for i, table in enumerate(tables):
        known = (labels[..., i] != IGNORE) & (labels[..., i] < len(table))
        wanted[known] += (1.0 if i < 3 else 0.25) * table[labels[..., i][known]]
    norm, linear = reader.projector
    x = F.pad(norm(features[:, 1:].float()).flatten(0, 1), (0, 1), value=1.0).double()
    squares = x.T @ x + 1e-5 * len(x) * torch.eye(x.shape[1])  # ridge: LayerNorm leaves one direction empty
    solved = torch.linalg.solve(squares, x.T @ wanted.flatten(0, 1).double())  # lstsq is not reproducible on 2 threads
    linear.load_state_dict({"weight": solved[:-1].T, "bias": solved[-1]})


def glimpse(owner: Tensor, few: bool, tokens: int) -> Tensor:  # (n,) -> (tokens,) or (1 + n,)
    """Which of the ViT's tokens T5 sees: all, as from the aggregator, or few, as a Q-Former might choose: one per thing
    and some background. They are shuffled, so that T5 cannot rely on their order."""
    order = torch.randperm(len(owner) + 1)
    if not few:
        return order
    shuffled = F.pad(owner, (1, 0), value=-1)[order]
    first = torch.cat([(shuffled == i).nonzero()[:1, 0] for i in range(int(owner.max()) + 1)])
    rest = (shuffled == -1).nonzero()[: tokens - len(first), 0]
    chosen = order[torch.cat((first, rest))]
    return F.pad(chosen, (0, tokens - len(chosen)), value=0)[torch.randperm(tokens)]


def prompt(record: Record, tagged: bool, rng: random.Random) -> str:
    """The record's prompt. Tags are shuffled: only position tells the "small" of a question from a tag."""
    if not tagged or "tags" not in record:
        return record["question"]
    shuffled = record["tags"].split(", ")
    rng.shuffle(shuffled)
    return tag_sentence(shuffled) + record["question"]


def train_t5(reader: Reader, pool: Pool, test: Pool, steps: int, seed: int, log: Log) -> T5:
    rng = random.Random(seed)
    start_from_words(reader, pool.features[:2000], patch_labels(pool.scenes[:2000], pool.owner[:2000]))
    reader.t5.lm_head.weight.data.copy_(0.1 * reader.t5.shared.weight)  # words it can read are then easy to write

    def loss(step: int) -> Tensor:
        # 1. The form of this step's prompts: mostly bare questions and few visual tokens at first.
        early = step < 0.6 * steps
        few, bare = rng.random() < (0.8 if early else 0.5), rng.random() < (0.9 if early else 0.3)
        instructions = BARE if bare else {kind: [rng.choice(texts)] for kind, texts in INSTRUCTIONS.items()}
        tagged = rng.random() < 0.4  # from the first step, or T5 mistakes tags for words of the question
        # 2. Four questions about each of 32 scenes; every twentieth step 64 grounded captions: long answers together.
        each, count = (1, 64) if step % 20 == 19 else (4, 32)
        pairs: list[tuple[int, Record]] = []
        for i in rng.sample(range(len(pool.scenes)), min(count, len(pool.scenes))):
            chosen = [grounded(pool.scenes[i])]
            if each > 1:
                about = records(pool.scenes[i], rng, instructions=instructions)
                chosen = rng.choices(about, [SHARES[r["subkind"] or r["kind"]] for r in about], k=each)
            pairs += [(i, record) for record in chosen]
        # 3. The losses of answers and meanings. Answers count equally, or a box would outweigh a yes.
        logits, labels, meant, wanted = reader(pool, pairs, few, tagged, rng)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        if step % 1000 == 999:
            log("t5, held out", exact_answers(reader, test))
            reader.train()
        return (losses.sum(1) / (labels != IGNORE).sum(1)).mean() + meaning_loss(meant, wanted)

    optimise(reader, loss, steps, 1e-3, "t5", log)  # at 1.6e-3 it stays on its first plateau
    log("t5, held out", exact_answers(reader, test))
    log("t5, held out, few", exact_answers(reader, test, few=True))
    log("t5, held out, tags", exact_answers(reader, test, tagged=True))
    return reader.t5


@torch.inference_mode()
def exact_answers(reader: Reader, pool: Pool, few: bool = False, tagged: bool = False) -> dict[str, float]:
    """The share of answers that greedy decoding would write word for word, by kind and sub-kind."""
    right: dict[str, list[float]] = {}
    rng, rows = random.Random(0), range(len(pool.scenes))
    for start in rows[::25]:
        part = [(i, pool.scenes[i]) for i in rows[start : start + 25]]
        pairs = [(i, record) for i, each in part for record in (*records(each, rng), grounded(each))]
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, *_ = reader(pool, pairs, few, tagged, rng)
        same = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
        for (_, r), yes in zip(pairs, same.tolist(), strict=True):
            right.setdefault(r["subkind"] or r["kind"], []).append(yes)
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def train_ram(config: LionConfig, pool: Pool, test: Pool, steps: int, seed: int, log: Log) -> tuple[Ram, list[float]]:
    """RAM, trained on tags with a tagger's errors, and each tag's threshold: the one with the greatest F1."""
    assert config.ram
    ram, rng = Ram(config.ram), random.Random(seed)
    pixels, held_out = (each.pixels(ram_transform, config.ram.image_size) for each in (pool, test))
    wanted = tag_labels([tags(each.things, rng) for each in pool.scenes])
    side = config.ram.image_size // config.ram.patch_size // 2 ** (len(config.ram.depths) - 1)
    labels = patch_labels(pool.scenes, owners(pool.scenes, side))[..., :3]
    head = nn.Linear(config.ram.tag_width, sum(FIELDS[:3]))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        context = ram.image_proj(ram.swin(pixels[rows].float()))  # (b, 1 + n, d): the mean, then the patches
        patches = field_loss(head(context[:, 1:]), labels[rows], FIELDS[:3])
        return asymmetric_loss(ram.recognise(context).float(), wanted[rows]) + patches

    optimise(nn.ModuleList((ram, head)), loss, steps, 3e-3, "ram", log)
    with torch.inference_mode():
        images = torch.cat((pixels[:1000], held_out))
        scores = torch.cat([ram(part.float()).sigmoid() for part in images.split(100)])
    thresholds = best_thresholds(scores[: -len(held_out)], wanted[:1000])
    chosen = (scores[-len(held_out) :] > torch.tensor(thresholds)).float()
    truth = tag_labels([set().union(*(t.words for t in each.things)) for each in test.scenes])
    hits = (chosen * truth).sum().item()
    log("ram, held out", {"precision": hits / max(1.0, chosen.sum().item()), "recall": hits / truth.sum().item()})
    return ram, thresholds


def best_thresholds(scores: Tensor, wanted: Tensor) -> list[float]:  # (b, c), (b, c) -> c
    """Per tag the score above which F1 = 2 hits / (chosen + wanted) is greatest."""
    floors = torch.linspace(0.05, 0.95, 91)
    chosen = (scores[None] > floors[:, None, None]).float()
    f1 = 2 * (chosen * wanted).sum(1) / (chosen.sum(1) + wanted.sum(0)).clamp_min(1)
    return [round(floor, 2) for floor in floors[f1.argmax(0)].tolist()]


@torch.random.fork_rng(devices=[])
def run(out: str | Path, quick: bool = False, seed: int = 0, log: Log = lambda name, values: None) -> Path:
    """Train all three. Write weights under the names of `LionModel.state_dict()`, vocabularies, tags and thresholds."""
    # oneDNN caches its kernels for the last 1,024 shapes. Here every step has new shapes: half a gigabyte and more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    folder, config, start = Path(out), PRESETS["tiny"], time.perf_counter()
    write_vocabularies(folder)
    torch.manual_seed(seed)
    side = config.vit.image_size // config.vit.patch_size
    pool, test = Pool(200 if quick else POOL, "train", side), Pool(20 if quick else 300, "test", side)
    steps = {"vit": 3, "t5": 5, "ram": 3} if quick else STEPS
    vit = train_vit(config, pool, test, steps["vit"], log)
    reader = Reader(config, UnigramTokenizer.from_file(folder / "tokenizer.json"))
    t5 = train_t5(reader, pool, test, steps["t5"], seed, log)
    ram, thresholds = train_ram(config, pool, test, steps["ram"], seed, log)
    parts = nn.ModuleDict({"vit": vit, "t5": t5, "ram": ram}).state_dict()
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in parts.items()}, folder / "model.safetensors")
    made_by = f"stage 0: lion_mini/toy/stage0.py (seed {seed}, {(time.perf_counter() - start) / 60:.1f} minutes)"
    (folder / "config.json").write_text(replace(config, made_by=made_by).to_json() + "\n", encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("".join(f"{t}\n" for t in thresholds), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy's stand-ins for EVA-CLIP, FlanT5 and RAM.")
    parser.add_argument("--out", type=Path, default=Path("out/stage0"))
    parser.add_argument("--quick", action="store_true", help="a few steps each, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()

    def log(name: str, values: dict[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{time.perf_counter() - start:6.0f} s  {name}: {figures}", flush=True)

    run(options.out, options.quick, options.seed, log)


if __name__ == "__main__":
    main()
