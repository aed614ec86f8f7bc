"""Train LION: the paper's three stages, and a fourth for fine-tuning; on the built-in toy world or on your own data.

    python train.py                        # the toy LION, stages 1, 2, 3 from the stage-0 weights in the package
    python train.py --from-scratch         # the same after stage 0, which replaces the published ViT, FlanT5 and RAM
    python train.py --quick                # all four, a few steps each: does everything work here?
    python train.py --resume               # continue a stopped run; it ends with the same weights

    python train.py --stage 1 --init weights/start --data image.json --images coco --out runs/one
    python train.py --stage 2 --init weights/start --data region.jsonl --images coco --out runs/two
    python train.py --stage 3 --init runs/one runs/two --data image.json region.jsonl --images coco --out runs/lion
    python train.py --stage 4 --init runs/lion --data mine.json --images photos --steps 500 --out runs/mine
    torchrun --nproc-per-node 8 train.py --stage 2 ...    # 8 GPUs; the global batch size stays the same

The recipes are in lion_mini/training/stages.py, the fields of a record in lion_mini/data/records.py.

A run's folder gets metrics.jsonl, loss.png, samples.png and checkpoints/, and at the end the weights, for
`Lion.from_pretrained`, infer.py and `weights.py export`. --held-out FILES adds the loss on their first 64 records, and
a score: short answers are equal, boxes overlap by half. Ctrl-C and SIGTERM save a checkpoint first (not in stage 0).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported; `run` handles it again

import argparse
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm

from lion_mini import files
from lion_mini.data.mixture import MicroBatches, Mixture, Samples, collate, micro_batches
from lion_mini.data.records import Records, Source, TrainingExample
from lion_mini.distributed import distributed
from lion_mini.pipeline import TINY, Lion
from lion_mini.quantize import best_dtype
from lion_mini.toy.training import Toy, toy_jobs
from lion_mini.training.checkpoint import State, restore, save, weight_files, write_result
from lion_mini.training.report import draw_loss, draw_samples, first_examples, log_step, overview, say, trim
from lion_mini.training.stages import STAGES, Job, Stage, changed, check_flags, groups, schedule, unfreeze
from lion_mini.training.start import begin

MAX_SKIPPED = 10  # non-finite steps in a row that end a run
SIGNALS: list[int] = []  # received so far; looked at between two steps


@dataclass
class Run:
    """A stage on its way: what the loop works with."""

    job: Job
    args: argparse.Namespace
    rank: int
    world: int
    lion: Lion
    model: Any  # lion.model, in DistributedDataParallel if there are several ranks
    trained: dict[str, nn.Parameter]
    optimizer: AdamW
    settings: dict[str, Any]
    state: State
    accumulate: int  # micro-batches per rank and step
    stream: Iterator[tuple[int, Samples]]
    held_out: bool  # or the examples are of the training data
    examples: list[TrainingExample]  # for samples.png

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """The sums of numbers over all ranks."""
        numbers = torch.tensor([float(value) for value in values], device=self.lion.device)
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers.tolist()

    def save(self) -> None:
        save(self.job.out / "checkpoints", self.trained, self.optimizer, self.state, self.settings, self.args.keep)

    def draw(self) -> dict[str, float]:
        """Write samples.png. Returns loss and score on the held-out records, if there are any."""
        with autocast(self.lion.device, self.args.bf16):
            facts = draw_samples(self.lion, self.examples, self.job, self.settings["micro_batch"])
        self.state.loss = facts["held_out_loss"]
        return facts if self.held_out else {}


def train(run: Run) -> bool:
    """The loop of one stage. Returns False if a signal stopped it."""
    args, job, stage, state, optimizer = run.args, run.job, run.job.stage, run.state, run.optimizer
    begun, first, spent = time.monotonic(), state.step, state.seconds
    bar = tqdm(desc=f"stage {job.number}", total=stage.steps, initial=first, disable=None if run.rank == 0 else True)
    for step in range(first, stage.steps):
        # 1. Learning rate: linear warm-up, then cosine decay (Appendix A). Some parts have a constant one.
        rate = schedule(step, stage.steps, stage.lr, stage.floor, stage.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate if group["constant"] is None else group["constant"]

        # 2. Data: this rank's micro-batches. Summed over the ranks: answer tokens, unusable records, signals.
        drawn = [next(run.stream) for _ in range(run.accumulate)]
        with autocast(run.lion.device, args.bf16):  # RAM tags what has no tags
            batches = [collate(run.lion, samples) for _, samples in drawn]
        tokens = [batch.answer_tokens() for batch in batches]
        faults = [sentence for _, samples in drawn for sentence in samples.bad]
        total, bad, stop = run.sum(sum(tokens), len(faults), len(SIGNALS))
        if stop:
            return False
        state.count(stage.batch, int(bad), faults)

        # 3. Gradients. Each rank accumulates its micro-batches; DDP averages over the ranks on the last one only.
        losses = []
        for (index, _), batch, count in zip(drawn, batches, tokens, strict=True):
            # Seed dropout by global micro-batch index, so that results do not depend on the number of ranks.
            torch.manual_seed(random.Random(f"{args.seed} {index}").getrandbits(63))
            share = run.world * count / total if stage.mean == "tokens" else 1 / run.accumulate
            with nullcontext() if batch is batches[-1] or run.world == 1 else run.model.no_sync():
                with autocast(run.lion.device, args.bf16):
                    loss = run.model(batch, stage.mean) * share
                loss.backward()
            losses.append(loss.detach())

        # 4. Update. A non-finite loss or gradient skips the step on every rank.
        norm = nn.utils.clip_grad_norm_(run.trained.values(), args.clip).item()
        mean_loss = run.sum(sum(losses))[0] / run.world
        state.step, state.seconds = step + 1, spent + time.monotonic() - begun
        if math.isfinite(mean_loss) and math.isfinite(norm):
            optimizer.step()
            state.in_a_row = 0
        else:
            culprits = [samples for (_, samples), loss in zip(drawn, losses, strict=True) if not loss.isfinite()]
            skip_step(run, mean_loss, norm, culprits)
        optimizer.zero_grad(set_to_none=True)

        # 5. Rank 0 measures, logs, draws and saves.
        if run.rank == 0:
            due = lambda every: state.step % every == 0 or state.step == stage.steps
            speed = round(stage.batch * (state.step - first) / (state.seconds - spent), 2)
            facts = {"stage": job.number, "step": state.step, "loss": mean_loss, "lr": rate, "norm": norm}
            facts |= {"tokens": int(total), "samples_per_second": speed, "bad": state.bad, "skipped": state.skipped}
            facts |= run.draw() if due(args.draw_every) else {}
            log_step(job.out / "metrics.jsonl", bar, facts)
            if due(args.draw_every):
                draw_loss(job.out / "metrics.jsonl", job.out / "loss.png")
            if due(args.save_every):
                run.save()
    bar.close()
    return True


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Products in bfloat16. Without a cache of cast weights, which would keep what --recompute frees."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def skip_step(run: Run, loss: float, norm: float, culprits: Sequence[Samples]) -> None:
    """Name this rank's samples whose loss is not finite. Ten such steps in a row stop the run."""
    state, names = run.state, [name for samples in culprits for name in samples.names]
    state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
    if names or run.rank == 0:
        say(f"step {state.step - 1} is skipped, its loss is {loss} and its gradient {norm}: {', '.join(names)}")
    if state.in_a_row == MAX_SKIPPED:
        raise ValueError(f"{MAX_SKIPPED} steps in a row were not finite: lower --lr, or look at these records")


