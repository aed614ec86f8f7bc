"""Train LION: the paper's three stages, and a fourth for fine-tuning; on the built-in toy world or on your own data.

    python train.py                        # the toy LION, stages 1, 2, 3 from the stage-0 weights in the package
    python train.py --from-scratch         # the same after stage 0, which stands for the published ViT, FlanT5 and RAM
    python train.py --quick                # all four, a few steps each: does everything work here?
    python train.py --resume               # go on where a run was stopped, to the same weights as if it never had been

    python train.py --stage 1 --init weights/xl --data image.json --images coco --out runs/one
    python train.py --stage 2 --init weights/xl --data region.jsonl --images coco --out runs/two
    python train.py --stage 3 --init runs/one runs/two --data image.json region.jsonl --images coco --out runs/lion
    python train.py --stage 4 --init runs/lion --data mine.json --images photos --steps 500 --out runs/mine
    torchrun --nproc-per-node 8 train.py --stage 2 ...    # the same batch on 8 GPUs; with an equal --micro-batch,
                                                          # to which dropout belongs, also the same training

The recipes stand in lion_mini/stages.py, what a record of --data looks like in lion_mini/data.py. The ablations of the
paper: --no-aggregator, --tags plain, --tags none, --no-router, --single-stage.

A run's folder gets `metrics.jsonl`, `loss.png`, `samples.png` and `checkpoints/`; when it is done, also what
`Lion.from_pretrained`, infer.py and `weights.py export` read. Ctrl-C and SIGTERM save first; stage 0 alone begins anew.
Order of the data, crops and dropout are functions of --seed and the step, so a run gives the same however often it was
stopped.
"""

import argparse
import json
import math
import os
import random
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

from lion_mini import GENERATION, Box, Lion
from lion_mini.config import IGNORE
from lion_mini.data.mixture import Batch, MicroBatches, Mixture, collate, loader
from lion_mini.data.records import Records, Source
from lion_mini.images import draw_boxes, lion_transform
from lion_mini.model.lion import TINY
from lion_mini.quantize import usable
from lion_mini.toy import stage0
from lion_mini.toy.source import Toy
from lion_mini.training.checkpoint import State, fingerprint, history, restore, save, write_result
from lion_mini.training.stages import PARTS, STAGES, TOY, Stage, begin, choose, groups, part_of, rate

IN_A_ROW = 10  # so many losses that are no numbers end a run
MOST_BAD = 0.05  # so do more unusable records than this share


# --- one step


@dataclass(frozen=True)
class Team:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def total(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, names: list[str]) -> list[str]:
        found: list[Any] = [names] * self.size
        if self.size > 1:
            dist.all_gather_object(found, names)
        return [name for one in found for name in one]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def share_of_loss(model: Lion, batch: Batch, mean: str, count: float) -> Tensor:
    """What a micro-batch adds to the loss of the whole batch, which has `count` tokens (or samples) in all."""
    tags = [one or [] for one in batch.tags]
    untagged = [i for i, one in enumerate(batch.tags) if one is None]
    if untagged and model.config.tags != "none":
        for i, found in zip(untagged, model.tag_pixels(batch.pixels[untagged]), strict=True):
            tags[i] = found
    logits, labels = model.logits(batch.pixels, batch.questions, batch.answers, tags, batch.tasks)
    loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    if mean == "samples":
        loss = loss / (labels != IGNORE).sum(1, keepdim=True)
    return loss.sum() / count


