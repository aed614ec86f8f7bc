"""How fast and how large: ours beside transformers and beside the machine's limit.

    python tests/bench.py                          everything, in float32 and bfloat16, as a table
    python tests/bench.py --parts vit t5 --json    some parts, as one JSON object
    python tests/bench.py --parts growth --png growth.png
    python tests/bench.py --quick                  tiny sizes, one round: does everything run?

Every time is the median of runs that take turns within this process: ours, transformers' and the machine's own, so that
what else the machine does falls on all alike. An absolute time means nothing on a shared machine; the ratios do. Both
have the same random parameters, dtype and threads, and what they compute is compared before anything is timed.

The limit is what this machine could do at best. Work comes in phases, one after the other (the encoder, then the
tokens); a phase takes at least as long as its multiplications at the rate of the fastest large matrix product in that
dtype, and as long as its weights at the rate at which memory can be read, whichever is more; the limit is the sum over
phases.

Without transformers its column stays empty. Tokenisers and vocabularies are the tests' small ones; weights are random.
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_memory as memory  # noqa: E402
import peers  # noqa: E402
from bench_measure import DTYPES, HEAD, Case, Row, Run, agree, draw, halved, in_turns, line, race, same  # noqa: E402
from bench_work import (  # noqa: E402
    Phase,
    aggregator_work,
    decoder_work,
    encoder_work,
    head_work,
    matrices,
    qformer_work,
    swin_work,
    vit_work,
)
from conftest import OFFICIAL, randomise  # noqa: E402

from lion_mini import Generation, Lion, LionConfig  # noqa: E402
from lion_mini.config import EOS, PRESETS, AggregatorConfig, QFormerConfig, RamConfig, T5Config, VitConfig  # noqa: E402
from lion_mini.data.mixture import MicroBatches, Mixture  # noqa: E402
from lion_mini.data.records import Records  # noqa: E402
from lion_mini.model.generate import generate  # noqa: E402
from lion_mini.model.lion import Text  # noqa: E402
from lion_mini.model.ram import Ram  # noqa: E402
from lion_mini.model.t5 import T5, Attention  # noqa: E402
from lion_mini.text.prompts import EVAL_TEMPLATES, render  # noqa: E402
from lion_mini.text.tokenizers import UnigramTokenizer, WordPieceTokenizer  # noqa: E402
from lion_mini.toy.questions import Toy  # noqa: E402

BASE = LionConfig(
    vit=VitConfig(width=768, depth=12, heads=12, mlp_width=3072),
    taps=(11, 8, 4),
    aggregator=AggregatorConfig(heads=12, mlp_width=3072),
    t5=T5Config(width=768, head_width=64, heads=12, mlp_width=2048, encoder_depth=12, decoder_depth=12),
    ram=RamConfig(width=128, heads=(4, 8, 16, 32)),
)
SMALL = LionConfig(  # FlanT5-small and eyes to match
    vit=VitConfig(width=384, depth=12, heads=6, mlp_width=1536),
    taps=(11, 8, 4),
    qformer=QFormerConfig(width=384, depth=6, heads=6, mlp_width=1536),
    aggregator=AggregatorConfig(heads=6, mlp_width=1536),
    t5=T5Config(width=512, head_width=64, heads=6, mlp_width=1024, encoder_depth=8, decoder_depth=8),
    ram=None,
)
FOURTH = LionConfig(  # XL, widths by four and depths by three
    vit=VitConfig(width=352, depth=13, heads=4, mlp_width=1536),
    taps=(12, 9, 6),
    qformer=QFormerConfig(width=192, depth=4, heads=3, mlp_width=768, vocab_size=7680),
    aggregator=AggregatorConfig(heads=4, mlp_width=768),
    t5=T5Config(width=512, head_width=64, heads=8, mlp_width=1280, encoder_depth=8, decoder_depth=8, vocab_size=8032),
    adapter_width=16,
    ram=None,
)
_TINY = PRESETS["tiny"]
TINY = replace(  # for --quick
    _TINY,
    vit=replace(_TINY.vit, depth=2),
    taps=(1, 0, 0),
    qformer=replace(_TINY.qformer, depth=2),
    t5=replace(_TINY.t5, encoder_depth=1, decoder_depth=1),
)
WRITTEN = 12  # tags of every picture


def texts(tags: int = 0) -> Text:
    """The tests' vocabularies; of any picture the first twelve tags are seen, and no other."""
    words = WordPieceTokenizer.from_file(OFFICIAL / "bert-base-uncased" / "vocab.txt")
    pieces = UnigramTokenizer.from_file(OFFICIAL / "flan-t5" / "tokenizer.json")
    floors = [0.0 if i < WRITTEN else 1.0 for i in range(tags)]
    return Text(words, pieces, [f"tag {i}" for i in range(tags)], floors)


