"""Stage 0, for the toy only: train small stand-ins for what a real LION downloads.

    ViT (EVA-CLIP)       block 3 says what every patch shows and where it ends; the last block is a sum of words' codes
    Q-Former (BLIP-2)    its queries become such sums too, of the things that a question is about
    T5 (FlanT5)          answers image-level questions from the Q-Former's tokens, region-level ones from all patches
    RAM                  says which tags apply, from pictures of twice the ViT's size

Answers alone teach too slowly, so patches and the nouns of a question have labels too (labels.py). No part reads the
paper's instructions. What T5 reads patches with is thrown away: the aggregator must learn to take its place.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW

from ..config import IGNORE, PAD, PRESETS
from ..files import atomic_write
from ..images import lion_transform, ram_transform
from ..model.qformer import QFormer
from ..model.ram import Ram
from ..model.t5 import T5
from ..model.vit import Vit
from ..pipeline import pad
from ..text.prompts import TASK_OF, tag_sentence
from ..text.tokenizers import UnigramTokenizer
from ..text.vocabularies import Vocabularies
from ..training.checkpoint import restore, save
from ..training.report import say
from ..training.stages import groups, schedule
from .labels import FIELDS, REFERENT, WORDS, asked_labels, field_loss, noun_labels, one_hot, patch_labels
from .questions import Record, records, tags
from .vocab import write_vocabularies
from .world import COLOURS, GROUNDS, SHAPES, SIDES, TAGS, Scene, scene

Drawn = tuple[int, Record]  # a scene's index, and a record of it
CONFIG = PRESETS["tiny"]
SIDE, DETAIL = CONFIG.vit.image_size // CONFIG.vit.patch_size, CONFIG.taps[1]  # in patches; the tap of fine detail
STEPS = {"vit": 500, "qformer": 4000, "t5": 6000, "ram": 800}
SHARES = {  # image-level questions by kind and sub-kind
    "existence": 1.5, "counting": 2, "colour": 1, "shape": 1, "comparison": 1.5, "relation": 2, "ground": 1,
    "caption": 1.5, "vqg": 0.1, "dialogue": 0.7,
}  # fmt: skip
REGION, TAGGED = 0.35, 0.4  # shares of T5's steps
# To follow the paper's instructions is what the stages learn.
BARE = {
    "caption": ["Describe the image."], "vqa": ["{question}"], "vqg": ["Ask for {answer}."],
    "dialogue": ["{question}"], "rec": ["Where is {expression}?"], "reg": ["What is at {box}?"],
}  # fmt: skip


@torch.random.fork_rng(devices=[])
def train_stage0(out: str | Path, quick: bool = False, seed: int = 0) -> None:
    """Train all four; write vocabularies, and weights under the names of `LionModel.state_dict()`. Checkpoints are in a
    folder beside `out`, so that the same command continues a killed run."""
    # oneDNN caches its kernels for the last 1,024 shapes. Here every step has new shapes: half a gigabyte and more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    folder = Path(f"{Path(out)}-checkpoints")
    write_vocabularies(folder)
    text = Vocabularies.from_folder(folder, CONFIG)
    scenes = [scene(i, "train") for i in range(200 if quick else 12_000)]
    steps = dict.fromkeys(STEPS, 3) if quick else STEPS
    vit, features, codes = train_vit(scenes, Training(folder, "vit", seed, steps["vit"], 2e-3))
    qformer = train_qformer(scenes, features, codes, text, Training(folder, "qformer", seed, steps["qformer"], 2e-3))
    t5 = train_t5(scenes, features, codes, qformer, text, Training(folder, "t5", seed, steps["t5"], 1e-3))
    ram = train_ram(scenes, Training(folder, "ram", seed, steps["ram"], 3e-3))
    with atomic_write(Path(out)) as new:
        write_vocabularies(new)
        parts = nn.ModuleDict({"vit": vit, "qformer": qformer, "t5": t5, "ram": ram}).state_dict()
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in parts.items()}, new / "model.safetensors")
        config = replace(CONFIG, made_by=f"stage 0: lion_mini/toy/stage0.py (seed {seed})")
        (new / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
    shutil.rmtree(folder)


@dataclass
class Training:
    """How one of the stand-ins is trained, and where its checkpoint lies. Seeds its initialisation too."""

    folder: Path
    name: str
    seed: int
    steps: int
    peak: float  # learning rate

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)

    def run(self, model: nn.Module, loss: Callable[[random.Random], Tensor]) -> None:
        """AdamW in bfloat16 autocast. The rate warms up to `peak` and decays to a fiftieth of it. Each step draws from
        a seed of its own, so that a killed run ends with the same weights."""
        trained, settings = dict(model.named_parameters()), {"seed": self.seed, "steps": self.steps}
        optimizer = AdamW(groups(trained, {}, 0.02), betas=(0.9, 0.98), fused=True)
        state = restore(self.folder / self.name, trained, optimizer, settings, rank=0)
        model.train()
        for step in range(state.step, self.steps):
            draw = random.Random(f"{self.seed} {self.name} {step}")
            torch.manual_seed(draw.getrandbits(63))
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, self.steps, self.peak, self.peak / 50, warmup=50)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(draw)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state.step, state.loss = step + 1, 0.98 * state.loss + 0.02 * value.item() if step else value.item()
            if state.step % 50 == 0 or state.step == self.steps:
                say(f"stage 0, {self.name}: step {state.step} of {self.steps}, loss {state.loss:.3f}")
            if state.step % 250 == 0 or state.step == self.steps:
                save(self.folder / self.name, trained, optimizer, state, settings, keep=2)
        model.eval()


def pixels_of(scenes: Sequence[Scene], transform: Callable[[Image, int], Tensor], size: int) -> Tensor:
    """(b, 3, s, s). Every image is drawn anew and forgotten, or 12,000 of them would take 330 MB."""
    return torch.stack([transform(scene(each.seed, each.split).image, size).bfloat16() for each in scenes])


def train_vit(scenes: Sequence[Scene], training: Training) -> tuple[Vit, Tensor, Tensor]:
    """The ViT; for every scene the tokens of its last block and of the detailed tap (b, 1 + n, 2 d); the codes (·, d).

    Each word has a code. The last block learns the sum of the codes of those words that describe the thing on a patch;
    CLS learns their mean, as CLIP's CLS agrees with a caption. What no word says, the exact box, fades there.
    """
    width, labels = CONFIG.vit.width, patch_labels(scenes, SIDE)
    pixels = pixels_of(scenes, lion_transform, CONFIG.vit.image_size)
    vit = Vit(CONFIG.vit)
    nn.init.normal_(vit.positions, std=0.3)
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(FIELDS)))
    codes = torch.linalg.qr(torch.randn(width, width))[0][: sum(WORDS)] * (width / len(WORDS)) ** 0.5
    said, things = one_hot(labels[..., : len(WORDS)], WORDS) @ codes, labels[..., :1] < len(SHAPES)  # (b, n, d or 1)
    said = torch.cat(((said * things).sum(1, keepdim=True) / things.sum(1, keepdim=True), said), dim=1).bfloat16()

    def loss(draw: random.Random) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        last, (detailed,) = vit(pixels[rows].float(), (DETAIL,))
        found = F.mse_loss(last.float(), said[rows].float())
        return field_loss(head(detailed[:, 1:]), labels[rows], FIELDS) + 10 * found

    training.run(nn.ModuleList((vit, head)), loss)
    vit.to(torch.bfloat16).float()  # T5 must learn from the weights as they will be stored
    with torch.inference_mode():
        parts = [vit(part.float(), (DETAIL,)) for part in pixels.split(500)]
        return vit, torch.cat([torch.cat((last, *taps), dim=-1).bfloat16() for last, taps in parts]), codes


def look(qformer: QFormer, text: Vocabularies, last: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """The queries' outputs (b, q, d) for the ViT's last block (b, 1 + n, d) and the records' questions."""
    ids, mask = pad([text.words.encode(record["question"]) for _, record in drawn], text.words.pad_id)
    return qformer.attend(last.float(), ids, mask)[:, : CONFIG.qformer.queries]


