"""One GPU for eight minutes: is LION right on it, how fast, and in how much memory?

    python tests/gpu_check.py                          everything, as a table and in gpu_check.json
    python tests/gpu_check.py --parts answers token    some parts
    python tests/gpu_check.py --device cpu --quick     tiny sizes on the CPU: does everything run?

Models have XL's sizes and random weights, made on the GPU. A time is the median of three runs after a first one.
Memory is the peak of what PyTorch allocates, weights included; a CPU counts none. Its limit is the bytes of the weights
in `answers` and `instructblip`, and what bench_memory.py computes in `training` and `batches`. An error's limit is the
bound that must hold. The limit in `token` is the GPU's own, as in bench.py.

A case that fails takes one line, the next one runs, and the exit code is 1. No case begins after --minutes. Without
transformers its column stays empty.
"""

# ruff: noqa: E402
import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench
import bench_memory as memory
import peers
from bench_measure import DTYPES, HEAD, Row, Run, fastest_product, in_turns, large_tensor, line, machine
from conftest import relative

from lion_mini import Generation, Lion
from lion_mini.config import EOS, PAD, PRESETS
from lion_mini.data.mixture import MicroBatches, Mixture, collate
from lion_mini.images import lion_transform, ram_transform
from lion_mini.model.generate import GENERATION, generate
from lion_mini.model.lion import Batch
from lion_mini.model.t5 import T5
from lion_mini.quantize import usable
from lion_mini.text.prompts import EVAL_TEMPLATES, render
from lion_mini.toy.training import Toy

HALF = "bfloat16"
BOUNDS = {"float32": 1e-4, HALF: 0.05}  # relative errors; bfloat16 has at most 0.012 on a CPU
Case = tuple[str, Callable[[], list[Row]]]  # its name and its rows; a part yields its cases


def measure(device: torch.device, run: Run, rounds: int) -> tuple[float, float]:
    """Median seconds, and the peak in bytes; 0 on a CPU."""
    if cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return in_turns({"": run}, rounds)[""], float(torch.cuda.max_memory_allocated(device)) if cuda else 0.0


def timed(part: str, what: str, args: argparse.Namespace, lion: Lion, ours: Run, theirs: Run | None = None) -> Case:
    """A case of two rows, seconds and bytes."""

    @torch.inference_mode()
    def run() -> list[Row]:
        seconds, size = measure(args.device, ours, args.rounds)
        their_seconds, their_size = measure(args.device, theirs, args.rounds) if theirs else (None, None)
        stored = sum(parameter.nbytes for parameter in lion.model.parameters())
        first = Row(part, what, HALF, seconds, their_seconds)
        return [first, Row(part, f"{what}: memory", HALF, size, their_size, stored, "B")]

    return what, run


def golden(args: argparse.Namespace) -> Iterator[Case]:
    """The golden tests on the device. A float32 failure a little above its bound is rounding if float64 passes: these
    weights magnify it (conftest.py)."""
    yield "float64", partial(golden_tests, args, "float64", "golden and not order")  # one golden gradient is 1.1e-3 off
    yield "float32", partial(golden_tests, args, "float32", "golden")


