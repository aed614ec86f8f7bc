"""How bench.py measures and prints: runs that take turns, the limit of each, a table and two plots."""

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from bench_work import Phase
from conftest import relative
from PIL import Image, ImageDraw
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLORS = ("#274690", "#c44536", "#3a7d44", "#7d5ba6", "#d98324", "#5b8fb9")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")

Device = torch.device | str
Run = Callable[[], object]
Curves = Sequence[tuple[str, list[tuple[float, float]]]]  # color, points


@dataclass(frozen=True)
class Row:
    """A line of the table. Units: s, B, samples, error, or x for a ratio."""

    part: str
    what: str
    dtype: str
    ours: float
    theirs: float | None = None
    limit: float | None = None
    unit: str = "s"


@dataclass(frozen=True)
class Case:
    """Two runs of the same work. Where both return tensors, these must agree."""

    what: str
    ours: Run
    theirs: Run | None = None
    phases: Sequence[Phase] = ()


def machine() -> str:
    """The processor, its cores, and the instruction sets that decide how fast a product is."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.is_file() else ""
    name = re.search(r"model name\s*: (.+)", info)
    flags = info.split()
    sets = [f"{each} {'yes' if each in flags else 'no'}" for each in INSTRUCTIONS] if info else []
    return ", ".join([name[1] if name else platform.processor(), f"{os.cpu_count()} cores", *sets])


def wait_for_gpu() -> None:
    """Until its queue is empty, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(runs: dict[str, Run], rounds: int, yardsticks: Sequence[str] = ()) -> dict[str, float]:
    """The median seconds of each run. They take turns, so that the machine's other load falls on all alike.

    A yardstick runs twice in each turn, and the second time counts. Cold, it took up to 1.6 times as long.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if name in yardsticks:
                run()
            wait_for_gpu()
            start = time.perf_counter()
            run()
            wait_for_gpu()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@cache
def fastest_product(dtype: torch.dtype, quick: bool, device: Device = "cpu") -> tuple[Run, float]:
    """The matrix product with the highest rate among PyTorch's public ways, and its multiplications and additions.

    `linear` in float32 calls MKL, which is slow on AMD processors. A 1x1 convolution and oneDNN's tensors call oneDNN.
    """
    cpu = torch.device(device).type == "cpu"
    shapes = [(1024, 2048, 2048), (2048, 1024, 4096), (2048, 2048, 2048), (512, 4096, 4096)]
    shapes = shapes if cpu else [(8192, 8192, 8192)]
    runs: dict[str, Run] = {}
    operations: dict[str, float] = {}
    for rows, width, out in [(64, 64, 64)] if quick else shapes:
        x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, out))
        image = x.view(1, rows, 1, width).permute(0, 3, 1, 2)  # channels last
        ways: list[Run] = [partial(F.linear, x, weight)]
        if cpu:
            ways.append(partial(F.conv2d, image, weight[..., None, None]))
        if cpu and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            ways.append(partial(F.linear, x.to_mkldnn(), weight.to_mkldnn()))
        for i, way in enumerate(ways):
            name = f"{i} {rows} {width} {out}"
            runs[name], operations[name] = way, 2.0 * rows * width * out
    with torch.inference_mode():
        times = in_turns(runs, 1 if quick else 5)
    best = max(times, key=lambda name: operations[name] / times[name])
    return runs[best], operations[best]


@cache
def large_tensor(quick: bool, device: Device = "cpu") -> Tensor:
    """Far larger than any cache."""
    size = 2**27 if torch.device(device).type == "cpu" else 2**29
    return torch.ones(2**20 if quick else size, device=device)


def race(
    part: str, dtype: str, cases: Sequence[Case], args: argparse.Namespace, rounds: int = 99, device: Device = "cpu"
) -> list[Row]:
    """One row per case. Ours, theirs, a large product and a large read take turns."""
    product, operations = fastest_product(DTYPES[dtype], args.quick, device)
    large = large_tensor(args.quick, device)
    runs: dict[str, Run] = {"product": product, "read": large.sum}
    with torch.inference_mode():
        for case in cases:
            runs[f"ours {case.what}"] = case.ours
            if case.theirs is not None and peers.available():
                runs[f"theirs {case.what}"] = case.theirs
                agree(case.ours(), case.theirs(), dtype)
        times = in_turns(runs, min(rounds, args.rounds), ("product", "read"))
    multiply, read = operations / times["product"], large.nbytes / times["read"]

    def row(case: Case) -> Row:
        limit = sum(max(work / multiply, size / read) for work, size in case.phases)
        return Row(part, case.what, dtype, times[f"ours {case.what}"], times.get(f"theirs {case.what}"), limit or None)

    return [row(case) for case in cases]


def agree(ours: object, theirs: object, dtype: str) -> None:
    """Numbers agree to rounding. Token ids are equal in float32; in bfloat16 random weights have near ties."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.is_floating_point():
            error = relative(ours, theirs)
            assert error < {"float32": 1e-3, "bfloat16": 0.1}[dtype], f"the results differ by {error:.1e}"
        elif dtype == "float32":
            assert torch.equal(ours, theirs), "the tokens differ"


