"""Every part of the benchmark runs. Its figures are not tested."""

import json
import math
from pathlib import Path
from typing import Any

import bench
import bench_memory
import gpu_check
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
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        assert bench.main(["--quick", "--json", "--threads", "1", "--png", str(png)]) == 0
    return json.loads(printed[-1])["rows"], png


def test_every_part_has_figures(figures: tuple[list[dict[str, Any]], Path]) -> None:
    rows, png = figures
    assert {row["part"] for row in rows} == set(bench.PARTS)
    for row in rows:
        least = -math.inf if row["what"].startswith("a token") or "rest" in row["what"] else 0
        assert math.isfinite(row["ours"]), row  # a difference of two times may be negative
        assert row["ours"] > least, row
        assert row["limit"] is None or row["limit"] > least, row
    with Image.open(png) as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or []) >= 6


def test_parts_that_transformers_has(figures: tuple[list[dict[str, Any]], Path]) -> None:
    oracle()
    beside = {row["part"] for row in figures[0] if row["theirs"] is not None}
    assert beside == {"tokenizers", "vit", "t5", "tag", "growth"}


def test_peak_bytes_by_hand() -> None:
    """Two of three products of 4 MB are alive at once; views and older tensors are free."""
    x = torch.randn(1000, 1000)
    assert bench_memory.peak_bytes(lambda: ((x @ x.T) @ x)[:10] @ x) == 8_000_000
    assert bench_memory.peak_bytes(lambda: x.mul_(2).view(-1)) == 0
    y = x.clone().requires_grad_()  # exp keeps its result for the backward pass
    assert bench_memory.peak_bytes(lambda: y.exp().exp().exp()) == 12_000_000


def test_recomputing_needs_less(figures: tuple[list[dict[str, Any]], Path]) -> None:
    peaks = {(row["what"], row["dtype"]): row["ours"] for row in figures[0] if row["part"] == "memory"}
    for (what, dtype), peak in peaks.items():
        if "recompute" in what:
            assert peak < peaks[what.removesuffix(", recompute"), dtype]
        if "int8" in what:
            assert peak < peaks[what.replace(", int8", ""), dtype]


def test_recomputing_keeps_one_tensor_of_each_layer() -> None:
    """Its input; neither what is computed inside, nor a decoder layer's keys and values of the image."""
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


def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """All but the golden tests, which run by themselves."""
    out, parts = tmp_path / "gpu_check.json", [part for part in gpu_check.PARTS if part != "golden"]
    assert gpu_check.main(["--device", "cpu", "--quick", "--out", str(out), "--parts", *parts]) == 0
    report = json.loads(out.read_text())
    assert {row["part"] for row in report["rows"]} == set(parts)
    assert report["faults"] == report["left out"] == []
