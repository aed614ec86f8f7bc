"""The weights in the package are small, complete, and answer as well as the toy's README says."""

import json
from pathlib import Path

import pytest

import infer
from lion_mini import Lion, toy
from lion_mini.pipeline import TINY
from lion_mini.toy import scores


def test_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 12e6
    assert "seed" in json.loads((TINY / "config.json").read_text())["made_by"]


def test_it_sees() -> None:
    """Floors below the reported scores and far above a blind guess: broken weights would not reach them."""
    model = Lion.from_pretrained("tiny")
    replies = scores.ask(model, [toy.scene(i, "test") for i in range(40)])
    rows = {row.name: row for row in scores.toy_scores(replies)}
    floors = {"REC, Acc@0.5": 0.8, "REG, exact": 0.8, "VQA, colour": 0.8, "VQA, existence": 0.9, "VQA, counting": 0.6}
    floors |= {"VQA, ground": 0.8}  # which the tags alone show
    for name, floor in (floors | {"VQA, comparison": 0.8, "VQA, relation": 0.8}).items():
        assert rows[name].score > floor > rows[name].baseline, rows[name]


def test_without_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert infer.main(["--out", str(tmp_path), "--seed", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {"scene.png", "scene-box.png"} <= {path.name for path in tmp_path.iterdir()}
    out = capsys.readouterr().out
    for word in ("tags", "caption", "ask", "locate", "describe", "What is the ground?", "true:"):
        assert word in out


def test_the_readme_shows_what_was_measured() -> None:
    """Its table equals scores.json, the result of `eval.py --scenes 1000` beside the weights."""
    measured = json.loads((TINY / "scores.json").read_text())
    readme = (Path(toy.__file__).parent / "README.md").read_text(encoding="utf-8")
    for row in measured:
        assert f"| {row['name']} | {row['score']:.1%} | {row['held_out']:.1%} | {row['baseline']:.1%} |" in readme