def train_qformer(
    scenes: Sequence[Scene], features: Tensor, codes: Tensor, text: Vocabularies, training: Training
) -> QFormer:
    """The Q-Former: its queries become the codes of the things that a question is about."""
    qformer, width = QFormer(CONFIG.qformer, CONFIG.vit.width, CONFIG.t5.width), CONFIG.vit.width

    def loss(draw: random.Random) -> Tensor:
        drawn = list(draw_records(scenes, False, False, draw))
        wanted = torch.tensor([asked_labels(scenes[i].things, record, CONFIG.qformer.queries) for i, record in drawn])
        found = look(qformer, text, features[[i for i, _ in drawn], :, :width], drawn)
        return F.mse_loss(found.float(), one_hot(wanted, WORDS) @ codes)

    training.run(qformer, loss)
    return qformer


class Reader(nn.Module):
    """T5, projectors from the ViT's tokens to its input, and a head that predicts what the nouns of a prompt mean. It
    reads them after the encoder's second layer already, so that the third can compare them."""

    def __init__(self) -> None:
        super().__init__()
        self.t5, width, tap = T5(CONFIG.t5), CONFIG.t5.width, CONFIG.vit.width
        self.words = nn.Linear(tap, width)
        self.detail = nn.Sequential(nn.LayerNorm(tap), nn.Linear(tap, width))
        self.nouns = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(REFERENT)))
        self.early = torch.empty(0)
        self.t5.encoder[1].register_forward_hook(lambda module, args, out: setattr(self, "early", out))

    @torch.no_grad()
    def start(self, pieces: UnigramTokenizer, codes: Tensor) -> None:  # (·, d)
        """Let a sum of codes be read as the sum of its words' embeddings, so that what T5 reads is easy to write."""
        embedding, width = self.t5.shared.weight, codes.shape[1]
        shapes, others = (embedding[[pieces.encode(word)[0] for word in said]] for said in (SHAPES, (*COLOURS, *SIDES)))
        background, places = torch.zeros(1, width), 0.5 * torch.randn(sum(WORDS[3:]), width)
        self.words.weight.copy_(torch.cat((shapes, background, others, places)).T @ codes * len(WORDS) / width)
        self.t5.lm_head.weight.copy_(0.1 * embedding)

    def forward(self, visual: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, d), (b, p), (b, t) -> (b, t, v), (b, p, classes)."""
        n, task = visual.shape[1], torch.zeros(len(ids), dtype=torch.long)
        mask = F.pad(ids != PAD, (n, 0), value=True)
        states = self.t5.encode(torch.cat((visual, self.t5.shared(ids)), dim=1), mask, task)
        logits = self.t5.predict(labels, self.t5.start(states, mask, task, labels.shape[1]))
        return logits, self.nouns(self.early[:, n:])


def draw_records(scenes: Sequence[Scene], region: bool, tagged: bool, draw: random.Random) -> Iterator[Drawn]:
    """REC and REG in 64 scenes, or four questions about each of 32. Only with tags T5 can tell the ground."""
    for i in draw.sample(range(len(scenes)), 64 if region else 32):
        if region:
            yield from ((i, record) for record in records(scenes[i], draw, ("rec", "reg"), BARE))
        else:
            about = records(scenes[i], draw, [kind for kind in BARE if TASK_OF[kind] == "image"], BARE)
            about = [record for record in about if tagged or record["answer"] != scenes[i].ground]
            for record in draw.choices(about, [SHARES[r["subkind"] or r["kind"]] for r in about], k=4):
                yield i, record


def prompt(record: Record, tagged: bool, draw: random.Random) -> str:
    """The record's prompt. Tags are shuffled: only position tells the "red" of a question from a tag."""
    shuffled = record["tags"].split(", ") if tagged and record["tags"] else []
    draw.shuffle(shuffled)
    return tag_sentence(shuffled) + record["question"] if shuffled else record["question"]


