"""Speed and memory: ours beside transformers, and beside the machine's limit.

    python tests/bench.py                          everything, in float32 and bfloat16, as a table
    python tests/bench.py --parts vit t5 --json    some parts, as one JSON object
    python tests/bench.py --parts growth --png growth.png
    python tests/bench.py --quick                  tiny sizes, one round: does everything run?

A time is the median of runs that take turns in one process: ours, transformers' and the machine's own. Ratios are
comparable on a shared machine, absolute times are not. Both models have the same random parameters, dtype and threads.
Their outputs are compared first.

The limit is what this machine could do at best. Work comes in phases (the encoder, then each token). A phase takes at
least its operations at the rate of the fastest large matrix product in that dtype. It also takes at least its weights'
bytes at the rate of a large read. The limit adds up the longer of the two.

Without transformers its column stays empty. Vocabularies are the tests' small ones. BENCHMARKS.md has the results.
"""

# ruff: noqa: E402
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from operator import sub, truediv
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_memory as memory
import bench_work as work
import peers
from bench_measure import DTYPES, HEAD, Case, Device, Row, Run, draw, halved, in_turns, line, machine, race
from conftest import OFFICIAL, randomise

from lion_mini import Generation, Lion, LionConfig
from lion_mini.config import EOS, PAD, PRESETS, AggregatorConfig, QFormerConfig, RamConfig, T5Config, VitConfig
from lion_mini.data.mixture import MicroBatches, Mixture, Samples, collate
from lion_mini.data.records import Records
from lion_mini.model.generate import generate
from lion_mini.model.lion import Batch, LionModel, NoInit, skeleton
from lion_mini.model.ram import Ram
from lion_mini.model.t5 import T5, Attention
from lion_mini.pipeline import TINY as TINY_FOLDER
from lion_mini.text.prompts import EVAL_TEMPLATES, render
from lion_mini.text.tokenizers import UnigramTokenizer, WordPieceTokenizer
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.toy.training import Toy
from lion_mini.training.stages import STAGES, unfreeze
from train import autocast

BASE = LionConfig(
    vit=VitConfig(width=768, depth=12, heads=12, mlp_width=3072), taps=(11, 8, 4),
    aggregator=AggregatorConfig(heads=12, mlp_width=3072),
    t5=T5Config(width=768, head_width=64, heads=12, mlp_width=2048, encoder_depth=12, decoder_depth=12),
    ram=RamConfig(width=128, heads=(4, 8, 16, 32)),
)  # fmt: skip
SMALL = LionConfig(  # FlanT5-small, and vision parts to match
    vit=VitConfig(width=384, depth=12, heads=6, mlp_width=1536), taps=(11, 8, 4),
    qformer=QFormerConfig(width=384, depth=6, heads=6, mlp_width=1536),
    aggregator=AggregatorConfig(heads=6, mlp_width=1536),
    t5=T5Config(width=512, head_width=64, heads=6, mlp_width=1024, encoder_depth=8, decoder_depth=8), ram=None,
)  # fmt: skip
FOURTH = LionConfig(  # XL, widths divided by four and depths by three
    vit=VitConfig(width=352, depth=13, heads=4, mlp_width=1536), taps=(12, 9, 6),
    qformer=QFormerConfig(width=192, depth=4, heads=3, mlp_width=768, vocab_size=7680),
    aggregator=AggregatorConfig(heads=4, mlp_width=768), adapter_width=16, ram=None,
    t5=T5Config(width=512, head_width=64, heads=8, mlp_width=1280, encoder_depth=8, decoder_depth=8, vocab_size=8032),
)  # fmt: skip
_TINY = PRESETS["tiny"]
TINY = replace(  # for --quick
    _TINY, vit=replace(_TINY.vit, depth=2), taps=(1, 0, 0), qformer=replace(_TINY.qformer, depth=2),
    t5=replace(_TINY.t5, encoder_depth=1, decoder_depth=1),
)  # fmt: skip
TAGS = 12  # of every picture


def vocabularies(tags: int = 0) -> Vocabularies:
    """The tests' vocabularies. RAM finds the first twelve tags in any picture."""
    words = WordPieceTokenizer.from_file(OFFICIAL / "bert-base-uncased" / "vocab.txt")
    pieces = UnigramTokenizer.from_file(OFFICIAL / "flan-t5" / "tokenizer.json")
    thresholds = [0.0 if i < TAGS else 1.0 for i in range(tags)]
    return Vocabularies(words, pieces, [f"tag {i}" for i in range(tags)], thresholds)


