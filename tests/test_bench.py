"""The benchmark runs, every part of it. What it measures is no test's business."""

import json
import math
from pathlib import Path
from typing import Any

import bench
import bench_memory
import pytest
import torch
from conftest import oracle
from PIL import Image

from lion_mini.config import T5Config
from lion_mini.model.t5 import T5


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    png = tmp_path_factory.mktemp("bench") / "growth.png"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: said.append(" ".join(map(str, texts))))
        assert bench.main(["--quick", "--json", "--threads", "1", "--png", str(png)]) == 0
    return json.loads(said[-1])["rows"], png


def test_every_part_has_figures(figures: tuple[list[dict[str, Any]], Path]) -> None:
    rows, png = figures
    assert {row["part"] for row in rows} == set(bench.PARTS)
    for row in rows:
        least = -math.inf if row["what"].startswith("a token") or "rest" in row["what"] else 0
        assert math.isfinite(row["ours"]), row  # the differences of two times may be anything
        assert row["ours"] > least, row
        assert row["limit"] is None or row["limit"] > least, row
    with Image.open(png) as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or []) >= 6


def test_transformers_stands_beside_us(figures: tuple[list[dict[str, Any]], Path]) -> None:
    oracle()
    beside = {row["part"] for row in figures[0] if row["theirs"] is not None}
    assert beside == {"tokenizers", "vit", "t5", "tag", "growth"}


def test_peak_bytes_by_hand() -> None:
    """Two of three products of 4 MB are there at once; views and what was there before are free."""
    x = torch.randn(1000, 1000)
    assert bench_memory.peak_bytes(lambda: ((x @ x.T) @ x)[:10] @ x) == 8_000_000
    assert bench_memory.peak_bytes(lambda: x.mul_(2).view(-1)) == 0
    y = x.clone().requires_grad_()  # exp keeps its result until the backward pass has been there
    assert bench_memory.peak_bytes(lambda: y.exp().exp().exp()) == 12_000_000


def test_recomputing_needs_less(figures: tuple[list[dict[str, Any]], Path]) -> None:
    found = {(row["what"], row["dtype"]): row for row in figures[0] if row["part"] == "memory"}
    for (what, dtype), row in found.items():
        if "recompute" in what:
            assert row["ours"] < found[what.removesuffix(", recompute"), dtype]["ours"]


def test_recomputing_keeps_one_tensor_of_each_layer() -> None:
    """Its input: not what happens inside, and not a decoder layer's keys and values of the image."""
    n, answer, width = 50, 3, 32
    peaks = {}
    for encoder, decoder in ((2, 2), (6, 2), (2, 6)):
        shape = T5Config(width, 8, 4, 2 * width, encoder, decoder, vocab_size=40)
        t5, task = T5(shape), torch.zeros(1, dtype=torch.long)
        t5.requires_grad_(False).recompute = True
        x, labels = torch.randn(1, n, width, requires_grad=True), torch.ones(1, answer, dtype=torch.long)
        run = lambda t5=t5, x=x, labels=labels, task=task: (
            t5.predict(labels, t5.start(t5.encode(x, None, task), None, task, answer)).sum().backward()
        )
        peaks[encoder, decoder] = bench_memory.peak_bytes(run)
    assert peaks[6, 2] - peaks[2, 2] <= 4 * (4 * n * width) * 1.1
    assert peaks[2, 6] - peaks[2, 2] <= 4 * (4 * answer * width) * 1.1