def train_t5(
    scenes: Sequence[Scene], features: Tensor, codes: Tensor, qformer: QFormer, text: Vocabularies, training: Training
) -> T5:
    """T5. How it reads the queries becomes the Q-Former's projection."""
    reader, pieces = Reader(), text.pieces
    reader.start(pieces, codes)

    def loss(draw: random.Random) -> Tensor:
        # 1. The records. Tags come from the first step on, or T5 mistakes them for words of the question.
        region, tagged = draw.random() < REGION, draw.random() < TAGGED
        drawn = list(draw_records(scenes, region, tagged, draw))
        # 2. The visual tokens: the Q-Former's, or all of the ViT's in any order.
        order = torch.randperm(features.shape[1])
        last, tap = features[[i for i, _ in drawn]][:, order].float().chunk(2, dim=-1)  # (b, 1 + n, d)
        if region:
            visual = reader.words(last) + reader.detail(tap)
        else:
            with torch.no_grad():
                found = look(qformer, text, last, drawn)
            visual = reader.words(found)
        # 3. The losses of answers and meanings. Answers count equally, or a box would outweigh a yes.
        prompts = [prompt(record, tagged, draw) for _, record in drawn]
        ids, _ = pad([pieces.encode(asked) for asked in prompts], PAD)
        answers, _ = pad([pieces.encode(record["answer"]) for _, record in drawn], IGNORE)
        pairs = zip(prompts, drawn, strict=True)
        nouns = [torch.tensor(noun_labels(pieces, asked, record, scenes[i].things)) for asked, (i, record) in pairs]
        meanings = pad_sequence(nouns, batch_first=True, padding_value=IGNORE)
        if not region:
            meanings[..., len(WORDS) : len(FIELDS)] = IGNORE  # the last block does not know the box
        logits, predicted = reader(visual, ids, answers)
        losses = F.cross_entropy(logits.float().transpose(1, 2), answers, ignore_index=IGNORE, reduction="none")
        return (losses.sum(1) / (answers != IGNORE).sum(1)).mean() + 0.2 * field_loss(predicted, meanings, REFERENT)

    training.run(reader, loss)  # at a rate of 1.6e-3 it stays on its first plateau
    qformer.proj = reader.words
    return reader.t5


