"""What train.py takes from the toy world: its training examples, and the stages of a whole run."""

import argparse
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ..data.records import TrainingExample, split_tags
from ..files import atomic_write
from ..pipeline import TINY, read_config
from ..text.prompts import TASK_OF
from ..training.stages import Job, changed
from .questions import KINDS, Record, records
from .stage0 import train_stage0
from .world import Split, scene

QFORMER = TINY.with_name("stage0") / "qformer.safetensors"


class Toy:
    """Training examples: scene `index`, and a question about it. Every kind and sub-kind is equally likely."""

    augments = False  # its questions are about left and right, and about positions

    def __init__(self, tasks: Sequence[str], split: Split = "train", scenes: int = 200_000):
        self.kinds, self.split, self.scenes = [kind for kind in KINDS if TASK_OF[kind] in tasks], split, scenes

    def __len__(self) -> int:
        return self.scenes

    def read(self, index: int, rng: random.Random) -> TrainingExample:
        this, groups = scene(index, self.split), dict[str, list[Record]]()
        for record in records(this, rng, self.kinds):
            groups.setdefault(f"{record['kind']} {record['subkind']}", []).append(record)
        chosen = rng.choice(groups[rng.choice(sorted(groups))])
        name, tags = f"toy scene {index} of {self.split}", split_tags(chosen["tags"])
        return TrainingExample(this.image, chosen["question"], chosen["answer"], tags, TASK_OF[chosen["kind"]], name)


def toy_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What train.py does without --stage: stage 0 or what the package has of it (on rank 0), then stages 1 to 3 or
    their ablations."""
    start, one, two, three = (args.out / f"stage{number}" for number in range(4))
    if not start.exists() and not (dist.is_initialized() and dist.get_rank()):
        if args.from_scratch or args.quick:
            train_stage0(start, args.quick, args.seed)
        else:
            copy_stage0(start)
    if dist.is_initialized():
        dist.barrier()
    if args.single_stage:
        yield Job(3, changed(3, args), [start], three)
        return
    for number, out in ((1, one), (2, two)):
        yield Job(number, changed(number, args), [start], out)
        if args.no_adapters:  # stage 1 alone is the comparison with InstructBLIP
            return
    yield Job(3, changed(3, args), [one, two], three)


def copy_stage0(out: Path) -> None:
    """The package's frozen parts, and the Q-Former as stage 0 left it."""
    config = read_config(TINY)
    config = replace(config, stage=0, made_by=config.made_by.split("\n")[0])
    with atomic_write(out) as new:
        shutil.copytree(TINY, new, ignore=shutil.ignore_patterns("trained.*", "scores.*"))
        shutil.copy(QFORMER, new)
        (new / "config.json").write_text(config.to_json(), encoding="utf-8")
