"""What the README says is so."""

import itertools
import re
from pathlib import Path

import pytest
from conftest import ROOT

import lion_mini
from lion_mini.stages import STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_lines_of_every_file() -> None:
    rows = re.findall(r"^\| .* \| `(\S+\.py)` \| (\d+) \|$", README, re.M)
    assert len(rows) > 10
    told = {name: int(lines) for name, lines in rows}
    found = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in told}
    assert told == found


def test_the_two_commands_stand_in_the_first_screen() -> None:
    first = "\n".join(README.splitlines()[:15])
    assert "pip install -e . && python infer.py" in first
    assert "pip install -e '.[test]' && pytest" in first


def test_reading_order() -> None:
    """The order that the README gives is the one at the foot of each file's docstring."""
    found = re.search(r"`(vit → .* → train)`", README)
    assert found
    names = found[1].split(" → ")
    for name, following in itertools.pairwise(names):
        text = (ROOT / "lion_mini" / f"{name}.py").read_text(encoding="utf-8")
        assert f"next: {following}.py" in text.split('"""')[1], name


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
    assert f"model.{name}(" in README
    assert callable(getattr(lion_mini.Lion, name))


def test_component_files_know_only_what_they_may() -> None:
    """A component imports config, layers and bert; only lion.py composes."""
    allowed = {"config", "layers", "bert"}
    more = {"t5": {"adapters"}, "ram": {"swin"}, "generate": {"t5"}}
    for name in ("vit", "bert", "qformer", "aggregator", "adapters", "t5", "generate", "swin", "ram"):
        text = Path(ROOT / "lion_mini" / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^from \.(\w+) import", text, re.M))
        assert imported <= allowed | more.get(name, set()), name