def set_up(job: Job, args: argparse.Namespace, ranks: tuple[int, int, torch.device]) -> Run:
    """Model, optimizer and data of a stage, at the step of its newest checkpoint."""
    (rank, world, device), stage = ranks, job.stage
    # 1. The model. Every rank builds the same one from the same folders and seed, so DDP need not broadcast it.
    half = args.bf16 and device.type != "cpu"
    lion, origin = begin(stage, job.init, args.seed, torch.bfloat16 if half else torch.float32)
    lion.model.to(device).recompute(args.recompute)
    trained = unfreeze(lion.model, stage)
    optimizer = AdamW(groups(trained, stage.constant), lr=0.0, betas=(0.9, 0.999), fused=True)
    model = DistributedDataParallel(lion.model, init_sync=False) if world > 1 else lion.model

    # 2. The data.
    size = args.micro_batch or stage.batch // world
    if size < 1 or stage.batch % (size * world):
        raise ValueError(f"{world} processes cannot make a batch of {stage.batch} in micro-batches of {size}")
    mixture = Mixture(sources(stage, args), args.ratios, args.seed)
    ram_size = lion.config.ram.image_size if lion.config.ram and lion.config.tags != "none" else None
    batches = MicroBatches(mixture, size, lion.config.vit.image_size, ram_size)

    # 3. The state. Every rank reads the checkpoint before rank 0 writes.
    settings = asdict(stage) | {"stage": job.number, "seed": args.seed, "clip": args.clip, "bf16": args.bf16}
    settings |= {"data": args.data, "ratios": args.ratios, "micro_batch": size, "weight files": weight_files(job.init)}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the checkpoint
    state = restore(job.out / "checkpoints", trained, optimizer, settings, rank)
    if world > 1:
        dist.barrier()
    if rank == 0:
        say(f"stage {job.number} -> {job.out}\n{overview(lion.model, origin, stage)}")
        job.out.mkdir(parents=True, exist_ok=True)
        trim(job.out / "metrics.jsonl", state.step)
    per_step = stage.batch // size
    stream = micro_batches(batches, range(state.step * per_step + rank, stage.steps * per_step, world), args.workers)
    share, held_out = per_step // world, bool(args.held_out) or args.data == ["toy"]
    shown = first_examples(sources(stage, args, held_out), 64 if held_out else 6)
    return Run(job, args, rank, world, lion, model, trained, optimizer, settings, state, share, stream, held_out, shown)


