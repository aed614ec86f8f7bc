"""Records and their order: what is refused, what is augmented, and that the order is a function of the seed alone."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lion_mini import Lion, toy
from lion_mini.data.mixture import MicroBatches, Mixture, Samples, collate, micro_batches
from lion_mini.data.records import Records, check_record
from lion_mini.images import lion_transform
from lion_mini.toy.training import Toy

BOTH = ("image", "region")
REGION = {"image": "0.png", "question": "where is the dog?", "answer": "[0.100,0.200,0.300,0.400]", "category": "REF"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        noise = random.Random(i).randbytes(3 * 40 * 30)
        Image.frombytes("RGB", (40, 30), noise).save(tmp_path / f"{i}.png")
    return tmp_path


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records, indent=1))
    return path


def numbered(folder: Path, name: str, count: int, **more: Any) -> Records:
    records = [{"image": f"{i % 10}.png", "question": f"question {i}", "answer": str(i), **more} for i in range(count)]
    return Records(write(folder / name, records), folder, BOTH)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"image": "a.jpg"}, {"image": "a.jpg", "answer": "", "tags": None, "task": "image"}),
        ({"image": "", "image_path": "b.jpg"}, {"image": "b.jpg"}),
        ({"image_id": "c.jpg", "image_path": None}, {"image": "c.jpg"}),
        ({"image": "a", "answer": ["first", "second"]}, {"answer": "first"}),
        ({"image": "a", "answer": []}, {"answer": ""}),
        ({"image": "a", "tags": "dog, traffic light"}, {"tags": ["dog", "traffic light"]}),
        ({"image": "a", "tags": "dog | traffic light"}, {"tags": ["dog", "traffic light"]}),  # as RAM joins them
        ({"image": "a", "tags": "dog,cat,"}, {"tags": ["dog", "cat"]}),
        ({"image": "a", "tags": ["dog"]}, {"tags": ["dog"]}),
        ({"image": "a", "tags": []}, {"tags": []}),
        ({"image": "a", "category": " Region_Level "}, {"task": "region"}),
        ({"image": "a", "category": "grounding"}, {"task": "region"}),
        ({"image": "a", "category": "region"}, {"task": "region"}),
        ({"image": "a", "category": "ref"}, {"task": "region"}),
        ({"image": "a", "category": "norm"}, {"task": "image"}),
        ({"image": "a", "category": None}, {"task": "image"}),
        ({"image": "a", "category": "image_level", "answer": "[0.9,0.1,0.2]"}, {"task": "image"}),
        (REGION | {"question": "what is in [0.000, 0.1, 1.0, .5]?"}, {"task": "region"}),
    ],
)
def test_the_releases_records(record: dict[str, Any], expected: dict[str, Any]) -> None:
    found = check_record({"question": "what is it?"} | record)
    assert found["question"]
    assert {key: found[key] for key in expected} == expected


BAD = [
    ("text", "a record must be an object"),
    ({"question": "what?"}, "its image path must be text, found None"),
    ({"image_id": 42, "question": "what?"}, "its image path must be text, found 42"),
    ({"image": ["0.png"], "question": "what?"}, "its image path must be text, found ['0.png']"),
    ({"image": "0.png", "answer": "a"}, "it has no question"),
    ({"image": "0.png", "question": "  "}, "it has no question"),
    ({"image": "0.png", "question": "what is <extra_id_0>?"}, "must not hold <extra_id_0>"),
    (
        {"image": "0.png", "question": "word " * 40_000},
        "has over 4,000 characters",
    ),
    ({"image": "0.png", "question": "what?", "tags": [f"tag {i}" for i in range(4585)]}, "its answer over 8,000"),
    ({"image": "0.png", "question": "what?", "answer": "x" * 800_000}, "its answer over 8,000"),
    ({"image": "0.png", "question": "what?", "answer": {"a": 1}}, "its answer must be text"),
    ({"image": "0.png", "question": "what?", "tags": [1]}, "its tag must be text, found 1"),
    ({"image": "0.png", "question": "what?", "tags": ["a", "<extra_id_0>"]}, "tags must not hold <extra_id_0>"),
    ({"image": "0.png", "question": "what?", "tags": "a, <extra_id_0>"}, "tags must not hold <extra_id_0>"),
    ({"image": "0.png", "question": "what?", "category": "regoin_level"}, "'regoin_level' is none of region_level"),
    (REGION | {"answer": "[0.5,0.2,0.3,0.4]"}, "is no box"),
    (REGION | {"answer": "[10,20,300,400]"}, "is no box"),
    (REGION | {"question": "what is in [0.1,0.2,0.3]?"}, "is no box"),
    (REGION | {"answer": "[0.1,0.2,NaN,0.4]"}, "is no box"),
    (REGION | {"answer": "[0.1,0.2,0.3,-inf]"}, "is no box"),
    ({"image": "missing.png", "question": "what?"}, "missing.png: No such file"),
    ({"image": "long" * 99, "question": "what?"}, "File name too long"),
    ({"image": "broken.png", "question": "what?"}, "broken.png"),
]


def test_each_bad_record_is_one_sentence_with_its_place(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    good = {"image": "0.png", "question": "what?", "answer": "a dog"}
    for name in ("bad.json", "bad.jsonl"):
        source = Records(write(folder / name, [*(record for record, _ in BAD), good]), folder, BOTH)
        [(_, batch)] = micro_batches(MicroBatches(Mixture([source], None, seed=1), len(source), 28), [0], workers=0)
        assert batch.questions == ["what?"] * len(source) == ["what?"] * len(batch.pixels)  # full of the good record
        for i, (_, words) in enumerate(BAD, 1):
            (sentence,) = {line for line in batch.bad if line.startswith(f"{folder / name}, record {i}: ")}
            assert words in sentence
            assert "\n" not in sentence


def test_only_bad_records_end_the_run(folder: Path) -> None:
    for count, words in ((3, "3 records in a row"), (101, "100 records in a row")):
        batches = MicroBatches(Mixture([numbered(folder, "a.jsonl", count, category="none")], None, seed=1), 2, 28)
        with pytest.raises(ValueError, match=f"{words} cannot be used: .*a.jsonl, record .*'none' is none of"):
            next(micro_batches(batches, range(9), workers=0))


def test_a_line_that_is_no_json_costs_only_itself(folder: Path) -> None:
    good = json.dumps({"image": "0.png", "question": "what?"})
    deep = '{"image": ' + "[" * 100_000
    (folder / "a.jsonl").write_text(f"\n{good}\n\n{{oops\r\n{good}\n{deep}")
    source = Records(folder / "a.jsonl", folder, BOTH)
    assert len(source) == 4
    assert source.read(2, random.Random()).question == "what?"
    for index, words in ((1, "record 2: it is not whole JSON"), (3, "record 4: it is nested too deeply")):
        with pytest.raises(ValueError, match=words):
            source.read(index, random.Random())


def test_several_roots(folder: Path, tmp_path: Path) -> None:
    """A name that two roots have is refused, unless their pictures are the same."""
    for name, number in (("more/new.gif", 1), ("more/3.png", 3), ("more/4.png", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / f"{number}.png").read_bytes())
    records = [{"image": image, "question": "what?"} for image in ("0.png", "new.jpg", "3.png", "4.png", "more/4.png")]
    source = Records(write(tmp_path / "a.json", records), [folder, folder / "more"])
    assert all(source.read(i, random.Random()).question for i in (0, 1, 2, 4))
    with pytest.raises(ValueError, match=r"a\.json, record 4: the image 4\.png may be .*: name the right folder"):
        source.read(3, random.Random())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no record"),
        ("[]", "no record"),
        ("[1,", "not whole JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("<!DOCTYPE html>\n<html>", "it is a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ],
    ids=["empty", "no record", "torn", "deep", "web page", "pointer"],
)
def test_a_file_without_records_stops_at_once(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Records(tmp_path / "a.json", tmp_path, BOTH)
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        Records(tmp_path / "none.json", tmp_path, BOTH)


def test_a_stage_refuses_the_other_level(folder: Path) -> None:
    source = Records(write(folder / "a.json", [REGION]), folder, ("image",))
    with pytest.raises(ValueError, match="is region-level, which this stage does not train"):
        source.read(0, random.Random())


def test_list_and_lines_are_the_same_records(folder: Path) -> None:
    lines, whole = (numbered(folder, name, 12) for name in ("a.jsonl", "a.json"))
    for i in range(12):
        for example in (source.read(i, random.Random()) for source in (lines, whole)):
            assert (example.question, example.answer) == (f"question {i}", str(i))
    for source in (lines, whole):  # as some editors begin a text
        source.path.write_bytes(b"\xef\xbb\xbf" + source.path.read_bytes())
        assert [json.loads(Records(source.path, folder, BOTH).line(i)) for i in range(12)] == whole.whole


# --- order


def test_an_epoch_is_every_record_once(folder: Path) -> None:
    mixture = Mixture([numbered(folder, "a.json", 7), numbered(folder, "b.jsonl", 13)], None, seed=3)
    epochs = [[mixture.at(epoch * 20 + i) for i in range(20)] for epoch in range(3)]
    everything = sorted([(0, i) for i in range(7)] + [(1, i) for i in range(13)])
    for number, epoch in enumerate(epochs):
        assert {found[0] for found in epoch} == {number}
        assert sorted(found[1:] for found in epoch) == everything
    assert [f[1:] for f in epochs[0]] != [f[1:] for f in epochs[1]]


def test_the_order_is_a_function_of_seed_and_position(folder: Path) -> None:
    sources = [numbered(folder, "a.json", 7), numbered(folder, "b.jsonl", 13)]
    forward = Mixture(sources, [1, 3], seed=3)
    found = {p: forward.at(p) for p in range(100)}
    backward = Mixture(sources, [1, 3], seed=3)
    assert all(backward.at(p) == found[p] for p in reversed(range(100)))
    assert any(Mixture(sources, [1, 3], seed=4).at(p) != found[p] for p in range(10))


def test_ratios(folder: Path) -> None:
    mixture = Mixture([numbered(folder, "a.json", 3), numbered(folder, "b.jsonl", 30)], [1, 1], seed=0)
    found = [mixture.at(p) for p in range(10 * 33)]
    drawn = [[index for _, source, index in found if source == number] for number in range(2)]
    assert abs(len(drawn[0]) - len(drawn[1])) <= 1
    for size, indices in zip((3, 30), drawn, strict=True):  # each goes through its records evenly, epoch after epoch
        counts = [indices.count(i) for i in range(size)]
        assert max(counts) - min(counts) <= 1
    for ratios in ([1], [1, 0], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="ratios must be 2 numbers above 0"):
            Mixture(mixture.sources, ratios, seed=0)


@pytest.mark.parametrize(("processes", "size"), [(1, 4), (1, 2), (2, 2), (4, 1)])
def test_processes_share_an_epoch_without_gap_or_overlap(folder: Path, processes: int, size: int) -> None:
    micro = MicroBatches(Mixture([numbered(folder, "a.jsonl", 24)], None, seed=5), size, 28)
    shares = [micro_batches(micro, range(rank, 24 // size, processes), workers=0) for rank in range(processes)]
    seen = [int(answer) for share in shares for _, batch in share for answer in batch.answers]
    assert sorted(seen) == list(range(24))


def test_workers_change_nothing(folder: Path) -> None:
    micro = MicroBatches(Mixture([numbered(folder, "a.jsonl", 24)], None, seed=5), 4, 28)
    alone, helped = (list(micro_batches(micro, range(1, 6, 2), workers)) for workers in (0, 2))
    assert [(n, batch.names) for n, batch in alone] == [(n, batch.names) for n, batch in helped]
    assert all(torch.equal(a.pixels, b.pixels) for (_, a), (_, b) in zip(alone, helped, strict=True))


def test_only_image_level_is_augmented(folder: Path) -> None:
    plain = {f"question {i}": lion_transform(Image.open(folder / f"{i}.png"), 28) for i in range(10)}
    sources = [numbered(folder, "a.json", 10, category=level) for level in ("image_level", "region_level")]
    both = (MicroBatches(Mixture([source], None, seed=0), 10, 28) for source in sources)
    image, region = ([batch for _, batch in micro_batches(each, [0, 1, 0], workers=0)] for each in both)
    for name, pixels in zip(region[0].questions, region[0].pixels, strict=True):
        assert torch.equal(pixels, plain[name])
    assert not any(torch.equal(p, plain[name]) for name, p in zip(image[0].questions, image[0].pixels, strict=True))
    assert torch.equal(image[0].pixels, image[2].pixels)
    again = dict(zip(image[1].questions, image[1].pixels, strict=True))
    assert not any(torch.equal(again[name], p) for name, p in zip(image[0].questions, image[0].pixels, strict=True))


# --- the toy world as a source


def test_toy_source() -> None:
    image, region = Toy(("image",)), Toy(("region",))
    asked = [image.read(i, random.Random(i)) for i in range(120)]
    assert {example.task for example in asked} == {"image"}
    assert {example.task for example in (region.read(i, random.Random(i)) for i in range(5))} == {"region"}
    existence = {e.answer for e in asked if "Is there a" in e.question and "question" not in e.answer}
    assert existence >= {"yes", "no"}
    again = image.read(3, random.Random(3))
    assert (again.question, again.answer, again.tags) == (asked[3].question, asked[3].answer, asked[3].tags)
    assert Toy(("image",), "test").read(3, random.Random(3)).image.tobytes() != asked[3].image.tobytes()
    batch = MicroBatches(Mixture([image], None, 0), 8, 48)[0]
    assert isinstance(batch, Samples)
    for name, pixels in zip(batch.names, batch.pixels, strict=True):  # not mirrored: left and right have names
        number = int(name.split()[2])
        assert torch.equal(pixels, lion_transform(toy.scene(number, "train").image, 48))


def test_ram_tags_the_whole_picture_of_samples_without_tags(tmp_path: Path) -> None:
    lion, image = Lion.from_pretrained("tiny"), toy.scene(3, "test").image
    image.save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "what is it?", "answer": "red"}
    (tmp_path / "r.json").write_text(json.dumps([record, record | {"tags": ["cross"]}]))
    samples: Any = MicroBatches(Mixture([Records(tmp_path / "r.json", tmp_path)], None, 0), 2, 48, 96)[0]
    batch = collate(lion, samples)
    prompts = [lion.text.pieces.decode(row) for row in batch.prompt.tolist()]
    tagged: Any = lion.tag([image])[0]
    wanted = [", ".join(tagged) if tags is None else "cross" for tags in samples.tags]
    assert len(set(wanted)) == 2
    assert all(f"[{tags}]" in prompt for tags, prompt in zip(wanted, prompts, strict=True)), prompts
