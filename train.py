"""Train LION: the paper's three stages, and a fourth for fine-tuning; on the built-in toy world or on your own data.

    python train.py                        # the toy LION, stages 1, 2, 3 from the stage-0 weights in the package
    python train.py --from-scratch         # the same with stage 0, which stands for the downloaded ViT, FlanT5 and RAM
    python train.py --quick                # all four with a few steps each: does everything work here?
    python train.py --resume               # go on where a run stopped, to the same weights as if it never had

    python train.py --stage 1 --init weights/xl --data image.json --images coco --out runs/one
    python train.py --stage 2 --init weights/xl --data region.jsonl --images coco --out runs/two
    python train.py --stage 3 --init runs/one runs/two --data image.json region.jsonl --images coco --out runs/lion
    python train.py --stage 4 --init runs/lion --data mine.json --images photos --steps 500 --out runs/mine
    torchrun --nproc-per-node 8 train.py --stage 2 ...    # the same batch, and so the same training, on 8 GPUs

The ablations of the paper: --no-aggregator, --tags plain, --tags none, --no-router, --single-stage.

A run's folder gets `metrics.jsonl`, `loss.png`, `samples.png` and `checkpoints/`; when it is done, `config.json` and
the weights, which `Lion.from_pretrained`, infer.py and `weights.py export` read. What the records of `--data` look like
stands in lion_mini/data.py. Everything is a function of --seed: the order of the data, crops, dropout.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

from lion_mini import GENERATION, Box, Lion, LionConfig
from lion_mini.config import IGNORE
from lion_mini.data import Batch, MicroBatches, Mixture, Records, Source, Toy, collate, loader
from lion_mini.images import draw_boxes, lion_transform
from lion_mini.lion import Text, check_tensors, read_shards
from weights import fresh

PARTS = {  # all that LION ever trains; whatever else the model has is frozen
    "qformer": r"qformer\..*",
    "aggregator": r"aggregator\.blocks\..*",
    "projector": r"aggregator\.(norm|proj)\..*",
    "adapters": r"t5\..*\.adapters\.adapters\..*",
    "router": r"t5\..*\.adapters\.gates\..*",
    "soft prompt": r"soft_prompt",
}


@dataclass(frozen=True)
class Stage:
    """One stage of section 3.2: what learns what, how long and how fast."""

    trains: tuple[str, ...]
    tasks: tuple[str, ...]
    batch: int
    steps: int
    lr: float
    floor: float = 0.0  # where the cosine ends
    constant: Mapping[str, float] = field(default_factory=dict)  # parts with a rate of their own, which never changes
    warmup: int = 1000
    mean: Literal["tokens", "samples"] = "tokens"
    model: Mapping[str, Any] = field(default_factory=dict)  # changes to the LionConfig


STAGES = {  # Appendix A; stage 4 as the release's config has it
    1: Stage(("qformer", "adapters"), ("image",), 64, 30_000, 1e-5,
             model={"visual_input": "image", "adapters": 1, "tags": "none"}),
    2: Stage(("aggregator", "projector", "adapters"), ("region",), 256, 60_000, 5e-4, 1e-6, {"aggregator": 1e-5},
             model={"visual_input": "region", "adapters": 1, "tags": "none"}),
    3: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5,
             model={"visual_input": "all", "adapters": 2, "tags": "soft"}),
    4: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5),
}  # fmt: skip
# Small models bear larger rates. A mean over tokens would starve the toy's two-token answers beside its captions.
TOY = {
    1: replace(STAGES[1], batch=192, steps=600, lr=1e-3, warmup=50, mean="samples"),
    2: replace(STAGES[2], batch=192, steps=1500, lr=2e-3, warmup=50, mean="samples", constant={}),
    3: replace(STAGES[3], batch=192, steps=400, lr=5e-4, warmup=50, mean="samples"),
    4: replace(STAGES[4], batch=64, steps=300, lr=2e-4, warmup=50, mean="samples"),
}
TINY = Path(__file__).parent / "lion_mini" / "assets" / "tiny"
IN_A_ROW = 10  # so many losses that are no numbers end a run
MOST_BAD = 0.05  # so do more unreadable records than this share
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


# --- schedules and groups


def rate(step: int, steps: int, peak: float, floor: float, warmup: int, start: float = 1e-8) -> float:
    """Linear from `start` to `peak` in the first `warmup` steps, then half a cosine that reaches `floor` at the end.

    Of a run too short for its warm-up, a tenth is warm-up.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return start + (peak - start) * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2