def train_ram(scenes: Sequence[Scene], training: Training) -> Ram:
    """RAM, trained on tags with a tagger's errors, and on ground and colour of every patch."""
    assert CONFIG.ram
    size, rng, fields = CONFIG.ram.image_size, random.Random(training.seed), (len(GROUNDS), len(COLOURS))
    side = size // CONFIG.ram.patch_size // 2 ** (len(CONFIG.ram.depths) - 1)
    pixels, colours = pixels_of(scenes, ram_transform, size), patch_labels(scenes, side)[..., 1]
    grounds = torch.tensor([GROUNDS.index(each.ground) for each in scenes])[:, None].expand_as(colours)
    wanted = torch.tensor([[float(tag in found) for tag in TAGS] for found in (tags(each, rng) for each in scenes)])
    ram, head = Ram(CONFIG.ram), nn.Linear(CONFIG.ram.tag_width, sum(fields))

    def loss(draw: random.Random) -> Tensor:
        rows = torch.randint(len(pixels), (64,))
        context = ram.image_proj(ram.swin(pixels[rows].float()))  # (b, 1 + n, d): the mean, then the patches
        found = F.binary_cross_entropy_with_logits(ram.recognise(context).float(), wanted[rows])
        labels = torch.stack((grounds[rows], colours[rows]), dim=-1)
        return len(TAGS) * found + field_loss(head(context[:, 1:]), labels, fields)

    training.run(nn.ModuleList((ram, head)), loss)
    return ram