# --- the table and the plots


HEAD = f"{'':10} {'':36} {'':9} {'ours':>14} {'transformers':>14} {'/ ours':>7} {'limit':>14} {'ours /':>7}"


def line(row: Row) -> str:
    """A row of the table, with transformers' time over ours, and ours over the limit."""
    faster = f"{row.theirs / row.ours:.2f}" if row.theirs and row.unit == "s" else ""
    above = f"{row.ours / row.limit:.2f}" if row.limit and row.ours else ""
    ours, theirs, limit = (amount(value, row.unit) for value in (row.ours, row.theirs, row.limit))
    return f"{row.part:10} {row.what:36} {row.dtype:9} {ours:>14} {theirs:>14} {faster:>7} {limit:>14} {above:>7}"


def amount(value: float | None, unit: str) -> str:
    if value is None or (unit == "B" and not value):  # a CPU counts no bytes
        return ""
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    if unit == "error":
        return f"{value:.1e}"
    return f"{value:,.0f}" if unit == "samples" else f"{value:.4f} {unit}"


def halved(rows: Sequence[Row]) -> list[Row]:
    """bfloat16's time over float32's, for every row that has both."""
    single = {(row.part, row.what): row.ours for row in rows if row.dtype == "float32" and row.unit == "s"}
    pairs = [row for row in rows if row.dtype == "bfloat16" and (row.part, row.what) in single]
    return [Row(r.part, r.what, "16 / 32", r.ours / single[r.part, r.what], unit="x") for r in pairs]


def draw(rows: Sequence[Row], path: Path, width: int = 420, height: int = 320) -> None:
    """Two plots side by side, logarithmic: seconds per sample over the batch, and over the prompt's length."""
    picture = Image.new("RGB", (2 * width + 220, height), "white")
    pen, colors = ImageDraw.Draw(picture), dict[str, str]()
    for i, (axis, title) in enumerate((("batch", "batch"), ("prompt", "tokens of the prompt"))):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            kind, _, value = row.what.partition(f", {axis} ")
            for who, seconds in (("ours", row.ours), ("transformers", row.theirs)):
                if row.part == "growth" and row.unit == "s" and value and seconds is not None:
                    curves.setdefault(f"{kind}, {row.dtype}, {who}", []).append((float(value), seconds))
        for name in curves:
            colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
        draw_plot(pen, [(colors[name], points) for name, points in curves.items()], title, i * width, width, height)
    for i, (name, color) in enumerate(colors.items()):
        pen.text((2 * width + 8, 30 + 16 * i), name, fill=color, anchor="lm")
    picture.save(path)


def draw_plot(pen: ImageDraw.ImageDraw, curves: Curves, title: str, x0: int, width: int, height: int) -> None:
    """Ticks at the measured values, and at powers of ten seconds. `x0` is the plot's left edge."""
    left, right, top, bottom = x0 + 58, x0 + width - 16, 24, height - 34
    points = [point for _, curve in curves for point in curve]
    ticks = sorted({x for x, _ in points})
    low = math.floor(math.log10(min(y for _, y in points)))
    high = max(low + 1, math.ceil(math.log10(max(y for _, y in points))))
    across = lambda x: left + (right - left) * math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0])
    up = lambda y: bottom - (bottom - top) * (math.log10(y) - low) / (high - low)
    for x in ticks:
        pen.text((across(x), bottom + 9), f"{x:g}", fill="black", anchor="mm")
    for power in range(low, high + 1):
        pen.line([(left, up(10**power)), (right, up(10**power))], fill="#dddddd")
        pen.text((left - 4, up(10**power)), f"{10.0**power:g} s", fill="black", anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    pen.text(((left + right) / 2, bottom + 24), title, fill="black", anchor="mm")
    pen.text((x0, 9), "seconds per sample", fill="black", anchor="lm")
    for color, curve in curves:
        pen.line([(across(x), up(y)) for x, y in curve], fill=color, width=2)
        for x, y in curve:
            pen.ellipse((across(x) - 3, up(y) - 3, across(x) + 3, up(y) + 3), fill=color)
