"""Contributions of parts: each change does to a model what its name says, and eval.py scores them all."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from test_eval import pope_file
from torch.testing import assert_close

import eval as script
from lion_mini import Lion, LionConfig, toy
from lion_mini.evaluation.parts import CHANGES, change, changes
from lion_mini.model.lion import Batch, LionModel
from lion_mini.toy import scores

QFORMER, QUESTION, AGGREGATOR, EMPTY, TAGS, ROUTER = CHANGES


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        ({}, ()),
        ({"visual_input": "image", "adapters": 1}, (AGGREGATOR, ROUTER)),
        ({"visual_input": "region", "adapters": 0}, (QFORMER, QUESTION, ROUTER)),
        ({"tags": "none"}, (EMPTY, TAGS)),
        ({"ram": None}, (EMPTY, TAGS)),
    ],
)
def test_only_parts_that_a_model_has(config: dict[str, Any], lacks: tuple[str, ...]) -> None:
    assert changes(replace(LionConfig(), **config)) == ["none", *(name for name in CHANGES if name not in lacks)]


@pytest.mark.parametrize("name", ["none", *CHANGES])
def test_each_change_does_what_its_name_says(golden_model: Lion, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It equals the whole model with other inputs to one part. A batch of one picture takes the one before it."""
    model: LionModel = golden_model.model
    randomise(model)
    draw, queries = torch.Generator().manual_seed(0), model.config.qformer.queries
    pictures, tagged = (torch.randn(3, 3, size, size, generator=draw) for size in (56, 64))
    question, prompt, labels = (torch.randint(5, 99, (3, length), generator=draw) for length in (5, 6, 4))
    mask = torch.tensor([[True] * 5, [True] * 5, [True] * 3 + [False] * 2])
    batch = Batch(
        *(pictures, torch.arange(3), question, mask, prompt, None),
        soft=prompt < 20, task=torch.tensor([0, 1, 0]), labels=labels,
    )  # fmt: skip

    # 1. What to expect, from the unchanged model.
    other = replace(batch, picture=torch.tensor([2, 0, 1]))
    asked = replace(batch, question=question[[2, 0, 1]], question_mask=mask[[2, 0, 1]])
    image = model.see({QFORMER: other, QUESTION: asked}.get(name, batch))[:, :queries]
    region = model.see(other if name == AGGREGATOR else batch)[:, queries:]
    visual, usual, tags = torch.cat((image, region), dim=1), model.logits(batch), model.ram(tagged)  # type: ignore
    tags = {EMPTY: torch.full_like(tags, -torch.inf), TAGS: tags[[2, 0, 1]]}.get(name, tags)
    with monkeypatch.context() as patch:
        patch.setattr(model, "see", lambda batch: visual)
        logits = model.logits(replace(batch, task=1 - batch.task) if name == ROUTER else batch)
    assert torch.allclose(logits, usual) == (name in ("none", EMPTY, TAGS))

    # 2. The changed model.
    change(model, name)
    assert_close(model.logits(batch), logits)
    single = replace(batch, pixels=pictures[:1], picture=torch.zeros(1, dtype=torch.long), question=question[:1])
    if name != QUESTION:
        assert_close(model.see(replace(single, question_mask=mask[:1])), visual[:1])
    for part in (slice(3), slice(1)):
        assert_close(model.ram(tagged[part]), tags[part])  # type: ignore


def test_no_tags_are_found(golden_model: Lion) -> None:
    image = toy.scene(0, "test").image
    assert golden_model.tag([image], threshold=0.01) != [[]]
    change(golden_model.model, EMPTY)
    assert golden_model.tag([image], threshold=0.01) == [[]]


@pytest.mark.parametrize("task", ["pope_random", "toy"])
def test_parts(
    golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    """A model that knows everything until one of its parts is changed."""
    made, out = list[str](), tmp_path / "results"
    score, low, flags = ("ground", 0, ["--no-tags"]) if task == "toy" else ("accuracy", 50, [])

    def answers(lion: Any, args: Any, batch: Any, prompts: list[str], images: Any) -> list[dict[str, Any]]:
        pairs = zip(batch, prompts, strict=True)
        return [{"id": e.id, "prompt": p, "text": e.references[0] if made[-1] == "none" else "yes"} for e, p in pairs]

    def ask(lion: Lion, scenes: Any) -> list[scores.Reply]:
        records = [(s, record) for s in scenes for record in toy.records(s, random.Random(s.seed))]
        return [scores.Reply(s, r, r["answer"] if made[-1] == "none" else "?") for s, r in records]

    for name, stub in (("change", lambda model, name: made.append(name)), ("answers", answers), ("ask", ask)):
        monkeypatch.setattr(script, name, stub)
    command = ["--scenes", 2] if task == "toy" else [task, "--ann", pope_file(tmp_path, 4)]
    folders = "--weights", golden_folder, "--images", tmp_path / "images", "--out", out
    assert script.main(list(map(str, (*command, "--parts", *flags, *folders)))) == 0
    expected = [name for name in ("none", *CHANGES) if not flags or "tags" not in name]
    assert made == expected
    rows = json.loads((out / f"{task}-parts.json").read_text())
    assert {name: row[score] for name, row in rows.items()} == {n: 100 if n == "none" else low for n in expected}
    head, _, none, *lines = capsys.readouterr().out.strip().split("\n")
    assert head.startswith("| change at answering time | ")
    assert none.startswith("| none | 100.0 |")
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in expected[1:]]
    assert all(f" {low}.0 ({low - 100}.0) " in line for line in lines)
    if task != "toy":
        files = {path.name for path in out.glob("*.jsonl")}
        assert files == {f"{task}.jsonl", *(f"{task}, {name}.jsonl" for name in expected[1:])}
