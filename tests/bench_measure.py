"""How bench.py measures and shows: runs that take turns, rows with a limit, a table and two plots."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from bench_work import Phase
from conftest import relative
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lion_mini.quantize import pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLORS = ("#274690", "#c44536", "#3a7d44", "#7d5ba6", "#d98324", "#5b8fb9")

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table; transformers and the limit where there are any."""

    part: str
    what: str
    dtype: str
    ours: float
    theirs: float | None = None
    limit: float | None = None
    unit: str = "s"


@dataclass(frozen=True)
class Case:
    """What is timed together under one name."""

    what: str
    ours: Run
    theirs: Run | None = None
    phases: Sequence[Phase] = ()


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: dict[str, Run], rounds: int, yardsticks: Sequence[str] = ()) -> dict[str, float]:
    """The median of each, measured in turns, so that what else the machine does falls on all alike.

    A yardstick is run twice at each turn, and the second time counts: after seconds of something else the first large
    product finds neither its memory nor the processor's clock ready, and took up to 1.6 times as long."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if name in yardsticks:
                run()
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


@cache
def fastest_product(dtype: torch.dtype, quick: bool) -> tuple[Run, float]:
    """The product that this machine does at the highest rate, plain or packed, and its multiplications and additions.

    On an AMD processor the two are far apart in float32, where PyTorch gives a plain product to MKL: a limit made of
    plain ones would be beaten twofold."""
    shapes = (
        [(64, 64, 64)] if quick else [(1024, 2048, 2048), (2048, 1024, 4096), (2048, 2048, 2048), (512, 4096, 4096)]
    )
    runs: dict[str, Run] = {}
    operations: dict[str, float] = {}
    for rows, width, out in shapes:
        layer, x = nn.Sequential(nn.Linear(width, out, bias=False, dtype=dtype)), torch.randn(rows, width).to(dtype)
        for name in (f"plain {rows} {width} {out}", f"packed {rows} {width} {out}"):
            runs[name], operations[name] = partial(layer[0], x), 2.0 * rows * width * out
            pack(layer)
    with torch.inference_mode():
        times = in_turns(runs, 1 if quick else 5)
    best = max(times, key=lambda name: operations[name] / times[name])
    return runs[best], operations[best]


@cache
def much_memory(quick: bool) -> Tensor:
    """Far larger than any cache."""
    return torch.ones(2**20 if quick else 2**27)


def race(part: str, dtype: str, cases: Sequence[Case], args: argparse.Namespace, rounds: int = 99) -> list[Row]:
    """One row per case: ours, theirs, a large product and a large read take turns."""
    (product, operations), big = fastest_product(DTYPES[dtype], args.quick), much_memory(args.quick)
    runs: dict[str, Run] = {"product": product, "read": lambda: big.sum()}
    for case in cases:
        runs[f"ours {case.what}"] = case.ours
        if case.theirs is not None:
            runs[f"theirs {case.what}"] = case.theirs
    with torch.inference_mode():
        times = in_turns(runs, min(rounds, args.rounds), ("product", "read"))
    multiply, read = operations / times["product"], big.nbytes / times["read"]

    def row(case: Case) -> Row:
        limit = sum(max(work / multiply, size / read) for work, size in case.phases)
        return Row(part, case.what, dtype, times[f"ours {case.what}"], times.get(f"theirs {case.what}"), limit or None)

    return [row(case) for case in cases]


def agree(found: Tensor, expected: Tensor) -> None:
    """The same to rounding: else there is nothing to compare."""
    error = relative(found, expected)
    assert error < (1e-3 if found.dtype == torch.float32 else 0.1), f"not the same results, by {error:.1e}"


def same(run: Callable[[], Tensor], model: nn.Module) -> None:
    """Packed, as infer.py and eval.py do before a model answers on a CPU, and that it changes nothing."""
    with torch.inference_mode():
        before = run()
        pack(model)
        agree(run(), before)


# --- what a person sees


Lines = dict[str, list[tuple[float, float]]]


def draw(rows: Sequence[Row], path: Path, width: int = 420, height: int = 320) -> None:
    """Two plots side by side, both axes logarithmic: seconds per sample over the batch, and over the prompt."""
    picture = Image.new("RGB", (2 * width + 220, height), "white")
    plots: dict[str, Lines] = {"batch": {}, "prompt": {}}
    for row in rows:
        for axis, lines in plots.items():
            kind, _, value = row.what.partition(f", {axis} ")
            if row.part == "growth" and row.unit == "s" and value:
                for who, seconds in (("ours", row.ours), ("transformers", row.theirs)):
                    if seconds is not None:
                        lines.setdefault(f"{kind}, {row.dtype}, {who}", []).append((float(value), seconds))
    names = dict.fromkeys(name for lines in plots.values() for name in lines)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for i, (axis, title) in enumerate((("batch", "batch"), ("prompt", "tokens of the prompt"))):
        plot = Image.new("RGB", (width, height), "white")
        draw_plot(ImageDraw.Draw(plot), plots[axis], colors, title, width, height)
        picture.paste(plot, (i * width, 0))
    for i, (name, color) in enumerate(colors.items()):
        ImageDraw.Draw(picture).text((2 * width + 8, 30 + 16 * i), name, fill=color, anchor="lm")
    picture.save(path)


def draw_plot(
    pen: ImageDraw.ImageDraw, lines: Lines, colors: Mapping[str, str], title: str, width: int, height: int
) -> None:
    """Ticks at the values that were measured, and at the powers of ten of a second."""
    left, right, top, bottom = 58, width - 16, 24, height - 34
    places = [point for line in lines.values() for point in line]
    ticks = sorted({x for x, _ in places})
    low = math.floor(math.log10(min(y for _, y in places)))
    high = max(low + 1, math.ceil(math.log10(max(y for _, y in places))))
    across = lambda x: left + (right - left) * math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0])
    up = lambda y: bottom - (bottom - top) * (math.log10(y) - low) / (high - low)
    for x in ticks:
        pen.text((across(x), bottom + 9), f"{x:g}", fill="black", anchor="mm")
    for power in range(low, high + 1):
        pen.line([(left, up(10**power)), (right, up(10**power))], fill="#dddddd")
        pen.text((left - 4, up(10**power)), f"{10.0**power:g} s", fill="black", anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    pen.text(((left + right) / 2, bottom + 24), title, fill="black", anchor="mm")
    pen.text((left, 9), "seconds per sample", fill="black", anchor="lm")
    for name, line in lines.items():
        pen.line([(across(x), up(y)) for x, y in line], fill=colors[name], width=2)
        for x, y in line:
            pen.ellipse((across(x) - 3, up(y) - 3, across(x) + 3, up(y) + 3), fill=colors[name])


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.0f}" if unit == "samples" else f"{value:.4f} {unit}"


HEAD = f"{'':10} {'':36} {'':9} {'ours':>14} {'transformers':>14} {'/ ours':>7} {'limit':>14} {'ours /':>7}"


def line(row: Row) -> str:
    """Transformers' time over ours, and ours over the limit: the second is never below 1 but by noise."""
    faster = f"{row.theirs / row.ours:.2f}" if row.theirs and row.unit == "s" else ""
    above = f"{row.ours / row.limit:.2f}" if row.limit else ""
    return (
        f"{row.part:10} {row.what:36} {row.dtype:9} {amount(row.ours, row.unit):>14} "
        f"{amount(row.theirs, row.unit):>14} {faster:>7} {amount(row.limit, row.unit):>14} {above:>7}"
    )


def halved(rows: Sequence[Row]) -> list[Row]:
    """Beside every time in both dtypes, bfloat16 over float32."""
    whole = {(row.part, row.what): row for row in rows if row.dtype == "float32" and row.unit == "s"}
    return [
        Row(row.part, row.what, "16 / 32", row.ours / whole[row.part, row.what].ours, unit="x")
        for row in rows
        if row.dtype == "bfloat16" and (row.part, row.what) in whole
    ]
