"""What a person sees of a run: an overview, a line per step, loss.png and samples.png."""

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..box import Box
from ..data.records import Source, TrainingExample
from ..evaluation.metrics import grounding, normalise_answer
from ..files import atomic_write, read_text, reading
from ..images import draw_boxes, draw_sheet, lion_transform
from ..model.generate import GENERATION
from ..model.lion import LionModel
from ..pipeline import Lion
from .stages import Job, Stage, part_of

HELD_OUT = {"held_out_loss": "held out", "held_out_score": "score"}  # in metrics.jsonl and in the bar


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def overview(model: LionModel, origin: Mapping[str, str], stage: Stage) -> str:
    """Which parts train, where each comes from, and the memory of weights, gradients and AdamW's moments."""
    sizes = dict.fromkeys(origin, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name) or name.split(".")[0]] += parameter.numel()
    trained = sum(size for part, size in sizes.items() if part in stage.trains)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = f"{(stored + 12 * trained) / 2**20:,.0f} MB before the first batch"
    state = lambda part: "trains" if part in stage.trains else "frozen"
    rows = [f"  {part:<12} {state(part)} {size:>14,}   {origin[part]}" for part, size in sizes.items()]
    rows += [f"  {trained:,} of {sum(sizes.values()):,} parameters train: {memory}"]
    rows += [f"  {stage.steps} steps of {stage.batch} samples, {' and '.join(stage.tasks)} level"]
    return "\n".join(rows)


def trim(metrics: Path, step: int) -> None:
    """Delete the lines of metrics.jsonl after the step that a run resumes from."""
    lines = read_text(metrics).splitlines(keepends=True) if metrics.exists() else []
    with reading(str(metrics)):
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with atomic_write(metrics) as new:
        new.write_text("".join(kept), encoding="utf-8")


def log_step(metrics: Path, bar: tqdm, facts: Mapping[str, Any]) -> None:
    with reading(str(metrics)), open(metrics, "a", encoding="utf-8") as file:  # a full disk names the file
        file.write(json.dumps(facts) + "\n")
    text = f"loss {facts['loss']:.3f}, lr {facts['lr']:.1e}, {facts['samples_per_second']:.0f} samples/s"
    bar.set_postfix_str(text, refresh=False)
    if measured := [f"{name} {facts[key]:.3f}" for key, name in HELD_OUT.items() if key in facts]:
        bar.set_description(f"stage {facts['stage']}, {', '.join(measured)}", refresh=False)  # stays until the next
    bar.update()


def draw_loss(metrics: Path, out: Path) -> None:
    """The loss of every step so far and its running mean, blue; the loss on held-out records, orange."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    curve = lambda key: [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    losses, held_out = curve("loss"), curve("held_out_loss")
    smooth = losses[:1]
    for step, loss in losses:
        smooth.append((step, smooth[-1][1] + 0.1 * (loss - smooth[-1][1])))
    last, top = lines[-1]["step"], max((loss for _, loss in losses + held_out), default=0) or 1
    place = lambda step, loss: (50 + 730 * step / last, 370 - 350 * loss / top)
    draw = ImageDraw.Draw(picture := Image.new("RGB", (800, 400), "white"))
    for points, colour, width in ((losses, "#b8c4e8", 1), (smooth, "#274690", 3), (held_out, "#e8590c", 3)):
        draw.line([place(*point) for point in points], fill=colour, width=width)
    for x, y in (place(*point) for point in held_out):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#e8590c")
    draw.line([(50, 20), (50, 370), (780, 370)], fill="black")
    text = ", held out ".join(f"{points[-1][1]:.3f}" for points in (losses, held_out) if points)
    for corner, label in (((44, 20), f"{top:.2f}"), ((44, 370), "0"), ((780, 384), f"step {last}, loss {text}")):
        draw.text(corner, label, fill="black", anchor="rm")
    with atomic_write(out) as new:
        picture.save(new, "png")


def first_examples(sources: Sequence[Source], count: int) -> list[TrainingExample]:
    """The first `count` records, of each source in turn, without those that cannot be used."""
    places = [(source, i) for i in range(count) for source in sources if i < len(source)][:count]
    examples, faults = list[TrainingExample](), list[str]()
    for source, i in places:
        try:
            examples.append(source.read(i, random.Random(i)))
        except ValueError as error:
            faults.append(str(error))
    if not examples:
        raise ValueError(f"{len(faults)} records in a row cannot be used: {faults[-1]}")
    if faults:
        say(f"samples.png is without {len(faults)} of {len(places)} records: {faults[0]}")
    return examples


@torch.inference_mode()
def draw_samples(lion: Lion, examples: Sequence[TrainingExample], job: Job, size: int) -> dict[str, float]:
    """Loss and score on the examples, without dropout. Six are drawn with question, true answer and the model's.

    Boxes are drawn too: the question's blue, the true one green, ours red.
    """
    lion.model.eval()
    loss, weight, answers = 0.0, 0, list[str]()
    for part in (examples[i : i + size] for i in range(0, len(examples), size)):
        questions, truth, tasks = ([getattr(e, name) for e in part] for name in ("question", "answer", "task"))
        by_ram = [e.image for e in part if e.tags is None and lion.config.tags != "none"]
        found = iter(lion.scored_tags(by_ram) if by_ram else ())
        tags = [[tag for tag, _ in next(found, ())] if e.tags is None else e.tags for e in part]
        pixels = torch.stack([lion_transform(e.image, lion.config.vit.image_size) for e in part])
        batch = lion.batch(pixels, questions, tags, tasks, truth)
        share = batch.answer_tokens() if job.stage.mean == "tokens" else len(part)
        loss, weight = loss + share * lion.model(batch, job.stage.mean).item(), weight + share
        answers += map(str, lion.generate(pixels, questions, tags, tasks, GENERATION["locate"]))
    lion.model.train()
    scores = [score for e, answer in zip(examples, answers, strict=True) for score in right(answer, e.answer)]
    cells = list[tuple[Image.Image, str]]()
    for example, answer in zip(examples[:6], answers, strict=False):
        texts = (("question", example.question, "blue"), ("true", example.answer, "green"), ("model", answer, "red"))
        boxes = [(box, label, color) for label, text, color in texts if (box := Box.parse(text))]
        cells.append((draw_boxes(example.image, boxes), "\n".join(f"{label}: {text}" for label, text, _ in texts)))
    with atomic_write(job.out / "samples.png") as new:
        draw_sheet(cells).save(new, "png")
    return {"held_out_loss": loss / weight} | ({"held_out_score": fmean(scores)} if scores else {})


def right(answer: str, true: str) -> list[bool]:
    """A box: is the IoU at least 0.5? Up to three words: are they the same for VQA? Longer answers have no score."""
    if box := Box.parse(true):
        return [grounding([answer], [box]).accuracy == 1]
    words = normalise_answer(true)
    return [normalise_answer(answer) == words] if len(words.split()) <= 3 else []
