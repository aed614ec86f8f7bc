"""What the README says is so."""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import lion_mini
from lion_mini.training.stages import STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_in_the_first_screen() -> None:
    first = "\n".join(README.splitlines()[:25])
    assert "pip install -e . && python infer.py" in first
    assert "pip install -e '.[test]' && pytest" in first


def test_short_and_plain() -> None:
    """At most 12 kB; half of the sentences have at most 18 words."""
    assert len(README.encode()) <= 12_000
    prose = re.sub(r"^(\||#|!\[|    ).*|`[^`]*`", "x", re.sub(r"```.*?```", "", README, flags=re.S), flags=re.M)
    lengths = [len(sentence.split()) for sentence in re.split(r"[.:!?]\s", prose) if len(sentence.split()) > 2]
    assert statistics.median(lengths) <= 18


def stage_row(number: int) -> str:
    stage = STAGES[number]
    rates = f"{stage.lr:g} → {stage.floor:g}" + "".join(f"; {part} {lr:g}" for part, lr in stage.constant.items())
    tasks = " and ".join(stage.tasks)
    return f"| {number} | {', '.join(stage.trains)} | {tasks} | {stage.batch} | {stage.steps:,} | {rates} |"


def test_recipes() -> None:
    for number in STAGES:
        assert stage_row(number) in README


def test_files_that_are_named_exist() -> None:
    for name in set(re.findall(r"`((?:lion_mini|tests)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["caption", "answer", "locate", "describe", "tag", "generate", "rank"])
def test_methods_of_the_example(name: str) -> None:
    assert f"lion.{name}(" in README
    assert callable(getattr(lion_mini.Lion, name))


def test_the_example_of_attention_runs(tmp_path: Path) -> None:
    """The block of model/README.md that takes the Q-Former's attention weights over a picture."""
    text = (ROOT / "lion_mini" / "model" / "README.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if ".record" in block]
    (tmp_path / "example.py").write_text(block)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("torch.Size([1, 4, 3, 37])\n"), done.stderr
