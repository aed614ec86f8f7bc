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
    assert replace(config, made_by="", instructions={}) == PRESETS["tiny"]
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


def test_it_restores_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stage0.train_stage0(tmp_path, quick=True)
    assert torch.equal(torch.rand(3), expected)


def test_the_projector_is_initialised_the_same_in_every_run(folder: Path) -> None:
    """At full size: on two threads, `torch.linalg.lstsq` gave other bits in every run."""
    config, generator = PRESETS["tiny"], torch.Generator().manual_seed(0)
    scenes = [toy.scene(seed, "train") for seed in range(20)]
    _, patches = labels.patch_labels(scenes, 6)
    features = torch.randn(2000, 37, config.vit.width, generator=generator).bfloat16()
    pieces, runs = UnigramTokenizer.from_file(folder / "tokenizer.json"), []
    for _ in range(3):
        torch.manual_seed(0)
        reader = stage0.Reader(pieces)
        stage0.start_from_words(reader, features, patches.repeat(100, 1, 1))
        runs.append([weight.clone() for weight in reader.projector.parameters()])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    linear = reader.projector[1]
    assert isinstance(linear, torch.nn.Linear)
    assert linear.weight.norm() < 100  # the direction that LayerNorm leaves empty does not explode


def test_the_projector_starts_at_the_words_for_a_patch(folder: Path) -> None:
    """If tokens differ by shape, each is mapped closer to the embedding of its shape's name than to another's."""
    config, pieces = PRESETS["tiny"], UnigramTokenizer.from_file(folder / "tokenizer.json")
    scenes = [toy.scene(seed, "train") for seed in range(100)]
    _, patches = labels.patch_labels(scenes, 6)
    torch.manual_seed(0)
    tokens = torch.randn(len(toy.SHAPES) + 1, config.vit.width)[patches[..., 0]]
    reader = stage0.Reader(pieces)
    stage0.start_from_words(reader, torch.cat((tokens[:, :1], tokens), dim=1), patches)
    shape = patches[..., 0]
    names = reader.t5.shared.weight[[pieces.encode(word)[0] for word in toy.SHAPES]]
    nearest = (reader.projector(tokens) @ names.T).argmax(-1)
    assert torch.equal(nearest[shape < len(names)], shape[shape < len(names)])


def test_the_tag_loss_is_asymmetric() -> None:
    """A confident true negative costs nothing, a false positive less than a missed tag; all are finite."""
    logits = torch.tensor([[-5.0], [1.0], [-1.0], [100.0]])
    wanted = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    sure, wrong, missed, extreme = (
        labels.tag_loss(a[None], b[None]).item() for a, b in zip(logits, wanted, strict=True)
    )
    assert sure == 0 < wrong < missed
    assert extreme < 20


def test_a_patch_belongs_to_the_thing_on_it() -> None:
    scene = toy.scene(0, "train")
    owner = labels.patch_labels([scene], 6)[0].reshape(6, 6).numpy()
    for i, thing in enumerate(scene.things):
        rows, columns = (owner == i).nonzero()
        assert rows.min() * 4 >= thing.top - 3
        assert (rows.max() + 1) * 4 <= thing.top + thing.side + 3
        assert columns.min() * 4 >= thing.left - 3
        assert (columns.max() + 1) * 4 <= thing.left + thing.side + 3


def test_a_glimpse_of_few_has_one_token_per_thing() -> None:
    owner = torch.tensor([-1, 0, 0, 1, -1, -1, 2, 2, -1, -1])
    chosen = stage0.glimpse(owner, few=True, tokens=6)
    assert sorted(owner[chosen[chosen > 0] - 1].tolist())[-3:] == [0, 1, 2]
    assert len(chosen) == 6
    assert sorted(stage0.glimpse(owner, few=False, tokens=6).tolist()) == list(range(11))


def test_what_words_mean(folder: Path) -> None:
    """By hand: scene(5) has a small red cross at the bottom left and a large red triangle right of it."""
    cross, triangle = toy.scene(5, "train").things
    pieces = UnigramTokenizer.from_file(folder / "tokenizer.json")

    def known(question: str, answer: str = "") -> dict[str, list[float]]:
        rows = labels.word_labels(pieces, question, {"question": question, "answer": answer}, (cross, triangle))
        words = [pieces.decode([piece]).strip() for piece in pieces.encode(question)]
        return {word: row for word, row in zip(words, rows, strict=True) if row != labels.UNKNOWN}

    box, unknown = [1, 19, 5, 23], [-100] * 3
    assert known("Is the red cross right of the red triangle?") == {
        "cross": [3, 0, 0, *box, 1, -0.75, 0.75, *unknown],
        "right": [*[-100] * 10, *map(pytest.approx, (-2 / 3, 1 / 12, -2 / 3))],
        "triangle": [2, 0, 1, 7, 16, 15, 24, 1, *map(pytest.approx, (-1 / 12, 2 / 3)), *unknown],
    }
    assert known("How many red shapes are there?") == {"shapes": [*[-100] * 7, 2, -100, -100, *unknown]}
    assert known("What is at [0.042,0.792,0.208,0.958]?") == {"0.958": [3, 0, 0, *box, -100, -0.75, 0.75, *unknown]}
    assert known("Where is the leftmost shape?", cross.box.to_text())["shape"][:8] == [3, 0, 0, *box, 2]
    question = {"question": "the cross", "answer": ""}
    *tags, word, end = labels.word_labels(pieces, "cross, red, small. the cross", question, (cross, triangle))
    assert all(row == labels.UNKNOWN for row in (*tags, end))  # no label for the tags before it and the </s> after it
    assert word[0] == 3


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
