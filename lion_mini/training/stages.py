"""Stage-wise instruction tuning (paper section 3.2, Appendix A): what learns in each stage, how fast, and from where.

    stage 1    image level     Q-Former (with its projection)               + adapter   captions, questions, dialogue
    stage 2    region level    vision aggregator, its norm and projection   + adapter   boxes
    stage 3    both            all of these, two adapters, their router, and the soft prompt before image tags
    stage 4    both            the same again, on data of one's own

Learning both levels at once makes them disturb each other; so stages 1 and 2 start side by side from the same frozen
ViT, FlanT5 and RAM, and stage 3 joins their results: stage 1's adapter becomes adapter 1, stage 2's adapter 0, and the
router begins as if they were still apart. The release published no stage but the last; its names are in weights.py.
next: checkpoint.py
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import LionConfig
from ..files import check_tensors, read_shards
from ..model.adapters import MixtureOfAdapters
from ..model.aggregator import Aggregator
from ..model.lion import Lion, Text
from ..model.qformer import QFormer

PARTS = {  # all that LION ever trains, by its tensors' names; whatever else the model has is frozen
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
    batch: int  # over all processes and micro-batches
    steps: int
    lr: float
    floor: float = 0.0  # where the cosine ends
    constant: Mapping[str, float] = field(default_factory=dict)  # parts with a rate of their own that never changes
    warmup: int = 1000
    mean: Literal["tokens", "samples"] = (
        "tokens"  # the loss of a batch is the mean over its tokens, or per sample first
    )
    model: Mapping[str, Any] = field(default_factory=dict)  # changes to the LionConfig


STAGES = {  # Appendix A; the fourth as the release's config has it
    1: Stage(("qformer", "adapters"), ("image",), 64, 30_000, 1e-5,
             model={"visual_input": "image", "adapters": 1, "tags": "none"}),
    2: Stage(("aggregator", "projector", "adapters"), ("region",), 256, 60_000, 5e-4, 1e-6, {"aggregator": 1e-5},
             model={"visual_input": "region", "adapters": 1, "tags": "none"}),
    3: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5,
             model={"visual_input": "all", "adapters": 2, "tags": "soft"}),
    4: Stage(tuple(PARTS), ("image", "region"), 64, 60_000, 1e-5),
}  # fmt: skip
# Small models bear larger rates. A mean over tokens would starve the toy's one-word answers beside its captions. The
# paper's slow aggregator matters here too: at 2e-3 like the rest of stage 2, its loss stood at 0.57 after 500 steps,
# where 1e-4 has 0.18 after 180: the language model must first learn to read what does not move. Stage 3 is the first
# to see tags: at 5e-4 it did not always learn how far to trust them.
TOY = {
    1: replace(STAGES[1], batch=96, steps=1100, lr=1e-3, warmup=50, mean="samples"),
    2: replace(STAGES[2], batch=64, steps=900, lr=3e-3, warmup=50, mean="samples", constant={"aggregator": 1e-4}),
    3: replace(STAGES[3], batch=96, steps=500, lr=2e-3, warmup=50, mean="samples", constant={"aggregator": 1e-4}),
    4: replace(STAGES[4], batch=64, steps=300, lr=2e-4, warmup=50, mean="samples"),
}
WEIGHT_DECAY = 0.05


def rate(step: int, steps: int, peak: float, floor: float, warmup: int, start: float = 1e-8) -> float:
    """The learning rate of a step: linear from `start` to `peak` in `warmup` steps, then half a cosine to `floor`.

    A warm-up longer than a tenth of the run is cut to that: 100 steps of fine-tuning should not end at 1e-6.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def part_of(name: str) -> str | None:
    """The part that a tensor belongs to, or None where it is frozen in every stage."""
    return next((part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)), None)


