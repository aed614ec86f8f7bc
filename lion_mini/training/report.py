"""What a person sees of a run: an overview, a line per step, loss.png and samples.png."""

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..box import Box
from ..data.records import Source, TrainingExample
from ..images import draw_boxes, draw_sheet
from ..model.generate import GENERATION
from ..model.lion import LionModel
from ..pipeline import Lion
from .stages import Stage, part_of


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def overview(model: LionModel, origin: Mapping[str, str], stage: Stage) -> str:
    """Which parts train, where each comes from, and the memory of weights, gradients and AdamW's moments."""
    sizes = dict.fromkeys(origin, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name) or name.split(".")[0]] += parameter.numel()
    rows = [
        f"  {part:<12} {'trains' if part in stage.trains else 'frozen'} {size:>14,}   {origin[part]}"
        for part, size in sizes.items()
    ]
    trained = sum(size for part, size in sizes.items() if part in stage.trains)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = (stored + 12 * trained) / 2**20
    rows.append(f"  {trained:,} of {sum(sizes.values()):,} parameters train: {memory:,.0f} MB before the first batch")
    rows.append(f"  {stage.steps} steps of {stage.batch} samples, {' and '.join(stage.tasks)} level")
    return "\n".join(rows)


def trim(metrics: Path, step: int) -> None:
    """Delete the lines of metrics.jsonl after the step that a run resumes from."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    metrics.write_text("".join(kept), encoding="utf-8")


def log_step(metrics: Path, bar: tqdm, facts: Mapping[str, Any]) -> None:
    with open(metrics, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
    text = f"loss {facts['loss']:.3f}, lr {facts['lr']:.1e}, {facts['samples_per_second']:.0f} samples/s"
    bar.set_postfix_str(text, refresh=False)
    bar.update()


def draw_loss(metrics: Path, out: Path, width: int = 800, height: int = 400) -> None:
    """The loss of every step so far, and its running mean."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line["loss"]) for line in lines if math.isfinite(line["loss"])]
    if not points:
        return
    last, top, left, right, bottom = points[-1][0], max(loss for _, loss in points), 50, width - 20, height - 30
    places = [(left + (right - left) * x / last, bottom - (bottom - 20) * y / (top or 1)) for x, y in points]
    smooth = places[:1]
    for x, y in places:
        smooth.append((x, smooth[-1][1] + 0.1 * (y - smooth[-1][1])))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.line(places, fill="#b8c4e8", width=1)
    draw.line(smooth, fill="#274690", width=3)
    draw.line([(left, 20), (left, bottom), (right, bottom)], fill="black")
    draw.text((left - 6, 20), f"{top:.2f}", fill="black", anchor="rm")
    draw.text((left - 6, bottom), "0", fill="black", anchor="rm")
    draw.text((right, bottom + 14), f"step {last}, loss {points[-1][1]:.3f}", fill="black", anchor="rm")
    picture.save(out)


@torch.inference_mode()
def draw_samples(lion: Lion, sources: Sequence[Source], out: Path, count: int = 6) -> None:
    """Questions, true answers and the model's. Boxes are drawn: the question's blue, the true one green, ours red."""
    examples: list[TrainingExample] = []
    for i in range(count):
        source = sources[i % len(sources)]
        try:
            examples.append(source.read(i // len(sources) % len(source), random.Random(i)))
        except ValueError as error:
            say(f"not drawn: {error}")
    if not examples:
        return
    lion.model.eval()
    images, questions, tasks = ([getattr(e, name) for e in examples] for name in ("image", "question", "task"))
    tags = None if any(example.tags is None for example in examples) else [e.tags or [] for e in examples]
    answers = [answer.text for answer in lion.respond(images, questions, tasks, GENERATION["locate"], tags)]
    lion.model.train()
    cells = []
    for example, answer in zip(examples, answers, strict=True):
        texts = (("question", example.question, "blue"), ("true", example.answer, "green"), ("model", answer, "red"))
        boxes = [(box, label, color) for label, text, color in texts if (box := Box.parse(text))]
        cells.append((draw_boxes(example.image, boxes), "\n".join(f"{label}: {text}" for label, text, _ in texts)))
    draw_sheet(cells).save(out)
