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


def test_it_writes_every_frozen_part(folder: Path) -> None:
    config = LionConfig.from_json((folder / "config.json").read_text())
    assert config.made_by.startswith("stage 0: ")
    assert replace(config, made_by="") == PRESETS["tiny"]
    expected = LionModel(config).state_dict()
    found = load_file(folder / "model.safetensors")
    frozen = {k for k in expected if k.split(".")[0] in ("vit", "t5", "ram") and ".adapters." not in k}
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
    assert "vit" not in capsys.readouterr().err
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


def test_the_projector_is_initialised_the_same_in_every_run(folder: Path) -> None:
    """At full size: on two threads, `torch.linalg.lstsq` gave other bits in every run."""
    config, generator = PRESETS["tiny"], torch.Generator().manual_seed(0)
    scenes = [toy.scene(seed, "train") for seed in range(20)]
    _, patches = labels.patch_labels(scenes, 6)
    features = torch.randn(2000, 37, 2 * config.vit.width, generator=generator).bfloat16()
    pieces, runs = UnigramTokenizer.from_file(folder / "tokenizer.json"), []
    for _ in range(3):
        torch.manual_seed(0)
        reader = stage0.Reader()
        stage0.start_from_words(reader, pieces, features, patches.repeat(100, 1, 1))
        runs.append([weight.clone() for part in (reader.few, reader.all) for weight in part.parameters()])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    for _, linear in (reader.few, reader.all):
        assert isinstance(linear, torch.nn.Linear)
        assert linear.weight.norm() < 100  # the direction that LayerNorm leaves empty does not explode


def test_the_projectors_start_at_the_words_for_a_patch(folder: Path) -> None:
    """If tokens differ by shape, each is mapped closer to the embedding of its shape's name than to another's."""
    config, pieces = PRESETS["tiny"], UnigramTokenizer.from_file(folder / "tokenizer.json")
    scenes = [toy.scene(seed, "train") for seed in range(100)]
    _, patches = labels.patch_labels(scenes, 6)
    torch.manual_seed(0)
    tokens = torch.randn(len(toy.SHAPES) + 1, 2 * config.vit.width)[patches[..., 0]]
    reader = stage0.Reader()
    stage0.start_from_words(reader, pieces, torch.cat((tokens[:, :1], tokens), dim=1), patches)
    shape = patches[..., 0]
    names = reader.t5.shared.weight[[pieces.encode(word)[0] for word in toy.SHAPES]]
    for projector, seen in ((reader.few, tokens[..., : config.vit.width]), (reader.all, tokens)):
        nearest = (projector(seen) @ names.T).argmax(-1)
        assert torch.equal(nearest[shape < len(names)], shape[shape < len(names)])


def test_a_patch_belongs_to_the_thing_that_covers_most_of_it() -> None:
    scenes = [toy.scene(seed, "train") for seed in range(30)]
    spans = [{*range(i * 32 // 6, -(-(i + 1) * 32 // 6))} for i in range(6)]  # in grid units
    for scene, owners, fields in zip(scenes, *labels.patch_labels(scenes, 6), strict=True):
        for at, (owner, field) in enumerate(zip(owners.tolist(), fields.tolist(), strict=True)):
            y, x = (spans[i] for i in divmod(at, 6))
            sides = [({*range(t.left, t.left + t.side)}, {*range(t.top, t.top + t.side)}) for t in scene.things]
            areas = [len(x & columns) * len(y & rows) for columns, rows in sides]
            assert max(areas) == (areas[owner] if owner >= 0 else 0)
            assert field == (labels.facts(scene.things[owner]) if owner >= 0 else [4, *[-100] * 8])
    assert labels.facts(scenes[0].things[0]) == [0, 3, 0, 0, 2, 24, 3, 29, 8]  # a small yellow circle at the top right


def test_one_hot() -> None:
    assert labels.one_hot(torch.tensor([[1, -100], [0, 2]]), (2, 3)).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is the ground?", []), ("How many circles are there?", [1, 5]), ("Is there yellow in a circle?", [1, 5]),
        ("How many yellow shapes are there?", [0, 1, 3]), ("What colour is the small cross? yellow", [0]),
        ("Is the red circle above the green triangle? no", [2, 5]), ("Is there a green circle in the image?", []),
        ("Ask for yes. Is there a blue triangle in the image?", [4]), ("What is at [0,0,1,1]? a yellow triangle", [3]),
    ],
)  # fmt: skip
def test_a_glimpse_holds_what_is_mentioned(text: str, found: list[int]) -> None:
    """One token of each mentioned thing; the rest are of other things, then of the background."""
    scene, queries = toy.scene(1, "train"), PRESETS["tiny"].qformer.queries
    names = ["yellow cross", "yellow circle", "green triangle", "yellow triangle", "blue triangle", "red circle"]
    assert [thing.name for thing in scene.things] == names
    assert labels.mentioned(scene.things, text) == found
    owner = labels.patch_labels([scene], 6)[0][0].tolist()
    for seed in range(30):
        question, _, answer = text.partition("? ")
        record = {"question": f"{question}?", "answer": answer}
        chosen = labels.glimpse(owner, scene.things, record, 4, random.Random(seed))
        assert len(chosen) == len({owner[token - 1] for token in chosen} - {-1}) == queries == 4
        assert {owner[token - 1] for token in chosen} >= {*found}
        alone = labels.glimpse([0 if i == 5 else -1 for i in owner], scene.things[5:], record, 4, random.Random(seed))
        assert sorted(owner[token - 1] == 5 for token in alone) == [False] * 3 + [True]


def test_what_words_mean(folder: Path) -> None:
    """By hand: scene(7) has a large red circle at the bottom left and a small red triangle right of it."""
    things = toy.scene(7, "train").things
    pieces = UnigramTokenizer.from_file(folder / "tokenizer.json")

    def known(question: str, answer: str = "") -> dict[str, list[float]]:
        rows = labels.word_labels(pieces, question, {"question": question, "answer": answer}, things)
        words = [pieces.decode([piece]).strip() for piece in pieces.encode(question)]
        return {word: row for word, row in zip(words, rows, strict=True) if row != labels.UNKNOWN}

    circle, triangle, unknown = [0, 0, 1, 2, 0, 1, 23, 10, 32], [2, 0, 0, 2, 1, 15, 23, 20, 28], [-100] * 3
    assert known("Is the red triangle right of the red circle?") == {
        "triangle": [*triangle, 1, 0.09375, 0.59375, *unknown],
        "right": [*[-100] * 12, 0.75, -0.125, 0.75],
        "circle": [*circle, 1, -0.65625, 0.71875, *unknown],
    }
    assert known("Is the red circle left of the red triangle?")["left"][-3:] == [-0.75, 0.125, 0.75]
    assert known("How many red shapes are there?") == {"shapes": [*[-100] * 9, 2, -100, -100, *unknown]}
    box = "What is at [0.469,0.719,0.625,0.875]?"
    assert known(box) == {"0.875": [*triangle, -100, 0.09375, 0.59375, *unknown]}
    assert known("Where is the leftmost shape?", things[1].box.to_text())["shape"][:10] == [*circle, 3]
    question = {"question": "the triangle", "answer": ""}
    *tags, word, end = labels.word_labels(pieces, "triangle, red, sand. the triangle", question, things)
    assert all(row == labels.UNKNOWN for row in (*tags, end))  # no label for the tags before it and the </s> after it
    assert word[:9] == triangle


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