def golden_tests(args: argparse.Namespace, dtype: str, which: str) -> list[Row]:
    files = [f"tests/model/test_{name}.py" for name in ("golden", "ram")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", which, *files]
    settings = os.environ | {"LION_DEVICE": str(args.device), "LION_DTYPE": dtype, "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=150)
    passed = re.search(r"(\d+) passed", done.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (?:\S+::)?(.+)", done.stdout, re.M)
    assert passed or failed, (done.stdout + done.stderr).strip().split("\n")[-1]
    rows = [Row("golden", "tests passed", dtype, int(passed[1]) if passed else 0, unit="samples")]
    return rows + [Row("golden", name, dtype, 1, None, 0, "error") for name in failed]


def parity(args: argparse.Namespace) -> Iterator[Case]:
    """The tiny trained model on the device, beside float32 on the CPU. In bfloat16 the golden weights tell nothing:
    rounding them alone moves T5's states by nine tenths."""
    samples = MicroBatches(Mixture([Toy(("image", "region"))], None, 0), 8, PRESETS["tiny"].vit.image_size)[0]
    expected = outputs(Lion.from_pretrained("tiny"), samples)

    def run(dtype: str) -> list[Row]:
        found = outputs(Lion.from_pretrained("tiny", args.device, DTYPES[dtype]), samples)
        errors = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
        return [Row("parity", name, dtype, error, None, BOUNDS[dtype], "error") for name, error in errors.items()]

    for dtype in BOUNDS:
        yield dtype, partial(run, dtype)


@torch.inference_mode()
def outputs(lion: Lion, samples: Any) -> dict[str, Tensor]:
    batch, model = collate(lion, samples), cast(Any, lion.model)
    states, taps = model.vit(batch.pixels, lion.config.taps)
    found = {
        "ViT": states,
        "Q-Former": model.qformer(states[batch.picture], batch.question, batch.question_mask),
        "aggregator": model.aggregator(taps),
        "T5's encoder": model.encode(batch)[0],
        "logits": model.logits(batch),
    }
    return {name: x.float().cpu() for name, x in found.items()}


def answers(args: argparse.Namespace) -> Iterator[Case]:
    """Different pictures to tags, captions, answers and boxes. The transforms run on the CPU."""
    lion = bench.build(bench.TINY if args.quick else PRESETS["xl"], HALF, args.device)
    sides = (lion_transform, lion.config.vit.image_size), (ram_transform, lion.ram.config.image_size)
    asked = (
        ("caption", EVAL_TEMPLATES["caption"], "image", GENERATION["caption"]),
        ("ask", render(EVAL_TEMPLATES["vqa"], question="what is he holding?"), "image", GENERATION["answer"]),
        ("locate", render(EVAL_TEMPLATES["rec"], expression="the dog on the left"), "region", GENERATION["locate"]),
    )
    transforms = lambda pictures: [transform(picture, side) for transform, side in sides for picture in pictures]
    for b in (1, 2) if args.quick else (1, 8, 32):
        pictures = [Image.effect_noise((640, 480), 64).convert("RGB") for _ in range(b)]
        runs: dict[str, Run] = {"transforms": partial(transforms, pictures), "tag": partial(lion.tag, pictures)}
        for what, question, task, settings in asked:
            short = replace(settings, max_new_tokens=4) if args.quick else settings
            runs[what] = partial(lion.respond, pictures, [question] * b, [task] * b, short)
        for what, run in runs.items():
            yield timed("answers", f"{what}, batch {b}", args, lion, run)
    if args.device.type == "cuda":
        yield "synchronisations", partial(synchronisations, lion.model.t5)


@torch.inference_mode()
def synchronisations(t5: T5) -> list[Row]:
    """How often a token makes the CPU wait for the GPU: those of 20 tokens minus those of 10."""
    x = torch.randn_like(t5.shared.weight[None, :330])
    task = torch.zeros(1, dtype=torch.long, device=x.device)
    states = t5.encode(x, None, task)

    def count(beams: int, tokens: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(t5, states, None, task, Generation(beams=beams, max_new_tokens=tokens))
        torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    each = {beams: (count(beams, 20) - count(beams, 10)) / 10 for beams in (1, 5)}
    return [Row("answers", f"waits of a token, beams: {beams}", HALF, n, unit="x") for beams, n in each.items()]


def token(args: argparse.Namespace) -> Iterator[Case]:
    """T5 alone, beside transformers and the limit of a large product and a large read."""
    run = partial(bench.t5, args, HALF, PRESETS["xl"].t5, args.device)
    yield "T5", lambda: [replace(row, part="token") for row in run()]


def instructblip(args: argparse.Namespace) -> Iterator[Case]:
    """A picture to 20 tokens of five beams, without what LION adds. transformers' parts hold the same tensors."""
    whole = bench.TINY if args.quick else PRESETS["xl"]
    config = replace(whole, visual_input="image", adapters=0, tags="none", ram=None)
    lion = bench.build(config, HALF, args.device)
    model, new, there = lion.model, 4 if args.quick else 20, peers.available()
    settings = Generation(beams=5, max_new_tokens=new, min_new_tokens=new)
    named = {"num_beams": 5, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    former: Any = model.qformer
    vit: Any = there and peers.vit(model.vit, config.vit)
    theirs: Any = there and peers.qformer(former, config.qformer)
    t5: Any = there and peers.t5(model.t5, config.t5)
    write = lambda batch: generate(model.t5, *model.encode(batch), batch.task, settings)
    their_tokens = lambda x: peers.read(theirs, former, peers.look(vit, x.pixels[x.picture]), x.question)

    def their_write(batch: Batch) -> Tensor:
        x = torch.cat((their_tokens(batch), t5.shared(batch.prompt)), dim=1)
        return t5.generate(inputs_embeds=x, pad_token_id=PAD, eos_token_id=EOS, **named)

    @torch.inference_mode()
    def agreement(batch: Batch) -> list[Row]:
        error = relative(model.see(batch), their_tokens(batch))
        return [Row("instructblip", f"visual tokens of {len(batch.task)}", HALF, error, None, 0.1, "error")]

    for b in (1, 2) if args.quick else (1, 8):
        pixels = torch.randn(b, 3, config.vit.image_size, config.vit.image_size)
        batch = lion.batch(pixels, ["what is the man holding in his left hand?"] * b, [""] * b, ["image"] * b)
        if there:
            yield f"agreement, batch {b}", partial(agreement, batch)
        yours = partial(their_write, batch) if there else None
        yield timed("instructblip", f"{new} tokens, batch {b}", args, lion, partial(write, batch), yours)


def training(args: argparse.Namespace) -> Iterator[Case]:
    """A step of 8 samples with bfloat16 autocast. Frozen matrices are bfloat16; int8 in the last case."""
    for number, recompute, int8 in (*product((1, 2, 3), (False, True), (False,)), (3, True, True)):
        what = f"stage {number}{', int8' * int8}{', recompute' * recompute}"
        yield what, partial(train_step, args, what, number, recompute, int8)


def train_step(args: argparse.Namespace, what: str, number: int, recompute: bool, int8: bool) -> list[Row]:
    config, size, words = (bench.TINY, 2, (12, 4)) if args.quick else (PRESETS["xl"], 8, (64, 16))
    config, text = replace(config, ram=None), bench.vocabularies()
    lion, passes, step = memory.training(config, text, number, True, True, args.device, int8)
    lion.model.recompute(recompute)
    batch = lion.batch(*memory.made_up(lion, number, size, words))
    seconds, _ = measure(args.device, partial(step, batch), args.rounds)
    _, most = measure(args.device, partial(passes, batch), 1)  # beside moments, and gradients of the warm-up
    computed = memory.step_bytes(config, text, size, recompute, words, number, int8)
    row = partial(Row, "training")
    rows = [row(f"{what}: a step", HALF, seconds), row(f"{what}: samples / s", HALF, size / seconds, unit="")]
    return [*rows, row(f"{what}: memory", HALF, most, None, computed, "B")]


def batches(args: argparse.Namespace) -> Iterator[Case]:
    """Does the largest micro-batch of stage 3 fit, as bytes = a + b * batch says? 1 GiB stays free."""
    for recompute in (False, True):
        yield f"largest{', recompute' * recompute}", partial(largest, args, recompute)


def largest(args: argparse.Namespace, recompute: bool) -> list[Row]:
    config, words = (bench.TINY, (12, 4)) if args.quick else (PRESETS["xl"], (128, 128))
    text = bench.vocabularies()
    a, b = memory.bytes_by_batch(config, text, recompute, words)
    room = a + 4 * b if args.quick else torch.cuda.get_device_properties(args.device).total_memory - 2**30
    size = (room - a) // b
    assert size > 0, f"no batch fits: {a / 1e9:.1f} GB, and {b / 1e9:.2f} GB for each sample"
    lion, passes, step = memory.training(config, text, 3, True, True, args.device)
    lion.model.recompute(recompute)
    few, many = (lion.batch(*memory.made_up(lion, 3, n, words)) for n in (2, size))
    step(few)  # makes the moments
    passes(few)  # makes the gradients
    free()
    most, fits = 0.0, "out of memory"
    with suppress(torch.OutOfMemoryError):
        most, fits = measure(args.device, partial(passes, many), 1)[1], "fits"
    return [Row("batches", f"batch {size}{', recompute' * recompute}: {fits}", HALF, most, None, a + b * size, "B")]


PARTS = {part.__name__: part for part in (golden, parity, answers, token, instructblip, training, batches)}


def free() -> None:
    """Give back what the last model and the yardsticks held."""
    fastest_product.cache_clear()
    large_tensor.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def reported(what: str, faults: list[str]) -> Iterator[None]:
    """An exception becomes one line."""
    try:
        yield
    except Exception as error:
        faults.append(f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        print(faults[-1], flush=True)


def run_part(part: str, args: argparse.Namespace, late: Callable[[], bool], report: dict[str, list]) -> None:
    """Its cases, one after the other. A function of its own, so that its model is free afterwards."""
    if late():
        report["left out"].append(part)
        return
    with reported(part, report["faults"]):
        for what, run in PARTS[part](args):
            if late():
                report["left out"].append(f"{part}: {what}")
                continue
            with reported(f"{part}: {what}", report["faults"]):
                rows = run()
                print(*map(line, rows), sep="\n", flush=True)
                report["rows"] += map(asdict, rows)
                wrong = [row for row in rows if row.unit == "error" and not row.ours <= (row.limit or 0)]
                report["faults"] += [f"{part}: {row.what}, {row.dtype}: {row.ours:.1e}" for row in wrong]
            free()


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=[*PARTS])
    parser.add_argument("--device", type=usable, default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args(argv)
    args.rounds = 1 if args.quick else 3
    name = machine()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        card = torch.cuda.get_device_properties(args.device)
        name = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
        torch.set_num_threads(min(8, os.cpu_count() or 1))  # the tests work with one
    elif not args.quick:
        parser.error(f"on {args.device} there is --quick only")
    torch.manual_seed(0)
    print(f"{name}, torch {torch.__version__}", HEAD, sep="\n", flush=True)
    report: dict[str, list] = {"device": [name, torch.__version__], "rows": [], "faults": [], "left out": []}
    late = lambda: time.monotonic() - start > 60 * args.minutes
    for part in args.parts:
        run_part(part, args, late, report)
        free()
        args.out.write_text(json.dumps(report, indent=1))
    ends = [f"{kind}: {text}" for kind in ("faults", "left out") for text in report[kind]]
    print(*ends, f"{(time.monotonic() - start) / 60:.1f} minutes", sep="\n")
    return bool(report["faults"])


if __name__ == "__main__":
    sys.exit(main())
