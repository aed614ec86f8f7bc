"""Stage 0 trains the three stand-ins and writes them under LION's own names."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lion_mini import toy
from lion_mini.config import PRESETS, LionConfig
from lion_mini.model.lion import LionModel
from lion_mini.text.tokenizers import UnigramTokenizer
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.toy import labels, stage0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage0.train_stage0(out := tmp_path_factory.mktemp("stage0"), quick=True)
    return out


def test_it_writes_every_frozen_part_and_the_qformer(folder: Path) -> None:
    config = LionConfig.from_json((folder / "config.json").read_text())
    assert config.made_by.startswith("stage 0: ")
    assert replace(config, made_by="") == PRESETS["tiny"]
    expected = LionModel(config).state_dict()
    found = load_file(folder / "model.safetensors")
    frozen = {k for k in expected if k.split(".")[0] in ("vit", "qformer", "t5", "ram") and ".adapters." not in k}
    assert set(found) == frozen
    assert all(found[name].shape == expected[name].shape for name in found)


def test_its_vocabularies_fit(folder: Path) -> None:
    text = Vocabularies.from_folder(folder, config := PRESETS["tiny"])
    assert len(text.words) == config.qformer.vocab_size
    assert len(text.pieces) <= config.t5.vocab_size
    assert text.tags == list(toy.TAGS)
    assert all(0 < threshold < 1 for threshold in text.thresholds)


def test_it_resumes_and_restores_the_random_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Killed after the ViT, it ends with the weights of one go. They depend on the seed alone."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with monkeypatch.context() as patch:
        patch.setattr(stage0, "train_t5", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage0.train_stage0(tmp_path / "out", quick=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out-checkpoints"}
    assert torch.equal(torch.rand(3), expected)
    capsys.readouterr()
    stage0.train_stage0(tmp_path / "out", quick=True)
    assert "vit: step" not in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_one_part_resumes(tmp_path: Path) -> None:
    """Killed between two checkpoints, which hold weights, optimizer and step. The losses draw from both generators."""

    def train(folder: Path, fatal: int) -> tuple[list[torch.Tensor], int]:
        model, calls = torch.nn.Linear(3, 2), 0
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)

        def loss(draw: random.Random) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return model(torch.randn(4, 3)).square().mean() * draw.random() * (1 // (calls != fatal))

        stage0.Training(folder, "vit", 0, 260, 1e-2).run(model, loss)
        return [*model.state_dict().values()], calls

    (tmp_path / "one").mkdir()
    whole, calls = train(tmp_path / "one", 0)
    assert calls == 260
    (tmp_path / "two").mkdir()
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "two", 256)
    resumed, calls = train(tmp_path / "two", 0)
    assert calls == 10
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_a_patch_belongs_to_the_thing_that_covers_most_of_it() -> None:
    scenes = [toy.scene(seed, "train") for seed in range(30)]
    spans = [{*range(i * 32 // 6, -(-(i + 1) * 32 // 6))} for i in range(6)]  # in grid units
    for scene, fields in zip(scenes, labels.patch_labels(scenes, 6).tolist(), strict=True):
        for at, field in enumerate(fields):
            y, x = (spans[i] for i in divmod(at, 6))
            sides = [({*range(t.left, t.left + t.side)}, {*range(t.top, t.top + t.side)}) for t in scene.things]
            areas = [len(x & columns) * len(y & rows) for columns, rows in sides]
            most = [labels.facts(t) for t, area in zip(scene.things, areas, strict=True) if area == max(areas)]
            assert field in (most if max(areas) else [[4, *[-100] * 8]])
    assert labels.facts(scenes[1].things[2]) == [0, 3, 1, 1, 0, 1, 11, 10, 20]  # a large yellow circle on the left


def test_one_hot() -> None:
    assert labels.one_hot(torch.tensor([[1, -100], [0, 2]]), (2, 3)).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is the ground?", []), ("How many circles are there?", [2, 5, 6]), ("Is yellow in a circle?", [2, 5, 6]),
        ("How many red shapes are there?", [0, 1]), ("What colour is the small cross? black", [3]),
        ("Is the red square above the black circle? no", [0, 5]), ("Is there a green cross in the image?", []),
        ("Ask for yes. Is there a black cross in the image?", [3]), ("What is at [0,0,1,1]? a yellow circle", [2]),
        ("What shape is the yellow shape? circle", [2]),
    ],
)  # fmt: skip
def test_what_a_question_is_about(text: str, found: list[int]) -> None:
    """The Q-Former's queries show the things that are mentioned, in reading order, and nothing else."""
    things, background = toy.scene(1, "train").things, [4, *[-100] * 4]
    names = "red square, red cross, yellow circle, black cross, green square, black circle, green circle"
    assert ", ".join(thing.name for thing in things) == names
    question, _, answer = text.partition("? ")
    rows = labels.asked_labels(things, {"question": f"{question}?", "answer": answer}, 3)
    assert rows == [*(labels.facts(things[i])[:5] for i in found), *[background] * 3][:3]
    assert labels.asked_labels(things, {"question": "How many shapes?", "answer": ""}, 3) == [background] * 3


def test_what_words_mean(folder: Path) -> None:
    """By hand, of the things in scene(7): what each noun of a question refers to, and how many things it fits."""
    things = toy.scene(7, "train").things
    pieces = UnigramTokenizer.from_file(folder / "tokenizer.json")

    def known(question: str, answer: str = "") -> dict[str, list[int]]:
        rows = labels.noun_labels(pieces, question, {"question": question, "answer": answer}, things)
        words = [pieces.decode([piece]).strip() for piece in pieces.encode(question)]
        return {word: row for word, row in zip(words, rows, strict=True) if row != [-100] * 10}

    circle, square = [0, 0, 0, 0, 2, 23, 6, 27, 10], [1, 1, 0, 0, 1, 12, 5, 17, 10]  # a red and a green one
    assert known("Is the green square left of the red circle?") == {"square": [*square, 1], "circle": [*circle, 1]}
    assert known("How many red shapes are there?") == {"shapes": [*[-100] * 9, 2]}
    assert known("What is at [0.719,0.188,0.844,0.312]?") == {"0.312": [*circle, -100]}
    assert known("Where is the topmost small shape?", things[1].box.to_text()) == {"shape": [*square, 5]}
    question = {"question": "the green square", "answer": ""}
    *tags, word, end = labels.noun_labels(pieces, "square, red, sand. the green square", question, things)
    assert all(row == [-100] * 10 for row in (*tags, end))  # no label for the tags before it and the </s> after it
    assert word == [*square, 1]


def test_tags_are_shuffled() -> None:
    record = {"question": "Where is the large cross?", "tags": "cross, red, small, large"}
    prompts = {stage0.prompt(record, True, random.Random(seed)) for seed in range(200)}
    assert len(prompts) == 24
    for prompt in prompts:
        tags, question = prompt.split("following tags: [")[1].split("]. ")
        assert (sorted(tags.split(", ")), question) == (["cross", "large", "red", "small"], record["question"])
    assert stage0.prompt(record, False, random.Random(0)) == record["question"]


def test_ignored_fields_have_no_gradient() -> None:
    fields = (3, 2)
    logits = torch.randn(4, 5, requires_grad=True)
    wanted = torch.tensor([[0, -100], [2, -100], [-100, -100], [-100, 1]])
    labels.field_loss(logits, wanted, fields).backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [[True] * 3 + [False] * 2] * 2 + [[False] * 5, [False] * 3 + [True] * 2]
