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
from typing import Any

import pytest
from conftest import ROOT, randomise
from PIL import Image
from safetensors.torch import save_file

import train
from lion_mini import Lion, toy
from lion_mini.config import PRESETS, QFormerConfig, T5Config, VitConfig
from lion_mini.model.lion import LionModel
from lion_mini.pipeline import Answer
from lion_mini.text.prompts import EVAL_TEMPLATES, render
from lion_mini.toy import ablations
from lion_mini.toy.ablations import SPACE, WAYS, percents, report, verdict, way
from lion_mini.toy.questions import by_attributes, by_order, by_relation
from lion_mini.toy.scores import Reply, ask
from lion_mini.training.stages import part_of

SIZES = replace(
    PRESETS["tiny"], taps=(2, 1, 0), adapter_width=4, made_by="stage 0: random\nstage 1: not part of the start",
    vit=VitConfig(image_size=48, patch_size=16, width=16, depth=3, heads=4, mlp_width=24),
    qformer=QFormerConfig(width=16, depth=2, heads=2, mlp_width=24, queries=3, vocab_size=512, max_positions=64),
    t5=T5Config(width=12, head_width=5, heads=2, mlp_width=20, encoder_depth=1, decoder_depth=1, vocab_size=512),
)  # fmt: skip
FLAGS = ["--steps", "3", "--batch", "4", "--save-every", "1", "--device", "cpu"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Arguments for a folder with frozen parts alone, taken from a package of random weights."""
    toy.write_vocabularies(package := tmp_path / "tiny")
    randomise(model := LionModel(SIZES))
    for name in ("frozen", "trained"):
        tensors = {k: v for k, v in model.state_dict().items() if (part_of(k) is None) == (name == "frozen")}
        save_file(tensors, package / f"{name}.safetensors")
    (package / "config.json").write_text(replace(SIZES, stage=3).to_json())
    monkeypatch.setattr(ablations, "TINY", package)
    args = argparse.Namespace(out=tmp_path / "out", seeds=0, scenes=2, flags=FLAGS)
    ablations.main(args)
    return args


def test_killed_and_continued(start: argparse.Namespace, tmp_path: Path) -> None:
    """Killed within and between runs, the command alone or with its training; the weights are those of one go."""
    out, seed = start.out, start.out / "seed0"
    assert json.loads((out / "stage-0" / "config.json").read_text())["made_by"] == "stage 0: random"
    assert not (out / "stage-0" / "trained.safetensors").exists()
    command = [sys.executable, "-m", "lion_mini.toy.ablations", "--out", str(out), "--seeds", "1", "--scenes", "2"]
    launch = lambda: subprocess.Popen([*command, *FLAGS], cwd=ROOT, start_new_session=True)
    for moment, kill in (
        ("stage-1/checkpoints/step-00000002.pt", os.killpg),
        ("stage-2/metrics.jsonl", os.kill),
        ("full.json", os.killpg),
    ):
        process = launch()
        while not (seed / moment).exists():
            assert process.poll() is None
            time.sleep(0.01)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    assert launch().wait() == 0
    assert len(list(seed.glob("*.json"))) == len(ablations.MODELS)
    assert "1 of 1 seeds are complete" in (out / "ablations.md").read_text()
    assert Image.open(out / "ablations.png").size == (1200, 700)

    one, two, three = (tmp_path / "whole" / name for name in ("stage-1", "stage-2", "full"))
    for number, init, folder in ((1, [out / "stage-0"], one), (2, [out / "stage-0"], two), (3, [one, two], three)):
        words = ["--stage", number, *FLAGS, "--seed", 0, "--init", *init, "--out", folder]
        assert train.main([str(word) for word in words]) == 0
        assert (folder / "trained.safetensors").read_bytes() == (
            seed / folder.name / "trained.safetensors"
        ).read_bytes()
    with pytest.raises(ValueError, match="stage-1 was not trained by train.py --stage 1 --steps 9 --seed 0"):
        ablations.main(argparse.Namespace(**vars(start) | {"seeds": 1, "flags": ["--steps", "9"]}))


def test_wrong_tags_are_the_next_scenes(start: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a scene is asked twice in a row."""
    lion, scenes, pairs = Lion.from_pretrained(ablations.TINY), [toy.scene(seed, "test") for seed in range(3)], set()
    number = {id(scene.image): i for i, scene in enumerate(scenes)}

    def respond(images: list[Image.Image], *args: Any) -> list[Answer]:
        pairs.update((number[id(image)], *tags) for image, tags in zip(images, args[-1], strict=True))
        return [Answer("yes", "", [], 0.0)] * len(images)

    monkeypatch.setattr(lion, "respond", respond)
    monkeypatch.setattr(lion, "scored_tags", lambda images: [[(number[id(image)], 1.0)] for image in images])
    ask(lion, scenes, tags_of=1)
    assert pairs == {(0, 1), (1, 2), (2, 0)}


def test_what_is_counted() -> None:
    scenes = [toy.scene(seed, "test") for seed in range(2)]  # the second one is held out
    words = render(EVAL_TEMPLATES["rec"], expression="the leftmost circle")
    box = scenes[1].things[0].box.to_text()
    replies = [
        Reply(scenes[0], {"kind": "vqa", "subkind": "counting", "question": "", "answer": "2"}, "2"),
        Reply(scenes[1], {"kind": "vqa", "subkind": "relation", "question": "", "answer": "no"}, "yes"),
        Reply(scenes[1], {"kind": "rec", "subkind": "", "question": words, "answer": box}, box),
    ]
    expected = dict.fromkeys(("counting", "image level, held-in", f"{SPACE}, held-in", "rec", "REC"), 100)
    expected |= dict.fromkeys(("counting, held-in", "rec, held-out", "REC, held-out"), 100)
    expected |= dict.fromkeys(("REC, by order", "REC, by order, held-out"), 100)
    expected |= {"image level": 50, SPACE: 50, "image level, held-out": 0}
    assert percents(replies) == expected | dict.fromkeys(("relation", "relation, held-out", f"{SPACE}, held-out"), 0)
    for name, made in zip(WAYS, (by_attributes, by_order, by_relation), strict=True):
        texts = [text for s in scenes for thing in s.things for text in made(s.things, thing)]
        assert {way(render(EVAL_TEMPLATES["rec"], expression=text)) for text in texts} == {name}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1, 2, 3], "+2.0 ± 0.6, 3 seeds: holds"),
        ([-1, 1, 3], "+1.0 ± 1.2, 3 seeds: does not hold"),
        ([-2, -3], "-2.5 ± 0.5, 2 seeds: does not hold"),
        ([1], "too few seeds to say, 1"),
    ],
)
def test_a_difference_greater_than_its_error_holds(values: list[float], text: str) -> None:
    assert verdict(values) == text


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
    assert "0 of 4 seeds are complete." in lines[1]
