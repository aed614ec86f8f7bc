"""The ablations: what they count, what they conclude, and that nothing but the flags decides the result."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, randomise
from PIL import Image
from safetensors.torch import save_file

import train
from lion_mini import Lion, toy
from lion_mini.config import PRESETS, QFormerConfig, T5Config, VitConfig
from lion_mini.model.lion import LionModel
from lion_mini.toy import ablations, scores
from lion_mini.toy.questions import by_attributes, by_order, by_relation
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
        ("no-aggregator/config.json", os.killpg),
        ("full/checkpoints/step-00000001.pt", os.kill),
        ("full-wrong.json", os.killpg),
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
        assert (folder / "trained.safetensors").read_bytes() == (seed / folder.name / "trained.safetensors").read_bytes()
    with pytest.raises(ValueError, match="stage-1 was not trained by train.py --stage 1 --steps 9 --seed 0"):
        ablations.main(argparse.Namespace(**vars(start) | {"seeds": 1, "flags": ["--steps", "9"]}))


def test_wrong_tags_are_the_next_scenes(start: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pictures: also where a scene is asked twice in a row."""
    ...


def test_what_is_counted() -> None:
    things = toy.scene(0, "test").things
    rng = random.Random(0)
    for place, made in enumerate((by_attributes, by_order, by_relation)):
        ...