def lion(config: LionConfig, dtype: str) -> Lion:
    """A LION with random parameters, which writes as many tokens as it may and only those that the vocabulary has."""
    model = Lion(config, texts(config.ram.tags if config.ram else 0)).eval().requires_grad_(False)
    fill(model)
    silence(model.t5, len(model.text.pieces))
    return model.to(DTYPES[dtype])


def fill(module: nn.Module) -> None:
    """Random parameters. T5 does not divide scores by sqrt(e): its queries are made as small as T5 starts them.

    Else one score dwarfs all others, and bfloat16's rounding moves the states by a sixth, ours and transformers' alike.
    """
    randomise(module, std=0.03)
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.q.weight.div_((layer.q.out_features // layer.heads) ** 0.5)


def silence(t5: T5, known: int) -> None:
    """Words beyond the vocabulary, and </s>, are never the best."""
    t5.lm_head.weight[known:] = 0
    t5.lm_head.weight[EOS] = 0


# --- the parts


def tokenizers(args: argparse.Namespace, dtype: str) -> list[Row]:
    """A thousand prompts, none of them twice."""
    text = texts()
    prompts = [f"Question: what is the man number {i} holding in his left hand? Short answer:" for i in range(1000)]
    pieces: Run | None = None
    words: Run | None = None
    if peers.available():
        from tokenizers import Tokenizer
        from transformers import BertTokenizer

        their_pieces = Tokenizer.from_file(str(OFFICIAL / "flan-t5" / "tokenizer.json"))
        bert = BertTokenizer.from_pretrained(OFFICIAL / "bert-base-uncased")
        bert.add_special_tokens({"bos_token": "[DEC]"})
        their_words = bert.backend_tokenizer
        for prompt in prompts[:50]:
            assert text.pieces.encode(prompt) == [*their_pieces.encode(prompt, add_special_tokens=False).ids, EOS]
            assert text.words.encode(prompt, 512) == their_words.encode(prompt).ids
        pieces = lambda: [their_pieces.encode(prompt) for prompt in prompts]
        words = lambda: [their_words.encode(prompt) for prompt in prompts]
    cases = [
        Case("1,000 prompts, T5", lambda: [text.pieces.encode(prompt) for prompt in prompts], pieces),
        Case("1,000 prompts, BERT", lambda: [text.words.encode(prompt, 512) for prompt in prompts], words),
    ]
    return [replace(row, dtype="") for row in race("tokenizers", "float32", cases, args)]


def vit(args: argparse.Namespace, dtype: str) -> list[Row]:
    """The two eyes: ViT and Q-Former, and what the aggregator adds."""
    config = TINY if args.quick else BASE
    model = lion(replace(config, ram=None), dtype)
    former, fuse = model.qformer, model.aggregator
    assert former is not None
    assert fuse is not None
    side, t, rest = config.vit.image_size, min(32, config.max_question_tokens), config.taps
    image = torch.randn(1, 3, side, side).to(DTYPES[dtype])
    ids = torch.randint(5, 100, (1, t))
    works = vit_work(model, 1), qformer_work(model, 1, t), aggregator_work(model, 1)
    their_vit = their_former = both = None
    with torch.inference_mode():
        states, taps = model.vit(image, rest)
        if peers.available():
            seer, reader = peers.vit(model.vit, config.vit), peers.qformer(former, config.qformer)
            seen = torch.ones(1, config.qformer.queries + t, dtype=torch.long)
            queries = config.qformer.queries

            def read(x: Tensor) -> Tensor:
                hidden = reader(
                    input_ids=ids, attention_mask=seen, query_embeds=former.queries,
                    encoder_hidden_states=former.image_norm(x),
                ).last_hidden_state  # fmt: skip
                return former.proj(hidden[:, :queries])

            their_vit = lambda: last_block(seer, image)
            their_former = lambda: read(states)
            both = lambda: read(last_block(seer, image))
    same(lambda: fuse(taps), fuse)
    same(lambda: former(states, ids), former)
    same(lambda: model.vit(image)[0], model.vit)
    with torch.inference_mode():
        if their_vit and their_former and both:
            agree(model.vit(image)[0], their_vit())
            agree(former(states, ids), their_former())
    cases = [
        Case("ViT", lambda: model.vit(image), their_vit, works[0]),
        Case(f"Q-Former, {t} words", lambda: former(states, ids), their_former, works[1]),
        Case("ViT + Q-Former", lambda: former(model.vit(image)[0], ids), both, [*works[0], *works[1]]),
        Case("aggregator", lambda: fuse(taps), None, works[2]),
    ]
    return race("vit", dtype, cases, args)


def last_block(theirs: Any, image: Tensor) -> Tensor:
    """Without the final norm, which LION does not have."""
    return theirs.encoder(inputs_embeds=theirs.embeddings(image)).last_hidden_state


def t5(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Encoder, and 20 tokens of one image with five beams and greedily.

    In float32 both must write the same tokens. In bfloat16 the next best of random weights is often as good, so only
    the encoder's states are compared; both write 20 tokens all the same.
    """
    config, n, new = (TINY.t5, 20, 4) if args.quick else (BASE.t5, 330, 20)
    ours = T5(config).eval().requires_grad_(False)
    fill(ours)
    silence(ours, config.vocab_size)
    ours.to(DTYPES[dtype])
    theirs: Any = peers.t5(ours, config) if peers.available() else None
    x, task = torch.randn(1, n, config.width).to(DTYPES[dtype]), torch.zeros(1, dtype=torch.long)
    before = encoder_work(ours, 1, n)
    decoder = {beams: decoder_work(ours, 1, beams, n, new) for beams in (5, 1)}

    def our_ids(beams: int, tokens: int = new) -> Tensor:
        settings = Generation(beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
        return generate(ours, ours.encode(x, None, task), None, task, settings)

    def their_ids(beams: int) -> Tensor:
        return theirs.generate(
            inputs_embeds=x, num_beams=beams, do_sample=False, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip

    same(lambda: ours.encode(x, None, task), ours)
    with torch.inference_mode():
        if theirs is not None:
            agree(ours.encode(x, None, task), theirs.encoder(inputs_embeds=x).last_hidden_state)
            for beams in (5, 1) if dtype == "float32" else ():
                assert torch.equal(our_ids(beams), their_ids(beams)), "not the same tokens: nothing to compare"
    with_theirs = lambda run: run if theirs is not None else None
    cases = [
        Case(
            "encoder", lambda: ours.encode(x, None, task), with_theirs(lambda: theirs.encoder(inputs_embeds=x)), before
        ),
        Case(f"{new} tokens, 5 beams", lambda: our_ids(5), with_theirs(lambda: their_ids(5)), [*before, *decoder[5]]),
        Case(f"{new} tokens, greedy", lambda: our_ids(1), with_theirs(lambda: their_ids(1)), [*before, *decoder[1]]),
        *(Case(f"{k * new // 2} tokens", lambda k=k: our_ids(5, k * new // 2)) for k in (1, 4, 8)),  # type: ignore[misc]
    ]
    rows = race("t5", dtype, cases, args)
    first, five, one, half, double, fourfold = rows
    growth = (five.ours - half.ours) / (new / 2) / ((fourfold.ours - double.ours) / (2 * new))
    early = Row("t5", f"a token up to {new} / beyond {2 * new}", dtype, growth, unit="x")
    return [first, five, one, token(five, first, new), token(one, first, new), early]


def token(whole: Row, encoder: Row, new: int) -> Row:
    """What is left of a whole without the encoder, per token."""
    theirs = (whole.theirs - encoder.theirs) / new if whole.theirs and encoder.theirs else None
    limit = (whole.limit - encoder.limit) / new if whole.limit and encoder.limit else None
    what = f"a token, {whole.what.split(', ')[1]}"
    return replace(whole, what=what, ours=(whole.ours - encoder.ours) / new, theirs=theirs, limit=limit)


def tag(args: argparse.Namespace, dtype: str) -> list[Row]:
    config = (TINY if args.quick else BASE).ram
    assert config is not None
    ram = Ram(config).eval().requires_grad_(False)
    fill(ram)
    ram.to(DTYPES[dtype])
    image = torch.randn(1, 3, config.image_size, config.image_size).to(DTYPES[dtype])
    works = swin_work(ram, 1), head_work(ram, 1)
    theirs = peers.swin(ram.swin, config) if peers.available() else None
    same(lambda: ram(image), ram)
    with torch.inference_mode():
        if theirs is not None:
            agree(ram.swin(image)[:, 1:], theirs(image).last_hidden_state)
    cases = [
        Case("Swin", lambda: ram.swin(image), None if theirs is None else lambda: theirs(image), works[0]),
        Case(f"Swin and {config.tags:,} tags", lambda: ram(image), None, [*works[0], *works[1]]),
    ]
    return race("tag", dtype, cases, args)


def whole(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Pictures to captions and boxes: what `Lion.caption` and `Lion.locate` do, for one picture and for eight.

    Packed, as for many pictures, and plain, as infer.py opens a model for a few."""
    model = lion(TINY if args.quick else BASE, dtype)
    plain = copy.deepcopy(model)
    side = model.config.vit.image_size
    picture = Image.effect_noise((2 * side, side), 64).convert("RGB")
    settings = {"caption": Generation(max_new_tokens=4 if args.quick else 30)}
    settings["locate"] = Generation(max_new_tokens=4 if args.quick else 40)
    asked = {
        "caption": (EVAL_TEMPLATES["caption"], "image"),
        "locate": (render(EVAL_TEMPLATES["rec"], expression="the dog on the left"), "region"),
    }
    cases = []
    for b in (1, 2 if args.quick else 8):
        for kind, (prompt, task) in asked.items():
            work = whole_work(model, b, prompt, settings[kind].max_new_tokens)
            for how, one in (("", model), (", plain", plain)):
                run = partial(one.respond, [picture] * b, [prompt] * b, [task] * b, settings[kind])
                cases.append(Case(f"{kind}, batch {b}{how}", run, None, work))
    pixels = torch.randn(1, 3, side, side)
    same(lambda: model.see(pixels, ["a"], [["a"]], ["image"])[0], model)
    return race("lion", dtype, cases, args, rounds=3)


def whole_work(model: Lion, b: int, prompt: str, tokens: int) -> list[Phase]:
    """Tagger, eyes, language model, and once more through the decoder, all tokens at a time, for the answer's score."""
    tags = [model.text.tags[:WRITTEN]]
    n = model.config.visual_tokens + len(model.text.pieces.encode(model.prompts([prompt], tags)[0]))
    phases = [*vit_work(model, b), *aggregator_work(model, b), *encoder_work(model.t5, b, n)]
    phases += qformer_work(model, b, len(model.text.words.encode(prompt, 128)))
    if model.ram is not None:
        phases += [*swin_work(model.ram, b), *head_work(model.ram, b)]
    return phases + decoder_work(model.t5, b, b, n, tokens) + decoder_work(model.t5, b, b, n, tokens, reads=1)


def train(args: argparse.Namespace, dtype: str) -> list[Row]:
    """One step of each stage, of which the frozen ViT is a part that needs no gradient; bfloat16 is autocast."""
    config, size, words = (replace(TINY, ram=None), 2, (12, 4)) if args.quick else (FOURTH, 4, (64, 16))
    rows = []
    for number in (1, 2, 3):
        model, batch, _, step = memory.training(config, texts(), number, size, words, half=dtype == "bfloat16")
        n = model.config.visual_tokens + words[0]
        seen = vit_work(model, size)
        language = encoder_work(model.t5, size, n) + decoder_work(model.t5, size, size, n, words[1], reads=1)
        both = [*seen, *both_ways(language, model.t5)]
        if model.qformer is not None:
            both += both_ways(qformer_work(model, size, words[0]), model.qformer)
        if model.aggregator is not None:
            both += both_ways(aggregator_work(model, size), model.aggregator)

        def see(model: Lion = model, pixels: Tensor = batch.pixels) -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                model.vit(pixels, model.config.taps)

        def learn(step: Callable[[], None] = step) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                step()

        cases = [Case("step", learn, None, both), Case("frozen ViT", see, None, seen)]
        whole, eye = race("train", dtype, cases, args, rounds=3)
        rest = replace(whole, what="rest", ours=whole.ours - eye.ours, limit=(whole.limit or 0) - (eye.limit or 0))
        rows += [replace(row, what=f"stage {number}, batch {size}: {row.what}") for row in (whole, eye, rest)]
    return rows


def both_ways(forward: Sequence[Phase], module: nn.Module) -> list[Phase]:
    """Forward, back to the inputs, and, for the share of the weights that trains, back to them.

    The few products back to the frozen ViT's tokens, which nobody needs, are not taken off.
    """
    sizes = [(matrix.numel(), matrix.requires_grad) for matrix in matrices(module)]
    times = 2 + sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
    return [(times * operations, times * size) for operations, size in forward]


def data(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Whether pictures come as fast as they are learned: one sample made by one thread, and one sample of a step."""
    size = 2 if args.quick else 64
    toy = replace(PRESETS["tiny"], ram=None)
    _, _, _, step = memory.training(toy, texts(), 1, size, (12, 4), half=True)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name)
        Image.effect_noise((640, 480), 64).filter(ImageFilter.GaussianBlur(2)).convert("RGB").save(photos / "a.jpg")
        records = [{"image": "a.jpg", "question": "a", "answer": "a", "category": "image"}] * size
        (photos / "records.json").write_text(json.dumps(records))
        made = {
            what: MicroBatches(Mixture([source], None, 0), size, config.vit.image_size)
            for what, source, config in (
                ("a photo", Records(photos / "records.json", photos, ("image",)), BASE),
                ("a toy scene", Toy(("image",)), toy),
            )
        }

        def make(batches: MicroBatches) -> None:
            torch.set_num_threads(1)  # as in a worker
            assert not batches[0].bad
            torch.set_num_threads(args.threads)

        runs: dict[str, Run] = {f"{what}, from source to tensor": partial(make, b) for what, b in made.items()}
        runs["a toy scene, its share of stage 1's step"] = step
        times = in_turns(runs, args.rounds)
    return [Row("data", what, "", seconds / size) for what, seconds in times.items()]


def peak(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Bytes of a step, beside parameters, trained state, one layer's activations and the logits."""
    config, size, words = (replace(TINY, ram=None), 2, (12, 4)) if args.quick else (FOURTH, 4, (64, 16))
    half, rows = dtype == "bfloat16", []
    for number in (1, 2, 3):
        model, _, passes, _ = memory.training(config, texts(), number, size, words, half)
        held = sum(memory.held(model))
        layer = memory.one_layer(model, model.config.visual_tokens + words[0], size, half)
        limit = held + layer + 4 * size * words[1] * config.t5.vocab_size
        for recompute in (False, True):
            model.recompute(recompute)
            what = f"stage {number}, batch {size}{', recompute' * recompute}"
            rows.append(Row("memory", what, dtype, held + memory.peak_bytes(passes), None, limit, "B"))
    return rows


def batches(args: argparse.Namespace, dtype: str) -> list[Row]:
    """The largest batch of stage 3 on a card, computed: bytes = a + b * batch, from the real sizes on fake tensors.

    Frozen weights and autocast are bfloat16; prompts and answers as long as training allows, 128 tokens each; 1 GiB
    of the card is left to its driver and to fragments.
    """
    sizes = {"tiny": TINY} if args.quick else {name: PRESETS[name] for name in ("xl", "xxl")}
    words, rows = (12, 4) if args.quick else (128, 128), []
    for name, config in sizes.items():
        for recompute in (False, True):
            a, b = memory.line(config, texts(), recompute, words)
            title = f"{name}{', recompute' * recompute}"
            rows += [Row("batches", f"{title}: a", "bfloat16", a, unit="B")]
            rows += [Row("batches", f"{title}: b, each sample", "bfloat16", b, unit="B")]
            for card in (4,) if args.quick else (4, 8, 16, 24, 80):
                room = (card - 1) * 2**30
                most = max(0, (room - a) // b)
                while most > 4 and memory.step_bytes(config, texts(), most, recompute, words) > room:
                    most -= 1 + most // 100  # the peak need not be at the same place as in a small batch
                rows.append(Row("batches", f"{title}: {card} GiB", "bfloat16", most, unit="samples"))
    return rows


LOAD = """
import sys
from lion_mini import Lion
if sys.argv[1:]:
    model = Lion.from_pretrained(sys.argv[1], dtype=None)
    print(sum(float(parameter.sum()) for parameter in model.parameters()))
"""


def convert(args: argparse.Namespace, dtype: str) -> list[Row]:
    """weights.py convert on made-up official files, and opening the result and reading all of it.

    Each is a process of its own; of its peak memory is taken away that of a process that only imports the package.
    """
    config = TINY if args.quick else BASE
    assert config.ram is not None
    config = replace(config, qformer=replace(config.qformer, vocab_size=161), ram=replace(config.ram, tags=24))
    times: dict[str, list[tuple[float, int]]] = {"import": [], "convert": [], "load": []}
    with tempfile.TemporaryDirectory() as name:
        folder, out, script = (Path(name) / part for part in ("official", "converted", "load.py"))
        folder.mkdir()
        script.write_text(LOAD)
        command = memory.official_files(config, folder)
        for _ in range(min(args.rounds, 3)):
            shutil.rmtree(out, ignore_errors=True)
            times["import"].append(memory.process(script))
            times["convert"].append(memory.process(*command, "--out", out, "--dtype", "bfloat16"))
            times["load"].append(memory.process(script, out))
        size = sum(path.stat().st_size for path in out.iterdir())
    seconds = {kind: statistics.median(time for time, _ in runs) for kind, runs in times.items()}
    bytes_ = {kind: statistics.median(most for _, most in runs) for kind, runs in times.items()}
    return [
        Row("convert", "convert", "bfloat16", seconds["convert"]),
        Row("convert", "convert, peak", "bfloat16", bytes_["convert"] - bytes_["import"], unit="B"),
        Row("convert", "load and read", "bfloat16", seconds["load"]),
        Row("convert", "load, peak", "bfloat16", bytes_["load"] - bytes_["import"], None, size, "B"),
        Row("convert", "import alone", "", seconds["import"]),
    ]


def growth(args: argparse.Namespace, dtype: str) -> list[Row]:
    """Seconds per sample as the batch grows, and as the prompt does; transformers for T5's encoder only."""
    config = replace(TINY, ram=None) if args.quick else SMALL
    counts, lengths = ((1, 2), (8, 16)) if args.quick else ((1, 2, 4, 8, 16, 32), (32, 64, 128, 256, 512))
    model = lion(config, dtype)
    side, width, visual = config.vit.image_size, config.t5.width, config.visual_tokens
    plain = T5(config.t5).eval().requires_grad_(False)
    fill(plain)
    plain.to(DTYPES[dtype])
    theirs = peers.t5(plain, config.t5) if peers.available() else None
    settings = Generation(max_new_tokens=4 if args.quick else 20)
    works = {(b, t): encoder_work(plain, b, visual + t) for b in counts for t in lengths}
    answers = {b: answer_work(model, b, settings.max_new_tokens) for b in counts}
    x, pixels, task = torch.randn(1, 8, width).to(DTYPES[dtype]), torch.randn(1, 3, side, side), torch.tensor([0])
    same(lambda: plain.encode(x, None, task), plain)
    same(lambda: model.see(pixels, ["a"], [["a"]], ["image"])[0], model)
    with torch.inference_mode():
        if theirs is not None:
            agree(plain.encode(x, None, task), theirs.encoder(inputs_embeds=x).last_hidden_state)

    def encoding(name: str, b: int, t: int) -> Case:
        x, task = torch.randn(b, visual + t, width).to(DTYPES[dtype]), torch.zeros(b, dtype=torch.long)
        run = None if theirs is None else lambda: theirs.encoder(inputs_embeds=x)
        return Case(name, lambda: plain.encode(x, None, task), run, works[b, t])

    def answering(b: int) -> Case:
        pixels, tags = torch.randn(b, 3, side, side), [["a", "a"]] * b
        return Case(f"answer, batch {b}", lambda: model.generate(pixels, ["a a a"] * b, tags, ["image"] * b, settings),
                    None, answers[b])  # fmt: skip

    rows = []
    for b in counts:
        both = race("growth", dtype, [encoding(f"encoder, batch {b}", b, lengths[0]), answering(b)], args, rounds=3)
        rows += [per_sample(row, b) for row in both]
    for t in lengths:
        rows += race("growth", dtype, [encoding(f"encoder, prompt {t}", 1, t)], args, rounds=3)
    few, many = counts[-1] // (2 if args.quick else 4), counts[-1]
    by_name = {row.what: row for row in rows}
    for kind in ("encoder", "answer"):
        before, after = by_name[f"{kind}, batch {few}"], by_name[f"{kind}, batch {many}"]
        factor = after.theirs / before.theirs if after.theirs and before.theirs else None
        what = f"{kind}: time per sample from {few} to {many}"
        rows.append(Row("growth", what, dtype, after.ours / before.ours, factor, unit="x"))
    return rows


def answer_work(model: Lion, b: int, tokens: int) -> list[Phase]:
    n = model.config.visual_tokens + len(model.text.pieces.encode(model.prompts(["a a a"], [["a", "a"]])[0]))
    eyes = vit_work(model, b) + qformer_work(model, b, 5) + aggregator_work(model, b)
    return eyes + encoder_work(model.t5, b, n) + decoder_work(model.t5, b, b, n, tokens)


def per_sample(row: Row, b: int) -> Row:
    less = lambda value: None if value is None else value / b
    return replace(row, ours=row.ours / b, theirs=less(row.theirs), limit=less(row.limit))


Part = Callable[[argparse.Namespace, str], list[Row]]
PARTS: dict[str, Part] = {
    "tokenizers": tokenizers, "vit": vit, "t5": t5, "tag": tag, "lion": whole, "train": train, "data": data,
    "memory": peak, "batches": batches, "convert": convert, "growth": growth,
}  # fmt: skip
ONE_DTYPE = ("tokenizers", "data", "batches", "convert")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=[*PARTS])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5, help="times each run takes its turn; slow ones at most 3")
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
    rows: list[Row] = []
    show = lambda *lines: None if args.json else print(*lines, sep="\n", flush=True)
    show(f"{args.threads} threads, {args.rounds} rounds, torch {torch.__version__}", HEAD)
    for part in args.parts:
        for dtype in DTYPES if args.dtype == "both" and part not in ONE_DTYPE else [args.dtype]:
            found = PARTS[part](args, dtype)
            rows += found
            show(*map(line, found))
    ratios = halved(rows)
    show(*map(line, ratios))
    if args.png:
        draw(rows, args.png)
    if args.json:
        print(json.dumps({"threads": args.threads, "rows": [asdict(row) for row in [*rows, *ratios]]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