def choose(model: Lion, stage: Stage) -> dict[str, nn.Parameter]:
    """Let the stage's parts learn and nothing else; their parameters by name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.trains)
    model.train()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(trained: Mapping[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """AdamW's groups, by schedule and by weight decay.

    Matrices decay. Biases, norms and other vectors do not, and so neither does the router: its gates are vectors, and
    zero, to which decay pulls, would mean no adapter at all.
    """
    found: dict[tuple[float | None, float], dict[str, Any]] = {}
    for name, parameter in trained.items():
        part = part_of(name)
        assert part is not None, name
        key = stage.constant.get(part), 0.0 if parameter.ndim < 2 or part == "router" else WEIGHT_DECAY
        empty: dict[str, Any] = {"params": [], "names": [], "constant": key[0], "weight_decay": key[1]}
        group = found.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    assert sorted(name for group in found.values() for name in group["names"]) == sorted(trained)
    return list(found.values())


def begin(
    stage: Stage, init: Sequence[Path], seed: int, new: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> tuple[Lion, dict[str, str]]:
    """A stage's model, and for each part the folder of `init` it comes from, or "new".

    Two folders are stage 1's and stage 2's results. Parts in `new` start anew even if a folder has them, and adapters
    do where their number differs: only a merge makes two of one. `dtype` is for what is frozen.
    """
    configs = [read_config(folder) for folder in init]
    if len(init) == 2:
        last = configs[1].made_by.split("\n")[-1]  # without the aggregator nothing else tells them apart
        if configs[0].visual_input != "image" or configs[1].visual_input == "all" or last.startswith("stage 1: "):
            raise ValueError(f"{init[0]} and {init[1]} are not of stage 1 and stage 2: give stage 1's folder first")
    config = replace(configs[0], **stage.model, made_by="")
    if len(init) == 2 and config.adapters == 1:
        config = replace(config, adapter_width=2 * config.adapter_width)
    text = Text.from_folder(init[0], tagger=config.ram is not None)
    text.check(config)
    model = Lion.plan(config, text)
    found, *others = (read_shards(folder, "cpu", None) for folder in init)
    for folder, tensors in zip(init, (found, *others), strict=True):
        if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
            raise ValueError(f"{folder} is rounded to int8, which is for answering: convert to bfloat16 to train")
    for other in others:
        for name in ("vit.positions", "t5.shared.weight"):
            if not torch.equal(found[name], other[name]):
                raise ValueError(f"{init[0]} and {init[1]} have different {name}: they must share the frozen parts")
        found = merge(found, other, config.adapters)
    if not others and configs[0].adapters != config.adapters:
        new = [*new, "adapters", "router"]

    plan = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in found.items() if name in plan and part_of(name) not in new}
    where = {"aggregator": init[-1], "projector": init[-1], "adapters": " + ".join(map(str, init))}
    origin = {part: str(where.get(part, init[0])) for part in (part_of(name) or name.split(".")[0] for name in tensors)}
    torch.manual_seed(seed)
    for name, tensor in fresh(config, model):
        if name not in tensors:
            tensors[name], origin[part_of(name) or ""] = tensor, "new"
    if not stage.model and "new" in origin.values():
        parts = ", ".join(part for part, where in origin.items() if where == "new")
        raise ValueError(f"{init[0]} has no {parts}: fine-tuning begins with a whole LION, which stage 3 makes")
    check_tensors(init[0], {name: tensor.shape for name, tensor in tensors.items()}, plan)
    # What was read is only mapped and belongs to the file: what trains must be a copy. Of what is frozen, norms and
    # T5's words stay in float32, and with them the sums along its layers.
    for name, tensor in tensors.items():
        precise = tensor.ndim < 2 or name == "t5.shared.weight"
        tensors[name] = tensor.float().clone() if part_of(name) else tensor.to(torch.float32 if precise else dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model, origin


def read_config(folder: Path) -> LionConfig:
    try:
        return LionConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder} has no config.json: weights.py convert or a finished stage write one") from None


def fresh(config: LionConfig, model: Lion) -> Iterator[tuple[str, Tensor]]:
    """Newly initialised values of all that LION trains, for a model that may be on the meta device."""
    width = config.t5.width
    parts: dict[str, nn.Module] = {}
    if model.qformer is not None:
        parts["qformer"] = QFormer(config.qformer, config.vit.width, width)
    if model.aggregator is not None:
        parts["aggregator"] = Aggregator(config.aggregator, config.vit.width, len(config.taps), width)
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfAdapters):
            parts[name] = MixtureOfAdapters(width, config.adapter_width, config.adapters)
    for name, part in parts.items():
        for rest, tensor in part.state_dict().items():
            yield f"{name}.{rest}", tensor
    if model.soft_prompt is not None:
        yield "soft_prompt", torch.randn(width)


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor], adapters: int) -> dict[str, Tensor]:
    """Stage 1's and stage 2's results as the beginning of stage 3.

    Without a router (`adapters=1`) both adapters are simply added, for both levels. The sum of two is one of twice the
    width: W_up' W_up'' side by side, W_down' W_down'' above each other, with the scales multiplied in.
    """
    merged = {name: tensor for name, tensor in first.items() if part_of(name) != "adapters"}
    merged |= {name: tensor for name, tensor in second.items() if part_of(name) in ("aggregator", "projector")}
    for name in (name for name in first if part_of(name) == "adapters"):
        one, two = first[name], second[name]
        if adapters == 2:
            merged[name], merged[name.replace(".adapters.adapters.0.", ".adapters.adapters.1.")] = two, one
            continue
        scale = re.sub(r"(\.adapters\.adapters\.0)\..*", r"\1.scale", name)
        if name == scale:
            merged[name] = torch.ones_like(one)
        elif name.endswith(".up.weight"):
            merged[name] = torch.cat((one * first[scale], two * second[scale]), dim=1)
        elif name.endswith(".up.bias"):
            merged[name] = one * first[scale] + two * second[scale]
        else:
            merged[name] = torch.cat((one, two))
    return merged