def fill(module: nn.Module, dtype: str, device: Device = "cpu") -> None:
    """Random parameters, frozen. T5 does not divide scores by sqrt(e), so its queries are small, as T5 starts them.

    Otherwise one score dominates, and rounding to bfloat16 moves the states by a sixth, in transformers too.
    """
    module.to(DTYPES[dtype]).to_empty(device=device)
    randomise(module.eval().requires_grad_(False), std=0.03)
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.q.weight.div_((layer.q.out_features // layer.heads) ** 0.5)


def build(config: LionConfig, dtype: str, device: Device = "cpu") -> Lion:
    lion = Lion(skeleton(config), vocabularies(config.ram.tags if config.ram else 0))
    fill(lion.model, dtype, device)
    never_write(lion.model.t5, len(lion.text.pieces))
    return lion


def never_write(t5: T5, known: int) -> None:
    """</s>, nor an id from `known` on: answers have full length."""
    t5.lm_head.weight[known:] = 0
    t5.lm_head.weight[EOS] = 0


def build_t5(config: T5Config, dtype: str, device: Device = "cpu") -> tuple[T5, Any]:
    """A T5 without adapters, and transformers' with the same parameters."""
    with torch.device("meta"), NoInit():
        ours = T5(config)
    fill(ours, dtype, device)
    return ours, peers.available() and peers.t5(ours, config)


# --- the parts: each returns its rows in one dtype


def tokenizers(args: argparse.Namespace, dtype: str) -> list[Row]:
    """A thousand different prompts."""
    text = vocabularies()
    prompts = [f"Question: what is the man number {i} holding in his left hand? Short answer:" for i in range(1000)]
    each = lambda encode, *rest: lambda: [encode(prompt, *rest) for prompt in prompts]
    pieces = words = None
    if peers.available():
        their_pieces, their_words = peers.tokenizers(OFFICIAL)
        for prompt in prompts[:50]:
            assert text.pieces.encode(prompt) == [*their_pieces.encode(prompt, add_special_tokens=False).ids, EOS]
            assert text.words.encode(prompt, 512) == their_words.encode(prompt).ids
        pieces, words = each(their_pieces.encode), each(their_words.encode)
    cases = [
        Case("1,000 prompts, T5", each(text.pieces.encode), pieces),
        Case("1,000 prompts, BERT", each(text.words.encode, 512), words),
    ]
    return [replace(row, dtype="") for row in race("tokenizers", "float32", cases, args)]


def vit(args: argparse.Namespace, dtype: str) -> list[Row]:
    """ViT, Q-Former and aggregator."""
    config = replace(TINY if args.quick else BASE, ram=None)
    model = build(config, dtype).model
    former, aggregator = model.qformer, model.aggregator
    assert former is not None
    assert aggregator is not None
    side, t = config.vit.image_size, min(32, config.max_question_tokens)
    image, ids = torch.randn(1, 3, side, side).to(DTYPES[dtype]), torch.randint(5, 100, (1, t))
    with torch.inference_mode():
        states, taps = model.vit(image, config.taps)
    their_vit: Any = peers.available() and peers.vit(model.vit, config.vit)
    their_former: Any = peers.available() and peers.qformer(former, config.qformer)

    look = lambda: peers.look(their_vit, image)
    read = lambda x: peers.read(their_former, former, x, ids)
    works = work.vit(model, 1), work.qformer(model, 1, t), work.aggregator(model, 1)
    cases = [
        Case("ViT", lambda: model.vit(image)[0], look, works[0]),
        Case(f"Q-Former, {t} words", lambda: former(states, ids), lambda: read(states), works[1]),
        Case("ViT + Q-Former", lambda: former(model.vit(image)[0], ids), lambda: read(look()), [*works[0], *works[1]]),
        Case("aggregator", lambda: aggregator(taps), None, works[2]),
    ]
    return race("vit", dtype, cases, args)


def t5(args: argparse.Namespace, dtype: str, config: T5Config = BASE.t5, device: Device = "cpu") -> list[Row]:
    """The encoder, and 20 tokens of one sample with five beams and greedily."""
    config, n, new = (TINY.t5, 20, 4) if args.quick else (config, 330, 20)
    ours, theirs = build_t5(config, dtype, device)
    never_write(ours, config.vocab_size)
    x = torch.randn(1, n, config.width).to(device, DTYPES[dtype])
    task = torch.zeros(1, dtype=torch.long, device=device)
    encoder = work.encoder(ours, 1, n)

    def write(beams: int, tokens: int) -> Tensor:
        settings = Generation(beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
        return generate(ours, ours.encode(x, None, task), None, task, settings)

    def case(beams: int, what: str) -> Case:
        settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        their_write = lambda: theirs.generate(inputs_embeds=x, pad_token_id=PAD, eos_token_id=EOS, **settings)
        phases = [*encoder, *work.decoder(ours, 1, beams, n, new)]
        return Case(f"{new} tokens, {what}", partial(write, beams, new), their_write, phases)

    their_encode = lambda: theirs.encoder(inputs_embeds=x).last_hidden_state
    cases = [
        Case("encoder", lambda: ours.encode(x, None, task), their_encode, encoder),
        case(5, "5 beams"),
        case(1, "greedy"),
        *(Case(f"{k * new // 2} tokens", partial(write, 5, k * new // 2)) for k in (1, 4, 8)),
    ]
    first, five, one, half, double, fourfold = race("t5", dtype, cases, args, device=device)
    each = lambda row: combined(row, lambda a, b: (a - b) / new, first, f"a token, {row.what.split(', ')[1]}")
    growth = (five.ours - half.ours) / (new / 2) / ((fourfold.ours - double.ours) / (2 * new))
    early = Row("t5", f"a token up to {new} / beyond {2 * new}", dtype, growth, unit="x")
    return [first, five, one, each(five), each(one), early]


def combined(row: Row, operation: Callable[[float, float], float], second: Row, what: str) -> Row:
    """The operation on two rows' times, where both have one."""
    pairs = {name: (getattr(row, name), getattr(second, name)) for name in ("ours", "theirs", "limit")}
    values: dict[str, Any] = {name: operation(a, b) if a and b else None for name, (a, b) in pairs.items()}
    return replace(row, what=what, **values)


def tag(args: argparse.Namespace, dtype: str) -> list[Row]:
    config = (TINY if args.quick else BASE).ram
    assert config is not None
    ram = Ram(config)
    fill(ram, dtype)
    image = torch.randn(1, 3, config.image_size, config.image_size).to(DTYPES[dtype])
    swin, head = work.swin(ram, 1), work.head(ram, 1)
    theirs: Any = peers.available() and peers.swin(ram.swin, config)
    cases = [  # theirs is without the mean, which RAM puts first
        Case("Swin", lambda: ram.swin(image)[:, 1:], lambda: theirs(image).last_hidden_state, swin),
        Case(f"Swin and {config.tags:,} tags", lambda: ram(image), None, [*swin, *head]),
    ]
    return race("tag", dtype, cases, args)


def whole(args: argparse.Namespace, dtype: str) -> list[Row]:
    """From pictures to captions and boxes, as `Lion.caption` and `Lion.locate`; of one picture, and of eight."""
    lion = build(TINY if args.quick else BASE, dtype)
    side = 2 * lion.config.vit.image_size
    asked = (
        ("caption", EVAL_TEMPLATES["caption"], "image", 30),
        ("locate", render(EVAL_TEMPLATES["rec"], expression="the dog on the left"), "region", 40),
    )
    cases = []
    for b in (1, 2 if args.quick else 8):
        pictures = [Image.effect_noise((side, side), 64).convert("RGB") for _ in range(b)]
        for kind, prompt, task, tokens in asked:
            settings = Generation(max_new_tokens=4 if args.quick else tokens)
            run = partial(lion.respond, pictures, [prompt] * b, [task] * b, settings)
            cases.append(Case(f"{kind}, batch {b}", run, None, whole_work(lion, b, prompt, settings.max_new_tokens)))
    return race("lion", dtype, cases, args, rounds=3)


def whole_work(lion: Lion, b: int, prompt: str, tokens: int) -> list[work.Phase]:
    """The tagger, the answer, and the decoder once more over all its tokens, for its score."""
    tags = lion.text.tags[:TAGS]
    assert lion.model.ram is not None
    phases = [*work.swin(lion.model.ram, b), *work.head(lion.model.ram, b), *answer_work(lion, b, prompt, tags, tokens)]
    n = prompt_tokens(lion, prompt, tags)
    return phases + work.decoder(lion.model.t5, b, b, n, tokens, reads=1)


def answer_work(lion: Lion, b: int, prompt: str, tags: list[str], tokens: int) -> list[work.Phase]:
    n, t = prompt_tokens(lion, prompt, tags), len(lion.text.words.encode(prompt, 128))
    vision = work.vit(lion.model, b) + work.qformer(lion.model, b, t) + work.aggregator(lion.model, b)
    return vision + work.encoder(lion.model.t5, b, n) + work.decoder(lion.model.t5, b, b, n, tokens)


def prompt_tokens(lion: Lion, prompt: str, tags: list[str]) -> int:
    """Tokens of T5's encoder: the image's and the prompt's."""
    return lion.config.visual_tokens + len(lion.text.pieces.encode(lion.prompts([prompt], [tags])[0]))


def train(args: argparse.Namespace, dtype: str) -> list[Row]:
    """A step of each stage, and the frozen ViT's share of it, which needs no gradient. bfloat16 is autocast."""
    config, size, words = (replace(TINY, ram=None), 2, (12, 4)) if args.quick else (FOURTH, 4, (64, 16))
    half, rows = dtype == "bfloat16", []
    for number in (1, 2, 3):
        lion, _, step = memory.training(config, vocabularies(), number, half)
        model, samples = lion.model, memory.made_up(lion, number, size, words)
        n = model.config.visual_tokens + words[0]
        frozen = work.vit(model, size)
        language = work.encoder(model.t5, size, n) + work.decoder(model.t5, size, size, n, words[1], reads=1)
        both = [*frozen, *both_ways(language, model.t5)]
        if model.qformer is not None:
            both += both_ways(work.qformer(model, size, words[0]), model.qformer)
        if model.aggregator is not None:
            both += both_ways(work.aggregator(model, size), model.aggregator)

        def learn(lion: Lion = lion, step: Callable = step, samples: tuple = samples) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                step(lion.batch(*samples))

        def look(model: LionModel = model, pixels: Tensor = samples[0]) -> None:
            with torch.no_grad(), autocast(memory.CPU, half):
                model.vit(pixels, model.config.taps)

        cases = [Case("step", learn, None, both), Case("frozen ViT", look, None, frozen)]
        step_row, vit_row = race("train", dtype, cases, args, rounds=3)
        three = step_row, vit_row, combined(step_row, sub, vit_row, "rest")
        rows += [replace(row, what=f"stage {number}, batch {size}: {row.what}") for row in three]
    return rows


def both_ways(forward: Sequence[work.Phase], module: nn.Module) -> list[work.Phase]:
    """Forward, back to the inputs, and back to the share of the weights that trains.

    The few products back to the frozen ViT's tokens, which nobody needs, are not subtracted.
    """
    sizes = [(matrix.numel(), matrix.requires_grad) for matrix in work.matrices(module)]
    times = 2 + sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
    return [(times * operations, times * size) for operations, size in forward]


def data(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Does data come as fast as it is learned? Seconds per sample: one worker's, and a training step's."""
    size = 2 if args.quick else 64
    toy = replace(PRESETS["tiny"], ram=None)
    lion, _, step = memory.training(toy, Vocabularies.from_folder(TINY_FOLDER, toy), 1, half=True)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name)
        Image.effect_noise((640, 480), 64).filter(ImageFilter.GaussianBlur(2)).convert("RGB").save(photos / "a.jpg")
        records = [{"image": "a.jpg", "question": "a", "answer": "a", "category": "image"}] * size
        (photos / "records.json").write_text(json.dumps(records))
        photo = Records(photos / "records.json", photos, ("image",))
        made = {
            "a photo": MicroBatches(Mixture([photo], None, 0), size, BASE.vit.image_size),
            "a toy scene": MicroBatches(Mixture([Toy(("image",))], None, 0), size, toy.vit.image_size),
        }

        def make(batches: MicroBatches) -> Samples:
            torch.set_num_threads(1)  # as in a worker
            samples = batches[0]
            torch.set_num_threads(args.threads)
            assert isinstance(samples, Samples)
            assert not samples.bad
            return samples

        runs: dict[str, Run] = {f"{what}, from source to tensor": partial(make, b) for what, b in made.items()}
        samples = make(made["a toy scene"])
        runs["a toy scene, its share of stage 1's step"] = lambda: step(collate(lion, samples))
        times = in_turns(runs, args.rounds)
    return [Row("data", what, "", seconds / size) for what, seconds in times.items()]


def peak(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Bytes of a step. The limit is parameters, gradients, moments, one layer's activations and the logits."""
    config, size, words = (replace(TINY, ram=None), 2, (12, 4)) if args.quick else (FOURTH, 4, (64, 16))
    half, rows = dtype == "bfloat16", []
    for number, int8 in product((1, 2, 3), (False, True)):
        lion, passes, _ = memory.training(config, vocabularies(), number, half, int8=int8)
        run = partial(passes, lion.batch(*memory.made_up(lion, number, size, words)))
        held = memory.held(lion.model)
        layer = memory.one_layer(lion.model, lion.config.visual_tokens + words[0], size, half)
        limit = held + layer + 4 * size * words[1] * config.t5.vocab_size
        for recompute in (False, True):
            lion.model.recompute(recompute)
            what = f"stage {number}, batch {size}{', int8' * int8}{', recompute' * recompute}"
            rows.append(Row("memory", what, dtype, held + memory.peak_bytes(run), None, limit, "B"))
    return rows


def batches(args: argparse.Namespace, dtype: str) -> list[Row]:
    """The largest micro-batch of stage 3 on a card, computed on fake tensors of the real sizes: bytes = a + b * batch.

    Frozen weights are bfloat16, or int8 in linear layers. Autocast is bfloat16. Prompts and answers are as long as
    training allows, 128 tokens each. 1 GiB of the card stays free.
    """
    sizes = {"tiny": TINY} if args.quick else {name: PRESETS[name] for name in ("xl", "xxl")}
    words, rows = (12, 12) if args.quick else (128, 128), []
    for name, config in sizes.items():
        for int8, recompute in product((False, True), repeat=2):
            a, b = memory.bytes_by_batch(config, vocabularies(), recompute, words, int8)
            title = f"{name}{', int8' * int8}{', recompute' * recompute}"
            rows += [Row("batches", f"{title}: a", "bfloat16", a, unit="B")]
            rows += [Row("batches", f"{title}: b, each sample", "bfloat16", b, unit="B")]
            for card in (4,) if args.quick else (4, 8, 12, 16, 24, 80):
                room = (card - 1) * 2**30
                most = max(0, (room - a) // b)
                size = partial(memory.step_bytes, config, vocabularies(), recompute=recompute, words=words, int8=int8)
                while most > 4 and size(size=most) > room:
                    most -= 1 + most // 100  # the peak may be elsewhere than in a small batch
                rows.append(Row("batches", f"{title}: {card} GiB", "bfloat16", most, unit="samples"))
    return rows


def hours(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Hours of each stage on one A100, computed: its operations at 40 % of 312e12 per second.

    Assumed are 24 tokens of prompt and 24 more of tags, and answers of 12 tokens, boxes of 24.
    """
    rows = []
    for name, config in {"tiny": TINY}.items() if args.quick else [(name, PRESETS[name]) for name in ("xl", "xxl")]:
        for number, tags, answer in (1, 0, 12), (2, 0, 24), (3, 24, 12):
            stage = STAGES[number]
            model = skeleton(replace(config, **stage.model, ram=None))
            unfreeze(model, stage)
            ids = lambda *shape: torch.zeros(shape, dtype=torch.long, device="meta")
            pixels = torch.empty(1, 3, config.vit.image_size, config.vit.image_size, device="meta")
            words = ids(1, 24), None, ids(1, 24 + tags), None, ids(1, 24 + tags).bool(), ids(1), ids(1, answer)
            with FlopCounterMode(display=False) as count:
                model(Batch(pixels, ids(1), *words)).backward()
            samples, operations = stage.batch * stage.steps, count.get_total_flops()
            rows.append(
                Row("hours", f"{name}, stage {number}: operations of a sample, 1e12", "", operations / 1e12, unit="x")
            )
            rows.append(Row("hours", f"{name}, stage {number}", "", samples * operations / (0.4 * 312e12), unit="s"))
    return rows


LOAD = """
import sys
from lion_mini import Lion
if sys.argv[1:]:
    lion = Lion.from_pretrained(sys.argv[1], dtype=None)
    print(sum(float(parameter.sum()) for parameter in lion.model.parameters()))
"""


def convert(args: argparse.Namespace, dtype: str) -> list[Row]:
    """weights.py convert on made-up official files, then opening the result and reading all of it.

    Each is a process of its own. The peak of a process that only imports the package is subtracted.
    """
    config = TINY if args.quick else BASE
    assert config.ram is not None
    config = replace(config, qformer=replace(config.qformer, vocab_size=161), ram=replace(config.ram, tags=24))
    runs: dict[str, list[tuple[float, int]]] = {"import": [], "convert": [], "load": []}
    with tempfile.TemporaryDirectory() as name:
        folder, out, script = (Path(name) / part for part in ("official", "converted", "load.py"))
        folder.mkdir()
        script.write_text(LOAD)
        command = memory.official_files(config, folder)
        for _ in range(min(args.rounds, 3)):
            shutil.rmtree(out, ignore_errors=True)
            runs["import"].append(memory.process(script))
            runs["convert"].append(memory.process(*command, "--out", out, "--dtype", "bfloat16"))
            runs["load"].append(memory.process(script, out))
        size = sum(path.stat().st_size for path in out.iterdir())
    seconds, peaks = ({kind: statistics.median(run[i] for run in each) for kind, each in runs.items()} for i in (0, 1))
    return [
        Row("convert", "convert", "bfloat16", seconds["convert"]),
        Row("convert", "convert, peak", "bfloat16", peaks["convert"] - peaks["import"], unit="B"),
        Row("convert", "load and read", "bfloat16", seconds["load"]),
        Row("convert", "load, peak", "bfloat16", peaks["load"] - peaks["import"], None, size, "B"),
        Row("convert", "import alone", "", seconds["import"]),
    ]


def growth(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Seconds per sample as the batch grows, and as the prompt does; transformers for T5's encoder only."""
    config = replace(TINY, ram=None) if args.quick else SMALL
    counts, lengths = ((1, 2), (8, 16)) if args.quick else ((1, 2, 4, 8, 16, 32), (32, 64, 128, 256, 512))
    lion, (plain, theirs) = build(config, dtype), build_t5(config.t5, dtype)
    settings = Generation(max_new_tokens=4 if args.quick else 20)
    side, tags = config.vit.image_size, ["a", "a"]

    def encoding(name: str, b: int, t: int) -> Case:
        n, task = config.visual_tokens + t, torch.zeros(b, dtype=torch.long)
        x = torch.randn(b, n, config.t5.width).to(DTYPES[dtype])
        run = lambda: theirs.encoder(inputs_embeds=x).last_hidden_state
        return Case(name, lambda: plain.encode(x, None, task), run, work.encoder(plain, b, n))

    def answering(b: int) -> Case:
        run = partial(lion.generate, torch.randn(b, 3, side, side), ["a a a"] * b, [tags] * b, ["image"] * b, settings)
        return Case(f"answer, batch {b}", run, None, answer_work(lion, b, "a a a", tags, settings.max_new_tokens))

    rows = []
    for b in counts:
        cases = [encoding(f"encoder, batch {b}", b, lengths[0]), answering(b)]
        count = Row("", "", "", b, b, b)
        rows += [combined(row, truediv, count, row.what) for row in race("growth", dtype, cases, args, rounds=3)]
    for t in lengths:
        rows += race("growth", dtype, [encoding(f"encoder, prompt {t}", 1, t)], args, rounds=3)
    few, many = counts[-1] // (2 if args.quick else 4), counts[-1]
    by_name = {row.what: row for row in rows}
    for kind in ("encoder", "answer"):
        after, before = by_name[f"{kind}, batch {many}"], by_name[f"{kind}, batch {few}"]
        ratio = combined(after, truediv, before, f"{kind}: time per sample from {few} to {many}")
        rows.append(replace(ratio, limit=None, unit="x"))
    return rows


PARTS: dict[str, Callable[[argparse.Namespace, str], list[Row]]] = {
    "tokenizers": tokenizers, "vit": vit, "t5": t5, "tag": tag, "lion": whole, "train": train, "data": data,
    "memory": peak, "batches": batches, "convert": convert, "hours": hours, "growth": growth,
}  # fmt: skip
ONE_DTYPE = ("tokenizers", "data", "batches", "convert", "hours")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=[*PARTS])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each run; slow ones have at most 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("--png", type=Path, help="where to draw the growth")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: the figures mean nothing")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.png and "growth" not in args.parts:
        parser.error("--png draws the growth: --parts must have it")
    args.rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    show = lambda *lines: None if args.json else print(*lines, sep="\n", flush=True)
    show(machine(), f"{args.threads} threads, {args.rounds} rounds, torch {torch.__version__}", HEAD)
    rows: list[Row] = []
    for part in args.parts:
        for dtype in DTYPES if args.dtype == "both" and part not in ONE_DTYPE else [args.dtype]:
            measured = PARTS[part](args, dtype)
            rows += measured
            show(*map(line, measured))
    ratios = halved(rows)
    show(*map(line, ratios))
    if args.png:
        draw(rows, args.png)
    if args.json:
        table = [asdict(row) for row in [*rows, *ratios]]
        print(json.dumps({"machine": machine(), "threads": args.threads, "rows": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
