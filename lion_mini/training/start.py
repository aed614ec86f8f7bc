"""How a stage begins: which tensors come from which folder, which are new, and how results are merged.

stage 1, 2    from the frozen parts of a converted folder; what the stage trains is new, or taken from the folder
stage 3       from the results of stages 1 and 2: Q-Former and image adapter of one, aggregator, projector and region
              adapter of the other; router and soft prompt are new
stage 3, 4    from a whole LION, whose config says that stage 3 or 4 trained it
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LionConfig
from ..files import Tensors, check_tensors, reading
from ..model.adapters import MixtureOfAdapters
from ..model.aggregator import Aggregator
from ..model.lion import LionModel, skeleton
from ..model.qformer import QFormer
from ..pipeline import Lion, read_config
from ..quantize import to_int8
from ..text.vocabularies import Vocabularies
from .stages import STAGES, Stage, part_of


def begin(
    stage: Stage, init: Sequence[Path], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Lion, dict[str, str]]:
    """A stage's model, and for each part the folder of `init` it comes from, or "new".

    Several folders are the results of one stage per task, in any order. Parts in `stage.new` are initialised even if a
    folder has them, and so are the adapters if their number changes without a merge. `dtype` is the frozen parts';
    int8 stays int8.
    """
    configs = by_task(stage, init)
    init, before = [*configs], next(iter(configs.values()))
    taps = before.taps if stage.aggregator else before.taps[:1]
    config = replace(before, **stage.model, taps=taps, made_by="")
    if len(init) > 1 and config.adapters == 1:
        config = replace(config, adapter_width=len(init) * config.adapter_width)
    text = Vocabularies.from_folder(init[0], config)

    # 1. Read the folders. What several have in common must be the same.
    sources = list(map(read_init, init))
    for folder, tensors in zip(init, sources, strict=True):
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{folder}: {broken[0]} holds NaN or infinite values")
        for name in {"vit.positions", "t5.shared.weight", "t5.lm_head.weight"} & tensors.keys():
            if name in sources[0] and not torch.equal(tensors[name], sources[0][name]):
                raise ValueError(f"{init[0]} and {folder} differ in {name}: they must share the frozen parts")
    found = merge(sources, config) if len(init) > 1 else sources[0]
    new = {*stage.new, *(("adapters", "router") if len(init) == 1 and before.adapters != config.adapters else ())}

    # 2. Keep what the model has, and initialise the rest.
    model = skeleton(config)
    to_int8(model, {name for name, tensor in found.items() if tensor.dtype == torch.int8})
    expected = model.state_dict()
    tensors = {name: tensor for name, tensor in found.items() if name in expected and part_of(name) not in new}
    origin = {}
    for name in tensors:
        part = part_of(name) or name.split(".")[0]
        where = (folder for folder, source in zip(init, sources, strict=True) if name in source)
        origin[part] = " + ".join(map(str, init)) if part == "adapters" else str(next(where))
    torch.manual_seed(seed)
    for name, tensor in fresh(config, model) if stage.model else ():  # stage 4 has the folder's model, and all of it
        if name not in tensors:
            tensors[name], origin[part_of(name) or ""] = tensor, "new"
    check_tensors(init[0], tensors, expected)

    # 3. Copy what trains (what was read is mapped from a file). Frozen norms and T5's embeddings stay in float32, so
    #    that the residual stream is float32.
    for name, tensor in tensors.items():
        precise = tensor.ndim < 2 or name == "t5.shared.weight"
        if tensor.dtype != torch.int8:
            tensors[name] = tensor.float().clone() if part_of(name) else tensor.to(torch.float32 if precise else dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return Lion(model, text), origin


def read_init(folder: Path) -> dict[str, Tensor]:
    """Every tensor, memory-mapped. What LION trains is dequantised; the frozen parts stay int8."""
    source = Tensors(folder)
    tensors = {name: source.read(name) for name in source.where}
    with reading(folder):
        for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and part_of(name)]:
            scale = tensors.pop(name.removesuffix("weight") + "scale")
            tensors[name] = tensors[name] * scale.float().view(-1, 1)
    return tensors


def by_task(stage: Stage, init: Sequence[Path]) -> dict[Path, LionConfig]:
    """The folders in the order of the router's rows. A ValueError if what a joint stage needs was never trained."""
    configs = {folder: read_config(folder) for folder in init}
    trained = {f: STAGES[c.stage].tasks if c.stage in STAGES and c.adapters else () for f, c in configs.items()}
    known = sorted(task for folder in init for task in trained[folder])
    if len(stage.tasks) > 1 and not stage.new and known != sorted(stage.tasks):
        given = ", ".join(f"{folder} (stage {configs[folder].stage})" for folder in init)
        whole = "a whole LION (stage 3 or weights.py convert --lion makes one); stage 3 also takes a result per level"
        raise ValueError(f"{' and '.join(stage.tasks)} level cannot begin with {given}: give {whole}")
    tasks = configs[init[0]].tasks
    return dict(sorted(configs.items(), key=lambda item: [task in trained[item[0]] for task in tasks], reverse=True))


def fresh(config: LionConfig, model: LionModel) -> Iterator[tuple[str, Tensor]]:
    """Newly initialised tensors of all that LION trains; the model may be on the meta device."""
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


def merge(sources: Sequence[Mapping[str, Tensor]], config: LionConfig) -> dict[str, Tensor]:
    """The results of single-task stages, in the order of the router's rows, as the beginning of a joint stage.

    With a router adapter k is that of task k. Without one (`adapters=1`) the adapters are added for every task. Their
    sum is one adapter of their widths together: W_up side by side, W_down above each other, scales multiplied in.
    """
    merged: dict[str, Tensor] = {}
    for k, source in reversed(list(enumerate(sources))):  # the first, region level, overwrites the others
        for name, tensor in source.items():
            merged[name.replace(".adapters.adapters.0.", f".adapters.adapters.{k}.")] = tensor
    if config.adapters > 1:
        return merged
    names = ("down.weight", "down.bias", "up.weight", "up.bias", "scale")
    for stem in (name.removesuffix("scale") for name in sources[0] if name.endswith(".adapters.0.scale")):
        down, down_bias, up, up_bias, scale = ([source[stem + name] for source in sources] for name in names)
        merged[stem + "down.weight"], merged[stem + "down.bias"] = torch.cat(down), torch.cat(down_bias)
        merged[stem + "up.weight"] = torch.cat([part * s for part, s in zip(up, scale, strict=True)], dim=1)
        merged[stem + "up.bias"] = torch.stack([part * s for part, s in zip(up_bias, scale, strict=True)]).sum(0)
        merged[stem + "scale"] = torch.ones_like(scale[0])
    return merged
