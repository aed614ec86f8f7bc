"""Checkpoints of a run, and its result. Every file is whole or not there.

    checkpoints/step-00000200.pt                                                   trained weights, optimizer, progress
    config.json, frozen.safetensors, trained.safetensors and the vocabularies      the result

A checkpoint holds no data position and no random state: both are functions of the seed and the step.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from ..files import Tensors, atomic_write, check_tensors, reading, reason, remove, sync
from ..model.lion import LionModel
from ..pipeline import read_config
from ..text.vocabularies import Vocabularies
from .report import say
from .stages import Job, part_of

MAX_BAD = 0.05  # the share of unusable records that ends a run


@dataclass
class State:
    """A run's progress, beside weights and moments."""

    step: int = 0
    seen: int = 0  # samples
    bad: int = 0  # records that could not be used
    skipped: int = 0  # steps with a non-finite loss or gradient
    in_a_row: int = 0  # ... since the last finite one
    loss: float = 0.0  # when samples.png was last drawn, on its records and without dropout
    seconds: float = 0.0

    def count(self, samples: int, bad: int, sentences: Sequence[str]) -> None:
        """Count a step's records over all ranks, and name this rank's unusable ones. A ValueError if they are many."""
        for sentence in dict.fromkeys(sentences):
            say(f"replaced: {sentence}")
        self.seen, self.bad = self.seen + samples, self.bad + bad
        if self.bad > MAX_BAD * max(self.seen + self.bad, 200):
            raise ValueError(f"{self.bad} of the first {self.seen + self.bad} records cannot be used: mend the data")


def save(
    folder: Path, trained: Mapping[str, Tensor], optimizer: Optimizer, state: State, settings: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint and keep the last `keep`, but two at least: whether the newest has diverged, the next step
    shows. If the disk is full, say so and go on. Then, and after a step that was not finite, the older ones stay."""
    try:
        with atomic_write(folder / f"step-{state.step:08}.pt") as new:
            weights = {name: tensor.detach() for name, tensor in trained.items()}
            checkpoint = {"trained": weights, "optimizer": optimizer.state_dict(), "state": asdict(state)}
            torch.save(checkpoint | {"settings": settings}, new)
    except OSError as error:
        say(f"no checkpoint at step {state.step}, the ones before it stay: {reason(error)}")
        return
    for old in () if state.in_a_row else sorted(folder.glob("step-*.pt"))[: -max(keep, 2)]:
        remove(old)


def restore(folder: Path, trained: Mapping[str, Tensor], optimizer: Optimizer, settings: dict, rank: int) -> State:
    """Load the newest whole checkpoint into parameters and optimizer; a fresh State if there is none.

    Rank 0 renames damaged checkpoints. One with other settings is refused.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            with reading(path):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                state, before = State(**checkpoint["state"]), dict(checkpoint["settings"])
                if not 0 < state.step <= before["steps"]:
                    raise ValueError(f"it says step {state.step} of {before['steps']}")
        except ValueError as error:
            if rank == 0:
                say(f"{error}: this checkpoint is damaged and renamed, the one before it is used")
                path.replace(path.with_name(f"damaged-{path.name}"))
            continue
        for name, value in before.items():
            if settings.get(name) != value:
                now = f"{name} {value}, not {settings.get(name)}"
                raise ValueError(f"{path} was trained with {now}: use the same settings, or another --out")
        check_tensors(path, checkpoint["trained"], trained)
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(checkpoint["trained"][name])
        with reading(path):
            optimizer.load_state_dict(checkpoint["optimizer"])
        if rank == 0:
            say(f"resuming from {path}")
        return state
    return State()


def weight_files(init: Sequence[Path]) -> list[str]:
    """Names, sizes and modification times of the files that a run starts from, wherever they lie."""
    paths = [path for folder in init for path in sorted(folder.glob("*.safetensors"))]
    return [f"{path.name}, {path.stat().st_size} bytes, {path.stat().st_mtime_ns}" for path in paths]


def write_result(job: Job, model: LionModel, made_by: str) -> None:
    """What `Lion.from_pretrained` opens, in the dtype of the frozen parts. Their file is a hard link if it can be."""
    out, init = job.out, job.init[0]
    frozen = {name for name in model.state_dict() if part_of(name) is None}
    stored = Tensors(init)
    dtype = stored.read("t5.shared.weight").dtype
    with atomic_write(out / "frozen.safetensors") as new:
        whole = init / "frozen.safetensors"
        with suppress(OSError):  # another disk, or one without links
            if whole.is_file() and Tensors(whole).where.keys() == frozen:
                os.link(whole, new)
        if not new.exists():
            save_file({name: stored.read(name) for name in sorted(frozen)}, new)
    trained = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    with atomic_write(out / "trained.safetensors") as new:
        save_file({name: tensor.to("cpu", dtype).contiguous() for name, tensor in trained.items()}, new)
    for name in Vocabularies.FILES:
        if (init / name).is_file():
            with atomic_write(out / name) as new:
                new.write_bytes((init / name).read_bytes())
    sync(out)
    with atomic_write(out / "config.json") as new:  # last: its presence says that the stage is finished
        config = replace(model.config, stage=job.number, made_by=history(job.init, bool(job.stage.new), made_by))
        new.write_text(config.to_json(), encoding="utf-8")


def history(init: Sequence[Path], frozen_only: bool, line: str) -> str:
    """`made_by` of a result: the lines of the folders it started from, each once, and its own. The first line of a toy
    folder tells who made its frozen parts; if nothing else of it is used, only that line counts."""
    lines = [read_config(folder).made_by.split("\n") for folder in init]
    kept = [text for one in lines for text in (one[:1] if frozen_only else one) if text]
    return "\n".join([*dict.fromkeys(kept), line])