def mixed_precision(device: str, enabled: bool) -> torch.autocast:
    """Products in bfloat16. A weight is used once in a pass: a cache of copies would keep what --recompute forgets."""
    return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Gradients:
    """All gradients in one row of numbers, the loss behind them: one sum over the processes, one norm, no special case.

    A parameter that got none, or a process without a usable record, is zeros here.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device):
        self.flat = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1, device=device)
        start = 0
        for parameter in parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clip(self, most: float) -> tuple[float, float]:
        """The loss, and the norm of the gradients, which is at most `most` afterwards."""
        loss, norm = torch.stack((self.flat[-1], self.flat[:-1].norm())).tolist()
        if norm > most:
            self.flat[:-1] *= most / norm
        return loss, norm


# --- what a person sees


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def overview(model: Lion, origin: Mapping[str, str], stage: Stage) -> str:
    """What trains and what does not, and the memory that this alone takes."""
    sizes = dict.fromkeys(origin, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name) or name.split(".")[0]] += parameter.numel()
    rows = [
        f"  {part:<12} {'trains' if part in stage.trains else 'frozen'} {size:>14,}   {origin[part]}"
        for part, size in sizes.items()
    ]
    learns = sum(size for part, size in sizes.items() if part in stage.trains)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = (stored + 12 * learns) / 2**20  # beside each weight that trains its gradient and two moments
    rows.append(f"  {learns:,} of {sum(sizes.values()):,} parameters train: {memory:,.0f} MB before the first picture")
    rows.append(f"  {stage.steps} steps of {stage.batch} samples, {' and '.join(stage.tasks)} level")
    return "\n".join(rows)


def draw_loss(metrics: Path, out: Path, width: int = 800, height: int = 400) -> None:
    """The loss of every step so far, and its running mean."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line["loss"]) for line in lines if math.isfinite(line["loss"])]
    if not points:
        return
    last, top, left, right, bottom = points[-1][0], max(loss for _, loss in points), 50, width - 20, height - 30
    places = [(left + (right - left) * x / last, bottom - (bottom - 20) * y / (top or 1)) for x, y in points]
    smooth = places[:1]
    for x, y in places:
        smooth.append((x, smooth[-1][1] + 0.1 * (y - smooth[-1][1])))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.line(places, fill="#b8c4e8", width=1)
    draw.line(smooth, fill="#274690", width=3)
    draw.line([(left, 20), (left, bottom), (right, bottom)], fill="black")
    draw.text((left - 6, 20), f"{top:.2f}", fill="black", anchor="rm")
    draw.text((left - 6, bottom), "0", fill="black", anchor="rm")
    draw.text((right, bottom + 14), f"step {last}, loss {points[-1][1]:.3f}", fill="black", anchor="rm")
    picture.save(out)