def sources(stage: Stage, args: argparse.Namespace, held_out: bool = False) -> list[Source]:
    names = args.held_out if held_out and args.held_out else args.data
    if names == ["toy"]:
        return [Toy((task,), "test" if held_out else "train") for task in stage.tasks]
    return [Records(Path(name), args.images, stage.tasks) for name in names]


def plan(args: argparse.Namespace) -> Iterable[Job]:
    """The stages to run: one, or all of the toy's."""
    if not args.stage:
        if args.data != ["toy"] or args.init:
            raise ValueError("--data and --init are for one stage: say which with --stage")
        return toy_jobs(args)
    stage = changed(args.stage, args)
    if len(args.init) != 1 and (not args.init or len(stage.tasks) == 1 or stage.new):
        raise ValueError(f"--init takes one folder, or for stage 3 those of stages 1 and 2, but found {len(args.init)}")
    return [Job(args.stage, stage, [TINY if path == Path("tiny") else path for path in args.init], args.out)]


def finish(run: Run) -> None:
    """Rank 0 writes the result, unless the last measured loss or a weight is not finite."""
    job, state = run.job, run.state
    finite = math.isfinite(state.loss) and all(tensor.isfinite().all() for tensor in run.trained.values())
    if any(run.sum(not finite)):
        raise ValueError(f"{job.out}: no result, a loss or weight is not finite; lower --lr, with another --out")
    if run.rank == 0:
        facts = f"(seed {run.args.seed}, {job.stage.steps} steps, {state.seconds / 60:.1f} minutes)"
        write_result(job, run.lion.model, f"stage {job.number}: {shlex.join(['train.py', *run.args.command])} {facts}")
        say(f"stage {job.number} is done: {job.out}")
    if run.world > 1:
        dist.barrier()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--stage", type=int, choices=sorted(STAGES), help="one stage; default: the toy's 1, 2, 3")
    what.add_argument("--init", type=Path, nargs="+", default=[], help="folder to start from, or: tiny; stage 3: two")
    what.add_argument("--data", nargs="+", default=["toy"], help="files of records, or: toy")
    what.add_argument("--ratios", type=float, nargs="+", help="the share of each file; default: every record once")
    what.add_argument("--images", type=Path, nargs="+", default=[Path()], help="folders of the records' pictures")
    what.add_argument("--held-out", nargs="+", help="files of records to measure and draw, not to train")
    what.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the run")
    what.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    what.add_argument("--from-scratch", action="store_true", help="the toy's stage 0 first")
    what.add_argument("--quick", action="store_true", help="all of the toy's stages, a few steps each")
    how = parser.add_argument_group("how, if not as lion_mini/training/stages.py says")
    for flag, kind in (("batch", int), ("steps", int), ("lr", float), ("warmup", int)):
        how.add_argument(f"--{flag}", type=kind)
    how.add_argument("--mean", choices=("tokens", "samples"), help="what the loss averages over")
    how.add_argument("--clip", type=float, default=1.0, help="the largest norm of the gradients")
    how.add_argument("--seed", type=int, default=0)
    parts = parser.add_argument_group("ablations (refused in stage 4)")
    parts.add_argument("--no-aggregator", action="store_true", help="stages 2, 3: last tap, norm and MLP only")
    parts.add_argument("--no-adapters", action="store_true", help="stage 1, and only that: FlanT5 as it is")
    parts.add_argument("--tags", choices=("soft", "plain", "none"), help="stage 3: default soft; plain: no soft prompt")
    parts.add_argument("--no-router", action="store_true", help="stage 3: both adapters added, for both levels")
    parts.add_argument("--single-stage", action="store_true", help="stage 3 alone, all new but Q-Former; steps of all")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument("--micro-batch", type=int, help="samples at a time and rank; the batch size stays the same")
    machine.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead")
    machine.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; default: if fast")
    machine.add_argument("--recompute", action="store_true", help="gradient checkpointing: slower, in less memory")
    machine.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    machine.add_argument("--keep", type=int, default=2, help="how many checkpoints stay, at least 2")
    machine.add_argument("--draw-every", type=int, default=100, help="steps between measurements and drawings")
    return parser.parse_args(argv, argparse.Namespace(command=[*argv]))


