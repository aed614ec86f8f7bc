"""Stage 0, for the toy only: train small stand-ins for EVA-CLIP, FlanT5 and RAM, which a real LION downloads.

    ViT    classifies every patch: shape, colour, size and box of the thing there
    T5     answers questions about the frozen ViT's tokens, through a linear projector that is then discarded
    RAM    says which tags apply

Answers alone teach too slowly. So every patch has labels too, and every noun and relation of a question (labels.py).
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..config import IGNORE, PAD, PRESETS
from ..files import atomic_write
from ..images import lion_transform, ram_transform
from ..model.ram import Ram
from ..model.t5 import T5
from ..model.vit import Vit
from ..pipeline import TINY, pad
from ..text.prompts import tag_sentence
from ..text.tokenizers import UnigramTokenizer
from ..training.report import say
from ..training.stages import PARTS, Job, changed, groups, schedule
from .labels import FIELDS, REFERENT, field_loss, patch_labels, tag_loss, word_labels, word_loss
from .questions import INSTRUCTIONS, Instructions, Record, records, tags
from .vocab import write_vocabularies
from .world import COLOURS, COORDINATES, SHAPES, SIDES, TAGS, Scene, scene

CONFIG = PRESETS["tiny"]
SIDE = CONFIG.vit.image_size // CONFIG.vit.patch_size  # in patches
SHARES = {  # T5's questions by kind and sub-kind
    "existence": 1.5, "counting": 2.0, "colour": 1.0, "shape": 0.5, "comparison": 1.5, "relation": 2.5,
    "caption": 1.0, "vqg": 0.1, "dialogue": 0.5, "rec": 3.0, "reg": 1.5,
}  # fmt: skip
BARE = {
    "caption": ["A short image description:"], "vqa": ["{question}"], "vqg": ["Question: {answer}"],
    "dialogue": ["{question}"], "rec": ["Where is {expression}?"], "reg": ["What is at {box}?"],
}  # fmt: skip


def toy_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What train.py does without --stage: stage 0 if asked for (on rank 0), then stages 1 to 3 or their ablations."""
    start, (one, two, three) = TINY, (args.out / f"stage{number}" for number in (1, 2, 3))
    if args.from_scratch or args.quick:
        start = args.out / "stage0"
        if not start.exists() and not (dist.is_initialized() and dist.get_rank()):
            with atomic_write(start) as new:
                train_stage0(new, args.quick, args.seed)
        if dist.is_initialized():
            dist.barrier()
    if args.single_stage:
        yield Job(3, changed(3, args), [start], three)
        return
    for number, out in ((1, one), (2, two)):  # only the frozen parts of the package's folder are used
        yield Job(number, replace(changed(number, args), new=tuple(PARTS)), [start], out)
        if args.no_adapters:  # stage 1 alone is the comparison with InstructBLIP
            return
    yield Job(3, changed(3, args), [one, two], three)


@torch.random.fork_rng(devices=[])
def train_stage0(out: str | Path, quick: bool = False, seed: int = 0) -> None:
    """Train all three. Write weights under the names of `LionModel.state_dict()`, vocabularies, tags and thresholds."""
    # oneDNN caches its kernels for the last 1,024 shapes. Here every step has new shapes: half a gigabyte and more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    folder, start = Path(out), time.perf_counter()
    write_vocabularies(folder)
    torch.manual_seed(seed)
    scenes = [scene(i, "train") for i in range(200 if quick else 12_000)]
    vit, features = train_vit(scenes, 3 if quick else 600)
    reader = Reader(UnigramTokenizer.from_file(folder / "tokenizer.json"))
    train_t5(reader, scenes, features, 5 if quick else 3900, seed)
    ram, thresholds = train_ram(scenes, 3 if quick else 900, seed)
    parts = nn.ModuleDict({"vit": vit, "t5": reader.t5, "ram": ram}).state_dict()
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in parts.items()}, folder / "model.safetensors")
    made_by = f"stage 0: lion_mini/toy/stage0.py (seed {seed}, {(time.perf_counter() - start) / 60:.1f} minutes)"
    asked = {kind: INSTRUCTIONS[kind][-1] for kind in ("rec", "reg")}
    config = replace(CONFIG, instructions=asked, made_by=made_by)
    (folder / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("".join(f"{t}\n" for t in thresholds), encoding="utf-8")


def optimise(name: str, model: nn.Module, loss: Callable[[int], Tensor], steps: int, peak: float) -> None:
    """AdamW in bfloat16 autocast. The rate warms up to `peak` and decays to a fiftieth of it."""
    optimizer = torch.optim.AdamW(groups(dict(model.named_parameters()), {}, 0.02), betas=(0.9, 0.98), fused=True)
    model.train()
    mean = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, peak, peak / 50, warmup=50)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = 0.98 * mean + 0.02 * value.item() if step else value.item()
        if step % 50 == 49 or step == steps - 1:
            say(f"stage 0, {name}: step {step + 1} of {steps}, loss {mean:.3f}")
    model.eval()