@torch.inference_mode()
def draw_samples(model: Lion, sources: Sequence[Source], out: Path, count: int = 6, side: int = 300) -> None:
    """Questions about pictures, the true answers and the model's; boxes are drawn: asked blue, true green, said red."""
    examples = []
    for i in range(count):
        source = sources[i % len(sources)]
        try:
            examples.append(source.read(i // len(sources) % len(source), random.Random(i)))
        except ValueError as error:
            say(f"not drawn: {error}")
    if not examples:
        return
    size = model.config.vit.image_size
    batch = collate(examples, [lion_transform(example.image, size) for example in examples], [], size)
    tags = None if any(one is None for one in batch.tags) else [one or [] for one in batch.tags]
    model.eval()
    said: list[Any] = model.generate(batch.pixels, batch.questions, tags, batch.tasks, GENERATION["locate"])
    model.train()
    picture = Image.new("RGB", (3 * side, -(-len(examples) // 3) * (side + 80)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i, (example, text) in enumerate(zip(examples, said, strict=True)):
        x, y = i % 3 * side, i // 3 * (side + 80)
        texts = (("asked", example.question, "blue"), ("true", example.answer, "green"), ("said", text, "red"))
        boxes = [(box, label, color) for label, words, color in texts if (box := Box.parse(words))]
        picture.paste(draw_boxes(example.image, boxes).resize((side - 4, side - 4)), (x + 2, y + 2))
        lines = [line for label, words, _ in texts for line in textwrap.wrap(f"{label}: {words}", 54)[:2]]
        plain = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
        draw.multiline_text((x + 4, y + side), plain, fill="black", font=font, spacing=1)
    picture.save(out)


# --- a stage


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and all is saved."""


SIGNALS: list[int] = []  # those that came; looked at between two steps


def heard(number: int, _: object) -> None:
    """Finish the step, save and go. A terminal's Ctrl-C comes twice under torchrun; who asks three times means it."""
    SIGNALS.append(number)
    if len(SIGNALS) > 2:
        raise KeyboardInterrupt


def learn(
    number: int, stage: Stage, init: list[Path], new: Sequence[str], out: Path, args: argparse.Namespace, team: Team
) -> None:
    """Train a stage from where `out`'s checkpoints are, and write its result there."""
    lead, device = team.rank == 0, team.device
    half = mixed_precision(device.type, args.bf16)
    frozen = torch.bfloat16 if args.bf16 and device.type != "cpu" else torch.float32
    model, origin = begin(stage, init, args.seed, new, frozen)
    begun = fingerprint(init, model, stage)
    model.to(device).recompute(args.recompute)
    trained = choose(model, stage)
    optimizer = AdamW(groups(trained, stage), lr=0.0, betas=(0.9, 0.999), fused=True)
    gradients = Gradients(list(trained.values()), device)
    size = args.micro_batch or stage.batch // team.size
    if size < 1 or stage.batch % (size * team.size):
        raise ValueError(f"{team.size} processes cannot make a batch of {stage.batch} in micro-batches of {size}")
    rounds = stage.batch // (size * team.size)
    mixture, held_out = Mixture(sources(stage, args), args.ratios, args.seed), sources(stage, args, held_out=True)

    settings = asdict(stage) | {"stage": number, "seed": args.seed, "clip": args.clip}
    settings |= {"bf16": args.bf16, "data": args.data, "ratios": args.ratios}
    settings |= {"micro_batch": size, "fingerprint of --init": begun}
    settings = json.loads(json.dumps(settings))  # as it will be read again
    checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
    tell = say if lead else lambda text: None
    tell(f"stage {number} -> {out}\n{overview(model, origin, stage)}")
    state = restore(checkpoints, trained, optimizer, settings, lead, tell) or State()
    if lead:
        out.mkdir(parents=True, exist_ok=True)
        trim(metrics, state.step)
    team.wait()  # nobody writes before everybody has read

    micro = MicroBatches(mixture, size, model.config.vit.image_size)
    order = range(state.step * rounds * team.size + team.rank, stage.steps * rounds * team.size, team.size)
    stream = iter(loader(micro, order, args.workers))
    bar = tqdm(
        desc=f"stage {number}", total=stage.steps, initial=state.step, unit="step", disable=None if lead else True
    )
    resumed, spent, start = state.step, state.seconds, time.monotonic()
    for step in range(state.step, stage.steps):
        for group in optimizer.param_groups:
            usual = rate(step, stage.steps, stage.lr, stage.floor, stage.warmup)
            group["lr"] = usual if group["constant"] is None else group["constant"]

        batches = [next(stream) for _ in range(rounds)]
        words = sum(len(model.answer_ids(answer)) for batch in batches for answer in batch.answers)
        usable, bad = (sum(len(getattr(batch, kind)) for batch in batches) for kind in ("names", "bad"))
        counts = team.total(torch.tensor([words, usable, bad, len(SIGNALS)], device=device))
        words, usable, bad, stop = counts.tolist()
        if stop:
            bar.close()
            if lead:
                save(checkpoints, trained, optimizer, state, settings, args.keep, say)
            tell(f"stopped after {step} steps; --resume goes on from {checkpoints}")
            raise Stopped
        for sentence in dict.fromkeys(sentence for batch in batches for sentence in batch.bad):
            say(f"left out: {sentence}")
        state.seen, state.bad = state.seen + usable, state.bad + bad
        if state.bad > MOST_BAD * max(state.seen + state.bad, 200):
            raise ValueError(f"{state.bad} of the first {state.seen + state.bad} records cannot be used: mend the data")

        gradients.flat.zero_()
        culprits: list[str] = []
        for i, batch in zip(order[(step - resumed) * rounds :], batches, strict=False):
            if not batch.names:
                continue
            # Dropout belongs to the micro-batch: not to the process that has it, nor to what was drawn before.
            torch.manual_seed(random.Random(f"{args.seed} {i}").getrandbits(63))
            with half:
                loss = share_of_loss(model, batch, stage.mean, words if stage.mean == "tokens" else usable)
            loss.backward()
            gradients.flat[-1] += loss.detach()
            if not torch.isfinite(loss):
                culprits += batch.names
        team.total(gradients.flat)
        total, norm = gradients.clip(args.clip)
        if usable and math.isfinite(total) and math.isfinite(norm):
            optimizer.step()
            state.in_a_row = 0
        else:
            state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
            culprits = team.gather(culprits)
            tell(
                f"step {step} is skipped, its loss is {total} and its gradient {norm}: {', '.join(culprits) or 'empty'}"
            )
            if state.in_a_row == IN_A_ROW:
                raise ValueError(f"{IN_A_ROW} losses in a row were no numbers: lower --lr, or look at these records")

        state.step, state.seconds = step + 1, spent + time.monotonic() - start
        last = state.step == stage.steps
        if not lead:
            continue
        speed = stage.batch * (state.step - resumed) / (state.seconds - spent)
        rates = {name: group["lr"] for group in optimizer.param_groups for name in [str(group["constant"] or "lr")]}
        line = {
            "stage": number,
            "step": state.step,
            "loss": total,
            "lr": rates.get("lr"),
            "norm": norm,
            "tokens": words,
        }
        line |= {"samples_per_second": round(speed, 2), "bad": state.bad, "skipped": state.skipped}
        with open(metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix_str(f"loss {total:.3f}, lr {line['lr']:.1e}, {speed:.0f} samples/s", refresh=False)
        bar.update()
        if last or state.step % args.save_every == 0:
            save(checkpoints, trained, optimizer, state, settings, args.keep, say)
        if last or state.step % args.draw_every == 0:
            draw_loss(metrics, out / "loss.png")
            with half:
                draw_samples(model, held_out, out / "samples.png")
    bar.close()
    if lead:
        command = shlex.join(["train.py", *args.command])
        made_by = f"stage {number}: {command} (seed {args.seed}, {stage.steps} steps, {state.seconds / 60:.1f} minutes)"
        write_result(out, init[0], model, history(init, set(new) >= set(PARTS), made_by))
        say(f"stage {number} is done: {out}")
    team.wait()


def trim(metrics: Path, step: int) -> None:
    """Forget what was logged after the checkpoint from which the run goes on."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    metrics.write_text("".join(kept), encoding="utf-8")


def sources(stage: Stage, args: argparse.Namespace, held_out: bool = False) -> list[Source]:
    if args.data == ["toy"]:
        return [Toy((task,), "test" if held_out else "train") for task in stage.tasks]
    paths = args.held_out if held_out and args.held_out else args.data
    return [Records(Path(path), args.images, stage.tasks) for path in paths]


# --- the command line


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that make no run, and flags that would change nothing: `made_by` would claim what never was."""
    for name in ("batch", "steps", "micro_batch", "save_every", "keep", "draw_every", "workers", "warmup"):
        value, least = getattr(args, name), 0 if name in ("workers", "warmup") else 1
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    for name in ("lr", "clip"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be above 0, not {getattr(args, name)}")
    for name, idle in (
        ("tags", (1, 2, 4)),
        ("no_router", (1, 2, 4)),
        ("no_aggregator", (1, 4)),
        ("from_scratch", STAGES),
        ("single_stage", STAGES),
    ):
        if args.stage in idle and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} changes nothing with --stage {args.stage}: leave it out")
    if args.held_out and args.data == ["toy"]:
        raise ValueError("--held-out is for files of records, and changes nothing with --data toy: leave it out")


def plan(args: argparse.Namespace, team: Team) -> Iterator[tuple[int, Stage, list[Path], list[str], Path]]:
    """The stages to run: number, recipe, folders to begin with, parts to begin anew all the same, folder to write."""
    toy = args.data == ["toy"]
    recipes = {number: changed(stage, args) for number, stage in (TOY if toy else STAGES).items()}
    if args.stage:
        init = [TINY if path == Path("tiny") else path for path in args.init]
        if len(init) not in ((1, 2) if args.stage == 3 else (1,)):
            raise ValueError(f"--init takes one folder, or for stage 3 those of stages 1 and 2, but found {len(init)}")
        yield args.stage, recipes[args.stage], init, [], args.out
        return
    if not toy or args.init:
        raise ValueError("--data and --init are for one stage: say which with --stage")
    start, (one, two, three) = TINY, (args.out / f"stage{number}" for number in (1, 2, 3))
    if args.from_scratch or args.quick:
        start = args.out / "stage0"
        if team.rank == 0 and not start.exists():
            aside = args.out / ".stage0"
            stage0.run(aside, args.quick, args.seed, lambda name, figures: say(f"{name}: {figures}"))
            aside.rename(start)
        team.wait()
    all_parts = list(PARTS)  # the package's folder holds a LION trained to the end: only what is frozen is wanted of it
    if args.single_stage:
        steps = args.steps or sum(recipes[number].steps for number in (1, 2, 3))
        yield 3, replace(recipes[3], steps=steps), [start], all_parts, three
        return
    yield 1, recipes[1], [start], all_parts, one
    # Without the aggregator, region level has only stage 1's Q-Former to see with, and learns adapters behind it.
    yield 2, recipes[2], [one if args.no_aggregator else start], all_parts[1 if args.no_aggregator else 0 :], two
    yield 3, recipes[3], [one, two], [], three


def changed(stage: Stage, args: argparse.Namespace) -> Stage:
    """The recipe with the ablations and with what the command line says otherwise."""
    model = dict(stage.model)
    if args.no_aggregator and model:
        model["visual_input"] = "image"
    if args.no_router and model:
        model["adapters"] = 1
    if args.tags and model.get("tags") == "soft":
        model["tags"] = args.tags
    given = {name: getattr(args, name) for name in ("batch", "steps", "lr", "warmup", "mean")}
    if args.quick:
        given |= {"batch": args.batch or 16, "steps": args.steps or 6}
    return replace(stage, model=model, **{name: value for name, value in given.items() if value is not None})


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--stage", type=int, choices=sorted(STAGES), help="one stage; default: the toy's 1, 2, 3")
    what.add_argument(
        "--init", type=Path, nargs="+", default=[], help="folder to begin with, two for stage 3; or: tiny"
    )
    what.add_argument("--data", nargs="+", default=["toy"], help="files of records, or: toy")
    what.add_argument("--ratios", type=float, nargs="+", help="how much of each file; default: each record as often")
    what.add_argument("--images", type=Path, default=Path(), help="the folder that the records' images are in")
    what.add_argument("--held-out", nargs="+", help="files of records for samples.png")
    what.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the run")
    what.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    what.add_argument("--from-scratch", action="store_true", help="the toy's stage 0 first")
    what.add_argument("--quick", action="store_true", help="all of the toy's stages, a few steps each")
    how = parser.add_argument_group("how, if not as lion_mini/stages.py says")
    for flag, kind in (("batch", int), ("steps", int), ("lr", float), ("warmup", int)):
        how.add_argument(f"--{flag}", type=kind)
    how.add_argument("--mean", choices=("tokens", "samples"), help="the loss of a batch is the mean over these")
    how.add_argument("--clip", type=float, default=1.0, help="the most that the norm of the gradients may be")
    how.add_argument("--seed", type=int, default=0)
    parts = parser.add_argument_group("ablations")
    parts.add_argument("--no-aggregator", action="store_true", help="image-level visual tokens only")
    parts.add_argument("--tags", choices=("soft", "plain", "none"), help="default: soft; plain: no soft prompt")
    parts.add_argument("--no-router", action="store_true", help="both adapters added, for both levels")
    parts.add_argument("--single-stage", action="store_true", help="everything at once, for as many steps")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument("--micro-batch", type=int, help="samples at a time and process; the batch stays what it is")
    machine.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead")
    machine.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    machine.add_argument("--recompute", action="store_true", help="gradient checkpointing: slower, in less memory")
    machine.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    machine.add_argument("--keep", type=int, default=2, help="how many checkpoints stay")
    machine.add_argument("--draw-every", type=int, default=100, help="steps between loss.png and samples.png")
    args = parser.parse_args(argv)
    args.command = [*argv]
    return args


def gathered(args: argparse.Namespace) -> Team:
    """This process alone, or those that torchrun started."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Team(device=usable(args.device))
    device = usable(args.device if args.device != "cuda" else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while one of them runs stage 0; elsewhere a process that hangs should end soon.
    patience = timedelta(days=7) if args.from_scratch or args.quick else None
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return Team(dist.get_rank(), dist.get_world_size(), device)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    SIGNALS.clear()
    usual = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        check(args)
        team = gathered(args)
        for number, stage, init, new, out in plan(args, team):
            for name in usual:  # not before: stage 0 has nothing to save
                signal.signal(name, heard)
            if not args.resume and any((out / name).exists() for name in ("checkpoints", "config.json")):
                raise ValueError(f"{out} holds a run already: --resume goes on with it, or choose another --out")
            if not (out / "config.json").exists():
                learn(number, stage, init, new, out, args, team)
            elif team.rank == 0:
                more = f"; --stage 4 --init {out} goes on from it" if number > 2 else ""
                say(f"{out} is finished already{more}")
    except Stopped:
        return 128 + (SIGNALS[0] if SIGNALS else signal.SIGTERM)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