def train_stages(args: argparse.Namespace) -> int:
    check_flags(args)
    ranks = distributed(args.device)
    args.bf16 = best_dtype(ranks[2]) == torch.bfloat16 if args.bf16 is None else args.bf16
    for job in plan(args):
        for name in (signal.SIGINT, signal.SIGTERM):  # after stage 0, which saves by itself
            signal.signal(name, on_signal)
        if not args.resume and any((job.out / name).exists() for name in ("checkpoints", "config.json")):
            raise ValueError(f"{job.out} holds a run already: --resume continues it, or choose another --out")
        if (job.out / "config.json").exists():
            if ranks[0] == 0:
                say(f"{job.out} is finished already; give it to --init to train it further")
            continue
        run = set_up(job, args, ranks)
        if not train(run):
            if run.rank == 0:
                run.save()
                say(f"stopped after {run.state.step} steps; --resume continues from {job.out / 'checkpoints'}")
            return 128 + (SIGNALS or [signal.SIGTERM])[0]
        finish(run)
    return 0


def on_signal(number: int, _: object) -> None:
    """Finish the step, save and stop. Ctrl-C comes twice under torchrun; the third one interrupts at once."""
    SIGNALS.append(number)
    if len(SIGNALS) > 2:
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    SIGNALS.clear()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = files.run(train_stages, args)
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    if dist.is_initialized() and code != 2:  # after an error the other ranks may not come, and nccl would wait for them
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