def pixels_of(scenes: Sequence[Scene], transform: Callable[[Image, int], Tensor], size: int) -> Tensor:
    """(b, 3, s, s). Every image is drawn anew and forgotten: 12,000 of them take 330 MB."""
    return torch.stack([transform(scene(each.seed, each.split).image, size).bfloat16() for each in scenes])


def train_vit(scenes: Sequence[Scene], steps: int) -> tuple[Vit, Tensor]:
    """The ViT, and its tokens for every scene: (b, 1 + n, d)."""
    pixels, (_, labels) = pixels_of(scenes, lion_transform, CONFIG.vit.image_size), patch_labels(scenes, SIDE)
    vit = Vit(CONFIG.vit)
    nn.init.normal_(vit.positions, std=0.3)
    head = nn.Sequential(nn.LayerNorm(CONFIG.vit.width), nn.Linear(CONFIG.vit.width, sum(FIELDS)))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        return field_loss(head(vit(pixels[rows].float())[0][:, 1:]), labels[rows], FIELDS)

    optimise("vit", nn.ModuleList((vit, head)), loss, steps, 2e-3)
    vit.to(torch.bfloat16).float()  # T5 must learn from the weights as they will be stored
    with torch.inference_mode():
        return vit, torch.cat([vit(part.float())[0].bfloat16() for part in pixels.split(500)])