def part_of(name: str) -> str | None:
    """The part that a tensor belongs to, or None where it is frozen in every stage."""
    return next((part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)), None)


def choose(model: Lion, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """Let the stage's parts learn and nothing else; their parameters by name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.trains)
    model.train()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(trained: Mapping[str, torch.nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """AdamW's groups. Matrices decay; biases, norms and other vectors do not, nor the router's, whose rest is not 0."""
    found: dict[tuple[float | None, float], dict[str, Any]] = {}
    for name, parameter in trained.items():
        part = part_of(name)
        assert part is not None
        decay = 0.0 if parameter.ndim < 2 or part == "router" else 0.05
        constant = stage.constant.get(part)
        group = {"params": [], "names": [], "weight_decay": decay, "constant": constant}
        found.setdefault((constant, decay), group)
        found[constant, decay]["params"].append(parameter)
        found[constant, decay]["names"].append(name)
    covered = [name for group in found.values() for name in group["names"]]
    assert sorted(covered) == sorted(trained), "the groups are no partition of what trains"
    return list(found.values())


# --- the model that a stage begins with


def begin(
    stage: Stage, init: Sequence[Path], seed: int, new: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> tuple[Lion, dict[str, str]]:
    """The model, and where each part comes from: `init`'s folder, or the two of stages 1 and 2, or "new".

    Parts named in `new` are not taken even where a folder has them; one adapter does not become two except by a merge.
    """
    configs = [LionConfig.from_json((folder / "config.json").read_text(encoding="utf-8")) for folder in init]
    config = replace(configs[0], **stage.model, made_by="")
    if len(init) == 2 and config.adapters == 1:
        config = replace(config, adapter_width=2 * config.adapter_width)
    text = Text.from_folder(init[0], tagger=config.ram is not None)
    with torch.device("meta"):
        model = Lion(config, text)
    plan = model.state_dict()
    sources = [read_shards(folder, "cpu", None) for folder in init]
    if len(init) == 2:
        found = merge(sources[0], sources[1], config.adapters)
        for name in ("vit.positions", "t5.shared.weight"):
            if not torch.equal(sources[0][name], sources[1][name]):
                raise ValueError(f"{init[0]} and {init[1]} do not belong together: their {name} differ")
    else:
        found = sources[0]
        if configs[0].adapters != config.adapters:
            new = [*new, "adapters", "router"]
    torch.manual_seed(seed)
    tensors = {name: tensor for name, tensor in found.items() if name in plan and part_of(name) not in new}
    origin = {part_of(name) or name.split(".")[0]: " + ".join(map(str, init)) for name in tensors}
    for name, tensor in fresh(config, model):
        if name not in tensors:
            tensors[name] = tensor
            origin[str(part_of(name))] = "new"
    check_tensors(init[0], {k: v.shape for k, v in tensors.items()}, {k: v.shape for k, v in plan.items()})
    # What trains is copied: what was read is only mapped, and belongs to the folder it came from.
    state = {name: t.to(dtype) if part_of(name) is None else t.float().clone() for name, t in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    text.check(config)
    return model, origin


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor], adapters: int) -> dict[str, Tensor]:
    """Stage 1's and stage 2's results as the beginning of stage 3: adapter 1 is the image's, adapter 0 the region's.

    Without a router (`adapters=1`) the two are added, which is one adapter of twice the width.
    """
    merged = {name: t for name, t in second.items() if part_of(name) in ("aggregator", "projector", "adapters")}
    for name, tensor in first.items():
        if part_of(name) != "adapters":
            merged[name] = tensor
        elif adapters == 2:
            merged[name.replace(".adapters.adapters.0.", ".adapters.adapters.1.")] = tensor
        else:
            stem, kind = name.split(".adapters.adapters.0.")
            here, there = (file[name] for file in (first, second))
            scales = [file[f"{stem}.adapters.adapters.0.scale"] for file in (first, second)]
            if kind == "scale":
                merged[name] = torch.ones_like(tensor)
            elif kind == "up.bias":
                merged[name] = here * scales[0] + there * scales[1]
            elif kind == "up.weight":
                merged[name] = torch.cat((here * scales[0], there * scales[1]), dim=1)
            else:
                merged[name] = torch.cat((here, there))
    return merged


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

    def gather(self, value: Any) -> list[Any]:
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found


def losses(model: Lion, batch: Batch, mean: str, count: float) -> Tensor:
    """This micro-batch's share of the loss: `count` tokens (or samples) are in the whole batch of all processes."""
    tags: list[Any] = list(batch.tags)
    unknown = [i for i, one in enumerate(tags) if one is None]
    if unknown and model.config.tags != "none":
        for i, found in zip(unknown, model.tag_pixels(batch.pixels[unknown]), strict=True):
            tags[i] = found
    logits, labels = model.logits(batch.pixels, batch.questions, batch.answers, tags, batch.tasks)
    loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    if mean == "samples":
        loss = loss / (labels != IGNORE).sum(1, keepdim=True)
    return loss.sum() / count


class Gradients:
    """All gradients in one row of numbers, and the loss behind them: one sum over processes, one norm, no special case.

    Parameters that got none, and processes whose records were all unreadable, are zeros here.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device):
        self.flat = torch.zeros(sum(p.numel() for p in parameters) + 1, device=device)
        start = 0
        for parameter in parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clip(self, most: float) -> tuple[float, float]:
        """The loss and the norm of the gradients, which is `most` at most afterwards."""
        norm = self.flat[:-1].norm()
        loss, length = torch.stack((self.flat[-1], norm)).tolist()
        if length > most:
            self.flat[:-1] *= most / length
        return loss, length


# --- checkpoints


@dataclass
class State:
    """What a run knows of itself beside its weights: where it is in the data and in the random numbers is `step`."""

    step: int = 0
    seen: int = 0
    bad: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    trained: Mapping[str, Tensor],
    optimizer: AdamW,
    state: State,
    settings: Mapping[str, Any],
    keep: int,
) -> None:
    """A checkpoint, whole or not there at all; without room for it, those before stay and training goes on."""
    target, aside = folder / f"step-{state.step:08}", folder / f".step-{state.step:08}"
    if target.exists():
        return
    names = [name for group in optimizer.param_groups for name in group["names"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        f"{kind} {name}": optimizer.state[parameter][kind]
        for name, parameter in zip(names, parameters, strict=True)
        for kind in MOMENTS
        if parameter in optimizer.state
    }
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach() for name, tensor in trained.items()}, aside / "trained.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"state": asdict(state), "settings": settings}, indent=1))
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        say(f"no checkpoint at step {state.step}, those before it stay: {error}")
        return
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path, trained: Mapping[str, Tensor], optimizer: AdamW, settings: Mapping[str, Any]
) -> tuple[State, Path | None]:
    """The newest checkpoint that is whole, put into the model and the optimizer; a fresh State where there is none."""
    for path in sorted(folder.glob(".step-*")):
        say(f"{path.name[1:]} was still being written when the run ended: the checkpoint before it counts")
        shutil.rmtree(path)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            data = json.loads((path / "state.json").read_text(encoding="utf-8"))
            state, saved = State(**data["state"]), data["settings"]
            weights, moments = (load_file(path / f"{name}.safetensors") for name in ("trained", "optimizer"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"{path} is not whole: the checkpoint before it counts ({error})")
            continue
        for name in settings.keys() | saved.keys():
            if settings.get(name) != saved.get(name):
                raise ValueError(f"{path} was trained with {name} {saved.get(name)}, not {settings.get(name)}")
        check_tensors(path, {k: v.shape for k, v in weights.items()}, {k: v.shape for k, v in trained.items()})
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(weights[name])
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if f"step {name}" in moments:
                    found = {kind: moments[f"{kind} {name}"] for kind in MOMENTS}
                    optimizer.state[parameter] = found | {k: found[k].to(parameter.device) for k in MOMENTS[:2]}
        return state, path
    return State(), None


def write_result(out: Path, init: Path, model: Lion, made_by: str) -> None:
    """The folder that `Lion.from_pretrained` opens. Frozen parts are shared with `init`'s files where they can be."""
    names = {name for name in model.state_dict() if part_of(name) is None}
    for path in sorted(init.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            inside = set(file.keys())
        if inside == names:
            link(path, out / path.name)
            break
    else:
        found = read_shards(init, "cpu", None)
        save_file({name: found[name] for name in sorted(names)}, out / "frozen.safetensors")
    trained = {n: t.detach().contiguous() for n, t in model.state_dict().items() if n not in names}
    save_file(trained, out / "trained.safetensors")
    for name in Text.FILES:
        if (init / name).is_file():
            shutil.copyfile(init / name, out / name)
    aside = out / ".config.json"
    aside.write_text(replace(model.config, made_by=made_by).to_json())
    aside.rename(out / "config.json")


def link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# --- what a person sees


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def overview(model: Lion, trained: Mapping[str, Tensor], origin: Mapping[str, str], stage: Stage, device: str) -> str:
    """What trains and what does not, and the memory that this alone takes."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[part_of(name) or name.split(".")[0]] = (
            sizes.get(part_of(name) or name.split(".")[0], 0) + parameter.numel()
        )
    rows = []
    for part, size in sorted(sizes.items(), key=lambda row: list(PARTS).index(row[0]) if row[0] in PARTS else -1):
        how = "trains" if part in stage.trains else "frozen"
        rows.append(f"  {part:<12} {how}  {size:>13,}   {origin[part]}")
    learns = sum(parameter.numel() for parameter in trained.values())
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = (stored + 12 * learns) / 2**20  # gradient and two moments beside each weight that trains
    total = sum(sizes.values())
    rows.append(f"  {learns:,} of {total:,} parameters train; {memory:,.0f} MB on {device} before any picture")
    rows.append(
        f"  {stage.steps} steps of {stage.batch} samples ({' and '.join(stage.tasks)} level), rate {stage.lr:g}"
    )
    return "\n".join(rows)


def draw_loss(metrics: Path, out: Path, width: int = 800, height: int = 400) -> None:
    """The curve of all losses so far, each beside their running mean."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line["loss"]) for line in lines if math.isfinite(line["loss"])]
    if len(points) < 2:
        return
    last, top, left, bottom = points[-1][0], max(loss for _, loss in points), 50, height - 30
    places = [(left + (width - left - 20) * x / last, bottom - (bottom - 20) * y / (top or 1)) for x, y in points]
    smooth, mean = [], places[0][1]
    for x, y in places:
        mean += 0.1 * (y - mean)
        smooth.append((x, mean))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.line(places, fill="#b8c4e8", width=1)
    draw.line(smooth, fill="#274690", width=3)
    draw.line([(left, 20), (left, bottom), (width - 20, bottom)], fill="black")
    draw.text((left - 6, 20), f"{top:.2f}", fill="black", anchor="rm")
    draw.text((left - 6, bottom), "0", fill="black", anchor="rm")
    draw.text((width - 20, bottom + 14), f"step {last}, loss {points[-1][1]:.3f}", fill="black", anchor="rm")
    picture.save(out)


@torch.inference_mode()
def draw_samples(model: Lion, sources: Sequence[Source], out: Path, count: int = 6, side: int = 300) -> None:
    """Pictures with question, answer and what the model says; the true box in green, its own in red."""
    examples = []
    for i in range(count):
        source = sources[i % len(sources)]
        try:
            examples.append(source.read(i % len(source), random.Random(i)))
        except ValueError as error:
            say(str(error))
    if not examples:
        return
    size = model.config.vit.image_size
    batch = collate(examples, [lion_transform(example.image, size) for example in examples], [], size)
    tags = None if any(one is None for one in batch.tags) else [one or [] for one in batch.tags]
    model.eval()
    said: list[Any] = model.generate(batch.pixels, batch.questions, tags, batch.tasks, GENERATION["locate"])
    model.train()
    picture = Image.new("RGB", (3 * side, -(-len(examples) // 3) * (side + 75)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i, (example, text) in enumerate(zip(examples, said, strict=True)):
        x, y = i % 3 * side, i // 3 * (side + 75)
        found = (("true", example.answer, "green"), ("said", text, "red"))
        boxes = [(box, label, color) for label, words, color in found if (box := Box.parse(words))]
        picture.paste(draw_boxes(example.image, boxes).resize((side - 4, side - 4)), (x + 2, y + 2))
        for row, line in enumerate((example.question, f"true: {example.answer}", f"said: {text}")):
            draw.text(
                (x + 4, y + side + 22 * row), line.encode("latin-1", "replace").decode("latin-1")[:56], "black", font
            )
    picture.save(out)


# --- a stage from beginning to end


class Stop(Exception):
    """SIGTERM or Ctrl-C came; the run is saved."""


def learn(
    number: int, stage: Stage, init: Sequence[Path], new: Sequence[str], out: Path, args: argparse.Namespace, team: Team
) -> None:
    """Train one stage, or go on with it, and write its result to `out`."""
    lead = team.rank == 0
    frozen = torch.bfloat16 if args.bf16 and team.device.type == "cuda" else torch.float32
    model, origin = begin(stage, init, args.seed, new, frozen)
    model.to(team.device)
    model.t5.recompute = args.recompute
    trained = choose(model, stage)
    optimizer = AdamW(groups(trained, stage), lr=0.0, betas=(0.9, 0.999), foreach=True)
    gradients = Gradients(list(trained.values()), team.device)
    sources, held_out = sources_of(stage, args), sources_of(stage, args, held_out=True)
    size = args.micro_batch or stage.batch // team.size
    rounds, rest = divmod(stage.batch, size * team.size)
    if rest or not rounds:
        raise ValueError(
            f"a batch of {stage.batch} cannot be shared by {team.size} processes in micro-batches of {size}"
        )

    settings = json.loads(
        json.dumps(
            {
                **asdict(stage),
                "stage": number,
                "seed": args.seed,
                "bf16": args.bf16,
                "data": args.data,
                "ratios": args.ratios,
            }
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    state = State()
    if args.resume:
        state, path = restore(out / "checkpoints", trained, optimizer, settings)
        if lead:
            say(f"going on from {path}" if path else f"{out} has no checkpoint: stage {number} begins anew")
    metrics = out / "metrics.jsonl"
    if lead:
        say(f"stage {number} -> {out}\n{overview(model, trained, origin, stage, str(team.device))}")
        cut(metrics, state.step)
    team.gather(None)  # nobody writes before everybody has read

    first = state.step * rounds * team.size
    order = range(first + team.rank, stage.steps * rounds * team.size, team.size)
    stream: Iterator[Batch] = iter(
        loader(
            MicroBatches(Mixture(sources, args.ratios, args.seed), size, model.config.vit.image_size),
            order,
            args.workers,
        )
    )
    bar = tqdm(
        total=stage.steps, initial=state.step, desc=f"stage {number}", unit="step", disable=None if lead else True
    )
    begun, before, resumed = time.monotonic(), state.seconds, state.step
    while state.step < stage.steps:
        step = state.step
        for group in optimizer.param_groups:
            constant = group["constant"]
            group["lr"] = rate(step, stage.steps, stage.lr, stage.floor, stage.warmup) if constant is None else constant

        batches = [next(stream) for _ in range(rounds)]
        tokens = sum(len(model.answer_ids(answer)) for batch in batches for answer in batch.answers)
        seen, bad = (sum(len(x) for x in column) for column in zip(*((b.names, b.bad) for b in batches), strict=True))
        counts = team.total(torch.tensor([tokens, seen, bad, len(SIGNALS)], device=team.device)).tolist()
        tokens, seen, bad, stopped = counts
        for sentence in (sentence for batch in batches for sentence in batch.bad):
            say(f"left out: {sentence}")
        if stopped:
            if lead:
                save(out / "checkpoints", trained, optimizer, state, settings, args.keep)
                say(f"stopped at step {step}, saved in {out / 'checkpoints'}: --resume goes on")
            raise Stop
        state.seen, state.bad = state.seen + seen, state.bad + bad
        if state.bad > MOST_BAD * max(state.seen + state.bad, 200):
            raise ValueError(f"{state.bad} of {state.seen + state.bad} records are bad, which is too many to go on")

        gradients.flat.zero_()
        wrong: list[str] = []
        for turn, batch in enumerate(batches):
            # Dropout is a function of the micro-batch, not of which process has it or of what went before.
            number_of_it = (step * rounds + turn) * team.size + team.rank
            torch.manual_seed(random.Random(f"{args.seed} {number_of_it}").getrandbits(63))
            if not batch.names:
                continue
            with torch.autocast(team.device.type, torch.bfloat16, enabled=args.bf16):
                loss = losses(model, batch, stage.mean, tokens if stage.mean == "tokens" else seen)
            loss.backward()
            gradients.flat[-1] += loss.detach()
            if not torch.isfinite(loss):
                wrong += batch.names
        team.total(gradients.flat)
        loss_value, norm = gradients.clip(args.clip)
        if math.isfinite(loss_value) and math.isfinite(norm) and seen:
            optimizer.step()
            state.in_a_row = 0
        else:
            state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
            names = ", ".join(name for names in team.gather(wrong) for name in names)
            if lead:
                say(f"step {step} skipped, its loss is {loss_value}: {names or 'no record by itself'}")
            if state.in_a_row == IN_A_ROW:
                raise ValueError(
                    f"the loss was no number {IN_A_ROW} times in a row: lower --lr or look at these records"
                )

        state.step += 1
        state.seconds = before + time.monotonic() - begun
        if not lead:
            continue
        lr = max(group["lr"] for group in optimizer.param_groups)
        speed = stage.batch * (state.step - resumed) / (state.seconds - before)
        line = {
            "stage": number,
            "step": state.step,
            "loss": loss_value,
            "lr": lr,
            "norm": norm,
            "tokens": tokens,
            "samples_per_second": round(speed, 2),
            "bad": state.bad,
            "skipped": state.skipped,
        }
        with open(metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss_value:.3f}", lr=f"{lr:.1e}", samples_s=f"{speed:.1f}", refresh=False)
        bar.update()
        if state.step % args.save_every == 0 or state.step == stage.steps:
            save(out / "checkpoints", trained, optimizer, state, settings, args.keep)
        if state.step % args.draw_every == 0 or state.step == stage.steps:
            draw_loss(metrics, out / "loss.png")
            with torch.autocast(team.device.type, torch.bfloat16, enabled=args.bf16):
                draw_samples(model, held_out, out / "samples.png")
    bar.close()
    if lead:
        before_it = {LionConfig.from_json((f / "config.json").read_text(encoding="utf-8")).made_by: 0 for f in init}
        command = f"stage {number}: {shlex.join(['train.py', *sys.argv[1:]])}, seed {args.seed}, {state.step} steps, "
        write_result(
            out, init[0], model, "\n".join([*filter(None, before_it), command + f"{state.seconds / 60:.1f} minutes"])
        )
        say(f"stage {number} is done: {out}")
    team.gather(None)


def cut(metrics: Path, step: int) -> None:
    """Forget what was logged after the checkpoint from which the run goes on."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def sources_of(stage: Stage, args: argparse.Namespace, held_out: bool = False) -> list[Source]:
    if args.data == ["toy"]:
        return [Toy((task,), "test" if held_out else "train") for task in stage.tasks]
    paths = args.held_out if held_out and args.held_out else args.data
    return [Records(Path(path), args.images, stage.tasks) for path in paths]


SIGNALS: list[int] = []  # what has come so far; looked at between two steps


# --- the command line


def runs(args: argparse.Namespace, team: Team) -> Iterator[tuple[int, Stage, list[Path], list[str], Path]]:
    """The stages that the arguments ask for: number, recipe, folders to begin with, parts to begin anew, result."""
    toy = args.data == ["toy"]
    table = {number: ablated(stage, args) for number, stage in (TOY if toy else STAGES).items()}
    if args.stage:
        init = [TINY if str(path) == "tiny" else path for path in args.init]
        if len(init) != 1 and not (args.stage == 3 and len(init) == 2):
            raise ValueError(f"--init takes one folder, or for stage 3 those of stages 1 and 2, not {len(init)}")
        yield args.stage, overridden(table[args.stage], args), init, [], args.out
        return
    if not toy or args.init:
        raise ValueError("--data and --init are for one stage: say which with --stage")
    start = args.out / "stage0" if args.from_scratch or args.quick else TINY
    if start != TINY and not (start / "config.json").exists() and team.rank == 0:
        from lion_mini import stage0  # type: ignore[attr-defined]  # comes with the toy's weights

        stage0.run(start, args.quick, args.seed)
    team.gather(None)
    one, two, three = (args.out / f"stage{number}" for number in (1, 2, 3))
    everything = list(PARTS)  # the tiny folder in the package is trained to the end: only what is frozen is taken
    if args.single_stage:
        steps = sum(table[number].steps for number in (1, 2, 3))
        yield 3, overridden(replace(table[3], steps=steps), args), [start], everything, three
        return
    yield 1, overridden(table[1], args), [start], everything, one
    # Without the aggregator, stage 2 has the image level's eyes: it learns its adapters behind stage 1's Q-Former.
    yield 2, overridden(table[2], args), [one if args.no_aggregator else start], everything[1:], two
    yield 3, overridden(table[3], args), [one, two], [], three


def ablated(stage: Stage, args: argparse.Namespace) -> Stage:
    model = dict(stage.model)
    if args.no_aggregator and model:
        model["visual_input"] = "image"
    if model.get("tags") == "soft":
        model["tags"] = args.tags
    if args.no_router and model:
        model["adapters"] = 1
    return replace(stage, model=model)


def overridden(stage: Stage, args: argparse.Namespace) -> Stage:
    """The recipe with what the command line says otherwise."""
    given = {name: getattr(args, name) for name in ("batch", "steps", "lr", "warmup", "mean")}
    if args.quick:
        given |= {"batch": given["batch"] or 16, "steps": given["steps"] or 6}
    return replace(stage, **{name: value for name, value in given.items() if value is not None})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--stage", type=int, choices=sorted(STAGES), help="one stage; default: the toy's 1, 2, 3")
    what.add_argument(
        "--init", type=Path, nargs="+", default=[], help="folder to begin with; two for stage 3; or: tiny"
    )
    what.add_argument("--data", nargs="+", default=["toy"], help="files of records, or: toy")
    what.add_argument("--ratios", type=float, nargs="+", help="how much of each file; default: every record as often")
    what.add_argument("--images", type=Path, default=Path(), help="the folder that the records' images are in")
    what.add_argument("--held-out", nargs="+", help="files of records for samples.png")
    what.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the run")
    what.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    what.add_argument("--from-scratch", action="store_true", help="the toy's stage 0 first")
    what.add_argument("--quick", action="store_true", help="all of the toy's stages with a few steps each")
    how = parser.add_argument_group("how, if not as the stage's table says")
    for flag, kind in (("batch", int), ("steps", int), ("lr", float), ("warmup", int)):
        how.add_argument(f"--{flag}", type=kind)
    how.add_argument("--mean", choices=("tokens", "samples"), help="the loss of a batch is the mean over these")
    how.add_argument("--clip", type=float, default=1.0, help="the most that the gradients' norm may be")
    how.add_argument("--seed", type=int, default=0)
    parts = parser.add_argument_group("ablations")
    parts.add_argument("--no-aggregator", action="store_true", help="image-level visual tokens only")
    parts.add_argument("--tags", choices=("soft", "plain", "none"), default="soft", help="plain: no soft prompt")
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:  # torchrun started us
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    team = Team(device=torch.device(args.device))
    if dist.is_initialized():
        team = replace(team, rank=dist.get_rank(), size=dist.get_world_size())
    SIGNALS.clear()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, heard)
    try:
        for number, stage, init, new, out in runs(args, team):
            if (out / "config.json").exists():
                if not args.resume:
                    raise ValueError(
                        f"{out} holds a finished stage: choose another --out, or --resume to go on after it"
                    )
                continue
            if (out / "checkpoints").exists() and not args.resume:
                raise ValueError(
                    f"{out} holds a run that was stopped: --resume goes on with it, or choose another --out"
                )
            learn(number, stage, init, new, out, args, team)
    except Stop:
        return 128 + SIGNALS[0] if SIGNALS else 1
    except (ValueError, OSError) as error:
        if team.rank == 0 or "records are bad" not in str(error):
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def heard(number: int, _: object) -> None:
    """Finish the step, save and go; whoever asks twice does not want to wait for that."""
    if SIGNALS:
        raise KeyboardInterrupt
    SIGNALS.append(number)


if __name__ == "__main__":
    sys.exit(main())
