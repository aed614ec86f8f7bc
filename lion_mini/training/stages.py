"""Stage-wise instruction tuning (section 3.1.2, Appendix A): what trains in each stage, and how fast.

    stage 1    image level     Q-Former (with its projection)               + adapter   captions, questions, dialogue
    stage 2    region level    vision aggregator, its norm and projection   + adapter   boxes
    stage 3    both            all of these, two adapters, their router, and the soft prompt before image tags
    stage 4    both            the same again, on data of one's own

Learning both levels at once makes them interfere. So stages 1 and 2 start independently from the same frozen ViT,
FlanT5 and RAM. Stage 3 joins their results (start.py): stage 2's adapter becomes adapter 0, stage 1's adapter 1, and
each task's gates are initially open for its own adapter only.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..model.lion import LionModel

PARTS = {  # everything that LION ever trains, by tensor name; the rest of the model is always frozen
    "qformer": r"qformer\..*",
    "aggregator": r"aggregator\.blocks\..*",
    "projector": r"aggregator\.(norm|proj)\..*",
    "adapters": r"t5\..*\.adapters\.adapters\..*",
    "router": r"t5\..*\.adapters\.gates\..*",
    "soft prompt": r"soft_prompt",
}


@dataclass(frozen=True)
class Stage:
    """The recipe of one stage."""

    trains: tuple[str, ...]
    tasks: tuple[str, ...]
    batch: int  # over all ranks and micro-batches
    steps: int
    lr: float
    floor: float = 0.0  # the end of the cosine
    constant: Mapping[str, float] = field(default_factory=dict)  # parts with a constant learning rate
    warmup: int = 1000
    mean: Literal["tokens", "samples"] = "tokens"  # the loss averages over all tokens, or within each sample first
    model: Mapping[str, Any] = field(default_factory=dict)  # changes to the LionConfig
    aggregator: bool = True  # False: without its blocks, so the last tap goes straight to the projector (Figure 6)
    new: tuple[str, ...] = ()  # parts to initialise even if a folder has them


@dataclass(frozen=True)
class Job:
    """One stage to run."""

    number: int
    stage: Stage
    init: list[Path]  # folders to start from
    out: Path


STAGES = {  # Appendix A; the fourth as the release's config has it
    1: Stage(("qformer", "adapters"), ("image",), 64, 30_000, 1e-5,
             model={"visual_input": "image", "adapters": 1, "tags": "none"}),
    2: Stage(("aggregator", "projector", "adapters"), ("region",), 256, 60_000, 5e-4, 1e-6, {"aggregator": 1e-5},
             model={"visual_input": "region", "adapters": 1, "tags": "none"}),
    3: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5,
             model={"visual_input": "all", "adapters": 2, "tags": "soft"}),
    4: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5),
}  # fmt: skip
# Small models bear larger rates. A mean over tokens would give the toy's one-word answers little weight beside its
# captions. The paper's slow aggregator and its gentle stage 3 matter here too: toy/README.md has what faster ones did.
TOY = {
    1: replace(STAGES[1], batch=96, steps=800, lr=1e-3, warmup=50, mean="samples"),
    2: replace(STAGES[2], batch=64, steps=900, lr=3e-3, warmup=50, mean="samples", constant={"aggregator": 4e-4}),
    3: replace(STAGES[3], batch=96, steps=800, lr=3e-4, warmup=50, mean="samples", constant={"aggregator": 1e-4}),
    4: replace(STAGES[4], batch=64, steps=300, lr=2e-4, warmup=50, mean="samples"),
}
LIMITS: dict[str, tuple[float, float]] = {"warmup": (0, 10**9), "workers": (0, 256), "seed": (0, 2**63 - 1)}
LIMITS |= dict.fromkeys(("steps", "save_every", "keep", "draw_every"), (1, 10**9))
LIMITS |= dict.fromkeys(("batch", "micro_batch"), (1, 10**5)) | dict.fromkeys(("lr", "clip", "ratios"), (1e-30, 1e30))


def schedule(step: int, steps: int, peak: float, floor: float = 0.0, warmup: int = 0, start: float = 1e-8) -> float:
    """The learning rate of a step: linear warm-up from `start` to `peak`, then cosine decay to `floor`.

    A warm-up longer than a tenth of the run is cut to that, or a short fine-tuning would never reach `peak`.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def part_of(name: str) -> str | None:
    """The part that a tensor belongs to; None if it is frozen in every stage."""
    return next((part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)), None)


def unfreeze(model: LionModel, stage: Stage) -> dict[str, nn.Parameter]:
    """Make the stage's parts trainable and freeze the rest. Returns the trained parameters by name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.trains)
    model.train()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(trained: Mapping[str, nn.Parameter], constant: Mapping[str, float], decay: float = 0.05) -> list[dict]:
    """AdamW's parameter groups, by constant learning rate (None: scheduled) and weight decay.

    Matrices decay; biases, norms and other vectors do not. Neither do the router's gates: decay would pull them towards
    zero, which is no adapter at all.
    """
    found: dict[tuple[float | None, float], dict[str, Any]] = {}
    for name, parameter in trained.items():
        part = part_of(name) or ""
        key = constant.get(part), 0.0 if parameter.ndim < 2 or part == "router" else decay
        group = found.setdefault(key, {"params": [], "names": [], "constant": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def changed(number: int, args: argparse.Namespace) -> Stage:
    """The recipe of a stage with the ablations and settings of the command line."""
    recipes = TOY if args.data == ["toy"] else STAGES
    stage, model, given = recipes[number], dict(recipes[number].model), dict[str, Any]()
    level = model.get("visual_input")  # None in stage 4, which no ablation changes
    if args.no_aggregator and level in ("region", "all"):
        given["aggregator"] = False
    if args.no_adapters and level == "image":
        model["adapters"] = 0
    if args.no_router and level == "all":
        model["adapters"] = 1
    if args.tags and level == "all":
        model["tags"] = args.tags
    if args.single_stage and level == "all":
        given |= {
            "new": tuple(part for part in PARTS if part != "qformer"),
            "steps": sum(recipes[i].steps for i in (1, 2, 3)),
        }
    if args.quick:
        given |= {"batch": 16, "steps": 6}
    given |= {name: v for name in ("batch", "steps", "lr", "warmup", "mean") if (v := getattr(args, name)) is not None}
    return replace(stage, model=model, **given)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse numbers that make no run, and flags that would change nothing but be recorded in `made_by`."""
    if any(re.fullmatch(r"(--[\w-]+=)?", word) for word in args.command):
        raise ValueError("an argument is empty: is a variable of the shell not set?")
    for name, (least, most) in LIMITS.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, not {value}")
    numbers = [args.stage] if args.stage else [1] if args.no_adapters else [1, 2, 3]
    for flag in ("tags", "no_adapters", "no_router", "no_aggregator", "single_stage"):
        without = argparse.Namespace(**vars(args) | {flag: None})
        if getattr(args, flag) and all(changed(i, args) == changed(i, without) for i in numbers):
            where = f"--stage {args.stage}" if args.stage else "--no-adapters, which is for stage 1"
            raise ValueError(f"--{flag.replace('_', '-')} changes nothing with {where}: leave it out")
    if args.from_scratch and args.stage:
        raise ValueError(f"--from-scratch changes nothing with --stage {args.stage}: leave it out")
