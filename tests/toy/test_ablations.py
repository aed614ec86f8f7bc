"""The ablations: what they count, what they conclude, and that nothing but the flags decides the result."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT, randomise
from PIL import Image
from safetensors.torch import save_file

import train
from lion_mini import toy
from lion_mini.config import PRESETS
from lion_mini.model.lion import LionModel
from lion_mini.text.prompts import EVAL_TEMPLATES, render
from lion_mini.toy import ablations, training
from lion_mini.toy.ablations import IMAGE, REC, SPACE, WAYS, percents, report, verdict, way
from lion_mini.toy.questions import by_attributes, by_order, by_relation
from lion_mini.toy.scores import Reply
from lion_mini.training.stages import part_of

FLAGS = ["--steps", "3", "--batch", "32", "--save-every", "1", "--device", "cpu"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Arguments for a folder that holds the frozen parts of a package of random weights."""
    toy.write_vocabularies(package := tmp_path / "tiny")
    randomise(model := LionModel(config := replace(PRESETS["tiny"], stage=3, made_by="stage 0: random\nstage 1: no")))
    of = lambda part: {k: v for k, v in model.state_dict().items() if part(k)}
    save_file(of(lambda name: part_of(name) is None), package / "frozen.safetensors")
    save_file(of(part_of), package / "trained.safetensors")
    save_file(of(lambda name: part_of(name) == "qformer"), tmp_path / "qformer.safetensors")
    (package / "config.json").write_text(config.to_json())
    monkeypatch.setattr(training, "TINY", package)
    monkeypatch.setattr(training, "QFORMER", tmp_path / "qformer.safetensors")
    args = argparse.Namespace(out=tmp_path / "out", seeds=0, scenes=2, flags=FLAGS)
    ablations.main(args)
    return args


def test_killed_and_continued(start: argparse.Namespace, tmp_path: Path) -> None:
    """Killed within and between runs, the command alone or with its training; the weights are those of one go."""
    out, seed, whole = start.out, start.out / "seed0", tmp_path / "whole"
    assert json.loads((out / "stage0" / "config.json").read_text())["made_by"] == "stage 0: random"
    assert not (out / "stage0" / "trained.safetensors").exists()
    command = [sys.executable, "-m", "lion_mini.toy.ablations", "--out", str(out), "--seeds", "1", "--scenes", "2"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: the weights are compared bit by bit
    launch = lambda: subprocess.Popen([*command, *FLAGS], cwd=ROOT, env=one_thread, start_new_session=True)
    moments = {"stage1/checkpoints/step-00000002.pt": os.killpg, "stage2/metrics.jsonl": os.kill}
    for moment, kill in (moments | {"full.json": os.killpg}).items():
        process = launch()
        while not (seed / moment).exists():
            assert process.poll() is None
            time.sleep(0.01)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    assert launch().wait() == 0
    assert "1 of 1 seeds are complete" in (out / "ablations.md").read_text()
    assert Image.open(out / "ablations.png").size == (1200, 700)
    assert len(list(seed.glob("*.json"))) == len(ablations.MODELS)

    for name, starts in (("stage1", [out / "stage0"]), ("full", [whole / "stage1", seed / "stage2"])):
        words = ["--stage", 1 if name == "stage1" else 3, *FLAGS, "--init", *starts, "--out", whole / name]
        assert train.main([str(word) for word in words]) == 0
        one, two = (folder / name / "trained.safetensors" for folder in (whole, seed))
        assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match=r"stage1 was not trained by train\.py --stage 1 --steps 9 --seed 0"):
        ablations.main(argparse.Namespace(**vars(start) | {"seeds": 1, "flags": ["--steps", "9"]}))


def test_what_is_counted() -> None:
    scenes = [toy.scene(seed, "test") for seed in range(2)]  # the second one is held out
    ask_for = lambda expression: render(EVAL_TEMPLATES["rec"], expression=expression)
    record = lambda kind, question: {"kind": kind, "subkind": "", "question": question, "answer": "2"}
    replies = [Reply(scenes[0], record("counting", ""), "2"), Reply(scenes[1], record("relation", ""), "no")]
    found = percents([*replies, Reply(scenes[1], record("rec", ask_for("the leftmost circle")), "2")])
    assert [found[name] for name in ("image level", *IMAGE, SPACE, "relation")] == [50, 100, 0, 50, 0]
    assert {name for name in found if "REC" in name} == {"REC", REC[1], WAYS[1], f"{WAYS[1]}, held-out"}
    for name, made in zip(WAYS, (by_attributes, by_order, by_relation), strict=True):
        texts = [text for scene in scenes for thing in scene.things for text in made(scene.things, thing)]
        assert {way(ask_for(text)) for text in texts} == {name}


@pytest.mark.parametrize(
    ("values", "text"),
    [([1, 2, 3], "+2.0 ± 0.6, 3 seeds: holds"), ([-1, 1, 3], "+1.0 ± 1.2, 3 seeds: does not hold"),
     ([-2, -3], "-2.5 ± 0.5, 2 seeds: does not hold"), ([1], "too few seeds to say, 1")],
)  # fmt: skip
def test_a_difference_greater_than_its_error_holds(values: list[float], text: str) -> None:
    assert verdict(values) == text


def test_wrong_tags_are_those_of_another_picture(
    start: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = list[str]()
    monkeypatch.setattr(ablations, "change", lambda model, what: changes.append(what))
    monkeypatch.setattr(ablations, "ask", lambda lion, scenes: [])
    (tmp_path / "full").symlink_to(tmp_path / "tiny")
    for name, scenes in (("full", 2), ("full", 2), ("full", 3), ("full-wrong", 3)):  # the second time it is there
        ablations.measure(tmp_path, name, scenes)
    assert changes == ["none", "none", "tags of another picture"]


def test_only_paired_seeds_are_compared(tmp_path: Path) -> None:
    """Wrong tags cost 20 points without a soft prompt and 5 with it. Two of four seeds lack a model."""
    for seed, (name, score) in product(
        range(4), {"plain": 90, "plain-wrong": 70, "full": 80, "full-wrong": 75}.items()
    ):
        if (seed, name) not in {(1, "plain"), (2, "full-wrong")}:
            (folder := tmp_path / f"seed{seed}").mkdir(exist_ok=True)
            record = {"scenes": 5, "percent": {"REC, held-in": score + seed, "ground": 7}}
            (folder / f"{name}.json").write_text(json.dumps(record))
    report(argparse.Namespace(out=tmp_path, seeds=4, scenes=5))
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert "| plain | 7.0 ± 0.0 | 91.7 ± 1.5 |" in lines
    assert "- REC, held-in: +15.0 ± 0.0, 2 seeds: holds" in lines
    assert "- REC, held-out: too few seeds to say, 0" in lines
    assert "0 of 4 seeds are complete." in lines[0]
