"""All stages of the toy LION, one after the other: what `python train.py` without --stage runs."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch.distributed as dist

from ..files import atomic_write
from ..pipeline import TINY
from ..training.report import say
from ..training.stages import PARTS, TOY, Job, changed
from . import stage0


def toy_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Stage 0 first if asked for (rank 0 alone trains it), then stages 1, 2 and 3, or the ablations of them."""
    recipes = {number: changed(stage, args) for number, stage in TOY.items()}
    start, (one, two, three) = TINY, (args.out / f"stage{number}" for number in (1, 2, 3))
    if args.from_scratch or args.quick:
        start = args.out / "stage0"
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0 and not start.exists():
            with atomic_write(start) as new:
                stage0.run(new, args.quick, args.seed, lambda name, figures: say(f"{name}: {figures}"))
        if dist.is_initialized():
            dist.barrier()
    parts = list(PARTS)  # only the frozen parts of the package's folder are used
    if args.single_stage:
        steps = args.steps or sum(recipes[number].steps for number in (1, 2, 3))
        yield Job(3, replace(recipes[3], steps=steps), [start], three, parts)
        return
    yield Job(1, recipes[1], [start], one, parts)
    if args.no_aggregator:  # stage 2 trains its adapters behind stage 1's Q-Former
        yield Job(2, recipes[2], [one], two, parts[1:])
    else:
        yield Job(2, recipes[2], [start], two, parts)
    yield Job(3, recipes[3], [one, two], three)
