"""Checkpoints of a run, and its result: folders that are whole or not there.

    checkpoints/step-00000200/    trained.safetensors  optimizer.safetensors  state.json      to go on from
    config.json, frozen.safetensors, trained.safetensors and the vocabularies                 to use

Each is written under a name that begins with a dot, brought to the disk, and renamed: whatever kills the process, under
the real name lies all of it. Where a run is in the data and in its random numbers needs no file of its own, since both
are functions of the seed and the step.
next: train.py
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ..files import check_tensors, read_shards
from ..model.lion import Lion, Text
from .stages import Stage, part_of, read_config

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW remembers of each parameter
Say = Callable[[str], None]


@dataclass
class State:
    """What a run knows of itself beside weights and moments."""

    step: int = 0
    seen: int = 0  # samples
    bad: int = 0  # records that could not be used
    skipped: int = 0  # steps whose loss was no number
    in_a_row: int = 0  # ... since the last one that was
    seconds: float = 0.0


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind} {name}": optimizer.state[parameter][kind]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind in MOMENTS
        if parameter in optimizer.state
    }


def save(
    folder: Path,
    trained: Mapping[str, Tensor],
    optimizer: Optimizer,
    state: State,
    settings: Mapping[str, Any],
    keep: int,
    say: Say,
) -> None:
    """One more checkpoint, of which the last `keep` stay. If it cannot be written, that is said and all else stays."""
    target, aside = folder / f"step-{state.step:08}", folder / f".step-{state.step:08}"
    if target.exists():
        return
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach() for name, tensor in trained.items()}, aside / "trained.safetensors")
        save_file(moments(optimizer), aside / "optimizer.safetensors")
        facts = {"state": asdict(state), "settings": settings}
        (aside / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        flush(aside)
        aside.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        say(f"no checkpoint at step {state.step}, the ones before it stay: {error}")
        return
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Bring a folder and its files to the disk."""
    for path in (*folder.glob("*.*"), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def restore(
    folder: Path,
    trained: Mapping[str, Tensor],
    optimizer: Optimizer,
    settings: Mapping[str, Any],
    lead: bool,
    say: Say,
) -> State | None:
    """Put the newest checkpoint that is whole into the parameters and the optimizer; None where there is none.

    A damaged one is renamed by the process that has the `lead`; the others, if they come to it, cannot read it either.
    One that another recipe wrote is refused: with other settings the run would not be the one that was begun.
    """
    for path in sorted(folder.glob(".step-*")):
        say(f"{path.name[1:]} was still being written when the run ended: the checkpoint before it counts")
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
            state, before = State(**facts["state"]), facts["settings"]
            weights, found = (load_file(path / f"{name}.safetensors") for name in ("trained", "optimizer"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"{path} is damaged ({error}) and is set aside: one before it counts, or the beginning")
            if lead:  # in its place a whole one shall be written
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            continue
        if unsaid := sorted(settings.keys() - before.keys()):
            say(f"{path} is of an older version and does not say its {', '.join(unsaid)}: taken to be the same")
        for name in sorted(before):
            if settings.get(name) != before[name]:
                now = f"{name} {before[name]}, not {settings.get(name)}"
                raise ValueError(f"{path} was trained with {now}: give what it was begun with, or another --out")
        shapes = {name: tensor.shape for name, tensor in trained.items()}
        check_tensors(path, {name: tensor.shape for name, tensor in weights.items()}, shapes)
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(weights[name])
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if f"step {name}" in found:
                    optimizer.state[parameter] = {
                        kind: found[f"{kind} {name}"].to(parameter.device) for kind in MOMENTS
                    }
        say(f"going on from {path}")
        return state
    return None


def fingerprint(init: Sequence[Path], model: Lion, stage: Stage) -> str:
    """Of what a run begins with, wherever it lies: who made it, and the first numbers of each frozen tensor.

    In bfloat16, as which a GPU has what a CPU keeps in float32. What trains need not be known: the checkpoint has it.
    """
    made_by = "\n".join(read_config(folder).made_by for folder in init)
    frozen = (tensor for name, tensor in model.state_dict().items() if part_of(name) not in stage.trains)
    numbers = torch.cat([tensor.flatten()[:8].bfloat16() for tensor in frozen]).view(torch.int16).numpy().tobytes()
    return f"{zlib.crc32(numbers, zlib.crc32(made_by.encode())):08x}"


def write_result(out: Path, init: Path, model: Lion, made_by: str) -> None:
    """What `Lion.from_pretrained` opens, in the dtype of the frozen parts; their file is shared with `init`."""
    frozen = {name for name in model.state_dict() if part_of(name) is None}
    source = next((path for path in init.glob("*.safetensors") if names(path) == frozen), None)
    if source is None:
        found = read_shards(init, "cpu", None)
        source = out / ".frozen.safetensors"
        save_file({name: found[name] for name in sorted(frozen)}, source)
    share(source, out / "frozen.safetensors")
    with safe_open(out / "frozen.safetensors", framework="pt") as file:
        dtype = file.get_tensor("t5.shared.weight").dtype
    learnt = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in learnt.items()}, out / "trained.safetensors")
    for name in Text.FILES:
        if (init / name).is_file():
            shutil.copyfile(init / name, out / name)
    flush(out)
    config = out / ".config.json"
    config.write_text(replace(model.config, made_by=made_by).to_json(), encoding="utf-8")
    config.rename(out / "config.json")


def names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def share(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    if source.parent == target.parent:
        source.rename(target)
        return
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def history(init: list[Path], frozen_only: bool, line: str) -> str:
    """Who made a result: what made the folders it began with, each line once, and one line more. Of a folder of which
    only the frozen parts were taken, stage 0's line counts."""
    lines = [one for folder in init for one in read_config(folder).made_by.split("\n") if one]
    lines = [one for one in lines if one.startswith("stage 0") or not frozen_only]
    return "\n".join([*dict.fromkeys(lines), line])