class Reader(nn.Module):
    """T5, the projector from the ViT's tokens to its input, and heads that predict what the words of a prompt mean.

    Nouns are read after the encoder's second layer already, so the third can compare them.
    """

    def __init__(self, pieces: UnigramTokenizer):
        super().__init__()
        self.t5, self.pieces, width = T5(CONFIG.t5), pieces, CONFIG.t5.width
        self.projector = nn.Sequential(nn.LayerNorm(CONFIG.vit.width), nn.Linear(CONFIG.vit.width, width))
        self.nouns = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(REFERENT) + 2))
        self.relations = nn.Linear(width, 3)
        self.early = torch.empty(0)
        self.t5.encoder[1].register_forward_hook(lambda module, args, out: setattr(self, "early", out))

    def forward(
        self, visual: Tensor, ids: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:  # (b, n, d), (b, p), (b, t) -> (b, t, v), (b, p, classes and measures)
        n, task = visual.shape[1], torch.zeros(len(ids), dtype=torch.long)
        mask = F.pad(ids != PAD, (n, 0), value=True)
        states = self.t5.encode(torch.cat((self.projector(visual), self.t5.shared(ids)), dim=1), mask, task)
        logits = self.t5.predict(labels, self.t5.start(states, mask, task, labels.shape[1]))
        return logits, torch.cat((self.nouns(self.early[:, n:]), self.relations(states[:, n:])), dim=-1)


@torch.no_grad()
def start_from_words(reader: Reader, features: Tensor, labels: Tensor) -> None:  # (b, 1 + n, d), (b, n, fields)
    """Initialise the projector as the least-squares map from the ViT's tokens to the embeddings of the words for them.

    Coordinates are rotated, each of a box's four differently. They are three quarters of the tokens' variance, so they
    count a quarter: else a question's "red" does not find its shape.
    """
    width, embedding, pieces = CONFIG.t5.width, reader.t5.shared.weight, reader.pieces
    numbers = embedding[[pieces.pieces[number][0] for number in COORDINATES]]
    tables = [embedding[[pieces.encode(word)[0] for word in field]] for field in (SHAPES, COLOURS, SIDES)]
    tables += [0.25 * numbers @ torch.linalg.qr(torch.randn(width, width))[0] for _ in range(4)]
    wanted = torch.zeros(*labels.shape[:2], width)
    for table, field in zip(tables, labels.unbind(-1), strict=True):
        known = (field != IGNORE) & (field < len(table))
        wanted[known] += table[field[known]]
    norm, linear = reader.projector
    x = F.pad(norm(features[:, 1:].float()).flatten(0, 1), (0, 1), value=1.0).double()
    squares = x.T @ x + 1e-5 * len(x) * torch.eye(x.shape[1])  # ridge: LayerNorm leaves one direction empty
    solved = torch.linalg.solve(squares, x.T @ wanted.flatten(0, 1).double())  # lstsq is not reproducible on 2 threads
    linear.load_state_dict({"weight": solved[:-1].T, "bias": solved[-1]})


def glimpse(owner: Tensor, few: bool, tokens: int) -> Tensor:  # (n,) -> (tokens,) or (1 + n,)
    """Which of the ViT's tokens T5 sees: all, as from the aggregator, or few, as a Q-Former might choose: one per thing
    and some background. They are shuffled, so that T5 cannot rely on their order."""
    order = torch.randperm(len(owner) + 1)
    if few:
        thing = F.pad(owner, (1, 0), value=-1)[order]
        first = [order[thing == i][:1] for i in range(int(owner.max()) + 1)]
        chosen = torch.cat((*first, order[thing == -1], order.new_zeros(tokens)))[:tokens]
        order = chosen[torch.randperm(tokens)]
    return order


def prompt(record: Record, tagged: bool, rng: random.Random) -> str:
    """The record's prompt. Tags are shuffled: only position tells the "small" of a question from a tag."""
    if not tagged or "tags" not in record:
        return record["question"]
    shuffled = record["tags"].split(", ")
    rng.shuffle(shuffled)
    return tag_sentence(shuffled) + record["question"]


def draw_records(
    scenes: Sequence[Scene], instructions: Instructions, grounded: bool, rng: random.Random
) -> Iterator[tuple[int, Record]]:
    """Four questions about each of 32 scenes, or 64 captions with boxes: one image teaches many coordinates."""
    for i in rng.sample(range(len(scenes)), 64 if grounded else 32):
        if grounded:
            answer = ", ".join(f"{t.size} {t.name} {t.box.to_text()}" for t in scenes[i].things)
            yield i, {"question": "Describe the image with coordinates.", "answer": answer}
        else:
            about = records(scenes[i], rng, instructions=instructions)
            for record in rng.choices(about, [SHARES[r["subkind"] or r["kind"]] for r in about], k=4):
                yield i, record


def train_t5(reader: Reader, scenes: Sequence[Scene], features: Tensor, steps: int, seed: int) -> None:
    rng, encode = random.Random(seed), reader.pieces.encode
    owners, labels = patch_labels(scenes, SIDE)
    start_from_words(reader, features[:2000], labels[:2000])
    reader.t5.lm_head.weight.data.copy_(0.1 * reader.t5.shared.weight)  # words it can read are then easy to write

    def loss(step: int) -> Tensor:
        # 1. The form of this step's prompts: mostly bare questions and few visual tokens at first.
        early = step < 0.6 * steps
        few, bare = rng.random() < (0.8 if early else 0.5), rng.random() < (0.9 if early else 0.3)
        instructions = BARE if bare else {kind: [rng.choice(texts)] for kind, texts in INSTRUCTIONS.items()}
        tagged = rng.random() < 0.4  # from the first step, or T5 mistakes tags for words of the question
        # 2. The records. Every twentieth step has only grounded captions: long answers together.
        drawn = list(draw_records(scenes, instructions, step % 20 == 19, rng))
        visual = torch.stack([features[i][glimpse(owners[i], few, CONFIG.qformer.queries)] for i, _ in drawn])
        prompts = [prompt(record, tagged, rng) for _, record in drawn]
        ids, _ = pad([encode(text) for text in prompts], PAD)
        answers, _ = pad([encode(record["answer"]) for _, record in drawn], IGNORE)
        words = [
            torch.tensor(word_labels(reader.pieces, text, record, scenes[i].things), dtype=torch.float32)
            for text, (i, record) in zip(prompts, drawn, strict=True)
        ]
        meanings = pad_sequence(words, batch_first=True, padding_value=IGNORE)
        # 3. The losses of answers and meanings. Answers count equally, or a box would outweigh a yes.
        logits, predicted = reader(visual.float(), ids, answers)
        losses = F.cross_entropy(logits.float().transpose(1, 2), answers, ignore_index=IGNORE, reduction="none")
        return (losses.sum(1) / (answers != IGNORE).sum(1)).mean() + word_loss(predicted, meanings)

    optimise("t5", reader, loss, steps, 1e-3)  # at 1.6e-3 it stays on its first plateau


def train_ram(scenes: Sequence[Scene], steps: int, seed: int) -> tuple[Ram, list[float]]:
    """RAM, trained on tags with a tagger's errors, and each tag's threshold: the one with the greatest F1."""
    config, rng = CONFIG.ram, random.Random(seed)
    assert config
    ram = Ram(config)
    side = config.image_size // config.patch_size // 2 ** (len(config.depths) - 1)
    pixels, (_, labels) = pixels_of(scenes, ram_transform, config.image_size), patch_labels(scenes, side)
    wanted = torch.tensor([[float(tag in found) for tag in TAGS] for found in (tags(s.things, rng) for s in scenes)])
    head = nn.Linear(config.tag_width, sum(FIELDS[:3]))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        context = ram.image_proj(ram.swin(pixels[rows].float()))  # (b, 1 + n, d): the mean, then the patches
        patches = field_loss(head(context[:, 1:]), labels[rows, :, :3], FIELDS[:3])
        return tag_loss(ram.recognise(context).float(), wanted[rows]) + patches

    optimise("ram", nn.ModuleList((ram, head)), loss, steps, 3e-3)
    with torch.inference_mode():
        scores = torch.cat([ram(part.float()).sigmoid() for part in pixels[:1000].split(100)])
    floors = torch.linspace(0.05, 0.95, 91)
    chosen, wanted = (scores > floors[:, None, None]).float(), wanted[:1000]
    f1 = 2 * (chosen * wanted).sum(1) / (chosen.sum(1) + wanted.sum(0)).clamp_min(1)  # (91, c)
    return ram, [round(floor, 2) for floor in floors[f1.argmax(0)].tolist()]


if __name__ == "__main__":
    train_stage0("out/stage0")
